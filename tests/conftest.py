"""Every test sees two CPU devices, whatever the machine: sharding is then always on."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest

from bnnmcmc.cli import main
from bnnmcmc.compilation import use_compilation_cache
from bnnmcmc.placement import use_all_cores

use_all_cores(2)

# The same few programs again and again: compile them once for all tests and their processes, and
# not in the user's own cache.
# Workers (pytest-xdist) share it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="bnnmcmc-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"):
    os.environ.pop(name, None)
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", None)
use_compilation_cache()

TINY = """
[data]
path = "table.csv"
target = "y"

[model]
hidden = [6]
activation = "tanh"

[ensemble]
members = 3
max_epochs = 40
patience = 40
batch_size = 16

[sampler]
kernel = "mclmc"
warmup = 200
draws = 40
thin = 2

[run]
arviz = "none"
"""


def start_cli(*arguments, cwd, **options):
    """Start the command line as a process, as a user's shell would."""
    environment = {
        **os.environ,
        "COLUMNS": "200",
        "BNNMCMC_DATA": "",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-m", "bnnmcmc", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def assert_thinned(kept, every, thin):
    """Check statistics (chain, record) of records of ``thin`` steps against those of each step."""
    steps = {name: values.reshape(len(values), -1, thin) for name, values in every.items()}
    np.testing.assert_array_equal(kept["gradients"], steps["gradients"].sum(-1))
    np.testing.assert_array_equal(kept["diverging"], steps["diverging"].sum(-1))
    np.testing.assert_array_equal(kept["tree_depth"], steps["tree_depth"].max(-1))
    np.testing.assert_array_equal(kept["energy"], steps["energy"][..., -1])
    rates = steps["acceptance_rate"].mean(-1)
    np.testing.assert_allclose(kept["acceptance_rate"], rates, rtol=1e-5)


@pytest.fixture(scope="session")
def cli():
    """Run the command line to its end: (exit status, stdout, stderr)."""

    def run(*arguments, cwd, **options):
        process = start_cli(*arguments, cwd=cwd, **options)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """Run the command line in this process, where JAX is awake: (exit status, stdout, stderr)."""
    monkeypatch.setattr("bnnmcmc.placement.use_all_cores", lambda cores=None: None)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("BNNMCMC_DATA", raising=False)

    def run(*arguments, cwd):
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def write_tiny(folder, rows=60, text=TINY):
    """Write a small table with two features and a category, and a config that is quick to run."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, rows))
    kind = np.array(["red", "green"])[np.arange(rows) % 2]
    y = 5 + 3 * a - b + 2 * (kind == "red") + 0.3 * rng.normal(size=rows)
    lines = ["a,b,kind,y"]
    lines += [f"{p:.6f},{q:.6f},{k},{r:.6f}" for p, q, k, r in zip(a, b, kind, y, strict=True)]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    (folder / "tiny.toml").write_text(text)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """A folder with table.csv and tiny.toml."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, cli):
    """A folder with table.csv, tiny.toml and a finished run in ``run/``; do not change it."""
    folder = write_tiny(tmp_path_factory.mktemp("finished"))
    code, out, err = cli("run", "tiny.toml", "--out", "run", cwd=folder)
    assert code == 0, err
    (folder / "stdout.txt").write_text(out)
    (folder / "stderr.txt").write_text(err)
    return folder
