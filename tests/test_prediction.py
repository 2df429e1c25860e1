"""The pooled distribution in target units: exact quantiles, density, samples, parts."""

import jax
import numpy as np
import pytest
import scipy.optimize
import scipy.stats as st

from bnnmcmc import likelihoods, mixture
from bnnmcmc.data import Encoding, FeatureColumn, TargetColumn
from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.posterior import Posterior
from bnnmcmc.prediction import Prediction, in_target_units
from bnnmcmc.predictive import draws_in_memory, pool
from bnnmcmc.priors import normal

ROWS, CHAINS, DRAWS = 5, 3, 20
X = np.random.default_rng(0).normal(size=(ROWS, 2)).astype(np.float32)
LEVELS = np.array([0.025, 0.3, 0.5, 0.95])


def encoding(targets, center=0.0, scale=1.0):
    columns = tuple(TargetColumn(f"t{i}", center, scale) for i in range(targets))
    features = (FeatureColumn("a", None, 0.0, 1.0), FeatureColumn("b", None, 0.0, 1.0))
    return Encoding("regression", features, columns, None, True)


def predicted(likelihood, weights=None, samples=False, **units):
    """A linear model's prediction, and the outputs of all draws (draw * chains, rows, outputs)."""
    posterior = Posterior(mlp(2, [], likelihood.num_outputs), likelihood, normal())
    rng = np.random.default_rng(1)

    def leaf(one):
        centre = rng.normal(size=(CHAINS, 1, *one.shape))
        return (centre + 0.4 * rng.normal(size=(CHAINS, DRAWS, *one.shape))).astype(np.float32)

    tree = jax.tree.map(leaf, jax.eval_shape(posterior.init, jax.random.key(0)))
    draws = draws_in_memory(tree)._replace(weights=weights)
    weight, bias = (tree["network"]["layer0"][n].astype(float) for n in ("weight", "bias"))
    outputs = np.einsum("rf,cdfo->dcro", X, weight) + np.moveaxis(bias, 0, 1)[:, :, None]
    pooled = pool(posterior, draws, X, seed=3, samples=samples)
    found = in_target_units(
        pooled, encoding(max(1, likelihood.num_outputs // 2), **units) if units else None
    )
    return found, outputs.reshape(-1, ROWS, likelihood.num_outputs)


# One object: what is compiled for it is shared.
GAUSSIAN = likelihoods.gaussian()


def softplus(raw):
    return np.logaddexp(0, raw) + likelihoods.MIN_SCALE


# What each draw predicts, by SciPy, from the outputs.
REFERENCES = {
    "gaussian": (GAUSSIAN, lambda o: st.norm(o[..., :1], softplus(o[..., 1:]))),
    "student_t": (
        likelihoods.student_t(df=5.0),
        lambda o: st.t(5.0, o[..., :1], softplus(o[..., 1:])),
    ),
    "poisson": (likelihoods.poisson(level=4.0), lambda o: st.poisson(4 * np.exp(o))),
    "beta": (
        likelihoods.beta(concentration=5.0, level=0.3),
        lambda o: st.beta(*(5 / (1 + np.exp(s * (o + np.log(0.3 / 0.7)))) for s in (-1, 1))),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_quantiles_cdf_and_density_are_those_of_the_mixture(name):
    likelihood, reference = REFERENCES[name]
    found, outputs = predicted(likelihood)
    each = reference(outputs)
    quantiles = found.quantile(LEVELS)
    assert quantiles.shape == (4, ROWS, 1)
    mixed = np.stack([each.cdf(q).mean(axis=0) for q in quantiles])
    np.testing.assert_allclose(found.cdf(quantiles[1]), mixed[1], atol=2e-5)
    levels = np.broadcast_to(LEVELS[:, None, None], mixed.shape)
    if likelihood.support == "count":
        below = np.stack([each.cdf(q - 1).mean(axis=0) for q in quantiles])
        assert np.all(mixed > levels - 1e-5)
        assert np.all(below < levels + 1e-5)
    else:
        np.testing.assert_allclose(mixed, levels, atol=3e-5)
    mass = each.pmf if likelihood.support == "count" else each.pdf
    expected = np.log(mass(quantiles[2]).mean(axis=0)[:, 0])
    np.testing.assert_allclose(found.log_prob(quantiles[2]), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.mean, each.mean().mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(
        found.aleatoric_variance, each.var().mean(axis=0), rtol=1e-3, err_msg="noise"
    )
    np.testing.assert_allclose(found.aleatoric_variance + found.epistemic_variance, found.variance)


def test_a_quantile_by_brute_force_where_modes_are_far_apart():
    found, outputs = predicted(likelihoods.gaussian(scale=0.01), center=100.0, scale=7.0)
    # Narrow components: the distribution function is a staircase.
    for level in (0.1, 0.34, 0.9):
        q = found.quantile(level)[:, 0]
        for row in range(ROWS):
            means = 100 + 7 * outputs[:, row, 0]

            def gap(y, means=means, level=level):
                return st.norm(means, 0.07).cdf(y).mean() - level

            root = scipy.optimize.brentq(gap, means.min() - 9, means.max() + 9, xtol=1e-10)
            # Where the function is flat, rounding of float32 moves the root along.
            assert abs(gap(q[row])) < 2e-5 or abs(q[row] - root) < 1e-4


def test_target_units():
    plain, _ = predicted(GAUSSIAN)
    scaled, _ = predicted(GAUSSIAN, center=50.0, scale=3.0)
    np.testing.assert_allclose(scaled.quantile(0.2), 50 + 3 * plain.quantile(0.2), rtol=1e-5)
    np.testing.assert_allclose(scaled.variance, 9 * plain.variance, rtol=1e-6)
    y = scaled.mean + 1
    np.testing.assert_allclose(scaled.cdf(y), plain.cdf((y - 50) / 3), atol=1e-6)
    np.testing.assert_allclose(
        scaled.log_prob(y), plain.log_prob((y - 50) / 3) - np.log(3), rtol=1e-5
    )
    np.testing.assert_allclose(
        scaled.sample(5, seed=1), 50 + 3 * plain.sample(5, seed=1), rtol=1e-4
    )
    low, high = scaled.interval(0.8)
    np.testing.assert_allclose(scaled.cdf(high) - scaled.cdf(low), 0.8, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "zero_inflated_poisson"])
def test_samples_are_those_of_the_mixture(name):
    likelihood = GAUSSIAN if name == "gaussian" else likelihoods.zero_inflated_poisson()
    found, _ = predicted(likelihood)
    samples = found.sample(6000, seed=2)
    assert samples.shape == (6000, ROWS, 1)
    error = found.sd / np.sqrt(6000)
    assert np.all(np.abs(samples.mean(axis=0) - found.mean) < 4.5 * error)
    for level in (0.2, 0.8):
        q = found.quantile(level)
        np.testing.assert_allclose((samples <= q).mean(axis=0), found.cdf(q), atol=0.03)
    assert np.array_equal(found.sample(50, seed=1), found.sample(50, seed=1))
    assert not np.array_equal(found.sample(50, seed=1), found.sample(50, seed=5))


def test_parts_of_rows_change_nothing(monkeypatch):
    found, _ = predicted(GAUSSIAN)
    before = found.quantile(LEVELS), found.sample(30), found.log_prob(found.mean)
    monkeypatch.setattr(mixture, "PART_BYTES", 2 * 4 * 2 * CHAINS * DRAWS)
    monkeypatch.setattr(mixture, "HELD_BYTES", 0)
    again, _ = predicted(GAUSSIAN)
    assert [part.length for part in again.mixture.parts()] == [2, 2, 1]
    assert {part.outputs.shape[1] for part in again.mixture.parts()} == {2}
    after = again.quantile(LEVELS), again.sample(30), again.log_prob(found.mean)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_weights_of_chains():
    weights = np.array([0.7, 0.0, 0.3])
    found, outputs = predicted(GAUSSIAN, weights=weights, samples=True)
    each = st.norm(outputs[..., :1], softplus(outputs[..., 1:]))
    share = np.tile(weights / DRAWS, DRAWS)
    np.testing.assert_allclose(found.mean, np.tensordot(share, outputs[..., :1], 1), rtol=1e-4)
    between = np.tensordot(share, (outputs[..., :1] - found.mean) ** 2, 1)
    np.testing.assert_allclose(found.epistemic_variance, between, rtol=1e-4)
    q = found.quantile(0.3)
    np.testing.assert_allclose(np.tensordot(share, each.cdf(q), 1), 0.3, atol=1e-5)
    np.testing.assert_allclose(
        found.log_prob(q), np.log(np.tensordot(share, each.pdf(q), 1))[:, 0], rtol=1e-4
    )
    # The kept samples too: 34 of each draw of the first chain, in proportion of the third.
    assert found.samples.shape[0] == pytest.approx(34 * DRAWS * (1 + 3 / 7), abs=34)
    error = found.sd / np.sqrt(found.samples.shape[0])
    assert np.all(np.abs(found.samples.mean(axis=0) - found.mean) < 5 * error)


def test_pit_of_counts_is_uniform():
    found, _ = predicted(likelihoods.poisson(level=2.0))
    y = found.sample(3000, seed=8)
    values = np.concatenate([found.pit(each, seed=i) for i, each in enumerate(y[:300])])
    assert st.kstest(values.ravel(), "uniform").pvalue > 0.001
    steps = np.concatenate([found.cdf(each) for each in y[:300]])  # not randomised
    assert st.kstest(steps.ravel(), "uniform").pvalue < 1e-3


def test_many_draws_leave_no_rounding_in_the_tails():
    def alike(likelihood, level):
        """Ten chains of a thousand draws that are all the same."""
        posterior = Posterior(mlp(2, [], likelihood.num_outputs), likelihood, normal())
        shapes = jax.eval_shape(posterior.init, jax.random.key(0))
        tree = jax.tree.map(lambda leaf: np.zeros((10, 1000, *leaf.shape), np.float32), shapes)
        found = in_target_units(pool(posterior, draws_in_memory(tree), X, samples=False), None)
        return found, found.quantile(level)[:, 0]

    for level in (0.95, 0.9999, 0.99999):
        found, quantile = alike(likelihoods.gaussian(scale=1.0), level)
        np.testing.assert_allclose(quantile, st.norm.ppf(level), atol=0.01)
    np.testing.assert_allclose(found.quantile(0.95), st.norm.ppf(0.95), atol=2e-5)
    far = np.full((ROWS, 1), 100.0)
    assert np.all(found.cdf(far) <= 1)
    assert np.all(found.cdf(far) > 1 - 1e-6)
    assert np.all(found.pit(-far) == 0)
    _, quantile = alike(likelihoods.poisson(level=4.0), 0.99999)
    np.testing.assert_array_equal(quantile, st.poisson(4).ppf(0.99999))


def test_a_nan_stays_one():
    likelihood = likelihoods.poisson()
    posterior = Posterior(mlp(2, [], 1), likelihood, normal())
    shapes = jax.eval_shape(posterior.init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros((2, 3, *leaf.shape), np.float32), shapes)
    tree["network"]["layer0"]["bias"][1, 2] = np.nan
    found = in_target_units(pool(posterior, draws_in_memory(tree), X), None)
    assert np.isnan(found.mean).all()
    assert np.isnan(found.quantile(0.5)).all()
    assert np.isnan(found.cdf(np.ones((ROWS, 1)))).all()
    assert np.isnan(found.sample(6)).any(axis=0).all()
    assert np.isnan(found.samples).any(axis=0).all()


def test_classes_entropy_and_what_data_could_tell():
    likelihood = likelihoods.categorical(3)
    posterior = Posterior(mlp(2, [], 3), likelihood, normal())
    shapes = jax.eval_shape(posterior.init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: np.zeros((2, 4, *leaf.shape), np.float32), shapes)
    # One chain is sure of class 0, the other of class 1.
    tree["network"]["layer0"]["bias"][0, :, 0] = 30
    tree["network"]["layer0"]["bias"][1, :, 1] = 30
    found = in_target_units(pool(posterior, draws_in_memory(tree), X), None)
    np.testing.assert_allclose(found.entropy, np.log(2), rtol=1e-5)
    np.testing.assert_allclose(found.mutual_information, np.log(2), rtol=1e-5)
    np.testing.assert_allclose(found.log_prob([0, 1, 0, 1, 0]), np.log(0.5), rtol=1e-5)
    assert set(np.unique(found.sample(40))) == {0, 1}
    # All draws agree that nothing is known.
    tree["network"]["layer0"]["bias"][:] = 0
    found = in_target_units(pool(posterior, draws_in_memory(tree), X), None)
    np.testing.assert_allclose(found.entropy, np.log(3), rtol=1e-5)
    np.testing.assert_allclose(found.mutual_information, 0, atol=1e-6)
    table = found.to_xarray()
    assert set(table.data_vars) == {"probability", "label", "entropy", "mutual_information"}
    for ask in (lambda: found.quantile(0.5), lambda: found.cdf([0] * 5), lambda: found.variance):
        with pytest.raises(InputError, match=r"needs? a numeric target"):
            ask()
    with pytest.raises(InputError, match="found the label 7, expected 5 of 0, 1, 2"):
        found.log_prob([0, 0, 0, 0, 7])


def test_tables():
    found, _ = predicted(likelihoods.gaussian(2), center=1.0, scale=2.0)
    frame, table = found.to_frame(0.8), found.to_xarray(0.8)
    assert table["mean"].dims == ("row", "target")
    low, high = found.interval(0.8)
    np.testing.assert_array_equal(table["lower"].sel(target="t1"), low[:, 1])
    np.testing.assert_array_equal(frame["t1_upper_80"], high[:, 1])
    total = table["epistemic_sd"] ** 2 + table["aleatoric_sd"] ** 2
    np.testing.assert_allclose(total, table["sd"] ** 2)


def test_mistakes():
    found, _ = predicted(GAUSSIAN, samples=True)
    without, _ = predicted(GAUSSIAN)
    assert without.samples is None
    np.testing.assert_allclose(without.mean, found.mean, rtol=1e-6)
    for levels in (0.0, 1.0, [0.5, 90], np.nan):
        with pytest.raises(InputError, match="expected numbers between 0 and 1"):
            found.quantile(levels)
    with pytest.raises(InputError, match=r"y: found shape \(3, 1\), expected \(5, 1\)"):
        found.cdf(np.zeros((3, 1)))
    with pytest.raises(InputError, match="n: found 0, expected at least 1"):
        found.sample(0)
    with pytest.raises(InputError, match="needs a classification"):
        _ = found.entropy
    bare = Prediction(("y",), mean=found.mean, sd=found.sd, samples=found.samples)
    np.testing.assert_allclose(
        bare.quantile(0.3), np.quantile(found.samples, 0.3, axis=0), rtol=1e-6
    )
    with pytest.raises(InputError, match="has no density"):
        bare.log_prob(found.mean)
