"""A whole fit beside the peer, sklearn-contrib-bde (Microcanonical Langevin Ensembles).

Same rows, split, scaling, architecture, number of members, warm-up steps and kept draws, same
integrator (minimal norm, two gradients a step) and energy variances. The wall clock is that of the
whole process: start-up and compilation (from an empty cache), training, sampling and scores; on our
side also the run folder, diagnostics and report. Training differs, each side has its own: the
peer's is full-batch Adam with early stopping, at most 1000 epochs; ours is the config's.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.processes import bnnmcmc, run
from experiments.benchmarks.settings import CONFIG, Settings, airfoil, setting_words
from experiments.benchmarks.timing import summary

PEER_PACKAGE = "sklearn-contrib-bde"
MEMBERS, HIDDEN, WARMUP, STEPS, THIN = 10, [16, 16, 16, 16], 50_000, 10_000, 10


def measure(settings: Settings) -> dict[str, Any]:
    """Measure both sides; ours also with its own integrator (one gradient a step)."""
    rows = []
    if settings.peer is not None:
        arguments = peer_settings(settings)
        found = [peer_fit(settings, "same-work", arguments, i) for i in range(settings.repeats)]
        rows.append(_row(f"{PEER_PACKAGE} {found[0]['version']}", 2, fastest(found)))
    for integrator, gradients in (("minimal_norm", 2), ("leapfrog", 1)):
        changes = our_settings(settings, integrator)
        found = [our_run(settings, f"{integrator}-{i}", changes) for i in range(settings.repeats)]
        best = fastest(found)
        stages = {f"{stage}_seconds": s for stage, s in best["stage_seconds"].items()}
        rows.append(_row(f"bnnmcmc, {integrator}", gradients, best) | stages)
    if settings.peer is not None:
        for row in rows:
            row["peer_over_it"] = rows[0]["seconds"] / row["seconds"]
    return {"rows": rows, "settings": our_settings(settings, "minimal_norm")}


def _row(what: str, gradients: int, found: dict[str, Any]) -> dict[str, Any]:
    names = ("seconds", "spread", "cpu_seconds", "lppd", "rmse", "kept_draws")
    start = {"what": what, "gradients_per_step": gradients}
    return start | {n: found[n] for n in names} | {"peak_mb": found["peak_bytes"] / 2**20}


def fastest(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the repeat that took least, with "seconds" and "spread" of wall clock.

    "cpu_seconds" is the least processor time, of all cores together: it says more where other
    work shares the machine.
    """
    wall = [each["wall_seconds"] for each in found]
    best = found[wall.index(min(wall))]
    processor = min(each["cpu_seconds"] for each in found)
    times = summary(wall)
    return best | {
        "seconds": times["seconds"],
        "spread": times["spread"],
        "cpu_seconds": processor,
    }


def peer_settings(settings: Settings) -> dict[str, Any]:
    """Return the arguments of the peer's estimator for this benchmark."""
    members, warmup, steps, thin = _work(settings)
    return {
        "n_members": members,
        "hidden_layers": [4] if settings.quick else HIDDEN,
        "activation": "relu",
        "epochs": 1000,
        "patience": 20,
        "warmup_steps": warmup,
        "n_samples": steps,
        "n_thinning": thin,
        "desired_energy_var_start": 0.5,
        "desired_energy_var_end": 0.1,
        "seed": 0,
    }


def our_settings(settings: Settings, integrator: str) -> dict[str, Any]:
    """Return the same as changes of the airfoil config."""
    members, warmup, steps, thin = _work(settings)
    changes = {
        "model.hidden": [4] if settings.quick else HIDDEN,
        "model.activation": "relu",
        "ensemble.members": members,
        "sampler.warmup": warmup,
        "sampler.draws": steps // thin,
        "sampler.thin": thin,
        "sampler.integrator": integrator,
        "sampler.energy_variance_start": 0.5,
        "sampler.energy_variance_end": 0.1,
        "sampler.metric": '"identity"',
    }
    return {**changes, "ensemble.max_epochs": 5} if settings.quick else changes


def _work(settings: Settings) -> tuple[int, int, int, int]:
    return (2, 40, 20, 2) if settings.quick else (MEMBERS, WARMUP, STEPS, THIN)


def make_peer(folder: Path) -> Path:
    """Make an environment with the peer in it; return its Python."""
    environment = folder / "peer"
    subprocess.run(["uv", "venv", "--quiet", "--python", "3.12", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", python, PEER_PACKAGE], check=True
    )
    return python


def peer_fit(
    settings: Settings, name: str, arguments: dict[str, Any], again: int = 0
) -> dict[str, Any]:
    """Fit the peer in a process of its own, once per name, arguments and ``again``.

    Returns
    -------
    dict
        What peer.py writes, with "wall_seconds" and "version".
    """
    assert settings.peer is not None
    folder = settings.folder / f"peer-{name}-{again}"
    kept = folder / "result.json"
    if kept.exists() and json.loads(kept.read_text())["arguments"] == arguments:
        return json.loads(kept.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", **airfoil(settings))
    (folder / "arguments.json").write_text(json.dumps(arguments))
    files = (folder / "data.npz", folder / "arguments.json", folder / "found.json")
    driver = Path(__file__).with_name("peer.py")
    # Its progress bars draw every step: without them it is a little faster.
    ended = run(
        [settings.peer, driver, *files], folder / "log.txt", environment={"TQDM_DISABLE": "1"}
    )
    found = json.loads((folder / "found.json").read_text())
    found |= {"wall_seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds}
    found |= {"peak_bytes": ended.peak_bytes, "arguments": arguments}
    kept.write_text(json.dumps(found))
    return found


def our_run(
    settings: Settings,
    name: str,
    changes: dict[str, Any],
    watch=None,
    cache: Path | None = None,
    config: Path = CONFIG,
) -> dict[str, Any]:
    """Run ``bnnmcmc run experiments/airfoil.toml``, or another config, into ``folder/name``.

    Parameters
    ----------
    settings : Settings
    name : str
    changes : dict
        Settings changed with ``--set``.
    watch : callable, optional
        See `processes.run`.
    cache : Path, optional
        The folder of the compilation cache; an empty one if not given.
    config : Path
    """
    out = settings.folder / name
    ended = run(
        bnnmcmc("run", config, "--out", out, *setting_words(changes)),
        settings.folder / f"{name}.log",
        environment=our_environment(settings, cache or settings.folder / f"{name}.cache"),
        watch=watch,
    )
    posterior = json.loads((out / "metrics.json").read_text())["test"]["posterior"]
    manifest = json.loads((out / "manifest.json").read_text())
    return {
        "wall_seconds": ended.seconds,
        "cpu_seconds": ended.cpu_seconds,
        "peak_bytes": ended.peak_bytes,
        "lppd": posterior["lppd"],
        "rmse": posterior["rmse"],
        "kept_draws": sum(block["count"] for block in manifest["blocks"]),
        "stage_seconds": manifest["seconds"],
        "folder": str(out),
    }


def our_environment(settings: Settings, cache: Path) -> dict[str, str]:
    """Return the environment of a run: where the table is, and where compiled programs go."""
    data = {} if settings.data is None else {"BNNMCMC_DATA": str(settings.data)}
    return {**data, "JAX_COMPILATION_CACHE_DIR": str(cache)}
