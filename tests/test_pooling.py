"""Weights of chains: stacking and pseudo-BMA, on validation rows alone."""

import json
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats as st

import bnnmcmc
from bnnmcmc import predictive
from bnnmcmc.config import parse
from bnnmcmc.errors import InputError
from bnnmcmc.health import ChainStatus
from bnnmcmc.pooling import chain_weights, effective_chains

QUICK = ["sampler.warmup=150", "sampler.draws=20", "ensemble.max_epochs=30"]


def densities(chains=5, rows=200, seed=0):
    """Chains of different quality, none best for all rows."""
    rng = np.random.default_rng(seed)
    y = np.where(rng.random(rows) < 0.7, rng.normal(0, 1, rows), rng.normal(4, 0.5, rows))
    centres = np.array([0.0, 0.3, 4.0, 8.0, -5.0])[:chains]
    return st.norm(centres[:, None], np.array([1, 1, 0.5, 1, 1])[:chains, None]).logpdf(y)


def test_stacking_is_the_best_log_score_of_all_weights():
    log_density = densities()
    weights = chain_weights("stacking", log_density)
    assert weights.sum() == pytest.approx(1)
    p = np.exp(log_density)

    def loss(free):
        w = np.exp(free) / np.exp(free).sum()
        return -np.log(w @ p).mean()

    best = scipy.optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8})
    assert -np.log(weights @ p).mean() <= best.fun + 2e-6
    # The true shares are 0.7 and 0.3; chains that explain nothing get nothing.
    assert weights[2] == pytest.approx(0.3, abs=0.08)
    assert weights[3] + weights[4] < 0.01


def test_stacking_does_not_depend_on_the_units():
    log_density = densities()
    np.testing.assert_allclose(
        chain_weights("stacking", log_density - 1000.0), chain_weights("stacking", log_density)
    )


def test_pseudo_bma_by_its_formula():
    log_density = densities(chains=3, rows=12)[:, :12]
    shares = np.random.default_rng(4).dirichlet(np.ones(12), 1000)
    expected = np.mean(
        [np.exp(12 * log_density @ a) / np.exp(12 * log_density @ a).sum() for a in shares], axis=0
    )
    np.testing.assert_allclose(chain_weights("pseudo_bma", log_density, 4), expected, rtol=1e-8)


@pytest.mark.parametrize("method", ["equal", "stacking", "pseudo_bma"])
def test_chains_that_are_alike_count_the_same(method):
    weights = chain_weights(method, np.tile(densities()[:1], (4, 1)))
    np.testing.assert_allclose(weights, 0.25)
    assert effective_chains(weights) == pytest.approx(4)


def test_mistakes():
    with pytest.raises(InputError, match="expected equal, stacking or pseudo_bma"):
        chain_weights("best", densities())
    with pytest.raises(InputError, match="found a NaN"):
        chain_weights("stacking", densities() * np.nan)
    impossible = densities()
    impossible[:, 7] = -np.inf
    with pytest.raises(InputError, match="every chain gives row 7 of the validation part"):
        chain_weights("stacking", impossible)
    with pytest.raises(InputError, match=r'pool: .*needs sampler\.rows = "train"'):
        parse({"data": {"path": "a"}, "pool": {"weights": "stacking"}}, "a.toml")


def test_a_run_stacks_on_its_validation_rows_alone(tiny, here):
    chosen = ["sampler.rows=train", "pool.weights=stacking", "data.split.validation=0.3"]
    code, out, err = here("run", "tiny.toml", "--out", "run", "--set", *QUICK, *chosen, cwd=tiny)
    assert code == 0, err
    pool = json.loads((tiny / "run" / "metrics.json").read_text())["pool"]
    assert "stacking weights from the validation rows: worth" in out
    run = bnnmcmc.Run.open(tiny / "run")
    np.testing.assert_allclose(run.weights, pool["of_chains"], rtol=1e-6)
    assert pool["effective_chains"] == pytest.approx(effective_chains(run.weights))
    # By hand: each chain alone, at the validation rows.
    held_out = run.dataset.x[run.dataset.validation], run.dataset.y[run.dataset.validation]
    flat = np.concatenate(list(run.draws.blocks()), axis=1)
    single = predictive.Draws
    each = np.stack(
        [
            predictive.pool(
                run.posterior,
                single(run.draws.layout, 1, flat.shape[1], lambda c=c: [flat[c : c + 1]]),
                *held_out,
            ).log_density
            for c in range(3)
        ]
    )
    np.testing.assert_allclose(run.weights, chain_weights("stacking", each), atol=1e-3)
    # Other test rows change nothing; the weights do change predictions.
    x, y = run.dataset.x.copy(), run.dataset.y.copy()
    x[run.dataset.test], y[run.dataset.test] = 100.0, -100.0
    noise = replace(run, dataset=replace(run.dataset, x=x, y=y)).weighted("stacking")
    np.testing.assert_array_equal(noise.weights, run.weights)
    equal = run.weighted("equal")
    assert equal.pooled_draws.weights is None
    table = bnnmcmc.read_table(tiny / "table.csv").frame.head(6)
    p, q = run.predict(table), equal.predict(table)
    assert not np.allclose(p.mean, q.mean)
    # The validation rows are spent: nothing is calibrated on them as well.
    with pytest.raises(InputError, match=r"cqr: the weights of chains \(stacking\) are fitted"):
        run.calibrated("cqr")
    # Nor are weights fitted on rows that a correction is.
    corrected = equal.calibrated("cqr")
    assert corrected.correction is not None
    with pytest.raises(InputError, match=r"cqr: the weights of chains \(stacking\) are fitted"):
        corrected.weighted("stacking")
    assert corrected.calibrated("none").weighted("stacking").correction is None
    # A thinned pool: as many draws of each chain, evenly.
    few = replace(equal, pool_size=12).pooled_draws
    assert (few.chains, few.draws) == (3, 4)


def test_few_draws_have_samples_in_proportion_to_the_weights():
    weights = np.array([0.5, 0.24, 0.12, 0.08, 0.06])
    draws = predictive.Draws(None, 5, 4, list)._replace(weights=weights)
    slots, per_draw = 20, 50
    # Each sample is the number of its chain.
    samples = np.broadcast_to(np.arange(slots)[:, None] % 5, (slots, per_draw))[..., None, None]
    kept = predictive._by_weight(samples, draws)
    assert kept.shape[1:] == (1, 1)
    np.testing.assert_allclose(np.bincount(kept.ravel()) / len(kept), weights, atol=0.003)
    assert np.bincount(kept.ravel())[0] == 4 * per_draw


def made_up(rows):
    """A run of random draws, made by hand, whose posterior conditions on these parts."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, 2)), columns=["a", "b"])
    price = pd.Series(10 + 3 * frame["a"] + rng.normal(size=60), name="price")
    split = bnnmcmc.Split(test=0.2, validation=0.4)
    data = bnnmcmc.prepare(bnnmcmc.table_from_arrays(frame, price), task="regression", split=split)
    posterior = bnnmcmc.Posterior(bnnmcmc.mlp(2, [], 2), bnnmcmc.gaussian(), bnnmcmc.normal_prior())
    shapes = jax.eval_shape(posterior.init, jax.random.key(0))
    tree = jax.tree.map(lambda leaf: rng.normal(size=(3, 8, *leaf.shape)) / 2, shapes)
    chosen = np.concatenate([getattr(data, part) for part in rows])
    fine = (ChainStatus("ok", ""),) * 3
    draws = predictive.draws_in_memory(tree)
    return bnnmcmc.Run(
        posterior, draws, {}, data.x[chosen], data.y[chosen], fine, dataset=data
    ), frame.assign(price=price)


def test_weights_are_never_fitted_on_rows_that_the_chains_have_seen():
    run, frame = made_up(["train", "validation"])
    with pytest.raises(
        InputError, match=r'conditions on them; sample with sampler\.rows = "train"'
    ):
        run.weighted("stacking")
    with pytest.raises(InputError, match=r'sampler\.rows = "train"'):
        run.calibrated("cqr")
    with pytest.raises(InputError, match="expected one of equal, stacking"):
        run.weighted("best")
    # Rows of the user's own are the user's word.
    assert run.weighted("pseudo_bma", frame.iloc[run.dataset.validation]).weights.sum() == 1


def test_intervals_of_a_run_corrected_on_its_validation_rows():
    run, frame = made_up(["train"])
    corrected = run.calibrated("cqr")
    held_out = frame.iloc[run.dataset.validation]
    found = corrected.predict(held_out)
    assert found.calibration == "conformalised quantile intervals from 24 held-out rows"
    y = held_out["price"].to_numpy()[:, None]
    low, high = found.interval(0.8)
    # On the very rows: 20 of 24, in the target's own units.
    assert ((low <= y) & (y <= high)).sum() == 20
    own = run.predict(held_out)
    assert own.calibration == ""
    np.testing.assert_array_equal(found.mean, own.mean)
    with pytest.raises(InputError, match="needs a classification"):
        run.calibrated("temperature")
    stacked = run.weighted("stacking")
    assert np.argmax(stacked.weights) == np.argmax(
        predictive.chain_log_densities(
            run.posterior,
            run.draws,
            run.dataset.x[run.dataset.validation],
            run.dataset.y[run.dataset.validation],
        ).sum(axis=1)
    )
