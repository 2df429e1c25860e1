"""`python -m bnnmcmc` is `bnnmcmc`."""

from bnnmcmc.cli import main

if __name__ == "__main__":
    main()
