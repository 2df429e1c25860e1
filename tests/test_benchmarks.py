"""The benchmarks run on tiny sizes and give the figures they promise."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnmcmc.run import Run
from bnnmcmc.samplers.table import KERNELS
from experiments.benchmarks import (
    compilation,
    gradients,
    kernels,
    machine,
    nuts_warmup,
    startup,
    steps,
    time_to_lppd,
    timing,
    whole_fit,
)
from experiments.benchmarks.__main__ import BENCHMARKS, app
from experiments.benchmarks.processes import in_fresh_process
from experiments.benchmarks.settings import Settings, setting_words

# A stand-in for the peer: two members, three draws, whose predictions are known.
FAKE_PEER = """
import numpy as np
class BdeRegressor:
    def __init__(self, **arguments):
        self.arguments = arguments
    def get_params(self):
        return self.arguments
    def fit(self, x, y):
        self.positions_eT_ = np.zeros(())
        assert x.shape == (len(y), 5) and y.ndim == 1
    def predict(self, x, raw):
        out = np.zeros((2, 3, len(x), 2))
        out[..., 0] = np.arange(6).reshape(2, 3, 1)
        return out
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Sixty rows under the airfoil table's name, and a peer that predicts at once."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rng = np.random.default_rng(0)
    np.savetxt(folder / "airfoil.data", rng.normal(size=(60, 6)), fmt="%.5f")
    (folder / "bde.py").write_text(FAKE_PEER)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    metadata = folder / "sklearn_contrib_bde-9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: sklearn-contrib-bde\nVersion: 9\n")
    return Settings(folder, data=folder, peer=python, repeats=1, quick=True)


@pytest.mark.slow
def test_gradients_stand_over_the_peak(settings):
    found = gradients.measure(settings)
    assert [(row["activation"], row["chains"]) for row in found["rows"]] == [
        ("silu", 1),
        ("silu", 3),
    ]
    for row in found["rows"]:
        assert row["of_peak"] == pytest.approx(row["gflops"] / found["peak"]["peak"])
        best = max(row["vmap_gflops"], row["vmap_sharded_gflops"])
        assert row["over_vmap"] == pytest.approx(row["gflops"] / best)
    assert found["peak"]["peak"] == max(found["peak"]["gflops"].values())
    assert found["copy_gb_per_second"] > 0


def test_flops_are_those_of_the_matrix_products():
    # 1202 x (880 forward + 880 for weights + 800 for inputs), multiplications and additions.
    assert gradients.gradient_flops(1202, (5, 16, 16, 16, 16, 2)) == 2 * 1202 * (880 + 880 + 800)


def test_both_networks_are_the_same_function():
    from bnnmcmc.models.mlp import mlp

    ours = mlp(5, [7, 4], 2, "tanh")
    params = ours.init(jax.random.key(0))
    params["layer1"]["bias"] = jnp.arange(4.0)
    plain = gradients.row_major_mlp((5, 7, 4, 2), "tanh")
    x = jax.random.normal(jax.random.key(1), (11, 5))
    same = plain.apply([params[f"layer{i}"] for i in range(3)], x)
    np.testing.assert_allclose(ours.apply(params, x), same, rtol=1e-5, atol=1e-5)


def test_every_repetition_is_computed():
    """Gradients whose result nobody uses would be left out by the compiler."""
    chain = gradients.chain_of_gradients(lambda p, x, y: -0.5 * jnp.sum(p**2))
    _, total = chain(jnp.full(2, 3.0), 5, None, None)
    assert total == pytest.approx(5 * -9.0, rel=1e-5)


def test_steps_stand_over_their_gradients(settings):
    rows = steps.measure(settings)["rows"]
    assert {row["kernel"].split()[0] for row in rows} == {"mclmc", "hmc,"}
    for row in rows:
        ratio = row["microseconds_per_gradient"] / row["gradient_alone"]
        assert row["over_gradient"] == pytest.approx(ratio)


@pytest.mark.slow
def test_trees_stand_over_blackjax_s(settings):
    rows = nuts_warmup.measure(settings)["rows"]
    assert rows[0]["over_blackjax"] == 1
    for row in rows:
        assert 1 <= row["tree"] <= 15
        assert row["over_blackjax"] == pytest.approx(row["tree"] / rows[0]["tree"])
        assert row["gradients"] == pytest.approx(row["warmup_gradients"] + 4 * row["tree"])
        assert np.isfinite(row["lppd"])
    assert rows[-1]["tree"] <= 3


@pytest.mark.slow
def test_every_kernel_is_run_and_its_gradients_counted(settings):
    rows = kernels.measure(settings)["rows"]
    assert [row["kernel"] for row in rows] == list(kernels.KERNELS)
    by_kernel = {row["kernel"]: row for row in rows}
    # 2 chains, 40 and 4 steps.
    assert by_kernel["mclmc"]["gradients"] == 2 * 44
    assert by_kernel["hmc"]["gradients"] > 10 * 2 * 44
    assert {row["kernel"].split(",")[0] for row in rows} == set(KERNELS)
    for row in rows:
        assert np.isfinite([row["lppd"], row["gradients"]]).all()


def test_peer_is_scored_as_we_score(settings):
    found = whole_fit.peer_fit(settings, "test", {"seed": 3})
    y = whole_fit.airfoil(settings)["y_test"].ravel()
    mean, scale = np.arange(6.0)[:, None], np.log(2) + 1e-6
    each = -0.5 * ((y - mean) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)
    pooled = np.logaddexp.reduce(each, axis=0) - np.log(6)
    assert found["lppd"] == pytest.approx(pooled.mean(), rel=1e-9)
    assert (found["members"], found["kept_draws"], found["version"]) == (2, 3, "9")
    assert found["settings"] == {"seed": 3}
    assert found["wall_seconds"] > found["seconds"]["scored"] > 0


def test_running_lppd_ends_at_the_run_s_score(finished):
    folder = finished / "run"
    running = time_to_lppd.running_lppd(str(folder))
    run = Run.open(folder)
    assert len(running) == run.draws.draws
    assert running[-1] == pytest.approx(run.score(units="standardised")["lppd"], abs=1e-5)


@pytest.mark.slow
def test_one_command_prints_a_table_and_writes_json(settings, tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "experiments.benchmarks", "memory", "--quick"]
    command += ["--repeats", "1", "--data", settings.data, "--out", out]
    ended = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "peak mb" in ended.stdout
    found = json.loads(out.read_text())
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["packages"]["jax"] == jax.__version__
    rows = found["memory"]["rows"]
    assert [row["draws"] for row in rows] == [10, 30]
    assert found["memory"]["growth_mb"] == pytest.approx(rows[1]["peak_mb"] - rows[0]["peak_mb"])
    assert all(row["peak_mb"] >= row["before_mb"] > 0 for row in rows if "before_mb" in row)


def test_a_benchmark_that_does_not_exist_is_refused(capsys):
    assert app(["gradeints"]) == 2
    said = capsys.readouterr().out
    assert "gradeints" in said
    assert all(name in said for name in BENCHMARKS)


def test_machine_names_its_parts():
    found = machine.describe()
    assert found["cpu"]
    assert found["memory_gib"] > 0
    assert found["python"] == sys.version.split()[0]


def test_the_smallest_time_counts_and_the_spread_is_given():
    found = timing.summary([2.0, 1.0, 1.5])
    assert (found["seconds"], found["spread"]) == (1.0, 1.0)


def test_settings_for_the_command_line():
    assert setting_words({"a.b": [4, 4], "c": True}) == ["--set", "a.b=[4, 4]", "c=true"]
    assert setting_words({}) == []


def test_the_fastest_repeat_counts():
    found = [{"wall_seconds": w, "cpu_seconds": c} for w, c in ((3.0, 2.0), (2.0, 2.5))]
    best = whole_fit.fastest(found)
    assert (best["seconds"], best["spread"], best["cpu_seconds"]) == (2.0, 0.5, 2.0)


@pytest.mark.slow
def test_startup_sees_the_first_progress(settings):
    rows = startup.measure(settings)["rows"]
    assert [row["what"] for row in rows] == ["--help", *startup.SIGNS, *startup.SIGNS]
    seconds = [row["seconds"] for row in rows[1:4]]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2]


@pytest.mark.slow
def test_compilation_is_counted_by_stage(settings):
    rows = compilation.measure(settings)["rows"]
    of = {(row["cache"], row["stage"]): row["seconds"] for row in rows}
    assert set(of) == {(c, s) for c in ("empty", "filled") for s in (*compilation.STAGES, "all")}
    assert of["empty", "warmup"] > 0
    assert of["filled", "all"] < of["empty", "all"]


@pytest.mark.slow
def test_whole_fit_gives_both_sides(settings):
    rows = whole_fit.measure(settings)["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["peer_over_it"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    assert rows[1]["kept_draws"] == 10


@pytest.mark.slow
def test_time_to_lppd_runs_the_draws_it_needs(settings):
    found = time_to_lppd.measure(settings)
    assert [row["peer"] for row in found["rows"]] == ["defaults", "same work"]
    reached = [row for row in found["rows"] if row["draws_needed"] is not None]
    assert reached, "the stand-in's score is meant to be poor"
    for row in reached:
        assert row["our_lppd"] >= row["peer_lppd"] - 1e-4
        assert row["times_faster"] == pytest.approx(row["peer_seconds"] / row["our_seconds"])


@pytest.mark.slow
def test_rows_are_predicted_in_flat_memory(settings):
    found = in_fresh_process("experiments.benchmarks.predict_rows", "measure", settings)
    assert [row["rows"] for row in found["rows"]] == [100, 1000]
    assert all(row["rows_per_second"] > 0 and row["peak_mb"] > 0 for row in found["rows"])
    assert found["flat"]
