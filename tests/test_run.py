"""The Python API: the same stages as plain functions and values."""

import warnings

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pandas as pd
import pytest

import bnnmcmc
from bnnmcmc import metrics


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 2))
    y = np.sin(x[:, :1]) + 0.1 * rng.normal(size=(120, 1))
    return x, y


@pytest.fixture(scope="module")
def run(rows):
    x, y = rows
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(2, [8], 2, "tanh"), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    ensemble = bnnmcmc.fit_ensemble(
        posterior, x[:80], y[:80], x[80:100], y[80:100], members=3, max_epochs=60
    )
    return bnnmcmc.sample(
        posterior, ensemble.positions, x[:100], y[:100], warmup=400, draws=100, thin=2
    )


def test_every_public_name_loads():
    for name in bnnmcmc.__all__:
        assert getattr(bnnmcmc, name) is not None
    assert set(bnnmcmc.__all__) <= set(dir(bnnmcmc))
    with pytest.raises(AttributeError, match="no attribute 'nuts2'"):
        _ = bnnmcmc.nuts2


def test_axes_are_chain_draw_leaf(run):
    draws = run.load_draws()
    assert draws["network"]["layer0"]["weight"].shape == (3, 100, 2, 8)
    assert run.stats["log_density"].shape == (3, 100)
    assert [chain.status for chain in run.status] == ["ok"] * 3
    # The recorded log-density is that of the draw.
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[1, 7]), draws)
    expected = run.posterior.log_density(one, run.x, run.y)
    assert run.stats["log_density"][1, 7] == pytest.approx(float(expected), rel=1e-4)


def test_predict_and_score_without_any_file(run, rows):
    x, y = rows[0][100:], rows[1][100:]
    prediction = run.predict(x)
    assert prediction.mean.shape == (20, 1)
    # By hand: the mixture over all draws of all chains.
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), run.load_draws())
    each = jax.vmap(lambda position: run.posterior.distribution(position, jnp.asarray(x)).mean)
    np.testing.assert_allclose(prediction.mean, each(flat).mean(axis=0), atol=1e-4)
    scores = run.score(x, y)
    assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((prediction.mean - y) ** 2)), rel=1e-5)
    assert scores["rmse"] < 0.3
    low, high = prediction.interval(0.9)
    assert scores["coverage_90"] == pytest.approx(np.mean((low <= y) & (y <= high)))
    assert np.all(prediction.epistemic_sd < prediction.sd)
    with pytest.raises(bnnmcmc.InputError, match="no test part; give rows"):
        run.score()
    with pytest.raises(bnnmcmc.InputError, match="give y"):
        run.score(x)
    with pytest.raises(bnnmcmc.InputError, match="expected 'target' or 'standardised'"):
        run.score(x, y, units="metres")
    with pytest.raises(bnnmcmc.InputError, match="level: found 90"):
        prediction.interval(90)


def test_shapes_that_would_broadcast_are_refused(rows):
    x, y = rows
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(2, [4], 2), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    with pytest.raises(bnnmcmc.InputError, match=r"use y\[:, None\]"):
        bnnmcmc.fit_ensemble(posterior, x, y[:, 0], members=1)
    narrow = bnnmcmc.Posterior(bnnmcmc.mlp(2, [4], 1), bnnmcmc.gaussian(), bnnmcmc.normal_prior())
    with pytest.raises(bnnmcmc.InputError, match="give the network 2 outputs"):
        bnnmcmc.fit_ensemble(narrow, x, y, members=1)


def test_opened_run_gives_what_the_command_line_wrote(finished):
    import json

    run = bnnmcmc.Run.open(finished / "run")
    metrics_file = json.loads((finished / "run" / "metrics.json").read_text())
    assert run.score(units="standardised") == pytest.approx(metrics_file["test"]["posterior"])
    assert run.score() == pytest.approx(metrics_file["test_target_units"]["posterior"])
    table = pd.read_csv(finished / "table.csv").iloc[run.dataset.test]
    again = run.score(table)  # rows as a user has them: the same scores
    assert again == pytest.approx(run.score(), rel=1e-4)
    frame = run.predict(table).to_frame(0.8)
    assert list(frame.columns)[-2:] == ["y_lower_80", "y_upper_80"]


def test_stored_draws_come_in_small_pieces(finished, monkeypatch):
    run = bnnmcmc.Run.open(finished / "run")
    whole = run.load_draws()
    seven = 7 * run.draws.chains * run.draws.layout.size * 4
    monkeypatch.setattr("bnnmcmc.run.PIECE_BYTES", seven)
    pieces = list(run.draws.blocks())
    assert max(piece.nbytes for piece in pieces) <= seven
    jax.tree.map(np.testing.assert_array_equal, run.load_draws(), whole)


def test_a_frame_in_memory_from_end_to_end():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"size": rng.uniform(50, 150, 90), "city": ["Bonn", "Köln", "Ulm"] * 30})
    price = pd.Series(3000 * frame["size"] + 9000 * (frame["city"] == "Ulm"), name="price")
    data = bnnmcmc.prepare(bnnmcmc.table_from_arrays(frame, price), task="regression")
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(data.x.shape[1], [6], 2), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    x, y = data.x[data.train], data.y[data.train]
    ensemble = bnnmcmc.fit_ensemble(posterior, x, y, members=2, max_epochs=100)
    run = bnnmcmc.sample(
        posterior, ensemble.positions, x, y, dataset=data, warmup=300, draws=50, thin=2
    )
    prediction = run.predict(frame)
    assert prediction.targets == ("price",)
    assert np.corrcoef(prediction.mean[:, 0], price)[0, 1] > 0.95
    assert run.score()["rmse"] < price.std()  # the test part, in target units
    tree = run.to_arviz()
    np.testing.assert_array_equal(tree["observed_data"]["row"], data.train)
    np.testing.assert_allclose(
        tree["observed_data"]["y"].values[:, 0], price[data.train], rtol=1e-5
    )


def test_bare_arrays_and_wrong_widths(finished, run, rows):
    opened = bnnmcmc.Run.open(finished / "run")
    table = pd.read_csv(finished / "table.csv").head(4)
    named = opened.predict(table)
    # An array of the features in the table's order, text and all.
    bare = opened.predict(table[["a", "b", "kind"]].to_numpy())
    np.testing.assert_allclose(bare.mean, named.mean, rtol=1e-6)
    with pytest.raises(bnnmcmc.InputError, match=r"expected \(rows, 2\) as sampled on"):
        run.predict(rows[0][:, :1])
    for value in (run, named, opened):
        assert len(repr(value)) < 200


def test_nonfinite_chain_is_left_out_and_says_so(run, rows):
    from dataclasses import replace

    from bnnmcmc.predictive import draws_in_memory
    from bnnmcmc.run import chain_status

    tree = jax.tree.map(np.array, run.load_draws())
    tree["network"]["layer0"]["bias"][1, 50:] = np.nan
    draws = draws_in_memory(tree)
    status = tuple(chain_status(draws, run.stats, 2))
    broken = replace(run, draws=draws, status=status)
    assert status[1].status == "nonfinite"
    assert status[1].sentence
    assert broken.pooled_chains == [0, 2]
    kept = draws_in_memory(jax.tree.map(lambda leaf: leaf[[0, 2]], tree))
    healthy = replace(run, draws=kept, status=(status[0], status[2]))
    x = rows[0][:5]
    np.testing.assert_allclose(broken.predict(x).mean, healthy.predict(x).mean)


def test_arviz_tree_opens_in_arviz(run, finished):
    matplotlib.use("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ's own, at import
        import arviz as az

    for each in (run, bnnmcmc.Run.open(finished / "run")):
        tree = each.to_arviz()
        groups = {"posterior", "sample_stats", "log_likelihood", "posterior_predictive"}
        assert groups | {"observed_data"} <= set(tree.children)
        assert tree["posterior"].sizes["chain"] == 3
        summary = az.summary(tree, var_names=["network.layer0.bias"])
        assert len(summary) == tree["posterior"]["network.layer0.bias"].shape[-1]
        az.plot_trace_dist(tree, var_names=["network.layer1.bias"])
    # The tree's log-likelihoods are those the score pools.
    values = tree["log_likelihood"]["y"]
    assert values.dims == ("chain", "draw", "row")
    pooled = np.logaddexp.reduce(
        values.values.reshape(-1, values.shape[-1]).astype(float)
    ) - np.log(np.prod(values.shape[:2]))
    opened = bnnmcmc.Run.open(finished / "run")
    sampled = pd.read_csv(finished / "table.csv").iloc[values["row"].values]
    found = opened.score(sampled, units="standardised")["lppd"]
    assert metrics.lppd(pooled) == pytest.approx(found, abs=1e-4)
    observed = tree["observed_data"]["y"].values.reshape(-1)
    np.testing.assert_allclose(observed, sampled["y"], rtol=1e-5)


def test_arviz_file_of_a_run(tiny, here):
    import xarray

    for kind, name in (("netcdf", "arviz.nc"), ("zarr", "arviz.zarr")):
        quick = ["sampler.draws=12", "sampler.warmup=50", f"run.arviz={kind}"]
        code, _, err = here("run", "tiny.toml", "--out", kind, "--quiet", "--set", *quick, cwd=tiny)
        assert code == 0, err
        with xarray.open_datatree(tiny / kind / name) as tree:
            assert tree["posterior"].sizes["draw"] == 12
            assert "warmup_sample_stats" in tree.children


def test_sampling_any_density_over_a_pytree():
    def log_density(position, shift):
        return -0.5 * jnp.sum((position["a"] - shift) ** 2) - 0.5 * jnp.sum(position["b"] ** 2)

    positions = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2,))}
    samples = bnnmcmc.sample_density(
        log_density, positions, kernel="nuts", warmup=200, draws=300, data=(jnp.float32(4.0),)
    )
    assert samples.draws["a"].shape == (2, 300, 3)
    assert samples.draws["b"].shape == (2, 300)
    assert samples.draws["a"].mean() == pytest.approx(4.0, abs=0.25)


@pytest.mark.slow
def test_float64_run_by_one_switch(tiny, cli):
    import zarr

    settings = ["run.precision=float64", "sampler.draws=10", "sampler.warmup=100"]
    code, out, err = cli(
        "run", "tiny.toml", "--out", "run", "--quiet", "--set", *settings, cwd=tiny
    )
    assert code == 0, err
    draws = zarr.open(tiny / "run" / "draws" / "network.layer0.weight")
    assert draws.dtype == np.float64
    assert "LPPD" in out
    with pytest.raises(bnnmcmc.InputError, match=r"float64, but JAX is not.*jax_enable_x64"):
        bnnmcmc.Run.open(tiny / "run")
