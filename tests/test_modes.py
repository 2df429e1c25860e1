"""How many chains are enough, and what a run's chains say of the modes they missed."""

import math

import numpy as np
import pytest
import scipy.integrate

from bnnmcmc import modes
from bnnmcmc.errors import InputError

# To four digits, as printed in the paper; what it computes with is not rounded.
SEED_EXAMPLE = [0.5665, 0.3505, 0.0830]
UNROUNDED = [0.56651, 0.35050, 0.08299]


def test_the_papers_example():
    # By hand: sum 1 / p_i - sum 1 / (p_i + p_j) + 1.
    a, b, c = SEED_EXAMPLE
    by_hand = 1 / a + 1 / b + 1 / c - 1 / (a + b) - 1 / (a + c) - 1 / (b + c) + 1
    assert modes.expected_chains(SEED_EXAMPLE) == pytest.approx(by_hand, rel=1e-12)
    assert modes.expected_chains(UNROUNDED) == pytest.approx(12.731, abs=5e-4)
    assert modes.chains_needed(UNROUNDED, 0.99) == 1274
    assert modes.chains_needed(UNROUNDED, 0.95) == 255
    assert modes.chains_needed([1.0]) == 20
    assert modes.chains_needed([1.0], 0.99) == 100


@pytest.mark.parametrize("count", [1, 2, 5, 12, 16, 17, 50, 1000])
def test_equal_modes_are_the_coupon_collectors(count):
    expected = count * sum(1 / k for k in range(1, count + 1))
    assert modes.expected_chains(np.full(count, 1 / count)) == pytest.approx(expected, rel=1e-6)


def test_sum_and_integral_agree_and_small_probabilities_are_kept():
    rng = np.random.default_rng(0)
    for count in (2, 7, 14):
        p = rng.dirichlet(np.full(count, 0.5))
        p = (p + 1e-4) / (p + 1e-4).sum()
        assert modes._integral(p) == pytest.approx(modes.expected_chains(p), rel=1e-6)
    rare = np.array([1 - 1e-9, 1e-9])
    assert modes.expected_chains(rare) == pytest.approx(1e9, rel=1e-6)
    many = rng.dirichlet(np.full(40, 0.3)) + 1e-5
    many /= many.sum()
    found = scipy.integrate.quad(
        lambda u: -np.expm1(np.log(-np.expm1(-many * np.exp(u))).sum()) * np.exp(u),
        -30, math.log(60 / many.min()), limit=2000, epsabs=0, epsrel=1e-9,
    )[0]  # fmt: skip
    assert modes.expected_chains(many) == pytest.approx(found, rel=1e-6)


def test_the_bound_holds_in_a_simulation_and_the_exact_number_is_smaller():
    rng, p = np.random.default_rng(0), np.array([0.6, 0.3, 0.1])
    draws = rng.choice(3, size=(20_000, 200), p=p)
    first = np.array([[np.argmax(row == k) for k in range(3)] for row in draws])
    needed = 1 + first.max(axis=1)
    assert needed.mean() == pytest.approx(modes.expected_chains(p), rel=0.02)
    exact = modes.chains_for(p, 0.95)
    assert exact < modes.chains_needed(p, 0.95)
    assert np.mean(needed <= exact) == pytest.approx(0.95, abs=0.01)
    assert np.mean(needed <= exact - 2) < 0.95


def planted(rng, labels, draws=100, inputs=20, gap=3.0):
    """Return predictions (chain, draw, input) of chains in modes `gap` deviations apart."""
    centres = np.random.default_rng(99).normal(size=(10, inputs))
    centres *= gap / np.sqrt(2)
    return centres[labels][:, None] + rng.normal(size=(len(labels), draws, inputs))


def modes_of(values):
    draws = values.shape[1]
    variances = values.var(axis=1, ddof=1)
    return modes.find_modes(
        modes.function_distances(values.mean(axis=1), variances, variances / draws)
    )


@pytest.mark.parametrize("chains", [10, 30, 100])
def test_planted_modes_are_recovered_and_the_interval_covers_the_unseen_mass(chains):
    rng, p = np.random.default_rng(chains), np.array([0.6, 0.3, 0.1])
    covered = right = total_covered = 0
    trials = 60
    for _ in range(trials):
        labels = rng.choice(3, size=chains, p=p)
        found = modes_of(planted(rng, labels))
        seen = np.unique(labels)
        right += len(found.counts) == len(seen) and np.array_equal(
            found.counts, np.sort(np.bincount(labels)[seen])[::-1]
        )
        unseen = modes.unseen(found.counts)
        missing = 1 - p[seen].sum()
        covered += unseen.low <= missing + 1e-12 and missing <= unseen.high
        total_covered += unseen.total_low <= 3 <= unseen.total_high + 1e-9
    assert right == trials
    assert covered >= 0.95 * trials
    assert total_covered >= 0.95 * trials
    print(chains, "chains: covers", covered / trials, "number of modes", total_covered / trials)


@pytest.mark.parametrize("chains", [10, 50, 200])
def test_the_interval_covers_with_many_rare_modes_too(chains):
    rng = np.random.default_rng(chains)
    p = 1 / np.arange(1, 101)
    p /= p.sum()
    covered = 0
    for _ in range(500):
        counts = np.bincount(rng.choice(100, size=chains, p=p), minlength=100)
        unseen = modes.unseen(counts)
        covered += unseen.low <= p[counts == 0].sum() <= unseen.high
    print(chains, covered / 500)
    assert covered >= 0.9 * 500


def test_chains_that_differ_by_their_noise_only_are_one_mode():
    rng = np.random.default_rng(0)
    found = modes_of(planted(rng, np.zeros(30, int), draws=50))
    assert found.counts.tolist() == [30]
    # Correlated draws: their means differ by 0.8 deviations, which is their error, passed as such.
    steps, rho = rng.normal(size=(8, 300, 100)), 0.98
    for t in range(1, 300):
        steps[:, t] = rho * steps[:, t - 1] + np.sqrt(1 - rho**2) * steps[:, t]
    error = np.full((8, 100), (1 + rho) / (1 - rho) / 300)
    means, ones = steps.mean(axis=1), np.ones((8, 100))
    assert modes.find_modes(modes.function_distances(means, ones, 0 * error)).counts.max() < 8
    found = modes.find_modes(modes.function_distances(means, ones, error))
    assert found.counts.tolist() == [8]


def test_a_frozen_chain_and_one_that_is_not_finite_are_modes_of_their_own():
    rng = np.random.default_rng(0)
    values = planted(rng, np.zeros(6, int))
    values[2] = 7.0
    values[4] = np.nan
    found = modes_of(values)
    assert found.counts.tolist() == [4, 1, 1]
    assert found.labels[[0, 1, 3, 5]].tolist() == [0, 0, 0, 0]
    assert sorted(found.order.tolist()) == list(range(6))
    assert sorted(found.order[:4].tolist()) == [0, 1, 3, 5]


def test_sentences():
    say = lambda counts: modes.say_unseen(modes.unseen(counts))  # noqa: E731
    text = say([2, 2, 2, 1, 1, 1, 1])
    assert text.startswith("7 functional modes seen in 10 chains, 4 of them once: the unseen share")
    assert "about 40 %" in text
    assert "run 80 or more" in text
    assert "each by a single one" in say([1] * 10)
    assert "run 200 or more" in say([1] * 10)
    assert say([10]).startswith(
        "1 functional mode seen in 10 chains: the unseen share is about 0 %"
    )
    assert "run 36 or more" in say([10])
    assert "run 36 or more" in say([30])
    assert modes.unseen([36]).high < 0.1 < modes.unseen([35]).high
    assert "rule out one of 10 %, run 70 or more" in say([20, 18, 1, 1])
    assert "little that is new" in say([60, 30, 10])
    assert "cannot be said" in say([1])


def test_mistakes_are_named():
    for bad in ([], [0.5, 0.4], [1.2, -0.2], [[1.0]], [np.nan, 1.0]):
        with pytest.raises(InputError, match="positive numbers that sum to 1"):
            modes.chains_needed(bad)
    with pytest.raises(InputError, match="between 0 and 1"):
        modes.chains_needed([1.0], 95)
    with pytest.raises(InputError, match="found no chains"):
        modes.unseen([])
