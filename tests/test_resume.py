"""A run that is killed or interrupted at any moment goes on to the same draws, bit for bit."""

import json
import os
import random
import shutil
import signal
import time
import tomllib

import numpy as np
import pytest
import zarr
from conftest import TINY, start_cli, write_tiny

from bnnmcmc.calibration import Fast

# Slow enough that every stage has several commits to be killed between.
SETTINGS = [
    "ensemble.max_epochs=3000",
    "ensemble.patience=3000",
    "sampler.warmup=60000",
    "sampler.draws=400",
    "sampler.thin=100",
    "run.block_draws=10",
]
STAGES = ("ensemble", "warmup", "sampling", "results")


def all_draws(folder):
    """Return every committed array of a run: draws, statistics, members, warm-up."""
    found = {}
    for group in ("draws", "stats"):
        for name, array in zarr.open_group(folder / group, mode="r").arrays():
            found[f"{group}/{name}"] = np.asarray(array)
    for name in ("warmup.npz", "ensemble/members.npz", "ensemble/history.npz"):
        with np.load(folder / name) as arrays:
            found |= {f"{name}/{key}": arrays[key] for key in arrays.files}
    return found


def assert_equal_runs(one, other):
    a, b = all_draws(one), all_draws(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    scores = [json.loads((f / "metrics.json").read_text())["test"] for f in (one, other)]
    assert scores[0] == scores[1]


def committed(folder):
    """Return how far a run is: the number of its stage, and the blocks of it committed."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        return -1, 0
    checkpoint = manifest["checkpoint"] or {"position": 0}
    return (*STAGES, "done").index(manifest["stage"]), checkpoint["position"]


def stop_in(process, folder, stage, delay, number):
    """Send a signal ``delay`` seconds after a new commit in a stage; False if it came too late."""
    wanted, before = STAGES.index(stage), committed(folder)
    while process.poll() is None:
        now = committed(folder)
        if now[0] > wanted:
            return False
        if now[0] == wanted and now > before and (now[1] > 0 or stage == "results"):
            time.sleep(delay)
            process.send_signal(number)
            process.wait(60)
            return True
        time.sleep(0.005)
    return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cli):
    folder = write_tiny(tmp_path_factory.mktemp("undisturbed"), text=TINY)
    code, _, err = cli(
        "run", "tiny.toml", "--out", "run", "--quiet", "--set", *SETTINGS, cwd=folder
    )
    assert code == 0, err
    return folder / "run"


def finish(folder, cwd, cli):
    code, out, err = cli("resume", folder, "--quiet", cwd=cwd)
    assert code == 0, err
    assert "Traceback" not in out + err


def test_one_run_stopped_again_and_again(tiny, undisturbed, cli):
    run = tiny / "run"
    stops = [
        ("warmup", 0.02, signal.SIGKILL),
        ("sampling", 0.1, signal.SIGKILL),
        ("sampling", 0.05, signal.SIGINT),
    ]
    arguments = ["run", "tiny.toml", "--out", "run", "--set", *SETTINGS]
    hits = []
    for stage, delay, number in stops:
        process = start_cli(*arguments, "--quiet", cwd=tiny)
        hit = stop_in(process, run, stage, delay, number)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        if hit and number == signal.SIGINT and process.returncode != 0:
            assert process.returncode == 130
            assert "bnnmcmc resume run" in out
            assert json.loads((run / "manifest.json").read_text())["stopped"] == "interrupted"
        hits.append(hit)
        arguments = ["resume", "run"]
    assert sum(hits) >= 2, f"the kills came too late: {hits}"
    finish(run, tiny, cli)
    assert_equal_runs(undisturbed, run)
    # Nothing half-written is left behind.
    left = [p.name for p in run.rglob("*") if p.name.endswith((".tmp", ".partial"))]
    assert left == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(10))
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(tiny, undisturbed, cli, stage, moment):
    delay = random.Random(f"{stage} {moment}").uniform(0, 0.5)
    process = start_cli("run", "tiny.toml", "--out", "run", "--quiet", "--set", *SETTINGS, cwd=tiny)
    assert stop_in(process, tiny / "run", stage, delay, signal.SIGKILL)
    process.communicate(timeout=60)
    finish(tiny / "run", tiny, cli)
    assert_equal_runs(undisturbed, tiny / "run")


def test_killed_before_the_first_commit_can_simply_run_again(tiny, here):
    # Set-up files without a manifest: what a kill in the first moments leaves.
    run = tiny / "run"
    run.mkdir()
    (run / ".lock").write_text("")
    (run / "config.toml").write_text("")
    (run / ".manifest.json.123.tmp").write_text("{")
    quick = ["sampler.draws=2", "sampler.warmup=5", "ensemble.max_epochs=2"]
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", "--set", *quick, cwd=tiny)
    assert code == 0, err


def test_block_size_does_not_change_the_draws(tiny, undisturbed, here):
    other = [s for s in SETTINGS if not s.startswith("run.block")] + ["run.block_draws=37"]
    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", "--set", *other, cwd=tiny)
    assert code == 0, err
    blocks = [
        json.loads((f / "manifest.json").read_text())["blocks"] for f in (undisturbed, tiny / "run")
    ]
    assert len(blocks[0]) != len(blocks[1])
    assert_equal_runs(undisturbed, tiny / "run")


@pytest.mark.slow
def test_the_placement_is_chosen_once(tiny, here, monkeypatch):
    """Stored with its reason, kept on another machine, and enough to repeat the run bit for bit."""
    monkeypatch.setattr("bnnmcmc.calibration.caches", lambda cores: Fast(2**20, 2**24))
    quick = ["sampler.warmup=100", "sampler.draws=10", "ensemble.members=4"]
    code, out, err = here("run", "tiny.toml", "--out", "one", "--set", *quick, cwd=tiny)
    assert code == 0, err
    assert "2 each, in groups of 2 (chosen by caches of 1 and 16 MB a core)" in out + err
    manifest = json.loads((tiny / "one" / "manifest.json").read_text())
    stored = tomllib.loads((tiny / "one" / "config.toml").read_text())["run"]
    assert (stored["mode"], stored["group"], stored["row_chunk"]) == ("map", 2, 48)
    assert "in groups of 2" in manifest["placement"]
    assert "caches" in manifest["placement_chosen"]
    # A machine with so small a cache would choose chunks of rows, and no groups.
    monkeypatch.setattr("bnnmcmc.calibration.caches", lambda cores: Fast(100, 0))
    monkeypatch.setattr("bnnmcmc.calibration.MIN_CHUNK", 8)
    code, _, err = here("resume", "one", "--draws", "10", cwd=tiny)
    assert code == 0, err
    now = json.loads((tiny / "one" / "manifest.json").read_text())
    assert now["placement"] == manifest["placement"]
    settings = ["sampler.draws=20", 'data.path="../table.csv"']
    code, _, err = here("run", "one/config.toml", "--out", "two", "--set", *settings, cwd=tiny)
    assert code == 0, err
    assert_equal_runs(tiny / "one", tiny / "two")
    code, _, err = here("run", "tiny.toml", "--out", "three", "--set", *quick, cwd=tiny)
    assert code == 0, err
    other = json.loads((tiny / "three" / "manifest.json").read_text())
    assert "rows in chunks of 8" in other["placement"]


def test_two_processes_cannot_work_on_one_run(tiny, cli):
    process = start_cli("run", "tiny.toml", "--out", "run", "--quiet", "--set", *SETTINGS, cwd=tiny)
    while process.poll() is None and committed(tiny / "run")[0] < 0:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        code, _, err = cli("resume", "run", cwd=tiny)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
    assert code == 2
    assert "another process is working on this run" in err


def test_diagnose_of_a_run_at_work_disturbs_nothing(tiny, undisturbed, cli, here):
    process = start_cli("run", "tiny.toml", "--out", "run", "--quiet", "--set", *SETTINGS, cwd=tiny)
    while process.poll() is None and committed(tiny / "run") <= (STAGES.index("sampling"), 0):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # in the midst of sampling, the lock held
    before = (tiny / "run" / "manifest.json").read_bytes()
    try:
        code, out, err = here("diagnose", "run", cwd=tiny)
        assert (tiny / "run" / "manifest.json").read_bytes() == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert code == 0, err
    assert "R-hat" in out
    assert process.wait(120) == 0
    process.communicate()
    assert_equal_runs(undisturbed, tiny / "run")


def test_leftovers_of_any_kind_are_removed_on_resume(finished, tmp_path, here):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / ".arviz.zarr.1.tmp").mkdir()
    (run / ".arviz.zarr.1.tmp.old").mkdir()
    (run / "draws" / "c.partial").write_text("")
    code, _, err = here("resume", "run", "--draws", "2", "--quiet", cwd=tmp_path)
    assert code == 0, err
    left = [p.name for p in run.rglob("*") if ".tmp" in p.name or p.name.endswith(".partial")]
    assert left == []
