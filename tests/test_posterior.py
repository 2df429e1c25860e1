import re

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
from bnnmcmc.posterior import Posterior, check_finite, check_outputs
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
