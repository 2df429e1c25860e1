"""Wall clock until this library reaches the peer's final pooled LPPD on the test rows.

The peer runs with three sets of arguments, each to its end: its constructor's defaults, the airfoil
example of its README (with the split and scaling of here), and the same-work fit of `whole_fit`.
Its time is that of the whole process.

This library runs once with the defaults of experiments/airfoil.toml. The times at which blocks of
draws were committed are noted, and afterwards the pooled LPPD of the first K draws of every chain
is computed for every K ("draws there after": when the K-th draw was committed). The smallest K that
reaches the peer's LPPD is then run again as a whole process, with ``--set sampler.draws=K``: its
wall clock, with start-up, compilation from an empty cache, training, warm-up, scores and report, is
what stands beside the peer's. Choosing K looks at the test rows; K is no recommendation, only the
answer to "when".
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import in_fresh_process
from experiments.benchmarks.settings import Settings
from experiments.benchmarks.whole_fit import fastest, our_run, peer_fit, peer_settings

README_EXAMPLE = {
    "hidden_layers": [16, 16],
    "n_members": 8,
    "seed": 0,
    "epochs": 200,
    "validation_split": 0.15,
    "lr": 1e-3,
    "weight_decay": 1e-4,
    "warmup_steps": 5000,
    "n_samples": 2000,
    "n_thinning": 2,
    "patience": 10,
}


def measure(settings: Settings) -> dict[str, Any]:
    """Measure the peer's times and LPPDs, and when ours gets there."""
    if settings.peer is None:
        return {"rows": [], "note": "not measured: needs --peer"}
    commits: list[tuple[float, int]] = []
    small = {"sampler.warmup": 40, "sampler.draws": 20, "ensemble.max_epochs": 5}
    changes: dict[str, Any] = small if settings.quick else {}
    full = our_run(
        settings,
        "lppd-full",
        changes,
        watch=lambda seconds, _: _note(settings.folder / "lppd-full", commits, seconds),
    )
    lppd = np.asarray(in_fresh_process(__name__, "running_lppd", full["folder"], jax=True))
    rows = []
    for name, arguments in (
        ("defaults", {"seed": 0}),
        ("README example", README_EXAMPLE),
        ("same work", peer_settings(settings)),
    ):
        if settings.quick and name == "README example":
            continue
        slug = name.lower().replace(" ", "-")
        fits = [peer_fit(settings, slug, arguments, i) for i in range(settings.repeats)]
        peer = fastest(fits)
        row = {
            "peer": name,
            "peer_lppd": peer["lppd"],
            "peer_seconds": peer["seconds"],
            "peer_spread": peer["spread"],
            "peer_cpu_seconds": peer["cpu_seconds"],
            "draws_needed": None,
        }
        reached = np.flatnonzero(lppd >= peer["lppd"])
        if len(reached):
            needed = int(reached[0]) + 1
            few = {**changes, "sampler.draws": needed}
            ours = fastest(
                [our_run(settings, f"lppd-{slug}-{i}", few) for i in range(settings.repeats)]
            )
            row |= {
                "draws_needed": needed,
                "draws_there_after": next((s for s, n in commits if n >= needed), None),
                "our_seconds": ours["seconds"],
                "our_spread": ours["spread"],
                "our_cpu_seconds": ours["cpu_seconds"],
                "our_lppd": ours["lppd"],
                "times_faster": peer["seconds"] / ours["seconds"],
            }
        rows.append(row)
    return {
        "rows": rows,
        "our_full_seconds": full["wall_seconds"],
        "our_full_lppd": full["lppd"],
        "commits": commits,
        "readme_example": README_EXAMPLE,
        "same_work": peer_settings(settings),
    }


def _note(folder: Path, commits: list[tuple[float, int]], seconds: float) -> None:
    try:
        blocks = json.loads((folder / "manifest.json").read_text())["blocks"]
    except (OSError, ValueError):  # not there yet
        return
    draws = sum(block["count"] for block in blocks)
    if draws and (not commits or draws > commits[-1][1]):
        commits.append((seconds, draws))


def running_lppd(folder: str) -> list[float]:
    """Return the pooled LPPD of the first 1, 2, ... draws of all chains on the test rows."""
    from bnnmcmc.predictive import per_draw
    from bnnmcmc.run import Run

    run = Run.open(folder)
    assert run.dataset is not None
    test = run.dataset.test
    found = per_draw(run.posterior, run.pooled_draws, run.dataset.x[test], run.dataset.y[test])
    each = found["log_density"].astype(np.float64)  # (chain, draw, row)
    pooled = np.logaddexp.accumulate(np.logaddexp.reduce(each, axis=0), axis=0)
    counts = each.shape[0] * np.arange(1, each.shape[1] + 1)
    return (pooled - np.log(counts)[:, None]).mean(axis=1).tolist()
