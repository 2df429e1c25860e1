import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import categorical, gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.models.network import Network
from bnnmcmc.posterior import Posterior, activation_bytes, check_finite, check_outputs
from bnnmcmc.priors import Prior, normal

RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 3)).astype(np.float32)
Y = RNG.normal(size=(8, 2)).astype(np.float32)


def make(scale="sampled", targets=2, outputs=None, prior=None):
    likelihood = gaussian(targets, scale, 0.7 if scale == "sampled" else 1.0)
    return Posterior(
        mlp(3, [4], outputs or likelihood.num_outputs), likelihood, prior or normal(0.8)
    )


def starts(posterior, chains=3):
    return jax.jit(jax.vmap(posterior.init))(jax.random.split(jax.random.key(0), chains))


def test_log_density_is_both_priors_plus_the_likelihood():
    posterior = make()
    position = posterior.init(jax.random.key(1))
    position["likelihood"]["log_scale"] = jnp.log(jnp.array([0.4, 1.3]))
    network = position["network"]
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(network)])
    sigma = np.array([0.4, 1.3])
    means = posterior.network.apply(network, X)
    prior = st.norm(0, 0.8).logpdf(flat).sum()
    prior_of_sigma = (st.halfnorm(0, 0.7).logpdf(sigma) + np.log(sigma)).sum()
    rows = st.norm(means, sigma).logpdf(Y).sum(axis=1)

    @jax.jit
    def parts(position, x, y):
        return (
            posterior.log_prior(position),
            posterior.pointwise_log_likelihood(position, x, y),
            posterior.log_likelihood(position, x, y),
            posterior.log_density(position, x, y),
        )

    found = parts(position, X, Y)
    both_priors = prior + prior_of_sigma
    np.testing.assert_allclose(found[0], both_priors, rtol=1e-5)
    np.testing.assert_allclose(found[1], rows, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[2], rows.sum(), rtol=1e-5)
    np.testing.assert_allclose(found[3], both_priors + rows.sum(), rtol=1e-5)


def test_a_position_names_network_and_likelihood():
    assert trees.leaf_names(make().init(jax.random.key(0))) == (
        "likelihood.log_scale",
        "network.layer0.bias",
        "network.layer0.weight",
        "network.layer1.bias",
        "network.layer1.weight",
    )
    assert make("predicted").init(jax.random.key(0))["likelihood"] == {}


def test_fitting_parts_pass_both_checks():
    for posterior in (make(), make("predicted"), make(0.5)):
        check_outputs(posterior, X, Y)
    check_finite(posterior, starts(posterior), X, Y)
    classes = Posterior(mlp(3, [4], 3), categorical(3), normal())
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    check_outputs(classes, X, labels)
    check_finite(classes, starts(classes), X, labels)


def test_wrong_number_of_outputs():
    with pytest.raises(
        InputError,
        match=re.escape(
            "the network's outputs have shape (8, 3) for 8 rows, but the likelihood needs an "
            "array of shape (8, 4): give the network 4 outputs"
        ),
    ):
        check_outputs(make("predicted", outputs=3), X, Y)


def test_wrong_number_of_features():
    with pytest.raises(InputError, match="the network cannot be applied to 2 features: "):
        check_outputs(make(), X[:, :2], Y)
    with pytest.raises(InputError, match=r"x: found shape \(8,\), expected \(rows, features\)"):
        check_outputs(make(), X[:, 0], Y)


def test_targets_of_another_shape():
    with pytest.raises(
        InputError, match=re.escape("y: found shape (8, 3), but the likelihood nee")
    ):
        check_outputs(make(), X, np.zeros((8, 3)))
    with pytest.raises(InputError, match=re.escape("y: found shape (7, 2)")):
        check_outputs(make(), X, Y[:7])
    # (rows,) would be broadcast against (rows, 1) to a density of the right shape, but wrong.
    with pytest.raises(InputError, match=re.escape("needs (8, 1) for 8 rows; use y[:, None]")):
        check_outputs(make(targets=1), X, Y[:, 0])
    classes = Posterior(mlp(3, [4], 3), categorical(3), normal())
    with pytest.raises(InputError, match=re.escape("needs (8,)")):
        check_outputs(classes, X, np.zeros((8, 1), int))


def test_a_users_network_that_breaks_the_contract():
    def check(init, apply):
        check_outputs(Posterior(Network(init, apply), gaussian(2, 1.0), normal()), X, Y)

    with pytest.raises(InputError, match="outputs have type tuple for 8 rows"):
        check(lambda key: {"w": jnp.zeros((3, 2))}, lambda params, x: (x @ params["w"],))
    with pytest.raises(
        InputError, match=r"parameter network\.steps has type int32, expected float"
    ):
        check(lambda key: {"steps": jnp.arange(3)}, lambda params, x: x[:, :2])

    def apply(params, x):
        raise ValueError("no such layer")

    with pytest.raises(InputError, match="cannot be applied to 3 features: no such layer"):
        check(lambda key: {"w": jnp.zeros((3, 2))}, apply)


def test_a_nan_in_a_start_position_is_named():
    posterior = make()
    positions = starts(posterior)
    weight = positions["network"]["layer1"]["weight"]
    positions["network"]["layer1"]["weight"] = weight.at[1, 2, 0].set(jnp.nan)
    with pytest.raises(
        InputError,
        match=r"member 1: at the start position network\.layer1\.weight holds a NaN or an infinity",
    ):
        check_finite(posterior, positions, X, Y, label="member")
    positions["network"]["layer1"]["weight"] = weight.at[1:, 0, 0].set(jnp.inf)
    with pytest.raises(InputError, match=r"chain 1 \(and 1 more\): .*Check the scales"):
        check_finite(posterior, positions, X, Y)


def test_a_prior_likelihood_or_gradient_that_is_not_finite():
    def bounded(params):
        return jnp.where(jnp.abs(params["layer0"]["bias"]).max() < 1, 0.0, -jnp.inf)

    posterior = make(prior=Prior(bounded, normal().sample))
    positions = starts(posterior)
    positions["network"]["layer0"]["bias"] += jnp.array([0.0, 0.0, 2.0])[:, None]
    with pytest.raises(InputError, match="chain 2: at the start position the log prior is not fi"):
        check_finite(posterior, positions, X, Y)

    with pytest.raises(InputError, match=r"chain 0 .*the log-likelihood is not finite"):
        check_finite(make(), starts(make()), X, np.full_like(Y, np.nan))

    def kinked(params):  # the derivative of sqrt at zero is infinite
        return -jnp.sqrt(jnp.abs(params["layer0"]["bias"])).sum()

    posterior = make(prior=Prior(kinked, normal().sample))
    with pytest.raises(InputError, match="the gradient of the log-density is not finite"):
        check_finite(posterior, starts(posterior), X, Y)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rows_in_chunks_give_the_same_value_and_gradient(precision):
    """Chunks that divide the 8 rows, that leave a rest, and that hold them all."""
    with jax.enable_x64(precision == "float64"):
        whole = make()
        x, y = whole.arrays(X, Y)
        position = starts(whole)

        @jax.jit
        def both(position):
            def one(posterior):
                return jax.vmap(lambda p: jax.value_and_grad(posterior.log_density)(p, x, y))(
                    position
                )

            return [one(replace(whole, row_chunk=chunk)) for chunk in (None, 1, 3, 4, 100)]

        expected, *found = both(position)
        tolerance = 1e-5 if precision == "float32" else 1e-12
        for value in found:
            assert value[0].dtype == precision
            for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)


def test_rows_in_chunks_with_classes_and_curvature():
    whole = Posterior(mlp(3, [4], 3), categorical(3), normal())
    x, y = whole.arrays(X, np.arange(8) % 3)
    position = starts(whole, 1)
    direction = jax.tree.map(jnp.ones_like, position)

    def curvature(posterior, position, direction):
        gradient = jax.grad(lambda p: posterior.log_density(trees.first(p), x, y))
        return jax.jvp(gradient, (position,), (direction,))[1]

    found = jax.jit(lambda *at: [curvature(replace(whole, row_chunk=c), *at) for c in (None, 3)])
    expected, chunked = found(position, direction)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_nan_in_one_row_is_not_lost_in_a_chunk():
    whole = make()
    x, y = whole.arrays(X, Y)
    density = jax.jit(jax.value_and_grad(replace(whole, row_chunk=3).log_density))
    position = trees.first(starts(whole, 1))
    for row in (0, 7):  # in a chunk, and in the rest
        value, gradient = density(position, x.at[row, 0].set(jnp.nan), y)
        assert jnp.isnan(value)
        assert jnp.isnan(gradient["network"]["layer0"]["weight"]).any()


def test_chunks_need_less_memory():
    whole = Posterior(mlp(3, [32, 32], 2), gaussian(), normal())
    x, y = whole.arrays(np.zeros((20_000, 3)), np.zeros((20_000, 1)))
    position = jax.eval_shape(whole.init, jax.random.key(0))

    def workspace(posterior):
        compiled = jax.jit(jax.value_and_grad(posterior.log_density)).lower(position, x, y)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    whole_bytes = workspace(whole)
    assert workspace(replace(whole, row_chunk=500)) < 0.2 * whole_bytes
    # What is predicted without compiling is what the compiler takes, and not much more.
    assert 0.5 * whole_bytes < activation_bytes(whole, x, y) < 2 * whole_bytes


def test_activations_grow_with_rows_and_widths_alone():
    rows = [activation_bytes(make(), jnp.zeros((n, 3)), jnp.zeros((n, 2))) for n in (64, 128, 1024)]
    assert rows[0] * 2 == rows[1]
    assert rows[0] * 16 == rows[2]
    wide = Posterior(mlp(3, [400], 2), gaussian(), normal())
    narrow = Posterior(mlp(3, [4], 2), gaussian(), normal())
    many, few = (
        activation_bytes(p, jnp.zeros((64, 3)), jnp.zeros((64, 1))) for p in (wide, narrow)
    )
    assert 20 < many / few < 100


def test_a_chunk_without_rows_is_refused():
    with pytest.raises(InputError, match="row_chunk: found 0, expected at least 1"):
        replace(make(), row_chunk=0)


@pytest.mark.parametrize("row_chunk", [None, 7])
def test_a_row_of_weight_two_is_two_rows(row_chunk):
    posterior = Posterior(mlp(3, [5], 2), gaussian(), normal(), row_chunk)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(20, 1)), jnp.float32)
    counts = rng.integers(0, 4, 20)
    position = posterior.init(jax.random.key(0))
    weights = jnp.asarray(counts, jnp.float32)
    repeated = np.repeat(np.arange(20), counts)
    found = jax.value_and_grad(posterior.log_density)(position, x, y, weights)
    expected = jax.value_and_grad(posterior.log_density)(position, x[repeated], y[repeated])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected
    )
