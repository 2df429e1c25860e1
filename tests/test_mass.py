"""Metrics: the algebra against dense matrices, their estimates, and what they do to the draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_stats.base import array_stats
from blackjax.mcmc.metrics import LowRankInverseMassMatrix

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.placement import gather, place, spread
from bnnmcmc.samplers import mass
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import (
    at_rest,
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    sample_density,
    start_chains,
)

SIZE = 100
rng = np.random.default_rng(0)
AXES = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]


def rotated(spectrum):
    """Return covariance and precision with these variances along `AXES`."""
    return (AXES * spectrum) @ AXES.T, (AXES / spectrum) @ AXES.T


# Three narrow and three wide directions, the rest around one: a condition of 10^4.
SPECTRUM = np.concatenate([[1e-3, 3e-3, 1e-2], np.geomspace(0.7, 1.4, SIZE - 6), [2.0, 5.0, 10.0]])
COVARIANCE, PRECISION = rotated(SPECTRUM)


def ill(x):
    return -0.5 * x @ jnp.asarray(PRECISION, x.dtype) @ x


def some_metric(kind):
    """Return a metric of a kind, and its inverse mass matrix."""
    if kind == "diagonal":
        found = np.geomspace(0.1, 3.0, SIZE)
        return jnp.asarray(found), np.diag(found)
    if kind == "dense":
        return mass.dense(jnp.asarray(COVARIANCE)), COVARIANCE
    sigma, vectors, lam = np.geomspace(0.5, 2.0, SIZE), AXES[:, :4], np.array([1e-3, 0.1, 5.0, 1.0])
    inner = np.eye(SIZE) + (vectors * (lam - 1)) @ vectors.T
    metric = LowRankInverseMassMatrix(*map(jnp.asarray, (sigma, vectors, lam)))
    return metric, sigma[:, None] * inner * sigma


each_metric = pytest.mark.parametrize("kind", mass.METRICS)


@each_metric
def test_velocity_energy_and_momenta_are_those_of_the_matrix(kind):
    with jax.enable_x64(True):
        metric, inverse = some_metric(kind)
        p = rng.normal(size=SIZE)
        np.testing.assert_allclose(mass.velocity(metric, p), inverse @ p, rtol=1e-9, atol=1e-10)
        moved = mass.displacement(metric, 0.3, jnp.asarray(p))
        np.testing.assert_allclose(moved, 0.3 * inverse @ p, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(mass.kinetic(metric, p), 0.5 * p @ inverse @ p, rtol=1e-9)
        # A momentum is linear in the noise, so the images of unit vectors say it all.
        root = jax.vmap(functools.partial(mass.momentum, metric), out_axes=1)(jnp.eye(SIZE))
        np.testing.assert_allclose(root @ root.T @ inverse, np.eye(SIZE), atol=1e-8)


low_rank = jax.jit(mass.low_rank, static_argnums=3)


def gaussian_draws(number):
    draws = rng.normal(size=(number, SIZE)) * np.sqrt(SPECTRUM) @ AXES.T + 3.0
    gradients = -(draws - 3.0) @ PRECISION
    return jnp.asarray(draws, jnp.float32), jnp.asarray(gradients, jnp.float32)


def condition(metric):
    """Condition of the precision as it is seen in the coordinates of a metric."""
    inverse = np.asarray(jax.vmap(functools.partial(mass.velocity, metric))(jnp.eye(SIZE)))
    values = np.linalg.eigvals(np.asarray(inverse, np.float64) @ PRECISION).real
    return values.max() / values.min()


def test_a_low_rank_estimate_takes_the_extreme_directions():
    """And more of them with more rank; rows that are not in use are of no consequence."""
    found = {}
    for rank in (3, 6, 20):
        x, g = gaussian_draws(300)
        found[rank] = condition(low_rank(x, g, 300, rank, 1.5))
    assert condition(jnp.ones(SIZE)) > 9000
    assert found[20] < 10
    assert found[20] < found[3] / 3
    x, g = gaussian_draws(60)
    full = low_rank(x, g, 60, 10, 1.5)
    filled = [jnp.concatenate([part, jnp.full((40, SIZE), 1e3)]) for part in (x, g)]
    padded = low_rank(*filled, 60, 10, 1.5)
    inverse = [jax.vmap(functools.partial(mass.velocity, m))(jnp.eye(SIZE)) for m in (full, padded)]
    np.testing.assert_allclose(*inverse, rtol=0.02, atol=1e-3)


def test_a_low_rank_estimate_without_draws_is_the_unit():
    x, g = gaussian_draws(20)
    for count in (0, 1):
        metric = low_rank(x, g, count, 5, 2.0)
        np.testing.assert_array_equal(mass.velocity(metric, x[0]), x[0])


def test_cutoff_leaves_out_what_is_near_the_diagonal():
    x, g = gaussian_draws(300)
    used = [int(jnp.sum(low_rank(x, g, 300, 20, c).lam != 1.0)) for c in (1.1, 8.0, 1e6)]
    assert used[0] > used[1] > used[2] == 0


def test_the_diagonal_of_draws_and_gradients():
    scales = np.geomspace(1e-3, 10.0, 20)
    draws = rng.normal(size=(50, 20)) * scales
    rule = mass.score_estimator()
    _, window = rule.init(jnp.zeros(20))
    for x in draws:
        window = rule.update(window, jnp.asarray(x), jnp.asarray(-x / scales**2))
    np.testing.assert_allclose(rule.final(window)[0], scales**2, rtol=1e-3)


def test_a_dense_metric_that_does_not_fit_is_refused():
    position = jax.ShapeDtypeStruct((20_000,), jnp.float32)
    with pytest.raises(
        InputError, match=r"dense metric of 20000 parameters takes 3.2 GB .*low_rank"
    ):
        jax.eval_shape(nuts(metric="dense").warmup(100).init, position)


def test_a_network_warm_up_needs_two_parameters():
    with pytest.raises(InputError, match=r"sampler\.adaptation: .*at least 2 parameters"):
        nuts(adaptation="network").warmup(100).init(jnp.zeros(1))


# ------------------------------------------------------------------------------- known posteriors


def run(kernel, draws=600, warmup=700):
    starts = jax.random.normal(jax.random.key(0), (4, SIZE))
    return sample_density(ill, starts, kernel=kernel, warmup=warmup, draws=draws, seed=1)


def failures(draws):
    """Return what is wrong with means and variances along the axes of the density."""
    found = []
    along = np.asarray(draws, np.float64) @ AXES
    for power, truth in ((1, np.zeros(SIZE)), (2, SPECTRUM)):
        for i in range(SIZE):
            x = along[..., i] ** power
            ess = array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean")
            error = array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean")
            if ess < 400:
                found.append(f"ess {ess:.0f}: power {power} along {i}")
            elif abs(x.mean() - truth[i]) > 4 * error:
                found.append(f"power {power} along {i}: {x.mean():.3g}, not {truth[i]:.3g}")
    return found


@functools.cache
def trees_of(metric):
    samples = run(nuts(metric=metric, max_rank=10))
    return failures(samples.draws), samples.stats["gradients"].mean()


@pytest.mark.parametrize("metric", ["low_rank", pytest.param("dense", marks=pytest.mark.slow)])
def test_a_condition_of_ten_thousand(metric):
    """The law is the same as without; trees are far shorter."""
    found, gradients = trees_of(metric)
    assert found == []
    assert gradients < 20  # 200 with the diagonal metric


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["low_rank", "dense"])
def test_hmc_with_a_metric(metric):
    assert failures(run(hmc(num_leapfrog=8, metric=metric, max_rank=10)).draws) == []


@pytest.mark.slow
def test_the_network_warm_up_ends_in_the_same_law():
    samples = run(nuts(adaptation="network", metric="low_rank", max_rank=10), warmup=2500)
    assert failures(samples.draws) == []
    early = samples.warmup_stats["gradients"][:, :100]
    assert set(np.unique(early)) == {samples.warmup_stats["gradients"].min()}  # the walk


@pytest.mark.parametrize("metric", [pytest.param("low_rank", marks=pytest.mark.slow), "dense"])
def test_momenta_that_do_not_know_the_metric_fail(monkeypatch, metric):
    """The metric in the kinetic energy, but not in the law of the momenta."""
    monkeypatch.setattr(mass, "momentum", lambda metric, noise: noise)
    found = run(nuts(metric=metric, max_rank=10), draws=400).draws
    assert any("not" in f for f in failures(found))


# ---------------------------------------------------------------------------------------- resuming

LAYOUT = trees.layout(jnp.zeros(8))


def leaning(x):
    return -0.5 * jnp.sum(x**2) - 20.0 * jnp.square(jnp.sum(x)) - 0.1 * jnp.sum(x**4)


@pytest.mark.parametrize(
    ("metric", "adaptation", "mode"),
    [
        pytest.param("low_rank", "window", "vmap", marks=pytest.mark.slow),
        ("dense", "window", "map"),
        ("low_rank", "network", "vmap"),
    ],
)
def test_a_metric_resumes_bit_for_bit(metric, adaptation, mode):
    kernel = nuts(max_depth=5, metric=metric, max_rank=3, adaptation=adaptation)
    program = build_program(
        leaning, kernel, LAYOUT, place(3, mode=mode), warmup=120, draws=12, thin=1
    )
    starts = jax.random.normal(jax.random.key(1), (3, 8))

    def through(max_count, from_disk):
        carry, found = start_chains(program, starts, 3, ()), {}
        for stage, schedule in (("warmup", program.warmup), ("sampling", program.sampling)):
            carry = finish_warmup(program, carry) if stage == "sampling" else carry
            first, blocks = 0, []
            while first < schedule.records:
                blocks_left = run_blocks(
                    program, stage, carry, 3, (), first=first, max_count=max_count
                )
                for block in blocks_left:
                    blocks.append(block._replace(carry=None))
                    carry, first = block.carry, block.start + block.count
                    if from_disk:
                        saved = jax.tree.map(np.array, gather(at_rest(carry), program.placement))
                        carry = spread(saved, program.placement)
                        break
            found |= {f"{stage}/{n}": v for n, v in join_stats(blocks).items()}
        found["draws"] = np.concatenate([block.draws for block in blocks], axis=1)
        return found

    whole, cut = through(None, False), through(7, True)
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name], err_msg=name)
    assert np.all(np.isfinite(whole["draws"]))
    assert program.traces == {"start": 1, "warm": 1, "finish": 1, "draw": 1}
