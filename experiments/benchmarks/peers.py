"""The peer table: ``uv run python -m experiments.benchmarks.peers --data DIR --out peers``.

Every cell, one method on one split of one table, is a file below ``--out``; what is there is not
computed again, so the command can be stopped and called again, with more splits or tables too.
The peers (sklearn-contrib-bde, NGBoost, CatBoost, scikit-learn) run in an environment of their own,
which is made with uv below ``--out``.

The splits are scikit-learn's ``train_test_split(test_size=0.2, random_state=0, 1, ...)``; a tenth
of the rows, out of the rest, is the validation part, the same for all methods. Scores are on the
target standardised by all rows that are not test rows.
"""

import json
import math
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.processes import in_fresh_process
from experiments.benchmarks.settings import EXPERIMENTS

TABLES = ("airfoil", "energy", "bikesharing", "ionosphere", "breast_cancer", "diabetes")
MODULE = "experiments.benchmarks.peers"  # also where it is run as a script
OURS = ("bnnmcmc", "deep_ensemble")
PEERS = ("bde", "ngboost", "catboost", "gaussian_process", "conformal_forest")
PACKAGES = ("sklearn-contrib-bde", "ngboost", "catboost", "scikit-learn")
# A Gaussian process takes memory and time with the square and cube of these.
MAX_GAUSSIAN_PROCESS_ROWS = 3000
COLUMNS = {
    "lppd": "LPPD",
    "nll_gaussian": "NLL (Gaussian)",
    "crps": "CRPS",
    "rmse": "RMSE",
    "coverage_90": "coverage 90 %",
    "width_90": "width 90 %",
    "accuracy": "accuracy",
    "brier": "Brier",
    "ece": "ECE",
    "fit_seconds": "fit s",
    "predict_seconds": "predict s",
}

app = cyclopts.App(name="python -m experiments.benchmarks.peers", result_action="return_value")


@app.default
def main(
    *,
    data: Path,
    out: Path = Path("peers"),
    tables: Annotated[list[str], Parameter(consume_multiple=True)] = list(TABLES),  # noqa: B006
    methods: Annotated[list[str], Parameter(consume_multiple=True)] = [*OURS, *PEERS],  # noqa: B006
    splits: int = 10,
    python: Path | None = None,
    only_table: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Fill the table's cells that are not there yet, and print it.

    Parameters
    ----------
    data
        Folder with the tables, such as airfoil.data.
    out
        Where cells, runs and the peers' environment go.
    tables, methods
        Which of them; all if not given.
    splits
        How many splits of each table.
    python
        Python of an environment with the peers; one is made if not given.
    only_table
        Print what is there, and compute nothing.
    """
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 180)
    unknown = [name for name in (*tables, *methods) if name not in (*TABLES, *OURS, *PEERS)]
    if unknown:
        console.print(
            f"unknown: {', '.join(unknown)}; there are {', '.join((*TABLES, *OURS, *PEERS))}"
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for split in range(0 if only_table else splits):
        for table in tables:
            for method in methods:
                cell = out / table / str(split) / f"{method}.json"
                if cell.exists():
                    continue
                if method not in OURS and python is None:
                    python = make_environment(out / "environment")
                begun = time.monotonic()
                try:
                    found = compute(table, split, method, data.resolve(), cell.parent, python)
                except Exception:  # one cell that fails shall not cost the others
                    traceback.print_exc()
                    failed += 1
                    continue
                cell.write_text(json.dumps(found, indent=1) + "\n")
                console.print(f"{table} {split} {method}: {time.monotonic() - begun:.0f} s")
    for table in tables:
        show(console, table, out / table, methods, splits)
    return 1 if failed else 0


def make_environment(folder: Path) -> Path:
    """Make an environment with the peers, if it is not there; return its Python."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        # Outside of this project: its version constraints are not the peers'.
        quiet = {"check": True, "cwd": folder.parent.absolute()}
        subprocess.run(["uv", "venv", "--quiet", "--python", "3.12", folder.absolute()], **quiet)
        words = ["uv", "pip", "install", "--quiet", "--python", python, *PACKAGES]
        subprocess.run(words, **quiet)
    return python


def compute(
    table: str, split: int, method: str, data: Path, folder: Path, python: Path | None
) -> dict[str, Any]:
    """Return the scores of one cell."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = in_fresh_process(MODULE, "split_arrays", table, split, data, jax=False)
    if method in OURS:
        found = in_fresh_process(
            MODULE, "our_predictions", table, split, method, data, folder, jax=True
        )
    else:
        rows = len(arrays["x"]) + len(arrays["x_validation"])
        if method == "gaussian_process" and rows > MAX_GAUSSIAN_PROCESS_ROWS:
            return {"skipped": f"{rows} rows are too many"}
        np.savez(folder / "data.npz", name=table, **arrays)
        driver = Path(__file__).with_name("peer_models.py")
        words = [python, driver, method, folder / "data.npz", folder / f"{method}.npz"]
        with open(folder / f"{method}.log", "w") as log:
            subprocess.run(words, check=True, stdout=log, stderr=subprocess.STDOUT)
        with np.load(folder / f"{method}.npz") as loaded:
            found = {name: loaded[name] for name in loaded.files}
        (folder / f"{method}.npz").unlink()
    return score(found, arrays)


def split_arrays(table: str, split: int, data: Path) -> dict[str, Any]:
    """Return the rows of a split, the target standardised by all rows that are not test rows."""
    dataset = our_dataset(table, split, data)
    rest = np.concatenate([dataset.train, dataset.validation])
    y, classes = dataset.y, len(dataset.encoding.classes or ())
    if not classes:
        y = (y - y[rest].mean(axis=0)) / y[rest].std(axis=0)
    parts = {"": dataset.train, "_validation": dataset.validation, "_test": dataset.test}
    return {
        "classes": classes,
        **{f"x{name}": dataset.x[rows] for name, rows in parts.items()},
        **{f"y{name}": y[rows] for name, rows in parts.items()},
    }


def our_dataset(table: str, split: int, data: Path):
    from bnnmcmc.config import read_config
    from bnnmcmc.inputs import read_dataset

    config = read_config(EXPERIMENTS / f"{table}.toml", [f"data.split.seed={split}"])
    return read_dataset(config, data)


def our_predictions(
    table: str, split: int, method: str, data: Path, folder: Path
) -> dict[str, Any]:
    """Run the table's config, once for both methods, and predict the test rows."""
    import os

    import jax

    import bnnmcmc
    from bnnmcmc.prediction import in_target_units
    from bnnmcmc.predictive import draws_in_memory, pool

    where = folder / "run"
    if not (where / "metrics.json").exists():
        words = [sys.executable, "-m", "bnnmcmc", "run", EXPERIMENTS / f"{table}.toml"]
        words += ["--out", where, "--set", f"data.split.seed={split}", "run.arviz=none"]
        if where.exists():
            words = [sys.executable, "-m", "bnnmcmc", "resume", where]
        with open(folder / "run.log", "w") as log:
            environment = {**os.environ, "BNNMCMC_DATA": str(data)}
            subprocess.run(words, check=True, stdout=log, stderr=log, env=environment)
    run = bnnmcmc.Run.open(where)
    members = jax.tree.map(lambda leaf: leaf[:, None], run.members)
    draws = run.pooled_draws if method == "bnnmcmc" else draws_in_memory(members)
    dataset = run.dataset
    x, y = dataset.x[dataset.test], dataset.y[dataset.test]
    begun = time.monotonic()
    pooled = pool(run.posterior, draws, x, y)
    found = in_target_units(pooled, None)
    stages = json.loads((where / "manifest.json").read_text())["seconds"]
    used = ("ensemble", "warmup", "sampling") if method == "bnnmcmc" else ("ensemble",)
    fit = sum(stages[name] for name in used)
    if found.probabilities is not None:
        return {
            "probabilities": found.probabilities,
            "seconds": [fit, time.monotonic() - begun],
        }
    low, high = found.interval(0.9)
    seconds = [fit, time.monotonic() - begun]
    # From the run's scale, that of its training rows, to that of the table.
    rest = np.concatenate([dataset.train, dataset.validation])
    center, scale = dataset.y[rest].mean(axis=0), dataset.y[rest].std(axis=0)
    values = {"mean": found.mean, "low": low, "high": high, "samples": found.samples}
    return {
        **{name: ((value - center) / scale)[..., 0] for name, value in values.items()},
        "sd": (found.sd / scale)[:, 0],
        "log_density": pooled.log_density + np.log(scale).sum(),
        "seconds": seconds,
    }


def score(found: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Return all scores that the predictions allow."""
    from bnnmcmc import metrics

    y = arrays["y_test"]
    times = {
        "fit_seconds": float(found["seconds"][0]),
        "predict_seconds": float(found["seconds"][1]),
    }
    if "probabilities" in found:
        p = np.asarray(found["probabilities"], np.float64)
        p = p / p.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            log_density = np.log(p[np.arange(len(y)), y])
        return metrics.classification_scores(y, p, log_density) | times
    low, high = found["low"][:, None], found["high"][:, None]
    scores = {
        "rmse": metrics.rmse(y, found["mean"][:, None]),
        "coverage_90": metrics.interval_coverage(y, low, high).value,
        "width_90": metrics.interval_width(low, high).value,
    }
    if "log_density" in found:
        variance = found["sd"][:, None] ** 2
        scores |= {
            "lppd": metrics.lppd(found["log_density"]),
            "nll_gaussian": metrics.nll_gaussian(y, found["mean"][:, None], variance),
            "crps": metrics.crps_samples(y, found["samples"][..., None]),
        }
    return scores | times


def show(console: Console, name: str, folder: Path, methods: list[str], splits: int) -> None:
    """Print mean and standard error over the splits that are there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        cells = [folder / str(split) / f"{method}.json" for split in range(splits)]
        read = [json.loads(cell.read_text()) for cell in cells if cell.exists()]
        found[method] = [cell for cell in read if "skipped" not in cell]
    used = [c for c in COLUMNS if any(c in cell for cells in found.values() for cell in cells)]
    table = Table(title=name, title_justify="left")
    table.add_column("")
    table.add_column("splits", justify="right")
    for column in used:
        table.add_column(COLUMNS[column], justify="right")
    for method, cells in found.items():
        texts = [_text([cell.get(column, math.nan) for cell in cells]) for column in used]
        if cells:
            table.add_row(method, str(len(cells)), *texts)
    console.print(table)


def _text(values: list[float]) -> str:
    mean = float(np.mean(values)) if values else math.nan
    if math.isnan(mean):
        return "-"
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    sys.exit(app())
