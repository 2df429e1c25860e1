"""What gradients buy: every kernel on airfoil, energy and bike sharing, beside its pooled LPPD.

Whole runs of ``experiments/*.toml``, ten chains from the same members, seed 0. A gradient is one
over all rows that the posterior conditions on, warm-up and sampling, all chains together; that of a
batch counts as its share. The LPPD is of the test rows, standardised. Each kernel has one setting,
fixed before these scores were seen, and none is tuned to a table.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import bnnmcmc, in_fresh_process, run
from experiments.benchmarks.settings import EXPERIMENTS, Settings, setting_words
from experiments.benchmarks.whole_fit import our_environment

TABLES = ("airfoil", "energy", "bikesharing")
WALK = {"sampler.warmup": 5100, "sampler.adaptation": '"network"'}
BATCHES = {"sampler.batch_size": 256}
# Name -> settings. Trees and trajectories are dear, so those have few draws.
KERNELS: dict[str, dict[str, Any]] = {
    "mclmc": {"sampler.warmup": 20_000, "sampler.draws": 1000, "sampler.thin": 10},
    "mclmc, half as long": {"sampler.warmup": 10_000, "sampler.draws": 500, "sampler.thin": 10},
    "mclmc, no metric": {
        "sampler.metric": '"identity"',
        "sampler.energy_variance_start": 5.0,
        "sampler.energy_variance_end": 0.05,
        "sampler.warmup": 20_000,
        "sampler.draws": 1000,
        "sampler.thin": 10,
    },
    "mams": {"sampler.warmup": 10_000, "sampler.draws": 250, "sampler.thin": 1},
    "mams, no metric": {
        "sampler.metric": '"identity"',
        "sampler.warmup": 10_000,
        "sampler.draws": 250,
        "sampler.thin": 1,
    },
    "nuts, network": {**WALK, "sampler.draws": 40, "sampler.max_depth": 8, "sampler.thin": 1},
    "hmc": {"sampler.warmup": 500, "sampler.draws": 100, "sampler.thin": 1},
    "smile": {**BATCHES, "sampler.warmup": 20_000, "sampler.draws": 500, "sampler.thin": 60},
    "sghmc": {**BATCHES, "sampler.warmup": 30_000, "sampler.draws": 500, "sampler.thin": 60},
    "sgld": {**BATCHES, "sampler.warmup": 30_000, "sampler.draws": 500, "sampler.thin": 60},
}
SHORT = {
    "sampler.warmup": 40,
    "sampler.draws": 4,
    "sampler.thin": 1,
    "ensemble.max_epochs": 5,
    "ensemble.members": 2,
    "model.hidden": [4],
}


def measure(settings: Settings) -> dict[str, Any]:
    """Run every kernel on every table."""
    rows = []
    for table in TABLES[:1] if settings.quick else TABLES:
        for name, changes in KERNELS.items():
            if settings.quick:
                changes = changes | SHORT
                if "sampler.batch_size" in changes:
                    changes["sampler.batch_size"] = 16
            rows.append(_row(settings, table, name, changes))
    return {"rows": rows}


def _row(settings: Settings, table: str, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    kernel = name.split(",")[0]
    out = settings.folder / f"{table}-{name.replace(', ', '-').replace(' ', '-')}"
    ended = run(
        bnnmcmc(
            "run",
            write_config(settings.folder, table, kernel),
            "--out",
            out,
            *setting_words(changes),
        ),
        settings.folder / f"{out.name}.log",
        environment=our_environment(settings, settings.folder / "cache"),
    )
    scores = json.loads((out / "metrics.json").read_text())["test"]
    status = json.loads((out / "manifest.json").read_text())["status"]
    return {
        "table": table,
        "kernel": name,
        "gradients": in_fresh_process(__name__, "gradients_of", str(out), jax=True),
        "lppd": scores["posterior"]["lppd"],
        "ensemble_lppd": scores["ensemble"]["lppd"],
        "chains_ok": sum(each["status"] == "ok" for each in status),
        "seconds": ended.seconds,
    }


def write_config(folder: Path, table: str, kernel: str) -> Path:
    """Write the experiment's config with this kernel and its defaults; return the file."""
    text = (EXPERIMENTS / f"{table}.toml").read_text()
    head, _, rest = text.partition("[sampler]\n")
    after = rest.partition("\n[")
    path = folder / f"{table}-{kernel}.toml"
    path.write_text(f'{head}[sampler]\nkernel = "{kernel}"\n{after[1]}{after[2]}')
    return path


def gradients_of(folder: str) -> float:
    """Return the gradients of a run's chains over all rows, of warm-up and sampling."""
    from bnnmcmc import Run

    opened = Run.open(folder)
    stages = [opened.stats, opened.warmup_stats]
    if "rows" in opened.stats:
        rows = len(opened.dataset.train) + len(opened.dataset.validation)
        return float(sum(np.sum(stage["rows"], dtype=np.float64) for stage in stages) / rows)
    return float(sum(np.sum(stage["gradients"], dtype=np.float64) for stage in stages))
