"""Seconds that JAX spends on compilation, per stage of a run, cold and from the cache.

A whole ``bnnmcmc run experiments/airfoil.toml`` with few steps runs in a child process that listens
to JAX's own durations: tracing, lowering, and compiling or fetching from the persistent cache. The
stage is the one that the run's manifest names at that moment.
"""

import json
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks.processes import run
from experiments.benchmarks.settings import CONFIG, Settings, setting_words
from experiments.benchmarks.timing import summary
from experiments.benchmarks.whole_fit import our_environment

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
# Few steps: compilation does not depend on how many there are.
CHANGES = {
    "ensemble.max_epochs": 3,
    "sampler.warmup": 200,
    "sampler.draws": 20,
}
STAGES = ("before", "ensemble", "warmup", "sampling", "results")


def measure(settings: Settings) -> dict[str, Any]:
    """Measure compilation from an empty cache, and again from the one it left."""
    rows = []
    for kernel in ("mclmc",) if settings.quick else ("mclmc", "nuts", "hmc"):
        for cache in ("empty", "filled"):
            found = [_child(settings, kernel, cache, i) for i in range(settings.repeats)]
            for stage in STAGES:
                each = [sum(one["seconds"][stage].values()) for one in found]
                best = found[each.index(min(each))]["seconds"][stage]
                rows.append(
                    {"kernel": kernel, "cache": cache, "stage": stage}
                    | {"seconds": min(each), "spread": _spread(each)}
                    | {what: best[what] for what in EVENTS.values()}
                )
            totals = [sum(sum(s.values()) for s in one["seconds"].values()) for one in found]
            wall = summary([one["wall"] for one in found])
            rows.append(
                {"kernel": kernel, "cache": cache, "stage": "all", "seconds": min(totals)}
                | {"spread": _spread(totals), "whole_process": wall["seconds"]}
            )
    return {"rows": rows, "changes": CHANGES}


def _spread(seconds: list[float]) -> float | None:
    return summary(seconds)["spread"] if min(seconds) > 0 else None


def _child(settings: Settings, kernel: str, cache: str, number: int) -> dict[str, Any]:
    folder = settings.folder / "compilation"
    name = f"{kernel}-{cache}-{number}"
    where = folder / f"{kernel}-cache-{number if cache == 'empty' else 0}"
    words = ["run", CONFIG, "--out", folder / name]
    words += setting_words({**CHANGES, "sampler.kernel": kernel})
    ended = run(
        [sys.executable, "-m", __name__, folder / f"{name}.json", *words],
        folder / f"{name}.log",
        environment=our_environment(settings, where),
    )
    return {"wall": ended.seconds, "seconds": json.loads((folder / f"{name}.json").read_text())}


def listen(out: Path, words: list[str]) -> None:
    """Run the command line in this process; write the seconds by stage and event to ``out``."""
    import jax.monitoring

    from bnnmcmc.cli import main

    manifest = Path(words[words.index("--out") + 1]) / "manifest.json"
    seconds = {stage: dict.fromkeys(EVENTS.values(), 0.0) for stage in STAGES}

    def note(event: str, duration: float, **_: Any) -> None:
        if event not in EVENTS:
            return
        stage = "before"
        if manifest.exists():
            stage = json.loads(manifest.read_text())["stage"]
        # The report comes after the last commit.
        seconds["results" if stage == "done" else stage][EVENTS[event]] += duration

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        main(words)
    finally:
        out.write_text(json.dumps(seconds))


if __name__ == "__main__":
    listen(Path(sys.argv[1]), sys.argv[2:])
