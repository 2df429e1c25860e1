"""Equi-output transformations: group laws, representatives, densities."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import scipy.special

from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.models.network import Layers, Network
from bnnmcmc.priors import LeafPrior, hierarchical, independent, normal
from bnnmcmc.symmetry import group
from bnnmcmc.symmetry.alignment import align, aligning_transformation
from bnnmcmc.symmetry.canonical import METHODS, canonicalize
from bnnmcmc.symmetry.exact import balance

FORMULAS = {
    "tanh": np.tanh,
    "sin": np.sin,
    "erf": scipy.special.erf,
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, 0.01 * z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "sigmoid": scipy.special.expit,
}
often = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
architectures = st.builds(
    Layers,
    st.tuples(st.integers(1, 3), *[st.integers(1, 4)] * 2, st.integers(1, 2))
    | st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 2))
    | st.just((3, 4, 4, 4, 2))
    | st.just((4, 4, 4, 3, 3, 1)),
    st.sampled_from(sorted(FORMULAS)),
    st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)


def random_params(layers, rng, lead=()):
    sizes = layers.sizes
    return {
        f"layer{i}": {
            "bias": rng.normal(size=(*lead, sizes[i + 1])),
            "weight": rng.normal(size=(*lead, sizes[i], sizes[i + 1])),
        }
        for i in range(len(sizes) - 1)
    }


def outputs(layers, params, x):
    """Return (*lead, rows, outputs) in float64, independently of the library."""
    h = x
    for i in range(len(layers.sizes) - 1):
        layer = params[f"layer{i}"]
        z = h @ layer["weight"] + layer["bias"][..., None, :]
        if i == len(layers.sizes) - 2:
            return z
        new = FORMULAS[layers.activation](z)
        h = new + h if layers.skip and layers.sizes[i] == layers.sizes[i + 1] else new


def flat(params, lead=0):
    return np.concatenate(
        [v.reshape(*v.shape[:lead], -1) for layer in params.values() for v in layer.values()], -1
    )


def same_function(layers, a, b):
    x = np.random.default_rng(1).normal(size=(5, layers.sizes[0]))
    found, expected = outputs(layers, a, x), outputs(layers, b, x)
    # Relative to what is summed up: an output near zero is a difference of larger numbers.
    size = np.abs(expected).max() + np.abs(flat(a)).max() * 5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * size)


@often
@hypothesis.given(architectures, seeds)
def test_any_element_leaves_the_function_unchanged(layers, seed):
    rng = np.random.default_rng(seed)
    params = random_params(layers, rng, (2, 3))
    element = group.random_element(layers, rng, (2, 3))
    group.check(layers, element)
    same_function(layers, group.apply(layers, element, params), params)


@often
@hypothesis.given(architectures, seeds)
def test_composition_and_inverse(layers, seed):
    rng = np.random.default_rng(seed)
    params = random_params(layers, rng, (3,))
    a, b = (group.random_element(layers, rng, (3,)) for _ in range(2))
    one_by_one = group.apply(layers, a, group.apply(layers, b, params))
    at_once = group.apply(layers, group.compose(a, b), params)
    np.testing.assert_allclose(flat(at_once), flat(one_by_one), rtol=1e-12)
    back = group.apply(layers, group.invert(a), group.apply(layers, a, params))
    np.testing.assert_allclose(flat(back), flat(params), rtol=1e-12)
    group.check(layers, group.compose(a, group.invert(b)))


@often
@hypothesis.given(architectures, seeds, st.sampled_from(["bias", "norm"]))
def test_exact_representative_is_idempotent_and_constant_on_orbits(layers, seed, order):
    rng = np.random.default_rng(seed)
    params = random_params(layers, rng, (4,))
    moved = group.apply(layers, group.random_element(layers, rng, (4,)), params)
    first = canonicalize(layers, params, order=order)
    group.check(layers, first.transformation)
    same_function(layers, first.params, params)
    again = canonicalize(layers, first.params, order=order).params
    other = canonicalize(layers, moved, order=order).params
    if layers.activation in group.HOMOGENEOUS:
        np.testing.assert_allclose(flat(again), flat(first.params), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(flat(other), flat(first.params), rtol=1e-6, atol=1e-8)
    else:
        np.testing.assert_array_equal(flat(again), flat(first.params))
        np.testing.assert_array_equal(flat(other), flat(first.params))


def separated_draws(layers, rng, draws, noise=0.02):
    """Return draws around one network whose units are far from each other and from zero."""
    centre = random_params(layers, np.random.default_rng(5))
    for i in range(len(layers.sizes) - 2):
        width = layers.sizes[i + 1]
        centre[f"layer{i}"]["bias"] = 2.0 * (1 + np.arange(width))
    if layers.activation in group.HOMOGENEOUS:
        # Balanced, with the biases in that order still.
        centre["layer0"]["weight"] *= 0.3
    return {
        name: {k: v + noise * rng.normal(size=(draws, *v.shape)) for k, v in leaves.items()}
        for name, leaves in centre.items()
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "layers",
    [
        Layers((2, 3, 1), "tanh"),
        Layers((3, 5, 4, 2), "tanh"),
        Layers((3, 4, 4, 4, 1), "tanh", True),
        Layers((2, 4, 3, 1), "relu"),
        Layers((2, 4, 3, 1), "silu"),
    ],
    ids=str,
)
def test_every_way_gives_draws_of_one_mode_one_place(method, layers):
    rng = np.random.default_rng(7)
    plain = separated_draws(layers, rng, 40)
    scrambled = group.apply(layers, group.random_element(layers, rng, (40,)), plain)
    found = canonicalize(layers, scrambled, method)
    same_function(layers, found.params, scrambled)
    spread = flat(found.params, 1).std(axis=0).max()
    assert flat(scrambled, 1).std(axis=0).max() > 1
    assert spread < 0.1
    again = canonicalize(layers, found.params, method).params
    np.testing.assert_allclose(flat(again), flat(found.params), rtol=1e-8, atol=1e-10)
    # Another mixture of the same orbits: the same representatives (alignment: of the first draw's).
    second = group.apply(layers, group.random_element(layers, rng, (40,), 0.0), plain)
    if method == "alignment":
        reference = group.apply(
            layers,
            group.identity(layers),
            {n: {k: v[0] for k, v in leaves.items()} for n, leaves in found.params.items()},
        )
        one = canonicalize(layers, second, method, reference=reference).params
        expected = canonicalize(layers, scrambled, method, reference=reference).params
    else:
        one, expected = canonicalize(layers, second, method).params, found.params
    np.testing.assert_allclose(flat(one), flat(expected), rtol=1e-7, atol=1e-9)


def test_alignment_of_one_hidden_layer_is_the_closest_point_of_the_orbit():
    layers, rng = Layers((2, 3, 1), "tanh"), np.random.default_rng(0)
    params, reference = random_params(layers, rng), random_params(layers, rng)
    found = group.apply(layers, aligning_transformation(layers, params, reference), params)
    best = np.inf
    import itertools

    for p in itertools.permutations(range(3)):
        for s in itertools.product([-1.0, 1.0], repeat=3):
            element = group.Transformation((np.array(p),), (np.array(s),))
            distance = np.square(flat(group.apply(layers, element, params)) - flat(reference)).sum()
            best = min(best, distance)
    assert np.square(flat(found) - flat(reference)).sum() == pytest.approx(best)


def test_a_chain_is_moved_as_a_whole():
    layers, rng = Layers((2, 3, 1), "tanh"), np.random.default_rng(0)
    draws = random_params(layers, rng, (4, 6))
    last = {n: {k: v[:, -1] for k, v in leaves.items()} for n, leaves in draws.items()}
    found = align(layers, last)
    moved = group.apply(layers, group.at(found, np.s_[:, None]), draws)
    np.testing.assert_array_equal(flat(moved, 2)[:, -1], flat(group.apply(layers, found, last), 1))
    same_function(layers, moved, draws)


def test_group_orders():
    assert group.group_order(mlp(5, [3], 1, "tanh")) == 48
    f2 = mlp(5, [16, 16, 16], 1, "tanh")
    assert group.group_order(f2) == (math.factorial(16) * 2**16) ** 3
    assert group.log_group_order(f2) == pytest.approx(3 * (math.lgamma(17) + 16 * math.log(2)))
    assert group.group_order(mlp(5, [4], 1, "silu")) == 24
    assert group.group_order(mlp(5, [4], 1, "relu")) == 24
    assert group.group_order(mlp(5, [], 1, "tanh")) == 1
    # Layers 1 and 2 are tied; in the second network all are, to the features.
    assert group.group_order(mlp(3, [4, 4], 1, "tanh", skip=True)) == 24 * 16
    assert group.group_order(mlp(4, [4, 4], 1, "tanh", skip=True)) == 1
    wide = mlp(5, [4096, 4096], 1, "tanh")
    assert group.log_group_order(wide) == pytest.approx(
        2 * (scipy.special.gammaln(4097) + 4096 * np.log(2))
    )


def test_density_under_invariant_priors_is_unchanged_and_the_change_under_rescaling_reported():
    rng = np.random.default_rng(3)
    tanh, relu = Layers((3, 5, 4, 2), "tanh"), Layers((3, 5, 4, 2), "relu")
    params = random_params(tanh, rng, (6,))
    as_jax = normal().log_density
    for method in METHODS:
        found = canonicalize(tanh, params, method, log_prior=as_jax)
        np.testing.assert_allclose(found.log_prior_change, 0, atol=1e-4)
        np.testing.assert_array_equal(found.log_volume, 0)
    found = canonicalize(relu, params, log_prior=as_jax)
    change = -0.5 * (np.square(flat(found.params, 1)) - np.square(flat(params, 1))).sum(axis=1)
    np.testing.assert_allclose(found.log_prior_change, change, rtol=1e-3, atol=1e-4)
    assert (found.log_prior_change > 1).all()  # the balanced network is the likeliest of its orbit
    # The stretch of space, against the determinant of the transformation as a matrix.
    one = group.at(found.transformation, 0)
    single = {n: {k: v[0] for k, v in leaves.items()} for n, leaves in params.items()}
    size = flat(single).size

    def moved(vector):
        tree, start = {}, 0
        for name, leaves in single.items():
            tree[name] = {}
            for k, v in leaves.items():
                tree[name][k] = vector[start : start + v.size].reshape(v.shape)
                start += v.size
        return flat(group.apply(relu, one, tree))

    matrix = np.array([moved(row) for row in np.eye(size)])
    assert found.log_volume[0] == pytest.approx(np.linalg.slogdet(matrix)[1])


def test_balanced_units_have_as_much_before_as_after():
    layers, rng = Layers((3, 5, 4, 2), "relu"), np.random.default_rng(3)
    params = random_params(layers, rng)
    found = group.apply(layers, balance(layers, params), params)
    for i in range(2):
        before = np.square(found[f"layer{i}"]["weight"]).sum(0) + found[f"layer{i}"]["bias"] ** 2
        np.testing.assert_allclose(before, np.square(found[f"layer{i + 1}"]["weight"]).sum(1))
    same_function(layers, found, params)


def test_which_priors_are_invariant():
    network = mlp(3, [5, 4], 2, "tanh")
    params = random_params(network.layers, np.random.default_rng(0))
    for prior in (normal(0.5), normal(1.0, fan_in=True), independent(LeafPrior("laplace"))):
        assert group.invariance(network, prior.log_density, params) == (True, True, None)
    own = jax.eval_shape(lambda p: hierarchical().hierarchy.start(p)[1], params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), own)
    scaled = hierarchical().log_density
    assert group.invariance(network, lambda p: scaled(p, zeros), params) == (True, True, None)
    relu = mlp(3, [5, 4], 2, "relu")
    assert group.invariance(relu, normal().log_density, params) == (True, None, False)

    def shifted(p):
        return -0.5 * np.square(p["layer0"]["bias"] - 1).sum()

    def by_unit(p):
        return -(np.arange(5) * p["layer0"]["bias"] ** 2).sum()

    assert group.invariance(network, shifted, params) == (True, False, None)
    assert group.invariance(network, by_unit, params) == (False, True, None)


def test_the_library_network_and_jax_agree():
    network = mlp(3, [5, 4], 2, "tanh")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda v: v.astype(np.float32), random_params(network.layers, rng))
    moved = group.apply(network, group.random_element(network, rng), params)
    assert moved["layer0"]["weight"].dtype == np.float32
    x = rng.normal(size=(6, 3)).astype(np.float32)
    np.testing.assert_allclose(
        network.apply(moved, x), network.apply(params, x), rtol=1e-4, atol=1e-5
    )


def test_mistakes_are_named():
    own = Network(lambda key: {}, lambda params, x: x)
    with pytest.raises(InputError, match="does not say what it is built of"):
        group.group_order(own)
    layers, rng = Layers((3, 4, 1), "silu"), np.random.default_rng(0)
    params = random_params(layers, rng)
    with pytest.raises(InputError, match=r"layer0\.bias: found shape"):
        canonicalize(Layers((3, 5, 1), "silu"), params)
    with pytest.raises(InputError, match=r"layer1\.bias"):
        canonicalize(layers, {"layer0": params["layer0"]})
    with pytest.raises(InputError, match="expected one of exact, hyperplane, alignment"):
        canonicalize(layers, params, "sorted")
    flip = group.identity(layers)._replace(scales=(np.array([1.0, -1, 1, 1]),))
    with pytest.raises(InputError, match="silu is not odd"):
        group.check(layers, flip)
    with pytest.raises(InputError, match="not homogeneous"):
        group.check(layers, flip._replace(scales=(np.array([1.0, 2, 1, 1]),)))
    with pytest.raises(InputError, match="expected a permutation"):
        group.check(layers, flip._replace(permutations=(np.array([0, 0, 1, 2]),)))
    tied = Layers((3, 4, 4, 1), "tanh", True)
    apart = group.identity(tied)
    apart.permutations[0][:] = [1, 0, 2, 3]
    with pytest.raises(InputError, match="a skip connection ties"):
        group.check(tied, apart)
