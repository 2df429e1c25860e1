"""What is written of the test rows, beyond the scores."""

import jax
import numpy as np
import pytest
from conftest import TINY, write_tiny
from scipy.stats import percentileofscore

from bnnmcmc.results import _pit_of_samples
from bnnmcmc.run import Run


def test_pit_is_the_share_of_samples_below_ties_half():
    rng = np.random.default_rng(0)
    samples, y = rng.integers(0, 9, (50, 7, 2)), rng.integers(0, 9, (7, 2))
    found = _pit_of_samples(samples.astype(float), y.astype(float))
    for row, target in np.ndindex(7, 2):
        expected = percentileofscore(samples[:, row, target], y[row, target], kind="mean") / 100
        assert found[row, target] == pytest.approx(expected)


def test_a_nan_makes_a_pit_nan():
    samples, y = np.zeros((5, 3, 1)), np.zeros((3, 1))
    samples[2, 1], y[2] = np.nan, np.nan
    assert np.isnan(_pit_of_samples(samples, y))[:, 0].tolist() == [False, True, True]


def test_densities_and_entropies_of_single_rows(tmp_path, here):
    text = TINY.replace('target = "y"', 'target = "kind"')
    folder = write_tiny(tmp_path, text=f'{text}\n[likelihood]\nkind = "bernoulli"\n')
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", cwd=folder)
    assert code == 0, err
    run, stored = Run.open(folder / "run"), np.load(folder / "run" / "predictions.npz")
    p, y = stored["probabilities"], stored["y"].astype(int)
    np.testing.assert_allclose(
        stored["log_density_posterior"], np.log(p[np.arange(len(y)), y]), rtol=1e-4, atol=1e-5
    )
    assert run.score()["lppd"] == pytest.approx(stored["log_density_posterior"].mean())
    # By hand, from each draw's probabilities.
    dataset = run.dataset
    x = dataset.x[dataset.test]
    apply = jax.vmap(jax.vmap(lambda params: run.posterior.network.apply(params, x)))
    outputs = np.asarray(apply(run.load_draws()["network"]))[..., 0]
    q = 1 / (1 + np.exp(-outputs.astype(float)))
    entropy = -(q * np.log(q) + (1 - q) * np.log1p(-q))
    np.testing.assert_allclose(stored["expected_entropy"], entropy.mean(axis=(0, 1)), rtol=1e-3)
    total = -(p * np.log(p)).sum(axis=1)
    assert (stored["expected_entropy"] <= total + 1e-6).all()
