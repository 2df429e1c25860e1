"""The command line as a process: what a user types, sees and finds on disk."""

import json
import math
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from bnnmcmc.cli import seconds
from bnnmcmc.errors import InputError
from bnnmcmc.sweep import parse_grid


def test_help_of_every_command_loads_no_jax():
    code = """
import sys
from bnnmcmc.cli import app
commands = "init check run resume predict diagnose report compare sweep"
for command in commands.split():
    app([command, "--help"], console=None)
heavy = {"jax", "pandas", "arviz", "matplotlib", "sklearn"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("--time-budget", "--out", "--set", "--draws", "--grid", "--seeds", "--data"):
        assert word in done.stdout


def test_run_prints_a_readable_summary(finished):
    out, err = (finished / "stdout.txt").read_text(), (finished / "stderr.txt").read_text()
    assert "60 rows, 4 features, regression of y" in out
    assert "42 train, 6 validation, 12 test" in out
    assert "train + validation (48 rows)" in out
    for words in ("best member", "deep ensemble", "posterior", "LPPD", "coverage 90 %"):
        assert words in out
    for words in ("3 chains on 2 CPU cores", "ensemble", "warm-up", "sampling", "report.html"):
        assert words in out
    for words in ("Ensemble", "Warm-up", "Sampling", "steps/s"):
        assert words in err
    for words in ("Traceback", "Warning", "warning"):
        assert words not in out + err


def test_run_folder_is_complete(finished):
    folder = finished / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    names = {"lppd", "nll_gaussian", "rmse", "crps"}
    names |= {f"coverage_{level}" for level in (50, 80, 90, 95)}
    sd = json.loads((folder / "scaling.json").read_text())["targets"][0]["scale"]
    for source in ("best_member", "ensemble", "posterior"):
        test, units = metrics["test"][source], metrics["test_target_units"][source]
        assert set(test) == set(units) == names
        assert all(math.isfinite(value) for value in test.values())
        # A density changes by the Jacobian of the scaling, an error by its factor.
        assert units["lppd"] == pytest.approx(test["lppd"] - math.log(sd), abs=1e-5)
        assert units["rmse"] == pytest.approx(test["rmse"] * sd, rel=1e-5)
        assert units["coverage_90"] == test["coverage_90"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == "done"
    assert [chain["chain"] for chain in manifest["status"]] == [0, 1, 2]
    assert sum(block["count"] for block in manifest["blocks"]) == 40
    for name in ("config.toml", "diagnostics.csv", "report.html", "warmup.npz"):
        assert (folder / name).stat().st_size > 0
    assert len(list((folder / "state").iterdir())) == 1


def test_set_changes_every_kind_of_key(tiny, here):
    (tiny / "table.csv").rename(tiny / "other.csv")
    settings = ["data.path=other.csv", "sampler.draws=7", "model.hidden=[3]", "run.seed=5"]
    settings += [
        "sampler.kernel=nuts",
        "sampler.thin=1",
        "sampler.warmup=30",
        "sampler.max_depth=3",
    ]
    code, out, err = here("run", "tiny.toml", "--out", "r", "--set", *settings, "--quiet", cwd=tiny)
    assert code == 0, err
    assert err == ""
    manifest = json.loads((tiny / "r" / "manifest.json").read_text())
    assert manifest["kernel"] == "nuts"
    assert manifest["seed"] == 5
    assert manifest["draws"] == 7
    assert manifest["parameters"] == 4 * 3 + 3 + 3 * 2 + 2
    assert "other.csv" in out


@pytest.mark.slow
def test_run_numbers_its_default_folder(tiny, here):
    quick = ["--set", "sampler.draws=2", "sampler.warmup=5", "ensemble.max_epochs=2", "--quiet"]
    (tiny / "runs" / "tiny").mkdir(parents=True)
    (tiny / "runs" / "tiny" / "notes.txt").write_text("mine")
    code, out, err = here("run", "tiny.toml", *quick, cwd=tiny)
    assert code == 0, err
    assert (tiny / "runs" / "tiny-2" / "report.html").is_file()
    assert "runs/tiny-2" in out


def test_check_samples_nothing_and_says_the_cost(tiny, here):
    code, out, err = here("check", "tiny.toml", cwd=tiny)
    assert code == 0, err
    for words in ("60 rows, 4 features", "44 parameters", "memory", "disk", "training", "sampling"):
        assert words in out
    assert sorted(path.name for path in tiny.iterdir()) == ["table.csv", "tiny.toml"]


def test_init_writes_a_config_that_checks(tiny, here):
    code, out, err = here("init", "new.toml", "--data", "table.csv", "--target", "y", cwd=tiny)
    assert code == 0, err
    assert "60 rows, 3 further columns, regression of y" in out
    text = (tiny / "new.toml").read_text()
    assert text.count("#") > 10
    code, out, err = here("check", "new.toml", cwd=tiny)
    assert code == 0, err
    before = (tiny / "new.toml").read_text()
    code, _, err = here("init", "new.toml", cwd=tiny)
    assert code == 2
    assert "exists already" in err
    assert (tiny / "new.toml").read_text() == before
    code, out, err = here("init", "k.toml", "--data", "table.csv", "--target", "kind", cwd=tiny)
    assert code == 0
    assert "classification of kind" in out
    assert 'kind = "categorical"' in (tiny / "k.toml").read_text()


def test_predict_matches_columns_by_name_and_scores(finished, tmp_path, here):
    table = pd.read_csv(finished / "table.csv")
    shuffled = table[["y", "kind", "b", "a"]].assign(extra=1)
    shuffled.to_csv(tmp_path / "shuffled.csv", index=False)
    code, straight, err = here("predict", finished / "run", finished / "table.csv", cwd=tmp_path)
    assert code == 0, err
    assert "rmse" in err  # the table holds the target
    code, _, err = here(
        "predict", finished / "run", "shuffled.csv", "--out", "p.parquet", cwd=tmp_path
    )
    assert code == 0, err
    found = pd.read_parquet(tmp_path / "p.parquet")
    lines = straight.splitlines()
    assert lines[0] == "y_mean,y_sd,y_epistemic_sd,y_lower_90,y_upper_90"
    printed = np.array([[float(cell) for cell in line.split(",")] for line in lines[1:]])
    np.testing.assert_allclose(found.to_numpy(), printed, rtol=1e-5)
    inside = (table["y"] > found["y_lower_90"]) & (table["y"] < found["y_upper_90"])
    assert inside.mean() > 0.7
    assert np.corrcoef(found["y_mean"], table["y"])[0, 1] > 0.9


def test_diagnose_and_report(finished, tmp_path, cli):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / "report.html").unlink()
    code, out, err = cli("diagnose", "run", cwd=tmp_path)
    assert code == 0, err
    for words in ("status", "R-hat", "ESS", "of 3 chains"):
        assert words in out
    code, out, err = cli("report", "run", cwd=tmp_path)
    assert code == 0, err
    assert "<html" in (run / "report.html").read_text()


def test_resume_adds_the_draws_a_longer_run_would_have(finished, tmp_path, here):
    import zarr

    shutil.copytree(finished / "run", tmp_path / "run")
    code, out, err = here("resume", "run", "--draws", "20", "--quiet", cwd=tmp_path)
    assert code == 0, err
    assert "60 draws per chain" in out
    shutil.copy(finished / "table.csv", tmp_path)
    shutil.copy(finished / "tiny.toml", tmp_path)
    code, _, err = here(
        "run", "tiny.toml", "--out", "long", "--set", "sampler.draws=60", "--quiet", cwd=tmp_path
    )
    assert code == 0, err
    name = "draws/network.layer0.weight"
    longer, added = (np.asarray(zarr.open(tmp_path / r / name)) for r in ("long", "run"))
    np.testing.assert_array_equal(added, longer)


@pytest.mark.alone
def test_time_budget_is_kept_with_everything_usable(tiny, cli):
    big = ["ensemble.max_epochs=1000000", "ensemble.patience=1000000"]
    big += ["sampler.warmup=10000000", "sampler.draws=1000000"]
    # A plan compiles anew: on two slow cores that takes most of a budget of less than a minute.
    begun = time.monotonic()
    code, out, err = cli(
        "run", "tiny.toml", "--out", "r", "--time-budget", "90s", "--set", *big, cwd=tiny
    )
    assert code == 0, err
    assert time.monotonic() - begun < 110  # a budget, on a machine that may be busy
    manifest = json.loads((tiny / "r" / "manifest.json").read_text())
    assert manifest["stage"] == "done"
    assert "training was ended by the time budget" in out
    # The tuning of MCLMC was planned to be complete, and done so.
    assert "planned for the time budget" in out
    assert "warm-up was ended" not in out
    assert 100 <= manifest["warmup"] < 10_000_000
    assert sum(block["count"] for block in manifest["blocks"]) >= 50
    metrics = json.loads((tiny / "r" / "metrics.json").read_text())
    assert math.isfinite(metrics["test"]["posterior"]["lppd"])
    assert (tiny / "r" / "report.html").is_file()


def test_classification_with_text_labels(tiny, here):
    text = (tiny / "tiny.toml").read_text().replace('target = "y"', 'target = "kind"')
    (tiny / "k.toml").write_text(text + '\n[likelihood]\nkind = "bernoulli"\n')
    code, out, err = here("run", "k.toml", "--out", "r", "--quiet", cwd=tiny)
    assert code == 0, err
    metrics = json.loads((tiny / "r" / "metrics.json").read_text())
    assert set(metrics["test"]["posterior"]) == {"lppd", "accuracy", "brier", "ece"}
    assert "test_target_units" not in metrics
    assert metrics["test"]["posterior"]["accuracy"] > 0.8
    code, out, err = here("predict", "r", "table.csv", cwd=tiny)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "kind,p(green),p(red)"
    label, *probabilities = lines[1].split(",")
    assert label in ("red", "green")
    assert sum(map(float, probabilities)) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_sweep_runs_a_grid_and_goes_on_where_it_stopped(tiny, cli):
    quick = ["--set", "sampler.draws=5", "sampler.warmup=20", "ensemble.max_epochs=5"]
    arguments = ["sweep", "tiny.toml", "--grid", "model.hidden=[],[4]", "--out", "s"]
    code, out, err = cli(*arguments, "--seeds", "1", *quick, cwd=tiny)
    assert code == 0, err
    rows = pd.read_csv(tiny / "s" / "sweep.csv")
    assert list(rows["seed"]) == [0, 0]
    assert rows["posterior_lppd"].nunique() == 2
    assert "model.hidden" in out
    assert "2 runs on the same 12 test rows: differences are paired, row by row." in out
    assert "The runs differ in model.hidden." in (tiny / "s" / "compare.html").read_text()
    stamps = {p: p.stat().st_mtime_ns for p in (tiny / "s").glob("*/manifest.json")}
    shutil.rmtree(tiny / "s" / rows["folder"][0])
    arguments[3] = "model.hidden=[]"
    code, out, err = cli(*arguments, "--seeds", "2", *quick, cwd=tiny)
    assert code == 0, err
    again = pd.read_csv(tiny / "s" / "sweep.csv")
    assert list(again["seed"]) == [0, 1]
    assert again["posterior_lppd"][0] == pytest.approx(rows["posterior_lppd"][0])
    assert again["posterior_lppd"][1] != again["posterior_lppd"][0]
    kept = [path for path, stamp in stamps.items() if path.stat().st_mtime_ns == stamp]
    assert [path.parent.name for path in kept] == [rows["folder"][1]]
    code, out, err = cli(*arguments, "--seeds", "1", *quick, "sampler.draws=6", cwd=tiny)
    assert code == 2
    assert "holds a run with other settings" in err


def test_grid_values_are_toml():
    assert parse_grid(["a.b=1,2.5", "c.d=tanh,relu", "e.f=[1,2],[3]"]) == {
        "a.b": ["1", "2.5"],
        "c.d": ["tanh", "relu"],
        "e.f": ["[1, 2]", "[3]"],
    }
    assert parse_grid(["a.b={x=1, y=[true]}"]) == {"a.b": ["{x = 1, y = [true]}"]}
    with pytest.raises(InputError, match=r"--grid a\.b: expected section\.key=value"):
        parse_grid(["a.b"])


def test_time_spans():
    assert [seconds(t) for t in ("90", "90s", "10m", "1h30m", "2.5s")] == [90, 90, 600, 5400, 2.5]
    for wrong in ("", "soon", "-5", "0"):
        with pytest.raises(InputError, match="expected a time such as"):
            seconds(wrong)
