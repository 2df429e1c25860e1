import jax
import numpy as np
import pytest
import scipy.stats as st
from scipy.special import log_softmax, logsumexp

from bnnmcmc import predictive, trees
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import bernoulli, categorical, gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.posterior import Posterior
from bnnmcmc.predictive import Draws, draws_in_memory, per_draw, pool, thinned
from bnnmcmc.priors import normal

ROWS, FEATURES = 7, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, FEATURES)).astype(np.float32)
Y = RNG.normal(size=(ROWS, 2)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2, 2])


def linear(likelihood):
    """A linear model: what each draw predicts is written down in a line."""
    return Posterior(mlp(FEATURES, [], likelihood.num_outputs), likelihood, normal())


def random_draws(posterior, chains=3, draws=40, seed=0):
    """Draws whose chains are far apart, as they are in different modes."""
    rng = np.random.default_rng(seed)

    def leaf(one):
        shape = (chains, draws, *one.shape)
        centre = rng.normal(size=(chains, 1, *one.shape))
        return (centre + 0.5 * rng.normal(size=shape)).astype(np.float32)

    return jax.tree.map(leaf, jax.eval_shape(posterior.init, jax.random.key(0)))


def outputs_of(tree):
    """Return (chain, draw, rows, outputs) in float64."""
    layer = tree["network"]["layer0"]
    weight, bias = (layer[part].astype(np.float64) for part in ("weight", "bias"))
    return np.einsum("rf,cdfo->cdro", X, weight) + bias[:, :, None, :]


def in_blocks(tree, sizes):
    whole = draws_in_memory(tree)
    flat = next(iter(whole.blocks()))
    borders = np.cumsum(sizes)[:-1]
    return whole._replace(blocks=lambda: np.split(flat, borders, axis=1))


def assert_same(one, other):
    for name in ("log_density", "mean", "variance", "epistemic", "samples"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5, err_msg=name
        )


HETERO = linear(gaussian(2))


@pytest.fixture(scope="module")
def tree():
    return random_draws(HETERO)


@pytest.fixture(scope="module")
def pooled(tree):
    return pool(HETERO, draws_in_memory(tree), X, Y, seed=5)


def test_log_density_is_log_mean_exp_over_all_draws_of_all_chains(tree, pooled):
    outputs = outputs_of(tree)
    sd = np.log1p(np.exp(outputs[..., 2:])) + 1e-4
    each = st.norm(outputs[..., :2], sd).logpdf(Y).sum(axis=-1)
    expected = logsumexp(each, axis=(0, 1)) - np.log(3 * 40)
    np.testing.assert_allclose(pooled.log_density, expected, rtol=1e-4)
    # Not the mean of the chains' own log predictive densities.
    mean_of_chains = (logsumexp(each, axis=1) - np.log(40)).mean(axis=0)
    assert np.all(pooled.log_density - mean_of_chains > 0.01)


def test_moments_follow_the_law_of_total_variance(tree, pooled):
    outputs = outputs_of(tree)
    means = outputs[..., :2]
    noise = (np.log1p(np.exp(outputs[..., 2:])) + 1e-4) ** 2
    np.testing.assert_allclose(pooled.mean, means.mean(axis=(0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pooled.epistemic, means.var(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(
        pooled.variance, noise.mean(axis=(0, 1)) + means.var(axis=(0, 1)), rtol=1e-4
    )


def test_variance_survives_large_means(tree):
    """Squares of means would cancel in float32, and lose digits even in float64."""
    posterior = linear(gaussian(2, scale=0.1))
    tree = random_draws(posterior)
    tree["network"]["layer0"]["bias"] += 1000
    found = pool(posterior, in_blocks(tree, [7, 13, 20]), X)
    np.testing.assert_allclose(found.epistemic, outputs_of(tree).var(axis=(0, 1)), rtol=1e-3)


def test_samples_come_from_the_mixture(pooled):
    assert pooled.samples.shape == (2040, ROWS, 2)  # 17 from each of 120 draws
    # Whatever the draws' correlation: a mean of 2040 with 17 per draw.
    error = np.sqrt(pooled.variance / 2040)
    assert np.all(np.abs(pooled.samples.mean(axis=0) - pooled.mean) < 5 * error)
    np.testing.assert_allclose(pooled.samples.var(axis=0), pooled.variance, rtol=0.15)


def test_samples_are_spread_over_all_chains(monkeypatch):
    """Thinning a flat list of draws by a stride could miss whole chains."""
    monkeypatch.setattr(predictive, "MAX_SAMPLES", 40)
    monkeypatch.setattr(predictive, "MIN_SAMPLES", 10)
    posterior = linear(gaussian(scale=0.01))
    tree = random_draws(posterior, chains=4, draws=20)
    tree["network"] = jax.tree.map(np.zeros_like, tree["network"])
    tree["network"]["layer0"]["bias"] += 10 * np.arange(4, dtype=np.float32)[:, None, None]
    samples = pool(posterior, draws_in_memory(tree), X).samples
    assert samples.shape == (40, ROWS, 1)  # every second draw
    chain, count = np.unique(np.round(samples[:, 0, 0] / 10), return_counts=True)
    np.testing.assert_array_equal(chain, np.arange(4))
    np.testing.assert_array_equal(count, 10)


@pytest.mark.parametrize(
    ("chains", "draws", "samples"),
    [
        (1, 1, 2000),
        (2, 3, 2004),
        (4, 500, 2000),
        (10, 1000, 10_000),
        (10, 1001, 5010),
        (3, 5000, 7500),
        (7, 1999, 7000),
    ],
)
def test_the_number_of_samples_stays_between_its_bounds(chains, draws, samples):
    posterior = linear(gaussian(scale=1.0))
    zeros = jax.tree.map(
        lambda leaf: np.zeros((chains, draws, *leaf.shape), np.float32),
        jax.eval_shape(posterior.init, jax.random.key(0)),
    )
    found = pool(posterior, draws_in_memory(zeros), X[:1]).samples
    assert found.shape == (samples, 1, 1)
    assert predictive.MIN_SAMPLES <= samples <= predictive.MAX_SAMPLES
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found.std(), 1, rtol=0.1)


def test_noise_is_independent_over_draws_rows_and_targets():
    posterior = linear(gaussian(2, scale=1.0))
    zeros = jax.tree.map(np.zeros_like, random_draws(posterior))
    noise = pool(posterior, draws_in_memory(zeros), X).samples
    assert np.unique(noise).size > 0.99 * noise.size  # float32 has a few equal by chance
    correlation = np.corrcoef(noise.reshape(len(noise), -1).T)
    np.testing.assert_allclose(correlation, np.eye(2 * ROWS), atol=0.12)


def test_samples_depend_on_the_seed_alone(tree, pooled):
    again = pool(HETERO, draws_in_memory(tree), X, Y, seed=5)
    np.testing.assert_array_equal(again.samples, pooled.samples)
    other = pool(HETERO, draws_in_memory(tree), X, Y, seed=6)
    assert np.all(other.samples != pooled.samples)
    np.testing.assert_array_equal(other.log_density, pooled.log_density)


@pytest.mark.parametrize("sizes", [[1] * 40, [13, 1, 26], [40]])
@pytest.mark.parametrize("batch", [16, 512])
def test_blocks_and_batches_change_nothing(sizes, batch, tree, pooled, monkeypatch):
    monkeypatch.setattr(predictive, "BATCH", batch)
    assert_same(pool(HETERO, in_blocks(tree, sizes), X, Y, seed=5), pooled)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_row_chunks_change_nothing(rows, tree, pooled, monkeypatch):
    monkeypatch.setattr(predictive, "CHUNK_BYTES", 8 * 2040 * 4 * rows)
    calls = []
    original = predictive._pool_rows
    monkeypatch.setattr(
        predictive, "_pool_rows", lambda *a: calls.append(len(a[-1][0])) or original(*a)
    )
    assert_same(pool(HETERO, draws_in_memory(tree), X, Y, seed=5), pooled)
    # All chunks are of one size: the last is filled up, and what fills it is cut off again.
    assert calls == [rows] * -(-ROWS // rows)


def test_small_blocks_fill_whole_batches(tree, monkeypatch):
    monkeypatch.setattr(predictive, "BATCH", 50)
    sizes = [len(numbers) for numbers, _ in predictive._batches(in_blocks(tree, [1] * 40))]
    assert sizes == [50, 50, 20]
    numbers, flat = zip(*predictive._batches(in_blocks(tree, [3, 30, 7])), strict=True)
    whole = next(iter(draws_in_memory(tree).blocks()))
    order = np.concatenate(numbers)
    np.testing.assert_array_equal(np.sort(order), np.arange(120))
    np.testing.assert_array_equal(np.concatenate(flat), whole[order % 3, order // 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_draw_is_never_left_out(bad, tree):
    broken = jax.tree.map(np.copy, tree)
    broken["network"]["layer0"]["bias"][1, 17, 0] = bad
    found = pool(HETERO, draws_in_memory(broken), X, Y)
    assert not np.isfinite(found.mean[:, 0]).any()
    assert not np.isfinite(found.variance[:, 0]).any()
    assert not np.isfinite(found.samples[..., 0]).all()
    assert np.isfinite(found.mean[:, 1]).all()  # the other target's outputs are sound
    # An infinite mean gives density zero, which is a number; a NaN gives none.
    assert np.isnan(found.log_density).all() == np.isnan(bad)


@pytest.mark.parametrize("likelihood", [categorical(3), bernoulli()])
def test_one_nan_draw_makes_class_probabilities_nan(likelihood):
    posterior = linear(likelihood)
    tree = random_draws(posterior)
    tree["network"]["layer0"]["bias"][2, 39, 0] = np.nan
    found = pool(posterior, draws_in_memory(tree), X, LABELS % 2)
    assert np.isnan(found.probabilities).all()
    assert np.isnan(found.log_density).all()


def test_density_zero_in_every_draw_is_minus_infinity():
    posterior = linear(gaussian(scale=1e-3))
    tree = random_draws(posterior)
    found = pool(posterior, draws_in_memory(tree), X, np.full((ROWS, 1), 1e30, np.float32))
    np.testing.assert_array_equal(found.log_density, -np.inf)


def test_classification():
    posterior = linear(categorical(3))
    tree = random_draws(posterior)
    found = pool(posterior, in_blocks(tree, [10, 30]), X, LABELS)
    log_p = log_softmax(outputs_of(tree), axis=-1)
    probabilities = np.exp(log_p).mean(axis=(0, 1))
    np.testing.assert_allclose(found.probabilities, probabilities, rtol=1e-4)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(
        found.log_density, np.log(probabilities[np.arange(ROWS), LABELS]), rtol=1e-4
    )
    assert found.mean is found.variance is found.epistemic is found.samples is None


def test_two_classes_with_one_output():
    posterior = linear(bernoulli())
    tree = random_draws(posterior)
    found = pool(posterior, draws_in_memory(tree), X, LABELS % 2)
    p = (1 / (1 + np.exp(-outputs_of(tree)[..., 0]))).mean(axis=(0, 1))
    np.testing.assert_allclose(found.probabilities, np.stack([1 - p, p], axis=1), rtol=1e-4)
    np.testing.assert_allclose(
        found.log_density, np.log(found.probabilities[np.arange(ROWS), LABELS % 2]), rtol=1e-4
    )


def test_a_sampled_scale_is_part_of_the_draw():
    posterior = linear(gaussian(2, scale="sampled"))
    tree = random_draws(posterior)
    found = pool(posterior, draws_in_memory(tree), X, Y)
    sd = np.exp(tree["likelihood"]["log_scale"].astype(np.float64))[:, :, None, :]
    each = st.norm(outputs_of(tree), sd).logpdf(Y).sum(axis=-1)
    np.testing.assert_allclose(
        found.log_density, logsumexp(each, axis=(0, 1)) - np.log(120), rtol=1e-4
    )
    np.testing.assert_allclose(
        found.variance - found.epistemic,
        np.broadcast_to((sd**2).mean(axis=(0, 1)), (ROWS, 2)),
        rtol=1e-4,
    )


def test_parts_of_a_table_are_the_whole_table(tree):
    whole = pool(HETERO, draws_in_memory(tree), X, Y, seed=5)
    rest = pool(HETERO, draws_in_memory(tree), X[3:], Y[3:], seed=5, first_row=3)
    np.testing.assert_allclose(rest.samples, whole.samples[:, 3:], rtol=1e-5, atol=1e-6)
    moved = pool(HETERO, draws_in_memory(tree), X[3:], Y[3:], seed=5)
    assert np.abs(moved.samples - whole.samples[:, 3:]).max() > 0.1


def test_without_targets_nothing_is_scored(tree, pooled):
    found = pool(HETERO, draws_in_memory(tree), X, seed=5)
    assert found.log_density is None
    np.testing.assert_allclose(found.mean, pooled.mean, rtol=1e-5)
    np.testing.assert_allclose(found.samples, pooled.samples, rtol=1e-5, atol=1e-6)


def test_per_draw_has_chain_and_draw_axes(tree):
    outputs = outputs_of(tree)
    found = per_draw(HETERO, in_blocks(tree, [3, 30, 7]), X, Y)
    assert found["samples"].shape == (3, 40, ROWS, 2)
    assert found["log_density"].shape == (3, 40, ROWS)
    np.testing.assert_allclose(found["mean"], outputs[..., :2], rtol=1e-4, atol=1e-5)
    sd = np.log1p(np.exp(outputs[..., 2:])) + 1e-4
    np.testing.assert_allclose(found["variance"], sd**2, rtol=1e-3)
    each = st.norm(outputs[..., :2], sd).logpdf(Y).sum(axis=-1)
    np.testing.assert_allclose(found["log_density"], each, rtol=1e-3, atol=1e-4)
    residual = (found["samples"] - found["mean"]) / np.sqrt(found["variance"])
    np.testing.assert_allclose(residual.std(), 1, rtol=0.1)


@pytest.mark.parametrize("every", [3, 7, 40, 100])
def test_thinned_keeps_every_so_many_of_each_chain(every, tree, monkeypatch):
    monkeypatch.setattr(predictive, "BATCH", 16)
    found = per_draw(HETERO, thinned(in_blocks(tree, [3, 30, 7]), every), X)
    np.testing.assert_allclose(
        found["mean"], outputs_of(tree)[:, ::every, :, :2], rtol=1e-4, atol=1e-5
    )
    assert "log_density" not in found


def test_thinned_draws_do_not_keep_the_others_in_memory(tree):
    whole = in_blocks(tree, [40])
    [block] = whole.blocks()
    [few] = thinned(whole._replace(blocks=lambda: [block]), 4).blocks()
    assert few.shape[1] == 10
    assert not np.shares_memory(few, block)


def test_per_draw_takes_a_seed(tree):
    one, again, other = (
        per_draw(HETERO, draws_in_memory(tree), X, seed=seed)["samples"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert np.all(one != other)


def test_per_draw_of_classes():
    posterior = linear(categorical(3))
    tree = random_draws(posterior)
    found = per_draw(posterior, draws_in_memory(tree), X)
    assert set(found) == {"probabilities"}
    expected = np.exp(log_softmax(outputs_of(tree), axis=-1))
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], None, r"x: found shape \(0, 2\), expected \(rows, features\), at least 1 row"),
        (X[0], None, r"x: found shape \(2,\), expected \(rows, features\)"),
        (X, Y[:1], r"y: found shape \(1, 2\), expected \(rows, targets\) with the 7 rows of x"),
        (X, Y[:, 0], r"y: found shape \(7,\), expected \(rows, targets\)"),
    ],
)
def test_rows_that_do_not_fit(x, y, message, tree):
    for function in (pool, per_draw):
        with pytest.raises(InputError, match=message):
            function(HETERO, draws_in_memory(tree), x, y)


def test_blocks_that_do_not_hold_all_draws(tree):
    whole = draws_in_memory(tree)
    short = Draws(whole.layout, 3, 41, whole.blocks)
    with pytest.raises(ValueError, match="gave 40 draws per chain, expected 41"):
        pool(HETERO, short, X)


def test_draws_in_memory_keeps_the_layout(tree):
    draws = draws_in_memory(tree)
    assert (draws.chains, draws.draws) == (3, 40)
    (flat,) = draws.blocks()
    back = trees.unflatten(flat, draws.layout)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
