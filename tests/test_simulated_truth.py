"""Intervals hold where the truth is known; epistemic uncertainty is where data are not."""

import numpy as np
import pytest
from simulated import fitted, sampled

import bnnmcmc
from bnnmcmc import metrics

LEVELS = np.array([0.5, 0.8, 0.9, 0.95])
REPETITIONS = 20


def covered(name, seed):
    """Return the share of 200 new rows inside the central intervals, by level."""
    run, x, y = fitted(name, 120, seed)
    found = run.predict(x)
    inside = []
    for level in LEVELS:
        low, high = found.interval(level)
        inside.append(((low <= y) & (y <= high)).mean())
    # What the intervals hold by the model's own account: more than the level, of counts.
    own = [
        (found.cdf(h) - found.cdf(l - 1 if name == "counts" else l)).mean()
        for l, h in (found.interval(level) for level in LEVELS)
    ]
    if name == "counts":
        assert np.all(found.cdf(y - 1) < found.cdf(y))
    return np.array(inside), np.array(own)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heteroscedastic", "skewed", "counts"])
def test_coverage_is_what_it_says(name):
    found, own = np.array([covered(name, seed) for seed in range(REPETITIONS)]).swapaxes(0, 1)
    error = found.std(axis=0, ddof=1) / np.sqrt(REPETITIONS)
    wanted = own.mean(axis=0)
    shown = (np.round(values, 3) for values in (found.mean(axis=0), error, wanted))
    print("{}: {} ± {}, said {}".format(name, *shown))
    assert np.all(wanted > LEVELS - 1e-3)
    assert np.all(np.abs(found.mean(axis=0) - wanted) < 3 * error)


def test_coverage_of_a_few_repetitions():
    found, _ = np.array([covered("heteroscedastic", seed) for seed in range(2)]).swapaxes(0, 1)
    # 400 rows, which share two fits.
    assert np.all(np.abs(found.mean(axis=0) - LEVELS) < 0.1)


@pytest.mark.slow
def test_the_epistemic_share_falls_as_rows_grow():
    shares = []
    for rows in (40, 400):
        run, x, _ = fitted("heteroscedastic", rows, 3)
        found = run.predict(x)
        shares.append((found.epistemic_variance / found.variance).mean())
    assert shares[1] < 0.5 * shares[0]


def test_epistemic_uncertainty_grows_where_there_are_no_data():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-2, -0.7, (60, 1)), rng.uniform(0.7, 2, (60, 1))])
    y = np.sin(2 * x) + 0.1 * rng.normal(size=x.shape)
    order = rng.permutation(120)
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(1, [16], 2, "tanh"), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    run = sampled(posterior, x[order], y[order], members=4, warmup=3000)
    inside = run.predict(x[::3]).epistemic_sd[:, 0]
    gap = run.predict(np.linspace(-0.3, 0.3, 13)[:, None]).epistemic_sd[:, 0]
    far = run.predict(np.linspace(4, 5, 13)[:, None]).epistemic_sd[:, 0]
    assert gap.min() > 2 * np.median(inside)
    assert far.min() > 3 * np.median(inside)
    found = metrics.auroc(inside, np.concatenate([gap, far]))
    assert found.value > 0.95
    assert found.error < 0.05
