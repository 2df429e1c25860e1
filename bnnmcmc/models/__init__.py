"""Networks: a `Network` is a pair of pure functions, `init` and `apply`."""
