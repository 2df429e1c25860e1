"""Rows per second, and peak memory, of ``bnnmcmc predict`` from CSV to Parquet.

A saved predictor of 100 draws (ten chains) of an 8-16-16-2 SiLU network, with random weights (what
is computed does not depend on them), predicts mean, standard deviations and a 90 % interval of each
row of a made table. Compiled programs are cached by a first call with fewer rows. The peak is the
child's ``ru_maxrss``; memory is bounded if it is the same for ten times the rows.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import bnnmcmc, in_fresh_process, run
from experiments.benchmarks.settings import Settings
from experiments.benchmarks.whole_fit import our_environment

# Whole pieces (`rows.READ_ROWS`): a last one of another length would be compiled in each call.
FIRST, ROWS, FEATURES, CHAINS, DRAWS = 16_384, (98_304, 983_040), 8, 10, 10
FLAT_MB = 200


def measure(settings: Settings) -> dict[str, Any]:
    """Predict tables of two lengths; say whether the peak is flat."""
    folder = settings.folder / "predict"
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.bnn"
    in_fresh_process(__name__, "make_predictor", model, jax=True)
    rows = []
    for count in (100, 1000) if settings.quick else (FIRST, *ROWS):
        table, out = folder / f"{count}.csv", folder / f"{count}.parquet"
        _write_table(table, count)
        ended = run(
            bnnmcmc("predict", model, table, "--out", out),
            folder / f"{count}.log",
            environment=our_environment(settings, folder / "cache"),
        )
        rows.append(
            {
                "rows": count,
                "draws": CHAINS * DRAWS,
                "seconds": ended.seconds,
                "rows_per_second": count / ended.seconds,
                "rows_per_cpu_second": count / ended.cpu_seconds,
                "peak_mb": ended.peak_bytes / 2**20,
                "csv_mb": table.stat().st_size / 2**20,
            }
        )
        table.unlink()
        out.unlink()
    rows = rows if settings.quick else rows[1:]  # the first one compiled
    growth = rows[-1]["peak_mb"] - rows[0]["peak_mb"]
    return {"rows": rows, "growth_mb": growth, "flat": growth <= FLAT_MB, "flat_within_mb": FLAT_MB}


def make_predictor(file: Path) -> None:
    """Save a predictor with random weights."""
    import jax

    from bnnmcmc import Posterior, Run, gaussian, mlp, normal_prior
    from bnnmcmc.health import ChainStatus
    from bnnmcmc.predictive import draws_in_memory

    posterior = Posterior(mlp(FEATURES, [16, 16], 2), gaussian(), normal_prior())
    keys = jax.random.split(jax.random.key(0), (CHAINS, DRAWS))
    draws = draws_in_memory(jax.vmap(jax.vmap(posterior.init))(keys))
    x, y = np.zeros((1, FEATURES)), np.zeros((1, 1))
    status = (ChainStatus("ok", ""),) * CHAINS
    kind = {"model": {"hidden": [16, 16]}, "likelihood": {"kind": "gaussian"}}
    Run(posterior, draws, {}, x, y, status, described=kind).save(file, draws=None)


def _write_table(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    names = ",".join(f"x{i}" for i in range(1, FEATURES + 1))
    with path.open("w") as file:
        file.write(names + "\n")
        for low in range(0, rows, 100_000):
            part = rng.normal(size=(min(100_000, rows - low), FEATURES))
            np.savetxt(file, part, delimiter=",", fmt="%.5f")
