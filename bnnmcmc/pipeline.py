"""The whole job: train the ensemble, warm up, sample, score, write everything down.

Each stage works in blocks and commits each block to the run folder, so that a run can stop
between any two of them (Ctrl-C, a time budget, a lost machine) and go on later.
"""

import importlib.metadata
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bnnmcmc import build, diagnostics, progress, store, trees
from bnnmcmc.config import Config, to_toml
from bnnmcmc.data import Dataset, fingerprint, save_dataset, target_to_units
from bnnmcmc.ensemble import build_training, finish_ensemble, run_epochs, start_members
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.placement import Placement, gather, replicate, spread
from bnnmcmc.posterior import Posterior, check_finite
from bnnmcmc.prediction import in_target_units
from bnnmcmc.predictive import draws_in_memory, pool
from bnnmcmc.run import (
    Run,
    check_precision,
    config_fingerprint,
    open_inputs,
    position_layout,
    read_members,
    scores,
)
from bnnmcmc.sampling import (
    Program,
    build_program,
    finish_warmup,
    run_blocks,
    start_chains,
)

# Packages that decide what a draw's bits are.
PINNED = ("bnnmcmc", "jax", "jaxlib", "blackjax", "numpyro", "optax")
NOTED = ("numpy", "scipy", "scikit-learn", "arviz", "zarr", "pandas")
# What a start that was cut off before its first commit may leave behind.
SETUP_FILES = {"config.toml", "data.npz", "scaling.json", ".lock"}
CHECKED_STARTS = 64
# Diagnostics look at no more draws per chain and weights than this.
MAX_DIAGNOSED_DRAWS, MAX_DIAGNOSED_WEIGHTS = 4000, 200
QUANTILES = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)

# How a time budget is shared: training ends after this part of it, ...
TRAINING_SHARE = 0.3
# ... scores and report get this part, within these seconds, ...
RESULTS_SHARE, RESULTS_SECONDS = 0.15, (8.0, 120.0)
# ... and of what is left a warm-up that turns out longer than planned gets this part.
WARMUP_SHARE = 0.7
# Speed is measured on at least this many seconds of compiled warm-up.
CALIBRATION_SECONDS = 0.5


@dataclass
class Stop:
    """When to stop between two blocks: at a time, or because the user asked."""

    deadline: float | None = None
    interrupted: bool = False
    begun: float = field(default_factory=time.monotonic)

    def at(self, deadline: float | None) -> bool:
        """Tell whether to stop now, given a deadline (monotonic seconds)."""
        return self.interrupted or (deadline is not None and time.monotonic() >= deadline)

    def share(self, part: float) -> float | None:
        """Return the time at which this part of the budget is used up."""
        return None if self.deadline is None else self.begun + part * (self.deadline - self.begun)

    @property
    def sampling_deadline(self) -> float | None:
        """When sampling must end so that scores and report still fit."""
        if self.deadline is None:
            return None
        return self.deadline - np.clip(
            RESULTS_SHARE * (self.deadline - self.begun), *RESULTS_SECONDS
        )


@dataclass
class Clock:
    """The stage being timed, since when, and the seconds of all stages before that."""

    stage: str = ""
    begun: float = 0.0
    before: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage by now, those of earlier sittings included."""
        so_far = self.before.get(self.stage, 0.0) + time.monotonic() - self.begun
        return {**self.before, self.stage: so_far}


@dataclass(frozen=True)
class Job:
    """What every stage needs."""

    store: store.Store
    config: Config
    dataset: Dataset
    posterior: Posterior
    placement: Placement
    layout: trees.Layout
    console: Console
    stop: Stop
    clock: Clock

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as last committed."""
        return self.store.manifest

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.run.seed


# --------------------------------------------------------------------------------- the whole


def start_run(
    config: Config,
    dataset: Dataset,
    folder: Path,
    *,
    name: str,
    command: str,
    console: Console,
    budget: float | None = None,
) -> bool:
    """Run an experiment into a new folder.

    Parameters
    ----------
    config : Config
    dataset : Dataset
        As `inputs.read_dataset` makes it from the config.
    folder : Path
        Made if it is not there; it must not hold anything.
    name, command : str
        For the report: the experiment's name, and how it was called.
    console : Console
        Where progress is shown.
    budget : float, optional
        Seconds for everything.

    Returns
    -------
    bool
        Whether the run is complete; False if it was interrupted.

    Raises
    ------
    InputError
        Anything the user gave cannot be used, before any long work.
    """
    stop = Stop(None if budget is None else time.monotonic() + budget)
    check_precision(config)
    check_free(folder)
    posterior, placement = check_model(config, dataset)
    of = position_layout(posterior)
    check_disk(folder, config, of)
    train, val, test = (len(p) for p in (dataset.train, dataset.validation, dataset.test))
    device = placement.devices[0]
    manifest = {
        "bnnmcmc": importlib.metadata.version("bnnmcmc"),
        "versions": versions(),
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": config.run.seed,
        "config": config_fingerprint(config),
        "data": {
            "name": dataset.name,
            "fingerprint": fingerprint(dataset),
            "rows": len(dataset.x),
            "features": dataset.x.shape[1],
            "train": train,
            "validation": val,
            "test": test,
            "sampled_on": config.sampler.rows if val else "train",
            "targets": [target.name for target in dataset.encoding.targets],
            "classes": dataset.encoding.classes and [str(c) for c in dataset.encoding.classes],
        },
        "task": config.task,
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(placement.devices),
        },
        "placement": placement.describe(),
        "chains": config.ensemble.members,
        "parameters": of.size,
        "leaves": dict(zip(of.names, map(list, of.shapes), strict=True)),
        "kernel": config.sampler.kernel,
        "warmup": config.sampler.warmup,
        "draws": config.sampler.draws,
        "thin": config.sampler.thin,
        "stage": "ensemble",
        "checkpoint": None,
        "ensemble": None,
        "statistics": [],
        "blocks": [],
        "status": [],
        "seconds": {},
        "stopped": None,
        "notes": [],
    }
    with store.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            store.write_atomic(folder / "config.toml", to_toml(config).encode())
            save_dataset(folder, dataset)
            run_store = store.new_store(folder, manifest)
    with locked(folder), interruptible(stop, console):
        return _advance(
            Job(run_store, config, dataset, posterior, placement, of, console, stop, Clock())
        )


def resume_run(
    folder: Path,
    *,
    console: Console,
    draws: int = 0,
    budget: float | None = None,
    other_versions: bool = False,
) -> bool:
    """Go on with a run, or add draws to it.

    Parameters
    ----------
    folder : Path
    console : Console
    draws : int
        Draws per chain beyond those planned so far.
    budget : float, optional
        Seconds for everything.
    other_versions : bool
        Go on even if the draws so far were made with other package versions.

    Returns
    -------
    bool
        Whether the run is complete.

    Raises
    ------
    InputError
        Not a run folder, changed or damaged files, or other package versions.
    """
    stop = Stop(None if budget is None else time.monotonic() + budget)
    if draws < 0:
        raise InputError(f"--draws: found {draws}, expected a number of draws to add")
    manifest = store.read_manifest(folder)
    with locked(folder):
        manifest = store.read_manifest(folder)
        config, dataset = open_inputs(folder, manifest)
        check_precision(config)
        done = sum(block["count"] for block in manifest["blocks"])
        if manifest["stage"] != "results" and (done < manifest["draws"] or draws):
            check_versions(folder, manifest, other_versions)
        posterior, placement = check_model(config, dataset)
        run_store = store.Store(folder, manifest)
        _remove_partial_files(folder)
        changes: dict[str, Any] = {"stopped": None}
        if draws:
            changes["draws"] = manifest["draws"] + draws
        if manifest["stage"] in ("results", "done") and done < (manifest["draws"] + draws):
            changes["stage"] = "sampling"
        run_store.commit(**changes)
        of = position_layout(posterior)
        with interruptible(stop, console):
            return _advance(
                Job(run_store, config, dataset, posterior, placement, of, console, stop, Clock())
            )


def _advance(job: Job) -> bool:
    for stage, work in (
        ("ensemble", train_ensemble),
        ("warmup", warm_up),
        ("sampling", draw),
        ("results", _finish),
    ):
        if job.manifest["stage"] == stage and not work(job):
            job.store.commit(stopped="interrupted")
            return False
    return True


def _finish(job: Job) -> bool:
    # Pictures need matplotlib and SciPy: seconds that a run should not begin with.
    from bnnmcmc.report.page import write_report

    with _timed(job, "results"), job.console.status("scores, diagnostics and report"):
        write_results(Run.open(job.store.folder), job.store, job.config.run.arviz)
    # The report shows the time of this very stage, so it comes last, after the commit.
    job.store.commit(stage="done")
    with job.console.status("report"):
        write_report(job.store.folder)
    return True


# ------------------------------------------------------------------------------------- stages


def train_ensemble(job: Job) -> bool:
    """Train all members; return False if interrupted."""
    config, dataset = job.config.ensemble, job.dataset
    dtype = jnp.result_type(float)
    held_out = dataset.validation if len(dataset.validation) else dataset.train
    rows = [job.posterior.arrays(dataset.x[p], dataset.y[p]) for p in (dataset.train, held_out)]
    training = build_training(
        job.posterior,
        build.make_ensemble_optimiser(job.config),
        job.placement,
        rows=len(dataset.train),
        validation_rows=len(dataset.validation),
        batch_size=config.batch_size or None,
        max_epochs=config.max_epochs,
        patience=config.patience,
    )
    data = replicate((*rows[0], *rows[1]), job.placement)
    entry = job.manifest["checkpoint"]
    if entry is None:
        members, done = start_members(training, job.seed), 0
        history = np.zeros((0, config.members, 2), dtype)
    else:
        template = {
            "history": jax.ShapeDtypeStruct((0, config.members, 2), dtype),
            "members": jax.eval_shape(
                training.start, *_index_and_key(job.placement, job.seed, "ensemble-init")
            ),
        }
        restored = job.store.restore(template)
        members, done = spread(restored["members"], job.placement), entry["position"]
        history = restored["history"]
    stop_at = job.stop.share(TRAINING_SHARE)
    with (
        _timed(job, "ensemble"),
        progress.stage(job.console, "Ensemble", config.max_epochs, "epochs", done) as update,
    ):
        stopped = np.asarray(members[1].stopped)
        while done < config.max_epochs and not stopped.all() and not job.stop.at(stop_at):
            for block in run_epochs(training, members, job.seed, data, first=done):
                members, done = block.members, block.start + block.count
                history = np.concatenate([history, np.swapaxes(block.history, 0, 1)])
                stopped = gather(members[1].stopped, job.placement)
                losses = gather(members[1].best_loss, job.placement)
                update(
                    done,
                    f"best loss {np.min(losses):.3f}, {stopped.sum()} of {len(stopped)} stopped",
                )
                if stopped.all() or done >= config.max_epochs:
                    break
                tree = {"history": history, "members": gather(members, job.placement)}
                _commit(job, checkpoint=job.store.checkpoint("ensemble", done, tree))
                if job.stop.at(stop_at):
                    break
        if job.stop.interrupted:
            return False
        update(config.max_epochs, f"{done} epochs")
    notes = list(job.manifest["notes"])
    if done < config.max_epochs and not stopped.all():
        notes.append(f"training was ended by the time budget after {done} epochs")
    ensemble = finish_ensemble(training, members, np.swapaxes(history, 0, 1))
    folder = job.store.folder / "ensemble"
    store.write_arrays(
        folder / "history.npz",
        {
            "history": ensemble.history,
            "best_epoch": ensemble.best_epoch,
            "epochs": ensemble.epochs,
            "validation_loss": ensemble.validation_loss,
        },
    )
    entry = {
        "sha256": store.save_tree(folder / "members.npz", ensemble.positions),
        "validation_loss": [float(loss) for loss in ensemble.validation_loss],
        "epochs": [int(epochs) for epochs in ensemble.epochs],
    }
    job.store.commit(stage="warmup", ensemble=entry, checkpoint=None, notes=notes)
    job.store.drop_old_checkpoints()
    return True


def warm_up(job: Job) -> bool:
    """Adapt every chain's kernel; return False if interrupted."""
    data = _sampling_data(job)
    program, carry, done, records = _begin_warmup(job, data)
    thin, total = program.warmup.thin, program.warmup.records
    begun, limit = time.monotonic(), job.stop.sampling_deadline
    stop_at = None if limit is None else begun + WARMUP_SHARE * max(limit - begun, 0)
    may_plan = limit is not None and job.manifest["checkpoint"] is None
    measured = [0, 0.0]
    notes = list(job.manifest["notes"])
    with (
        _timed(job, "warmup"),
        progress.stage(
            job.console, "Warm-up", program.warmup.total, "steps", done * thin
        ) as update,
    ):
        while done < total and not job.stop.at(stop_at):
            plan = None
            for block in run_blocks(program, "warmup", carry, job.seed, data, first=done):
                first_call = block.start == done and not measured[0]
                carry, done = block.carry, block.start + block.count
                records = _join_records(records, block.stats)
                update(min(done * thin, program.warmup.total), _note(block.stats))
                if may_plan and not first_call:
                    measured = [measured[0] + block.count * thin, measured[1] + block.seconds]
                    if measured[1] >= CALIBRATION_SECONDS:
                        may_plan = False
                        plan = _plan(job, measured[1] / measured[0], limit, done * thin)
                        if plan is not None:
                            break
                tree = {"carry": gather(carry, job.placement), "records": records}
                _commit(job, checkpoint=job.store.checkpoint("warmup", done, tree))
                if job.stop.at(stop_at):
                    break
            if plan is not None:
                # The adaptation's schedule depends on its length: begin again with the new one.
                notes.append(plan.pop("note"))
                _commit(job, checkpoint=None, notes=notes, **plan)
                program, carry, done, records = _begin_warmup(job, data)
                thin, total = program.warmup.thin, program.warmup.records
                update(0, "planned anew for the time budget")
        if job.stop.interrupted:
            return False
        update(program.warmup.total, "")
    if done < total:
        notes.append(
            f"warm-up was ended by the time budget after {done * thin} of "
            f"{program.warmup.total} steps"
        )
    carry = gather(finish_warmup(program, carry), job.placement)
    store.write_arrays(
        job.store.folder / "warmup.npz",
        {n: np.swapaxes(v, 0, 1) for n, v in (records or {}).items()},
    )
    shapes = _draw_shapes(program, carry, data)
    _create_arrays(job, shapes)
    job.store.commit(
        stage="sampling",
        blocks=[],
        statistics=sorted(shapes),
        checkpoint=job.store.checkpoint("sampling", 0, carry),
        notes=notes,
    )
    job.store.drop_old_checkpoints()
    return True


def draw(job: Job) -> bool:
    """Draw until the planned number is there; return False if interrupted."""
    data = _sampling_data(job)
    manifest = job.manifest
    program = _program(job)
    index, key = _index_and_key(job.placement, job.seed, "sampler-init")
    template = jax.eval_shape(lambda: _sampling_carry(program, index, key, data))
    carry = spread(job.store.restore(template), job.placement)
    done, total, folder = manifest["checkpoint"]["position"], manifest["draws"], job.store.folder
    for path in (folder / "draws", folder / "stats"):
        store.resize_arrays(path, total)
    steps = manifest["thin"]
    with (
        _timed(job, "sampling"),
        progress.stage(job.console, "Sampling", total * steps, "steps", done * steps) as update,
    ):
        limit = job.config.run.block_draws or None
        if done < total and not job.stop.at(job.stop.sampling_deadline if done else None):
            for block in run_blocks(
                program, "sampling", carry, job.seed, data, first=done, max_count=limit
            ):
                done = block.start + block.count
                assert block.draws is not None
                leaves = dict(
                    zip(job.layout.names, trees.split_flat(block.draws, job.layout), strict=True)
                )
                record = {
                    "start": block.start,
                    "count": block.count,
                    "draws": store.append(folder / "draws", block.start, leaves),
                    "stats": store.append(folder / "stats", block.start, block.stats),
                }
                tree = gather(block.carry, job.placement)
                _commit(
                    job,
                    blocks=[*job.manifest["blocks"], record],
                    checkpoint=job.store.checkpoint("sampling", done, tree),
                )
                update(done * steps, _note(block.stats))
                if job.stop.at(job.stop.sampling_deadline):
                    break
        if job.stop.interrupted and done < total:
            return False
    changes: dict[str, Any] = {"stage": "results", "stopped": None}
    if done < total:
        changes["stopped"] = "time budget"
        changes["notes"] = [
            *job.manifest["notes"],
            f"sampling was ended by the time budget after {done} of {total} draws per chain",
        ]
    job.store.commit(**changes)
    return True


def write_results(run: Run, run_store: store.Store, kind: str) -> None:
    """Score, diagnose and write metrics.json, predictions.npz, diagnostics.* and the ArviZ file.

    Parameters
    ----------
    run : Run
        Opened from the store's folder; it may be unfinished.
    run_store : Store
    kind : str
        ``run.arviz`` of the config.
    """
    folder, dataset = run_store.folder, run.dataset
    assert dataset is not None
    write_diagnostics(run, run_store)
    if len(dataset.test):
        _write_scores(run, folder)
    if kind != "none":
        every = None if kind == "auto" else 1
        chosen = "zarr" if kind == "zarr" else "netcdf"
        path = folder / ("arviz.zarr" if chosen == "zarr" else "arviz.nc")
        with store.disk_errors(folder):
            diagnostics.write_datatree(run.to_arviz(every=every), path, chosen)


def write_diagnostics(run: Run, run_store: store.Store) -> None:
    """Write the chains' status, diagnostics.csv and diagnostics.json."""
    table, summary = diagnose(run)
    diagnostics.write_table(run_store.folder / "diagnostics.csv", table)
    store.write_json(run_store.folder / "diagnostics.json", summary)
    run_store.commit(status=[{"chain": i, **s._asdict()} for i, s in enumerate(run.status)])


def refresh_results(folder: Path) -> None:
    """Score and diagnose the draws so far of a run that has not finished.

    Raises
    ------
    InputError
        Another process is working on the run.
    """
    with locked(folder):
        run_store = store.Store(folder, store.read_manifest(folder))
        run = Run.open(folder)
        write_results(run, run_store, open_inputs(folder, run_store.manifest)[0].run.arviz)


def diagnose(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the table of chains and the summary of a run (see `bnnmcmc.diagnostics`).

    Of long chains, predictions and weights are looked at in evenly spaced draws, so that the
    cost is bounded; their ESS is then a lower bound.
    """
    stats = run.stats
    every = max(1, -(-run.draws.draws // MAX_DIAGNOSED_DRAWS))
    functions = run.function_draws(every)
    stride = max(1, -(-run.draws.layout.size // MAX_DIAGNOSED_WEIGHTS))
    kept, first = [], 0
    for block in run.draws.blocks():
        kept.append(block[:, -first % every :: every, ::stride])
        first += block.shape[1]
    table = diagnostics.chain_table(
        log_density=stats["log_density"],
        positions=np.concatenate(kept, axis=1),
        functions=functions,
        stats=stats,
        statuses=list(run.status),
    )
    return table, diagnostics.run_summary(functions, stats["log_density"], table)


def _write_scores(run: Run, folder: Path) -> None:
    dataset, encoding = run.dataset, run.encoding
    assert dataset is not None and encoding is not None
    x, y = dataset.x[dataset.test], dataset.y[dataset.test]
    best = int(np.argmin(np.nan_to_num(np.asarray(run.validation_loss), nan=np.inf)))
    members = jax.tree.map(lambda leaf: leaf[:, None], run.members)
    sources = {
        "best_member": draws_in_memory(jax.tree.map(lambda leaf: leaf[best : best + 1], members)),
        "ensemble": draws_in_memory(members),
        "posterior": run.pooled_draws,
    }
    found = {
        name: pool(run.posterior, draws, x, y, seed=run.seed) for name, draws in sources.items()
    }
    both = {name: scores(pooled, y, encoding) for name, pooled in found.items()}
    result: dict[str, Any] = {"test": {n: s["standardised"] for n, s in both.items()}}
    if encoding.task == "regression":
        result["test_target_units"] = {name: s["target"] for name, s in both.items()}
    result |= {"rows": len(x), "best_member": best, "pooled_chains": run.pooled_chains}
    store.write_json(folder / "metrics.json", result)
    prediction = in_target_units(found["posterior"], encoding)
    arrays: dict[str, Any] = {"row": dataset.test}
    if prediction.probabilities is not None:
        arrays |= {
            "y": y,
            "probabilities": prediction.probabilities,
            "classes": np.array([str(label) for label in encoding.classes or ()]),
        }
    else:
        arrays |= {
            "y": target_to_units(encoding, y),
            "mean": prediction.mean,
            "sd": prediction.sd,
            "epistemic_sd": prediction.epistemic_sd,
            "levels": np.array(QUANTILES),
            "quantiles": prediction.quantile(QUANTILES),
        }
    store.write_arrays(folder / "predictions.npz", arrays)


# ------------------------------------------------------------------------------------- checks


def check_model(config: Config, dataset: Dataset) -> tuple[Posterior, Placement]:
    """Build posterior and placement and check them before any long work.

    Raises
    ------
    InputError
        A part cannot be built, shapes do not fit, or the density is not finite at the start.
    """
    posterior = build.make_posterior(config, dataset.encoding)
    build.make_kernel(config)
    build.make_ensemble_optimiser(config)
    placement = build.make_placement(config)
    x, y = posterior.arrays(*build.sampling_rows(config, dataset))
    key = stage_key(config.run.seed, "ensemble-init")
    count = min(config.ensemble.members, CHECKED_STARTS)
    starts = jax.jit(jax.vmap(lambda i: posterior.init(jax.random.fold_in(key, i))))
    check_finite(posterior, starts(jnp.arange(count)), x, y, label="member")
    return posterior, placement


def check_free(folder: Path) -> None:
    """Raise InputError if the folder holds a run, or anything else of the user's."""
    if (folder / "manifest.json").exists():
        raise InputError(
            f"{folder}: already holds a run; go on with it (bnnmcmc resume {folder}), or choose "
            "another folder with --out"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, expected a folder that is new or empty")
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [n for n in found if n not in SETUP_FILES and not n.endswith(".tmp")]
    if others:
        raise InputError(
            f"{folder}: is not empty (it holds {others[0]!r}); choose another folder with --out"
        )


def draw_bytes(config: Config, of: trees.Layout) -> int:
    """Return how much disk the draws of a run need, in bytes."""
    item = 8 if config.run.precision == "float64" else 4
    chains, draws = config.ensemble.members, config.sampler.draws
    return item * chains * draws * (of.size + 8)


def check_disk(folder: Path, config: Config, of: trees.Layout) -> None:
    """Raise InputError if the disk has not enough room for the run's draws."""
    place = folder
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, draw_bytes(config, of)
    if needed > free:
        raise InputError(
            f"{folder}: the draws need {needed / 1e9:.2f} GB ({config.ensemble.members} chains x "
            f"{config.sampler.draws} draws x {of.size} parameters), but the disk has "
            f"{free / 1e9:.2f} GB free; lower sampler.draws, raise sampler.thin, or use another "
            "disk with --out"
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    found = {name: importlib.metadata.version(name) for name in (*PINNED, *NOTED)}
    return {"python": platform.python_version(), **found}


def check_versions(folder: Path, manifest: dict[str, Any], allowed: bool) -> None:
    """Raise InputError if the run was begun with other versions of what makes a draw."""
    now, then = versions(), manifest["versions"]
    other = [f"{n} {then.get(n)} (now {now[n]})" for n in PINNED if then.get(n) != now[n]]
    if other and not allowed:
        raise InputError(
            f"{folder}: the run was begun with {', '.join(other)}; install those versions, or "
            "accept draws that are not bit for bit the same with --other-versions"
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on the same run folder.

    Raises
    ------
    InputError
        Another process is at work there.
    """
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is working on this run; wait for it, or stop it first"
            ) from error
        yield


@contextmanager
def interruptible(stop: Stop, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C stop between blocks; the second one stops at once."""

    def handle(number, frame):
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True
        console.print(
            "[yellow]Stopping after this block (Ctrl-C again: at once, losing the block)[/]"
        )

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: Ctrl-C is not ours to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


# -------------------------------------------------------------------------------------- parts


@contextmanager
def _timed(job: Job, stage: str) -> Iterator[None]:
    """Count the seconds of a stage, with those of earlier sittings."""
    clock = job.clock
    clock.stage, clock.begun, clock.before = stage, time.monotonic(), job.manifest["seconds"]
    try:
        yield
    finally:
        _commit(job)


def _commit(job: Job, **changes: Any) -> None:
    """Commit a block, with the time so far, and drop what it replaces."""
    job.store.commit(seconds=job.clock.seconds(), **changes)
    job.store.drop_old_checkpoints()


def _index_and_key(placement: Placement, seed: int, stage: str) -> tuple[jax.Array, jax.Array]:
    index = spread(jnp.arange(placement.chains, dtype=jnp.int32), placement)
    return index, stage_key(seed, stage)


def _sampling_data(job: Job) -> tuple[jax.Array, jax.Array]:
    rows = build.sampling_rows(job.config, job.dataset)
    return replicate(job.posterior.arrays(*rows), job.placement)


def _program(job: Job) -> Program:
    return build_program(
        job.posterior.log_density,
        build.make_kernel(job.config),
        job.layout,
        job.placement,
        warmup=job.manifest["warmup"],
        draws=job.manifest["draws"],
        thin=job.manifest["thin"],
    )


def _begin_warmup(job: Job, data) -> tuple[Program, Any, int, dict[str, np.ndarray] | None]:
    """Return the program and where the warm-up stands: carry, records done, their statistics."""
    program = _program(job)
    entry = job.manifest["checkpoint"]
    if entry is None:
        members, _ = read_members(job.store.folder, job.manifest, job.layout)
        check_finite(job.posterior, members, *data)
        carry = start_chains(program, trees.flatten_stacked(members), job.seed, data)
        return program, carry, 0, None
    index, key = _index_and_key(job.placement, job.seed, "sampler-init")
    carry = jax.eval_shape(lambda: _warmup_carry(program, index, key, data))
    stats = jax.eval_shape(program.warm, carry, key, np.int32(0), np.int32(0), data)[1][1]
    chains = job.placement.chains
    records = {n: jax.ShapeDtypeStruct((0, chains), s.dtype) for n, s in stats.items()}
    restored = job.store.restore({"carry": carry, "records": records})
    carry = spread(restored["carry"], job.placement)
    return program, carry, entry["position"], restored["records"]


def _warmup_carry(program: Program, index, key, data):
    positions = jnp.zeros((index.shape[0], program.layout.size), jnp.result_type(float))
    return index, *program.start((index, positions), key, data)


def _sampling_carry(program: Program, index, key, data):
    return finish_warmup(program, _warmup_carry(program, index, key, data))


def _join_records(records, stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Append statistics (chain, count) to records (record, chain)."""
    new = {name: np.swapaxes(values, 0, 1) for name, values in stats.items()}
    if records is None:
        return new
    return {name: np.concatenate([records[name], new[name]]) for name in new}


def _draw_shapes(program: Program, carry, data) -> dict[str, np.dtype]:
    """Return the statistics a kernel records, with their types."""
    padded = jax.eval_shape(lambda tree: spread(tree, program.placement), carry)
    key = stage_key(0, "sampling")
    stats = jax.eval_shape(program.draw, padded, key, np.int32(0), np.int32(0), data)[1][1]
    return {name: np.dtype(shape.dtype) for name, shape in stats.items()}


def _create_arrays(job: Job, stats: dict[str, np.dtype]) -> None:
    folder, manifest = job.store.folder, job.manifest
    dtype = np.dtype(jnp.result_type(float))
    shapes = dict(zip(job.layout.names, job.layout.shapes, strict=True))
    chains, draws = manifest["chains"], manifest["draws"]
    store.create_arrays(folder / "draws", shapes, dict.fromkeys(shapes, dtype), chains, draws)
    store.create_arrays(folder / "stats", dict.fromkeys(stats, ()), stats, chains, draws)


def _plan(job: Job, step_seconds: float, limit: float | None, steps_done: int) -> dict | None:
    """Return fewer warm-up steps and draws if the planned ones do not fit, else None."""
    assert limit is not None
    warmup, draws, thin = (job.manifest[name] for name in ("warmup", "draws", "thin"))
    left = limit - time.monotonic()
    if (warmup - steps_done + draws * thin) * step_seconds <= left:
        return None
    # Beginning again costs the steps done so far; 0.9 for saving blocks and the second start.
    share = 0.9 * left / ((warmup + draws * thin) * step_seconds)
    fewer = {"warmup": max(1, int(warmup * share)), "draws": max(1, int(draws * share))}
    note = (
        f"planned for the time budget: {fewer['warmup']} of {warmup} warm-up steps and "
        f"{fewer['draws']} of {draws} draws per chain"
    )
    return {**fewer, "note": note}


def _note(stats: dict[str, np.ndarray]) -> str:
    """Say in a few words how the chains do."""
    parts = [f"log-density {np.median(stats['log_density'][:, -1]):.4g}"]
    if "acceptance_rate" in stats:
        parts.append(f"acceptance {np.mean(stats['acceptance_rate']):.2f}")
    if "step_size" in stats:
        parts.append(f"step size {np.median(stats['step_size'][:, -1]):.2g}")
    if stats["diverging"].sum():
        parts.append(f"{stats['diverging'].sum()} divergent steps")
    return ", ".join(parts)


def _remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for pattern in ("**/.*.tmp", "**/*.partial"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
