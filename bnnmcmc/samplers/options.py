"""Checks of the options that several kernels share."""

from bnnmcmc.errors import InputError


def check_positive(**options: float) -> None:
    """Raise InputError if one of the named options is not more than zero (NaN is not)."""
    for name, value in options.items():
        if not value > 0:
            raise InputError(f"sampler.{name}: found {value}, expected more than 0")


def check_acceptance(target_acceptance: float) -> None:
    """Raise InputError if it is no acceptance rate to aim at."""
    if not 0 < target_acceptance < 1:
        raise InputError(
            f"sampler.target_acceptance: found {target_acceptance}, expected between 0 and 1"
        )


def check_jitter(jitter: float) -> None:
    """Raise InputError if it is no relative half-width of a number of steps."""
    if not 0 <= jitter < 1:
        raise InputError(f"sampler.jitter: found {jitter}, expected 0 <= jitter < 1")
