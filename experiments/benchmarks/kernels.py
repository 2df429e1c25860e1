"""What gradients buy: every kernel on airfoil, energy and bike sharing, beside its pooled LPPD.

Whole runs of ``experiments/*.toml``, ten chains from the same members, seed 0. A gradient is one
over all rows that the posterior conditions on, warm-up and sampling, all chains together; that of a
batch counts as its share. The LPPD is of the test rows, standardised. Each kernel has one setting,
fixed before these scores were seen, and none is tuned to a table.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import in_fresh_process
from experiments.benchmarks.settings import EXPERIMENTS, Settings
from experiments.benchmarks.whole_fit import our_run

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
    config = write_config(settings.folder, table, name.split(",")[0])
    run_name = f"{table}-{name.replace(', ', '-').replace(' ', '-')}"
    cache = settings.folder / "cache"
    found = our_run(settings, run_name, changes, cache=cache, config=config)
    told = in_fresh_process(__name__, "spent", found["folder"], jax=True)
    return {
        "table": table,
        "kernel": name,
        "gradients": told["gradients"],
        "lppd": found["lppd"],
        "chains_ok": told["chains_ok"],
        "seconds": found["wall_seconds"],
    }


def write_config(folder: Path, table: str, kernel: str) -> Path:
    """Write the experiment's config with this kernel and its defaults; return the file."""
    text = (EXPERIMENTS / f"{table}.toml").read_text()
    head, _, rest = text.partition("[sampler]\n")
    after = rest.partition("\n[")
    path = folder / f"{table}-{kernel}.toml"
    path.write_text(f'{head}[sampler]\nkernel = "{kernel}"\n{after[1]}{after[2]}')
    return path


def spent(folder: str) -> dict[str, float]:
    """Return a run's gradients over all rows, warm-up and all, and how many chains are ok."""
    from bnnmcmc import Run

    opened = Run.open(folder)
    # Of batches, rows are counted.
    name, whole = "gradients", 1
    if "rows" in opened.stats:
        name, whole = "rows", len(opened.dataset.train) + len(opened.dataset.validation)
    stages = (opened.stats, opened.warmup_stats)
    counted = sum(np.sum(stage[name], dtype=np.float64) for stage in stages)
    return {
        "gradients": float(counted / whole),
        "chains_ok": sum(chain.status == "ok" for chain in opened.status),
    }
