"""Peak resident memory of a whole run against the number of kept draws.

``bnnmcmc run`` on a made table of 50 rows (cheap likelihood, every step kept): 10 chains of 1001
parameters, from 1000 to 100 000 draws, with scores, diagnostics, ArviZ file and report. The peak is
the child's ``ru_maxrss``; beside it the largest resident memory seen in each stage, sampled every
50 ms. The draws of the largest run take 4 GB of disk.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import bnnmcmc, run
from experiments.benchmarks.settings import Settings, setting_words
from experiments.benchmarks.whole_fit import our_environment

DRAWS, FEATURES, HIDDEN = (1000, 10_000, 100_000), 6, [27, 27]
FLAT_MB = 200
CONFIG = """
[data]
path = "table.csv"
target = "y"

[model]
activation = "tanh"

[ensemble]
max_epochs = 20

[sampler]
warmup = 500
thin = 1
"""


def measure(settings: Settings) -> dict[str, Any]:
    """Measure the peak for each number of draws; say whether it is flat."""
    folder = settings.folder / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, FEATURES + 1))
    header = ",".join([*(f"x{i}" for i in range(FEATURES)), "y"])
    np.savetxt(folder / "table.csv", table, delimiter=",", header=header, comments="", fmt="%.6f")
    (folder / "table.toml").write_text(CONFIG)
    hidden = [4] if settings.quick else HIDDEN
    rows = []
    for draws in (10, 30) if settings.quick else DRAWS:
        rows.append(_of(settings, folder, draws, hidden))
    growth = rows[-1]["peak_mb"] - rows[0]["peak_mb"]
    return {"rows": rows, "growth_mb": growth, "flat": growth <= FLAT_MB, "flat_within_mb": FLAT_MB}


def _of(settings: Settings, folder: Path, draws: int, hidden: list[int]) -> dict[str, Any]:
    out = folder / f"run-{draws}"
    by_stage: dict[str, float] = {}

    def watch(_: float, pid: int) -> None:
        resident = _resident_mb(pid)
        try:
            stage = json.loads((out / "manifest.json").read_text())["stage"]
        except (OSError, ValueError):  # not there yet
            stage = "before"
        stage = "report" if stage == "done" else stage
        if resident is not None:
            by_stage[stage] = max(by_stage.get(stage, 0.0), resident)

    ended = run(
        bnnmcmc(
            "run",
            folder / "table.toml",
            "--out",
            out,
            *setting_words({"model.hidden": hidden, "sampler.draws": draws}),
        ),
        folder / f"run-{draws}.log",
        environment=our_environment(settings, folder / "cache"),
        watch=watch,
    )
    manifest = json.loads((out / "manifest.json").read_text())
    shutil.rmtree(out)
    return {
        "draws": draws,
        "chains": manifest["chains"],
        "parameters": manifest["parameters"],
        "peak_mb": ended.peak_bytes / 2**20,
        "seconds": ended.seconds,
        **{f"{stage}_mb": value for stage, value in by_stage.items()},
    }


def _resident_mb(pid: int) -> float | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # ended just now, or no Linux
        return None
    for line in lines:
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None
