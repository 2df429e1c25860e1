"""Nested R-hat, moments a block at a time, and the score of a growing pool."""

import tracemalloc

import arviz_stats.base
import numpy as np
import pytest

from bnnmcmc.convergence import (
    batch_ess,
    chainwise_moments_rhat,
    mean_ess,
    moments_rhat,
    nested_rhat,
    stream_moments,
)
from bnnmcmc.running import running_lppd

ARVIZ = arviz_stats.base.array_stats


def correlated(chains, draws, n, rho, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(chains, draws, n))
    for t in range(1, draws):
        values[:, t] = rho * values[:, t - 1] + np.sqrt(1 - rho**2) * values[:, t]
    return values


def in_blocks(values, size):
    return (values[:, low : low + size] for low in range(0, values.shape[1], size))


@pytest.mark.parametrize("superchains", [[0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2], [0] * 3 + [1] * 3])
def test_nested_rhat_is_arvizs(superchains):
    values = np.moveaxis(correlated(6, 40, 5, 0.7), 2, 0)
    values += np.array(superchains)[:, None] * np.array([0, 0.1, 0.5, 2, 5])[:, None, None]
    found = nested_rhat(values, np.array(superchains))
    expected = [ARVIZ.rhat_nested(v, np.array(superchains)) for v in values]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 7, 50, 200])
def test_moments_of_blocks_are_those_of_the_whole(size):
    values = correlated(4, 203, 6, 0.5) + 1000.0
    moments = stream_moments(in_blocks(values, size), 203, parts=4)
    kept = values[:, 3:].reshape(4, 4, 50, 6)
    np.testing.assert_allclose(moments.means, kept.mean(axis=2), rtol=1e-12)
    np.testing.assert_allclose(moments.variances, kept.var(axis=2, ddof=1), rtol=1e-8)


def test_streamed_rhat_is_arvizs():
    values = correlated(4, 200, 3, 0.9) + np.arange(4)[:, None, None] * np.array([0, 0.3, 3])
    halves = stream_moments(in_blocks(values, 17), 200, parts=2)
    expected = [ARVIZ.rhat(values[..., k], method="split") for k in range(3)]
    np.testing.assert_allclose(moments_rhat(halves), expected, rtol=1e-8)
    groups = np.array([0, 0, 1, 1])
    nested = [ARVIZ.rhat_nested(values[..., k], groups, method="split") for k in range(3)]
    np.testing.assert_allclose(moments_rhat(halves, groups), nested, rtol=1e-8)
    quarters = stream_moments(in_blocks(values, 17), 200, parts=4)
    parts = values.reshape(4, 4, 50, 3)
    alone = [[ARVIZ.rhat(parts[c, ..., k], method="identity") for k in range(3)] for c in range(4)]
    np.testing.assert_allclose(chainwise_moments_rhat(quarters), alone, rtol=1e-8)


def test_batch_ess_is_near_that_of_the_autocorrelations():
    values = correlated(20, 4000, 4, 0.8)
    found = batch_ess(stream_moments(in_blocks(values, 100), 4000, parts=25)).mean()
    expected = mean_ess(np.moveaxis(values, 1, 2)[:, :, None]).mean()
    assert found == pytest.approx(expected, rel=0.15)
    assert found == pytest.approx(4000 / 9, rel=0.15)  # (1 + rho) / (1 - rho) = 9


def test_a_draw_that_is_not_finite_shows_and_a_wrong_count_is_refused():
    values = correlated(3, 40, 2, 0.0)
    values[1, 30, 0] = np.nan
    found = stream_moments(in_blocks(values, 6), 40)
    assert np.isnan(found.means[1, 3, 0])
    assert np.isfinite(found.means[1, :3]).all()
    assert np.isnan(moments_rhat(found)[0])
    for draws in (39, 41):
        with pytest.raises(ValueError, match=r"found 40 draws|expected"):
            stream_moments(in_blocks(values, 6), draws)
    with pytest.raises(ValueError, match="parts of two"):
        stream_moments(in_blocks(values, 6), 7)


def test_memory_does_not_grow_with_the_draws():
    def peak(draws):
        rng = np.random.default_rng(0)
        blocks = (rng.normal(size=(50, 10, 100)).astype(np.float32) for _ in range(draws // 10))
        tracemalloc.start()
        moments_rhat(stream_moments(blocks, draws))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(1000) < 1.1 * peak(100)


def test_running_lppd_against_its_formula():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 9, 5))
    found = running_lppd(values)
    assert found.draws.tolist() == [1, 2, 3, 5, 9]
    assert found.chains.tolist() == [1, 2, 3, 6]

    def lppd(some):
        return np.log(np.exp(some).reshape(-1, 5).mean(axis=0)).mean()

    np.testing.assert_allclose(found.by_draws, [lppd(values[:, :d]) for d in found.draws])
    assert found.by_chains[-1] == pytest.approx(lppd(values))
    assert found.by_chains[0] == pytest.approx(np.mean([lppd(v) for v in values]))
    assert found.gain_draws == pytest.approx(lppd(values) - lppd(values[:, :5]))
    assert np.isnan(running_lppd(values[:1, :1]).gain_chains)


def test_running_lppd_says_what_helps():
    rng = np.random.default_rng(1)
    # Chains in different places, each draw of a chain the same: only chains help.
    apart = np.repeat(rng.normal(size=(16, 1, 30)), 50, axis=1)
    found = running_lppd(apart)
    assert found.gain_draws == pytest.approx(0, abs=1e-9)
    assert found.gain_chains > 0.01
    # Draws that differ, chains that do not.
    same = np.repeat(rng.normal(scale=2, size=(1, 50, 30)), 16, axis=0)
    found = running_lppd(same)
    assert found.gain_chains == pytest.approx(0, abs=1e-9)
    assert found.gain_draws > 0.01
