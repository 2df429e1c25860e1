"""What a network is to this library: two pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Layers(NamedTuple):
    """A multilayer perceptron in plain words, for what must know how it is built (symmetries).

    Parameters are ``{"layer0": {"bias": (width,), "weight": (fan_in, width)}, ...}``, as of `mlp`.

    Parameters
    ----------
    sizes : tuple of int
        Number of features, width of each hidden layer, number of outputs.
    activation : str
        Its name, such as "tanh".
    skip : bool
        Whether a hidden layer's input is added to its output where both have the same width.
    """

    sizes: tuple[int, ...]
    activation: str
    skip: bool = False


class Network(NamedTuple):
    """A network as two pure functions.

    Parameters
    ----------
    init : callable
        ``init(key) -> params``, a pytree of floating-point arrays: where training starts.
    apply : callable
        ``apply(params, x) -> outputs``; ``x`` is ``(rows, features)``, the outputs are
        ``(rows, outputs)``. What the outputs mean is the likelihood's matter.
    layers : Layers, optional
        What it is built of, if it is a multilayer perceptron.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    layers: Layers | None = None
