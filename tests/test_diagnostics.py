import csv
import subprocess
import sys
from types import MappingProxyType

import numpy as np
import pytest
import xarray

from bnnmcmc.convergence import bulk_ess, mean_ess, rank_rhat, tail_ess
from bnnmcmc.diagnostics import (
    chain_table,
    chainwise_rhat,
    ess,
    read_table,
    run_summary,
    to_datatree,
    write_datatree,
    write_table,
)
from bnnmcmc.errors import InputError
from bnnmcmc.health import ChainStatus

OK = ChainStatus("ok", "No rule fired.")
# What MCLMC records, as Samples.stats holds it.
CHAINS, DRAWS, ROWS = 3, 40, 5
COUNTS = MappingProxyType({"diverging": 2, "gradients": 10})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make_stats(chains=CHAINS, draws=DRAWS):
    stats = {name: np.full((chains, draws), n, np.int32) for name, n in COUNTS.items()}
    stats["diverging"][:, 1:] = 0
    return {
        **stats,
        "log_density": normal(chains, draws).astype(np.float32),
        "energy_error_squared": np.full((chains, draws), 0.25, np.float32),
        "step_size": np.full((chains, draws), 0.5, np.float32),
    }


def make_draws(chains=CHAINS, draws=DRAWS):
    return {
        "likelihood": {"log_scale": normal(chains, draws, 2)},
        "network": {
            "layer0": {
                "bias": normal(chains, draws, 4).astype(np.float32),
                "weight": normal(chains, draws, 6, 4).astype(np.float32),
            }
        },
    }


def regression_tree(chains=CHAINS, draws=DRAWS):
    return to_datatree(
        draws=make_draws(chains, draws),
        stats=make_stats(chains, draws),
        warmup_stats=make_stats(chains, 7),
        log_likelihood=normal(chains, draws, ROWS),
        posterior_predictive=normal(chains, draws, ROWS, 2),
        observed=normal(ROWS, 2),
        row_ids=[f"house {i}" for i in range(ROWS)],
        targets=["price", "rent"],
        attrs={"kernel": "mclmc", "seed": 3, "exact": False, "widths": [4, 4], "note": None},
    )


def make_table(log_density, positions, functions=None, stats=None, statuses=None, **options):
    return chain_table(
        log_density=log_density,
        positions=positions,
        functions=functions,
        stats=stats or {},
        statuses=statuses or [OK] * len(log_density),
        **options,
    )


# --- DataTree -------------------------------------------------------------------------------


def test_tree_names_every_axis():
    tree = regression_tree()
    weight = tree["posterior"]["network.layer0.weight"]
    assert weight.dims == (
        "chain",
        "draw",
        "network.layer0.weight_in",
        "network.layer0.weight_out",
    )
    np.testing.assert_array_equal(weight, make_draws()["network"]["layer0"]["weight"])
    bias = tree["posterior"]["network.layer0.bias"]
    assert bias.dims == ("chain", "draw", "network.layer0.bias_out")
    scale = tree["posterior"]["likelihood.log_scale"]
    assert scale.sel(target="rent").dims == ("chain", "draw")
    np.testing.assert_array_equal(
        scale.sel(target="rent"), make_draws()["likelihood"]["log_scale"][..., 1]
    )
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "row")
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "row", "target")
    assert tree["observed_data"]["y"].dims == ("row", "target")
    assert tree["observed_data"]["y"].sel(row="house 3", target="price") == normal(ROWS, 2)[3, 0]
    assert tree["warmup_sample_stats"]["lp"].shape == (CHAINS, 7)


def test_statistics_get_arviz_names():
    stats = regression_tree()["sample_stats"]
    assert set(stats.data_vars) == {
        "lp",
        "n_steps",
        "diverging",
        "energy_error_squared",
        "step_size",
    }
    assert stats["diverging"].dtype == bool
    assert stats["diverging"].sum() == CHAINS
    np.testing.assert_array_equal(stats["lp"], make_stats()["log_density"])


def test_classification_tree_holds_class_indices_and_labels():
    predicted = np.random.default_rng(0).integers(0, 2, (CHAINS, DRAWS, ROWS))
    observed = np.array([0, 1, 1, 0, 1])
    tree = to_datatree(
        draws=make_draws(),
        stats=make_stats(),
        posterior_predictive=predicted,
        observed=observed,
        classes=["benign", "malignant"],
    )
    for group in ("posterior_predictive", "observed_data"):
        y = tree[group]["y"]
        assert y.dims[-1] == "row"
        assert tree[group]["class"].values[y.values].ravel()[0] in ("benign", "malignant")
    labels = tree["observed_data"]["class"].values[tree["observed_data"]["y"].values]
    assert list(labels) == ["benign", "malignant", "malignant", "benign", "malignant"]
    assert "log_likelihood" not in tree.children
    plain = to_datatree(
        draws=make_draws(), stats={}, posterior_predictive=predicted, observed=observed
    )
    assert plain["observed_data"]["y"].dims == ("row",)


def test_one_target_may_come_as_a_vector():
    tree = to_datatree(
        draws=make_draws(),
        stats=make_stats(),
        posterior_predictive=normal(CHAINS, DRAWS, ROWS, 1),
        observed=normal(ROWS),
        targets=["price"],
    )
    np.testing.assert_array_equal(tree["observed_data"]["y"].sel(target="price"), normal(ROWS))


def test_user_pytrees_of_any_shape():
    draws = {"conv/kernel": normal(2, 8, 3, 3, 1, 4), "scalar": normal(2, 8)}
    posterior = to_datatree(draws=draws, stats={"log_density": normal(2, 8)})["posterior"]
    assert posterior["conv.kernel"].dims[2:] == (
        "conv.kernel_dim0",
        "conv.kernel_dim1",
        "conv.kernel_in",
        "conv.kernel_out",
    )
    assert posterior["scalar"].dims == ("chain", "draw")
    with pytest.raises(InputError, match=r"two leaves are named 'a\.b'"):
        to_datatree(draws={"a.b": normal(2, 8), "a/b": normal(2, 8)}, stats={})


@pytest.mark.parametrize(("kind", "engine"), [("netcdf", "h5netcdf"), ("zarr", "zarr")])
@pytest.mark.parametrize("draws", [2, DRAWS])  # fewer draws than chains, too
def test_tree_survives_the_disk(tmp_path, kind, engine, draws):
    path = tmp_path / "new" / "arviz.out"
    write_datatree(regression_tree(draws=5), path, kind)
    tree = regression_tree(draws=draws)
    write_datatree(tree, path, kind)  # over the old one
    with xarray.open_datatree(path, engine=engine) as found:
        assert found.identical(tree)
        assert found.attrs == {
            "kernel": "mclmc",
            "seed": 3,
            "exact": "false",
            "widths": "[4, 4]",
            "note": "null",
        }
    assert [p.name for p in path.parent.iterdir()] == ["arviz.out"]


@pytest.mark.parametrize("kind", ["netcdf", "zarr"])
def test_failed_write_keeps_the_old_tree(tmp_path, kind, monkeypatch):
    path = tmp_path / "arviz.out"
    write_datatree(regression_tree(), path, kind)
    tree = regression_tree(draws=6)

    def full(self, target, **options):
        target.mkdir() if kind == "zarr" else target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xarray.DataTree, "to_zarr", full)
    monkeypatch.setattr(xarray.DataTree, "to_netcdf", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_datatree(tree, path, kind)
    assert [p.name for p in tmp_path.iterdir()] == ["arviz.out"]
    engine = "zarr" if kind == "zarr" else "h5netcdf"
    with xarray.open_datatree(path, engine=engine) as found:
        assert found["posterior"].sizes["draw"] == DRAWS


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="found 'csv', expected 'netcdf' or 'zarr'"):
        write_datatree(regression_tree(), tmp_path / "a", "csv")


def test_arviz_opens_the_tree():
    import matplotlib

    matplotlib.use("Agg")
    import arviz
    import matplotlib.pyplot as plt

    tree = regression_tree()
    summary = arviz.summary(tree)
    assert len(summary) == 2 + 4 + 6 * 4
    assert "network.layer0.weight[5, 3]" in summary.index
    assert "likelihood.log_scale[rent]" in summary.index
    plot = arviz.plot_trace_dist(tree, var_names=["likelihood.log_scale"])
    assert plot is not None
    plt.close("all")


# --- R-hat and ESS --------------------------------------------------------------------------


def test_rhat_and_ess_equal_arviz():
    from arviz_stats.base import array_stats

    values = normal(2, 203, 3).cumsum(axis=1) * 0.1 + normal(2, 203, 3, seed=1)
    bulk, tail = ess(values)
    rhat = chainwise_rhat(values, parts=4)
    assert rhat.shape == bulk.shape == tail.shape == (2, 3)
    for chain in range(2):
        for i in range(3):
            one = values[chain, :, i]
            parts = one[3:].reshape(4, 50)  # 203 = 3 + 4 * 50: the start is dropped
            assert rhat[chain, i] == pytest.approx(array_stats.rhat(parts))
            assert bulk[chain, i] == pytest.approx(array_stats.ess(one[None], method="bulk"))
            tails = array_stats.ess(one[None], method="tail", prob=(0.05, 0.95))
            assert tail[chain, i] == pytest.approx(tails)
    assert chainwise_rhat(values, parts=2)[0, 0] == pytest.approx(
        array_stats.rhat(values[0, 1:, 0].reshape(2, -1))
    )


@pytest.mark.parametrize("draws", [10, 11, 12, 13, 50, 203])
@pytest.mark.parametrize("memory", [-0.9, -0.3, 0.0, 0.5, 0.95])
def test_many_sequences_at_once_equal_arviz_one_by_one(draws, memory):
    """Sequences that swing, wander, or repeat values; one or several of them together."""
    from arviz_stats.base import array_stats

    noise = normal(12, 3, draws, seed=draws)
    values = noise.copy()
    for t in range(1, draws):
        values[..., t] = memory * values[..., t - 1] + noise[..., t]
    values[:4] = values[:4].round()  # ties
    for count in (1, 3):
        some = values[:, :count]
        found = bulk_ess(some), tail_ess(some, (0.05, 0.95)), mean_ess(some)
        for i, one in enumerate(some):
            expected = (
                array_stats.ess(one, method="bulk"),
                array_stats.ess(one, method="tail", prob=(0.05, 0.95)),
                array_stats.ess(one, method="identity"),
            )
            np.testing.assert_allclose([f[i] for f in found], expected, rtol=1e-9)
    rhats = [array_stats.rhat(one) for one in values]
    np.testing.assert_allclose(rank_rhat(values), rhats, rtol=1e-9)


def test_a_few_sequences_at_a_time_change_nothing(monkeypatch):
    values, log_density = normal(3, 60, 5), normal(3, 60)
    one_go = chainwise_rhat(values), *ess(values), make_table(log_density, values, values)
    monkeypatch.setattr("bnnmcmc.diagnostics.CHUNK_BYTES", 2 * 60 * 8)
    pieces = chainwise_rhat(values), *ess(values), make_table(log_density, values, values)
    for a, b in zip(one_go[:3], pieces[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert repr(one_go[3]) == repr(pieces[3])  # also where both are NaN


def test_rhat_is_near_one_for_independent_draws():
    rhat = chainwise_rhat(normal(3, 1000, 20))
    assert np.all((rhat > 0.99) & (rhat < 1.02))


def test_chainwise_rhat_sees_a_trend_that_chains_share():
    from arviz_stats.base import array_stats

    # All chains climb together: across chains nothing differs.
    values = normal(4, 400, 1) + np.linspace(0, 3, 400)[None, :, None]
    values[3] = normal(400, 1, seed=5)
    rhat = chainwise_rhat(values)[:, 0]
    assert np.all(rhat[:3] > 1.2)
    assert rhat[3] < 1.05
    climbing = values[:3, :, 0]
    assert array_stats.rhat(climbing, method="identity") < 1.01


def test_a_trend_between_chains_apart_does_not_matter():
    values = normal(4, 400, 1) + 100.0 * np.arange(4)[:, None, None]
    assert np.all(chainwise_rhat(values) < 1.05)


def test_ess_counts_repeated_draws_once():
    independent = normal(1, 2000, 1)
    repeated = np.repeat(normal(1, 500, 1), 4, axis=1)
    assert ess(independent)[0] > 1500
    assert 300 < ess(repeated)[0] < 800


def test_what_has_no_meaning_is_nan():
    values = normal(2, 100, 4)
    values[:, :, 0] = 0.1  # never changes
    values[0, 50, 1] = np.nan
    values[0, 50:60, 2] = -np.inf
    for found in (chainwise_rhat(values), *ess(values)):
        np.testing.assert_array_equal(
            np.isnan(found), [[True, True, True, False], [True, False, False, False]]
        )
    assert np.isnan(chainwise_rhat(normal(2, 15, 1), parts=4)).all()
    assert np.isfinite(chainwise_rhat(normal(2, 16, 1), parts=4)).all()
    for found in ess(normal(2, 9, 3)):  # ArviZ: 7.22, whatever the draws are
        assert np.isnan(found).all()
    # 96 of 100 draws at the maximum: both quantiles are the maximum.
    saturated = np.ones((1, 100, 1))
    saturated[0, [3, 40, 62, 85]] = 0.5
    bulk, tail = ess(saturated)
    assert np.isfinite(bulk).all()
    assert np.isnan(tail).all()
    # Every part stands still at a value of its own.
    steps = np.repeat(np.arange(4.0), 16)[None, :, None]
    assert chainwise_rhat(steps)[0, 0] == np.inf


def test_less_than_two_parts_are_refused():
    with pytest.raises(InputError, match="parts: found 1, expected at least 2"):
        chainwise_rhat(normal(1, 10, 1), parts=1)


# --- the table of chains --------------------------------------------------------------------


def test_table_numbers_are_those_of_the_chain():
    log_density = normal(CHAINS, DRAWS) + np.array([0.0, 10.0, 20.0])[:, None]
    positions, functions = normal(CHAINS, DRAWS, 7, seed=1), normal(CHAINS, DRAWS, ROWS, seed=2)
    stats = {
        **make_stats(),
        "tree_depth": np.arange(CHAINS * DRAWS).reshape(CHAINS, DRAWS),
    }
    statuses = [OK, ChainStatus("stuck", "Never moved."), OK]
    table = make_table(log_density, positions, functions, stats, statuses)
    bulk, rhat = ess(functions)[0], chainwise_rhat(functions)
    for chain, row in enumerate(table):
        assert (row["chain"], row["status"], row["sentence"]) == (chain, *statuses[chain])
        assert row["draws"] == DRAWS
        assert row["log_density"] == pytest.approx(log_density[chain].mean())
        assert row["acceptance_rate"] is None
        assert row["energy_error"] == 0.25
        assert row["divergences"] == 2
        assert row["tree_depth_max"] == (chain + 1) * DRAWS - 1
        assert row["step_size"] == 0.5
        assert row["gradients"] == 10 * DRAWS
        assert row["ess_log_density"] == ess(log_density[..., None])[0][chain, 0]
        assert row["ess_function_median"] == np.median(bulk[chain])
        assert row["ess_function_min"] == bulk[chain].min()
        assert row["rhat_function_median"] == np.median(rhat[chain])
        assert row["rhat_function_max"] == rhat[chain].max()
        assert row["rhat_weights_max"] == chainwise_rhat(positions)[chain].max()
        assert row["rhat_log_density"] == chainwise_rhat(log_density[..., None])[chain, 0]
    two = make_table(log_density, positions, functions, stats, statuses, parts=2)
    assert two[0]["rhat_weights_max"] == chainwise_rhat(positions, 2)[0].max()


def test_drift_has_a_sign_and_a_unit():
    noise = 0.01 * normal(3, 400)
    trends = np.stack([np.linspace(0, 8, 400), np.linspace(8, 0, 400), np.zeros(400)])
    table = make_table(trends + noise, normal(3, 400, 2))
    up, down, flat = (row["log_density_drift"] for row in table)
    assert up == pytest.approx(0.75 * np.sqrt(12), rel=0.01)  # 3/4 of the range, sd range/sqrt(12)
    assert down == pytest.approx(-up, rel=0.01)
    assert abs(flat) < 0.5


def test_many_coordinates_are_thinned_evenly():
    positions = normal(2, 32, 2001)
    positions[:, :, 1] += np.linspace(0, 50, 32)[None, :]  # between two evaluated coordinates
    calm = make_table(normal(2, 32), positions)[0]["rhat_weights_max"]
    positions[:, :, 2000] += np.linspace(0, 50, 32)[None, :]  # the last is always evaluated
    assert make_table(normal(2, 32), positions)[0]["rhat_weights_max"] > max(2.0, calm + 0.5)


def test_predictions_that_never_change_are_left_out():
    functions = normal(2, 100, 3)
    functions[:, :, 0] = 1.0  # a saturated class probability
    functions[1] = 0.5  # a chain that never moved
    moving, still = make_table(normal(2, 100), normal(2, 100, 2), functions)
    assert moving["ess_function_min"] == ess(functions)[0][0, 1:].min()
    assert moving["rhat_function_max"] == chainwise_rhat(functions)[0, 1:].max()
    assert np.isnan([still["ess_function_median"], still["rhat_function_max"]]).all()
    functions[0, 7, 1] = np.nan  # a NaN is not left out
    bad = make_table(normal(2, 100), normal(2, 100, 2), functions)[0]
    assert np.isnan([bad[name] for name in bad if "function" in name]).all()


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("draws", [1, 4])
def test_short_runs_give_nan_and_no_warning(chains, draws):
    log_density, functions = normal(chains, draws), normal(chains, draws, 3)
    stats = make_stats(chains, draws)
    table = make_table(log_density, normal(chains, draws, 6), functions, stats)
    for row in table:
        undefined = [name for name, v in row.items() if isinstance(v, float) and np.isnan(v)]
        wanted = {name for name in row if name.startswith(("ess", "rhat"))}
        assert set(undefined) == wanted | ({"log_density_drift"} if draws == 1 else set())
    summary = run_summary(functions, log_density, table)
    assert summary["chains_undefined"] == list(range(chains))
    assert np.isnan(summary["ess_function_total_median"])
    assert np.isnan(summary["rhat_function_across_max"]) == (chains == 1 or draws < 4)
    assert 2 <= len(summary["verdict"]) <= 4
    assert "cannot be computed" in summary["verdict"][1]


def test_broken_and_stuck_chains_are_shown():
    log_density = normal(3, 100)
    log_density[0] = 2.0
    log_density[1, :2] = [np.inf, -np.inf]
    table = make_table(log_density, normal(3, 100, 2))
    for row in table[:2]:
        assert np.isnan([row["log_density_drift"], row["rhat_log_density"]]).all()
        assert np.isnan(row["ess_log_density"])
    assert table[0]["log_density"] == 2.0
    assert np.isnan(table[1]["log_density"])
    summary = run_summary(None, log_density, table)
    assert summary["chains_undefined"] == [0, 1]
    assert "cannot be computed for chains 0, 1" in summary["verdict"][1]
    assert np.isnan(summary["rhat_log_density_across"])


# --- the run as a whole ---------------------------------------------------------------------


def summarise(functions, log_density, statuses=None):
    table = make_table(log_density, functions, functions, statuses=statuses)
    return run_summary(functions, log_density, table)


def test_summary_of_a_good_run():
    from arviz_stats.base import array_stats

    functions, log_density = normal(4, 250, 9), normal(4, 250, seed=1)
    summary = summarise(functions, log_density)
    across = [array_stats.rhat(functions[:, :, i]) for i in range(9)]
    assert summary["rhat_function_across_median"] == pytest.approx(np.median(across))
    assert summary["rhat_function_across_max"] == pytest.approx(max(across))
    assert summary["rhat_log_density_across"] == pytest.approx(array_stats.rhat(log_density))
    assert summary["ess_function_total_median"] == np.median(ess(functions)[0].sum(axis=0))
    assert summary["share_ok"] == 1.0
    assert summary["chains_drifting"] == summary["chains_undefined"] == []
    verdict = summary["verdict"]
    assert len(verdict) == 4
    assert verdict[0] == "4 of 4 chains have status ok."
    assert "no sign of drift" in verdict[1].lower()
    assert "agree" in verdict[2]
    assert f"about {summary['ess_function_total_median']:,.0f} " in verdict[3]


def test_summary_of_a_bad_run():
    functions = normal(4, 250, 9) + 5.0 * np.arange(4)[:, None, None]
    functions[2] += np.linspace(0, 6, 250)[:, None]
    stuck = ChainStatus("stuck", "Never moved.")
    summary = summarise(functions, normal(4, 250), [OK, stuck, OK, OK])
    assert summary["share_ok"] == 0.75
    assert summary["chains_drifting"] == [2]
    assert summary["rhat_function_across_median"] > 1.5
    verdict = summary["verdict"]
    assert verdict[0] == "3 of 4 chains have status ok (stuck: chain 1)."
    assert verdict[1].startswith("1 of 4 chains still drift (chain 2): ")
    assert "differ" in verdict[2]


def test_summary_without_predictions_uses_the_log_density():
    log_density = normal(4, 250)
    log_density[1] += np.linspace(0, 6, 250)
    table = make_table(log_density, normal(4, 250, 2))
    summary = run_summary(None, log_density, table)
    assert summary["chains_drifting"] == [1]
    assert summary["rhat_function_across_max"] is None
    assert summary["ess_function_total_median"] is None
    assert len(summary["verdict"]) == 3
    assert "log-density" in summary["verdict"][1]


def test_a_chain_that_never_moved_adds_no_ess():
    functions = normal(3, 100, 4)
    functions[1] = 0.5
    summary = summarise(functions, normal(3, 100))
    assert summary["ess_function_total_median"] == np.median(ess(functions[[0, 2]])[0].sum(axis=0))
    functions[0, 3] = np.nan
    assert np.isnan(summarise(functions, normal(3, 100))["ess_function_total_median"])


# --- files and imports ----------------------------------------------------------------------


def test_table_survives_the_disk(tmp_path):
    statuses = [OK, ChainStatus("low", 'Says "why", at length.'), ChainStatus("ok", "")]
    log_density = normal(CHAINS, DRAWS)
    log_density[0] = 1.0
    table = make_table(log_density, normal(CHAINS, DRAWS, 3), None, make_stats(), statuses)
    path = tmp_path / "diagnostics.csv"
    write_table(path, table)
    found = read_table(path)
    assert [list(row) for row in found] == [list(row) for row in table]
    for row, wanted in zip(found, table, strict=True):
        for name, value in wanted.items():
            assert type(row[name]) is type(value), name
            assert row[name] == value or (np.isnan(row[name]) and np.isnan(value)), name
    with open(path, newline="") as file:
        assert next(csv.reader(file)) == list(table[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"chain,draws\n0,many\n", "damaged: .*'many'"),
        (b"chain,draws\n0\n", "damaged"),
        (b"a,b\n1,2\n", "holds no chains"),
        (b"", "holds no chains"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_unreadable_tables_are_named(tmp_path, content, message):
    path = tmp_path / "diagnostics.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_importing_the_module_is_light():
    code = (
        "import sys, bnnmcmc.diagnostics; "
        "print([m for m in ('jax', 'arviz', 'arviz_stats', 'xarray') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.strip(), found.stderr) == ("[]", "")
