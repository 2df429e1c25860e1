"""What a network is to this library: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Network(NamedTuple):
    """A network as two pure functions.

    Parameters
    ----------
    init : callable
        ``init(key) -> params``, a pytree of floating-point arrays: where training starts.
    apply : callable
        ``apply(params, x) -> outputs``; ``x`` is ``(rows, features)``, the outputs are
        ``(rows, outputs)``. What the outputs mean is the likelihood's matter.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
