"""The multilayer perceptron, written feature-major."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bnnmcmc.errors import InputError
from bnnmcmc.models.network import Network

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sigmoid": jax.nn.sigmoid,
    "sin": jnp.sin,
    "identity": lambda h: h,
}


def mlp(
    features: int,
    hidden: Sequence[int],
    outputs: int,
    activation: str = "silu",
    skip: bool = False,
) -> Network:
    r"""Build a multilayer perceptron.

    .. math:: h_0 = x, \quad h_l = \phi(W_l^\top h_{l-1} + b_l) \; [+ h_{l-1}], \quad
              f(x) = W_L^\top h_{L-1} + b_L

    Parameters
    ----------
    features : int
        Number of input features.
    hidden : sequence of int
        Width of each hidden layer; empty for a linear model.
    outputs : int
        Number of outputs; the likelihood says how many it needs (``Likelihood.num_outputs``).
    activation : str
        One of ``ACTIVATIONS``.
    skip : bool
        Add a layer's input to its output wherever both have the same width.

    Returns
    -------
    Network
        Parameters are ``{"layer0": {"bias": (width,), "weight": (fan_in, width)}, ...}``;
        ``init`` draws weights from N(0, 1/fan_in) and sets biases to zero.

    Raises
    ------
    InputError
        Unknown activation, or a width below one.

    Notes
    -----
    Activations are kept as ``(width, rows)``: on CPUs the products ``W.T @ h`` then run along
    contiguous rows, which is several times faster than ``h @ W`` for narrow layers.
    """
    if activation not in ACTIVATIONS:
        raise InputError(
            f"model.activation: found {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
        )
    if any(width < 1 for width in (features, *hidden, outputs)):
        raise InputError(
            f"model.hidden: found widths {[features, *hidden, outputs]}, expected all at least 1"
        )
    phi = ACTIVATIONS[activation]
    sizes = (features, *hidden, outputs)
    layers = [f"layer{i}" for i in range(len(sizes) - 1)]

    def init(key: jax.Array):
        params = {}
        for i, name in enumerate(layers):
            shape = (sizes[i], sizes[i + 1])
            weight = jax.random.normal(jax.random.fold_in(key, i), shape) / jnp.sqrt(sizes[i])
            params[name] = {"bias": jnp.zeros(sizes[i + 1]), "weight": weight}
        return params

    def apply(params, x: jax.Array) -> jax.Array:
        h = x.T
        for i, name in enumerate(layers):
            layer = params[name]
            z = layer["weight"].T @ h + layer["bias"][:, None]
            if i == len(layers) - 1:
                return z.T
            z = phi(z)
            h = z + h if skip and sizes[i] == sizes[i + 1] else z
        raise AssertionError("an MLP has at least one layer")

    return Network(init, apply)
