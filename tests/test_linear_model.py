"""A linear model with known noise, through the same path a user takes, against algebra."""

import json

import arviz_stats.base as stats
import numpy as np
import pytest
from rich.console import Console

from bnnmcmc.config import read_config
from bnnmcmc.inputs import read_dataset
from bnnmcmc.pipeline import start_run
from bnnmcmc.run import Run

SIGMA, PRIOR_SD = 0.7, 1.5

CONFIG = f"""
[data]
source = "sklearn:diabetes"
features = ["age", "bmi", "bp", "s3", "s5"]

[model]
hidden = []

[likelihood]
scale = {SIGMA}

[prior]
scale = {PRIOR_SD}

[ensemble]
members = 4
max_epochs = 30

[run]
arviz = "none"

[sampler]
"""

SAMPLERS = {
    # Unadjusted: the mean of a Gaussian is free of its bias, the variance is not.
    "mclmc": "warmup = 2000\ndraws = 2000\nthin = 2\nenergy_variance_end = 1e-4",
    "nuts": 'kernel = "nuts"\nwarmup = 300\ndraws = 500',
    "hmc": 'kernel = "hmc"\nwarmup = 500\ndraws = 500\nnum_leapfrog = 10',
}


def closed_form(run):
    """Return mean and covariance of (bias, weights) given the rows sampled on."""
    x = np.column_stack([np.ones(len(run.x)), run.x])
    precision = x.T @ x / SIGMA**2 + np.eye(x.shape[1]) / PRIOR_SD**2
    covariance = np.linalg.inv(precision)
    return covariance @ x.T @ run.y[:, 0] / SIGMA**2, covariance


@pytest.mark.parametrize(
    "sampler", [pytest.param(s, marks=pytest.mark.slow if s != "mclmc" else []) for s in SAMPLERS]
)
def test_mean_over_draws_is_the_closed_form(tmp_path, sampler):
    (tmp_path / "linear.toml").write_text(CONFIG + SAMPLERS[sampler])
    config = read_config(tmp_path / "linear.toml")
    folder = tmp_path / "run"
    quiet = Console(quiet=True)
    dataset = read_dataset(config)
    assert start_run(config, dataset, folder, name="linear", command="-", console=quiet)
    run = Run.open(folder)
    layer = run.load_draws()["network"]["layer0"]
    draws = np.concatenate([layer["bias"], layer["weight"][..., 0]], axis=-1).astype(float)
    mean, covariance = closed_form(run)
    for i in range(draws.shape[-1]):
        ess = float(stats.array_stats.ess(draws[..., i], method="bulk"))
        assert ess > 400
        error = draws[..., i].mean() - mean[i]
        assert abs(error) < 4.5 * np.sqrt(covariance[i, i] / ess)
        # Within 4.5 standard errors of a standard deviation, 1 / sqrt(2 ESS), and 5 % of bias.
        ratio = draws[..., i].std() / np.sqrt(covariance[i, i])
        ess = float(stats.array_stats.ess(draws[..., i], method="sd"))
        allowed = 4.5 / np.sqrt(2 * ess) + (0.05 if sampler == "mclmc" else 0)
        assert abs(ratio - 1) < allowed
    # The pooled predictive of this model is known too: N(x mean, sigma^2 + x C x).
    test = dataset.x[dataset.test]
    rows = np.column_stack([np.ones(len(test)), test])
    variance = SIGMA**2 + np.einsum("ni,ij,nj->n", rows, covariance, rows)
    error = dataset.y[dataset.test][:, 0] - rows @ mean
    exact = np.mean(-0.5 * np.log(2 * np.pi * variance) - error**2 / (2 * variance))
    found = json.loads((folder / "metrics.json").read_text())["test"]["posterior"]["lppd"]
    assert found == pytest.approx(exact, abs=0.01)
