"""The multilayer perceptron, written feature-major."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bnnmcmc.errors import InputError
from bnnmcmc.models.network import Layers, Network

# Tables are filled up with empty rows to a multiple of this, the floats of the widest CPU register:
# products over rows then have no ragged end.
LANES = 16
# A product with so few outputs is cheaper as a sum of scaled rows than as a matrix product.
FEW_OUTPUTS = 2


@jax.custom_jvp
def relu(z: jax.Array) -> jax.Array:
    """Return max(z, 0); the derivative is read off the result, so that z need not be kept."""
    return jnp.maximum(z, 0)


@relu.defjvp
def _relu_jvp(primals, tangents):
    h = relu(primals[0])
    return h, jnp.where(h > 0, tangents[0], 0)


def sigmoid(z: jax.Array) -> jax.Array:
    """Return 1 / (1 + exp(-z)) through tanh, which compilers turn into the faster code."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


@jax.custom_jvp
def silu(z: jax.Array) -> jax.Array:
    """Return z * sigmoid(z)."""
    return z * sigmoid(z)


@silu.defjvp
def _silu_jvp(primals, tangents):
    (z,) = primals
    h, s = silu(z), sigmoid(z)
    return h, tangents[0] * (s + h * (1 - s))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "relu": relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": silu,
    "gelu": jax.nn.gelu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "sigmoid": sigmoid,
    "sin": jnp.sin,
    "identity": lambda h: h,
}


def feature_major(x: jax.Array) -> jax.Array:
    """Return rows ``(rows, features)`` as ``(features, rows filled up to a multiple of LANES)``.

    The barrier keeps the compiler from folding the transposition into the products that follow;
    out of a loop over draws it moves it altogether.
    """
    columns = jnp.pad(x.T, ((0, 0), (0, -x.shape[0] % LANES)))
    return jax.lax.optimization_barrier(columns)


@jax.custom_jvp
def dense(weight: jax.Array, bias: jax.Array, h: jax.Array) -> jax.Array:
    """Return ``weight.T @ h + bias`` for feature-major ``h`` (fan_in, rows).

    Written so that value, gradient by ``h`` and gradient by ``weight`` each are a product that
    CPU libraries have a fast form of.
    """
    return jax.lax.optimization_barrier(weight.T) @ h + bias[:, None]


@dense.defjvp
def _dense_jvp(primals, tangents):
    weight, bias, h = primals
    weight_dot, bias_dot, h_dot = tangents
    if weight.shape[1] <= FEW_OUTPUTS:
        by_h = jnp.stack([(weight[:, k, None] * h_dot).sum(axis=0) for k in range(weight.shape[1])])
    else:
        by_h = weight.T @ h_dot
    return dense(weight, bias, h), weight_dot.T @ h + bias_dot[:, None] + by_h


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
        h = feature_major(x)
        for i, name in enumerate(layers):
            layer = params[name]
            z = dense(layer["weight"], layer["bias"], h)
            if i == len(layers) - 1:
                return z[:, : x.shape[0]].T
            z = phi(z)
            h = z + h if skip and sizes[i] == sizes[i + 1] else z
        raise AssertionError("an MLP has at least one layer")

    return Network(init, apply, Layers(sizes, activation, skip))
