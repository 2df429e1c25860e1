import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import ACTIVATIONS, mlp

# Written out independently of the library.
FORMULAS = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    "elu": lambda z: np.where(z > 0, z, np.expm1(z)),
    "softplus": lambda z: np.log1p(np.exp(z)),
    "sigmoid": scipy.special.expit,
    "sin": np.sin,
    "identity": lambda z: z,
}


def random_params(network, seed=0):
    """Return parameters with biases that are not zero."""
    params = network.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


def row_major(params, x, phi, skip=False):
    h, names = np.asarray(x, np.float64), sorted(params)
    for name in names:
        z = h @ params[name]["weight"].astype(np.float64) + params[name]["bias"]
        if name == names[-1]:
            return z
        h = phi(z) + h if skip and z.shape == h.shape else phi(z)


@pytest.fixture
def x():
    return np.random.default_rng(1).normal(size=(7, 4)).astype(np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees_with_its_formula(activation, x):
    network = mlp(4, [5, 3], 2, activation)
    params = random_params(network)
    expected = row_major(params, x, FORMULAS[activation])
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=2e-5, atol=2e-5)


def test_skip_adds_a_layers_input_where_widths_are_equal(x):
    widths = [4, 6, 6, 3]  # layers 0 and 2 keep the width, 1 and 3 do not
    network = mlp(4, widths, 3, "tanh", skip=True)
    params = random_params(network)
    expected = row_major(params, x, np.tanh, skip=True)
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-4, atol=1e-4)
    plain = mlp(4, widths, 3, "tanh").apply(params, x)
    assert np.abs(plain - expected).max() > 0.1


def test_the_output_layer_has_no_activation_and_no_skip(x):
    # One hidden layer as wide as the outputs: a skip into the output layer would show.
    network = mlp(4, [2], 2, "relu", skip=True)
    params = random_params(network)
    np.testing.assert_allclose(
        network.apply(params, x), row_major(params, x, FORMULAS["relu"]), rtol=1e-5, atol=1e-5
    )


def test_no_hidden_layer_is_a_linear_model(x):
    network = mlp(4, [], 2)
    params = random_params(network)
    assert list(params) == ["layer0"]
    expected = x @ params["layer0"]["weight"] + params["layer0"]["bias"]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-5, atol=1e-5)


def test_init_has_variance_one_over_fan_in_and_zero_biases():
    params = mlp(50, [400, 100], 30).init(jax.random.key(0))
    assert {name: layer["weight"].shape for name, layer in params.items()} == {
        "layer0": (50, 400),
        "layer1": (400, 100),
        "layer2": (100, 30),
    }
    for layer in params.values():
        fan_in = layer["weight"].shape[0]
        np.testing.assert_allclose(np.var(layer["weight"]) * fan_in, 1, rtol=0.08)
        np.testing.assert_array_equal(layer["bias"], 0)


def test_init_depends_on_the_key_and_layers_differ():
    network = mlp(3, [3], 3)
    one, again, other = (network.init(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one["layer0"]["weight"], again["layer0"]["weight"])
    assert np.all(one["layer0"]["weight"] != other["layer0"]["weight"])
    assert np.all(one["layer0"]["weight"] != one["layer1"]["weight"])


def test_rows_do_not_influence_each_other(x):
    network = mlp(4, [5], 1)
    params = random_params(network)
    alone = jnp.concatenate([network.apply(params, x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(network.apply(params, x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, [3], 1, "swish2"), r"model\.activation: found 'swish2', expected one of tanh, relu"),
        ((4, [3, 0], 1), r"model\.hidden: found widths \[4, 3, 0, 1\], expected all at least 1"),
        ((4, [3], 0), r"found widths \[4, 3, 0\]"),
        ((0, [3], 1), r"found widths \[0, 3, 1\]"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        mlp(*arguments)
