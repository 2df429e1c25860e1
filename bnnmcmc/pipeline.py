"""The whole job: train the ensemble, warm up, sample, score, write everything down.

Each stage works in blocks and commits each block to the run folder, so that a run can stop
between any two of them (Ctrl-C, a time budget, a lost machine) and go on later.

Several processes go through the same stages and blocks side by side, each with its own chains.
They meet where they agree on something (`Group.share`, and what calls it: `Stop.at`,
`Store.checkpoint`, `Store.follow`), so every process must come by all of these, in the same order.
"""

import importlib
import importlib.metadata
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from bnnmcmc import build, diagnostics, health, preflight, progress, store, trees
from bnnmcmc.ahead import FUNCTIONS, Ahead
from bnnmcmc.config import Config, to_toml, with_placement
from bnnmcmc.data import Dataset, fingerprint, save_dataset
from bnnmcmc.ensemble import build_training, finish_ensemble, run_epochs, start_members
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.live import Live
from bnnmcmc.placement import Placement, gather, indices, replicate, spread
from bnnmcmc.posterior import Posterior, chain_starts, check_finite
from bnnmcmc.processes import Group
from bnnmcmc.results import write_results
from bnnmcmc.run import (
    Run,
    check_precision,
    config_fingerprint,
    open_inputs,
    position_layout,
    read_members,
    stored_draws,
    watch,
)
from bnnmcmc.samplers.kernel import RowDensity
from bnnmcmc.sampling import (
    at_rest,
    build_program,
    finish_warmup,
    run_blocks,
    start_chains,
)
from bnnmcmc.stopping import (
    CALIBRATION_SECONDS,
    PLANNED_SHARE,
    TRAINING_SHARE,
    WARMUP_SHARE,
    Stop,
    fewer_steps,
    interruptible,
    locked,
)
from bnnmcmc.targets import (
    Checks,
    check_target,
    is_met,
    next_check,
    say_outcome,
    say_progress,
    target_of,
)

# As long as another machine may take to see the run folder.
FOLDER_SECONDS = 60.0


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
    """What every stage needs; the placement is that of this process's chains."""

    store: store.Store
    config: Config
    dataset: Dataset
    posterior: Posterior
    placement: Placement
    layout: trees.Layout
    console: Console
    stop: Stop
    clock: Clock
    # The samplers of this run by their numbers of steps: a second one if a budget asks for fewer.
    samplers: dict[tuple[int, ...], Ahead] = field(default_factory=dict)

    @cached_property
    def live(self) -> Live:
        """What the run says of itself while it goes on."""
        return Live(self.store.folder)

    @property
    def group(self) -> Group:
        """The processes at work."""
        return self.store.group

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
    group: Group | None = None,
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
    group : Group, optional
        Several processes: this is process 0, the others call `follow_run`.

    Returns
    -------
    bool
        Whether the run is complete; False if it was interrupted.

    Raises
    ------
    InputError
        Anything the user gave cannot be used, before any long work.
    """
    group = group or Group()
    stop = Stop(None if budget is None else time.monotonic() + budget, group)
    check_precision(config)
    preflight.check_free(folder)
    draws = config.sampler.draws
    posterior, placement = preflight.check_model(config, dataset, group, folder, draws)
    of = position_layout(posterior)
    train, val, test = (len(p) for p in (dataset.train, dataset.validation, dataset.test))
    # With the placement as it was chosen: a resumed or repeated run shall not choose anew.
    config = with_placement(config, build.chosen_fields(config, dataset, placement))
    text = to_toml(config).encode()
    manifest = {
        "bnnmcmc": importlib.metadata.version("bnnmcmc"),
        "versions": preflight.versions(),
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seed": config.run.seed,
        "config": config_fingerprint(text),
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
        **_devices(placement),
        "placement_chosen": placement.reason,
        "chains": config.ensemble.members,
        "parameters": of.size,
        "sampled": build.sampled_size(config, of),
        "leaves": dict(zip(of.names, map(list, of.shapes), strict=True)),
        "kernel": config.sampler.kernel,
        "wanted": dict(build.make_kernel(config).wanted),
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
        "until": config.stop.model_dump(),
        "checks": [],
        "stopped_chains": {},
        "planned": False,
        "notes": [],
    }
    with store.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), interruptible(stop, console):
        if (folder / "manifest.json").exists():  # begun by another process since the check
            preflight.check_free(folder)
        store.write_atomic(folder / "config.toml", text)
        with store.disk_errors(folder):
            save_dataset(folder, dataset)
        run_store = store.new_store(folder, manifest, group)
        group.first([str(folder), run_store.manifest])
        return _advance(
            Job(run_store, config, dataset, posterior, placement, of, console, stop, Clock())
        )


def resume_run(
    folder: Path,
    *,
    console: Console,
    draws: int = 0,
    ess: float | None = None,
    lppd: float | None = None,
    budget: float | None = None,
    other_versions: bool = False,
    group: Group | None = None,
) -> bool:
    """Go on with a run, or add draws to it.

    Parameters
    ----------
    folder : Path
    console : Console
    draws : int
        Draws per chain beyond those planned so far.
    ess, lppd : float, optional
        The target from now on (`bnnmcmc.targets`), instead of that of the config.
    budget : float, optional
        Seconds for everything.
    other_versions : bool
        Go on even if the draws so far were made with other package versions.
    group : Group, optional
        As in `start_run`; their number may be another than before.

    Returns
    -------
    bool
        Whether the run is complete.

    Raises
    ------
    InputError
        Not a run folder, changed or damaged files, other package versions, or a target that is
        met although draws are to be added.
    """
    group = group or Group()
    stop = Stop(None if budget is None else time.monotonic() + budget, group)
    if draws < 0:
        raise InputError(f"--draws: found {draws}, expected a number of draws to add")
    manifest = store.read_manifest(folder)
    with locked(folder):
        manifest = store.read_manifest(folder)
        config, dataset = open_inputs(folder, manifest)
        check_precision(config)
        done = sum(block["count"] for block in manifest["blocks"])
        target, checks = target_of(manifest)
        target = target._replace(
            ess=target.ess if ess is None else ess, lppd=target.lppd if lppd is None else lppd
        )
        check_target(
            target, rows=manifest["data"]["sampled_on"], validation=len(dataset.validation)
        )
        met = is_met(target, checks)
        if met and draws:
            raise InputError(
                f"--draws: the target is met ({say_progress(target, checks)}); to draw more, raise "
                "it with --ess (0: no such target) or lower --lppd"
            )
        goes_on = done < manifest["draws"] + draws and not met
        if goes_on:
            preflight.check_versions(folder, manifest, other_versions)
        left = manifest["draws"] + draws - done
        posterior, placement = preflight.check_model(config, dataset, group, folder, left)
        of = position_layout(posterior)
        run_store = store.Store(folder, manifest, group)
        _remove_partial_files(folder)
        changes: dict[str, Any] = {"stopped": None, **_devices(placement)}
        changes["until"] = target._asdict()
        if draws:
            changes["draws"] = manifest["draws"] + draws
        if manifest["stage"] in ("results", "done") and goes_on:
            changes["stage"] = "sampling"
        run_store.commit(**changes)
        group.first([str(folder), run_store.manifest])
        with interruptible(stop, console):
            return _advance(
                Job(run_store, config, dataset, posterior, placement, of, console, stop, Clock())
            )


def follow_run(group: Group, *, console: Console) -> bool:
    """Take part in the run that process 0 starts or resumes.

    Parameters
    ----------
    group : Group
        This is not process 0.
    console : Console
        A quiet one: process 0 shows the progress.

    Returns
    -------
    bool
        Whether all draws are there; process 0 then scores them alone.

    Raises
    ------
    InputError
        The run folder is not to be seen from here, or something of this machine does not fit.
    LostProcessError
        Another process is gone, or has stopped.
    """
    stop = Stop(group=group)
    name, manifest = group.first()
    folder = Path(name)
    _await_folder(folder, manifest)
    config, dataset = open_inputs(folder, manifest)
    check_precision(config)
    posterior, placement = preflight.check_model(config, dataset, group)
    of = position_layout(posterior)
    run_store = store.Store(folder, manifest, group)
    with interruptible(stop, console):
        return _advance(
            Job(run_store, config, dataset, posterior, placement, of, console, stop, Clock())
        )


def _advance(job: Job) -> bool:
    try:
        return _advance_stages(job)
    finally:
        for sampler in job.samplers.values():
            sampler.cancel()


def _advance_stages(job: Job) -> bool:
    _meet(job)
    stages = {"ensemble": train_ensemble, "warmup": warm_up, "sampling": draw}
    if job.manifest["stage"] in stages:
        placed = f"Chains: {job.placement.describe()} ({job.placement.reason})"
        job.console.print(placed, style="dim", highlight=False, markup=False, soft_wrap=True)
    for stage, work in stages.items():
        if job.manifest["stage"] != stage:
            continue
        done = work(job)
        job.store.follow()
        if job.stop.at() or not done:
            job.store.commit(stopped="interrupted")
            return False
    if job.group.lead and job.manifest["stage"] == "results":
        _finish(job)
    return True


def _meet(job: Job) -> None:
    """See that all processes compute alike, and note down what they compute on."""
    if job.group.count == 1:
        return
    versions = {name: v for name, v in preflight.versions().items() if name in preflight.PINNED}
    found = job.group.share([versions, _devices(job.placement)["devices"]])
    for number, (theirs, _) in enumerate(found):
        other = [
            f"{n} {theirs[n]} (process 0: {v})" for n, v in found[0][0].items() if v != theirs[n]
        ]
        if other:
            raise InputError(
                f"process {number} on {job.group.hosts[number]} has {', '.join(other)}; install "
                "the same versions on all machines"
            )
    devices = {**found[0][1], "count": sum(device["count"] for _, device in found)}
    described = (
        f"{job.config.ensemble.members} chains in {job.group.count} processes; process 0: "
        f"{job.placement.describe()}"
    )
    job.store.commit(devices=devices, placement=described)


def _await_folder(folder: Path, manifest: dict[str, Any]) -> None:
    """Wait until what process 0 has written is to be seen here: network file systems are slow."""
    until = time.monotonic() + FOLDER_SECONDS
    while True:
        try:
            if store.read_manifest(folder)["created"] == manifest["created"]:
                return
            found = "another run than that of process 0"
        except InputError:
            found = "no run folder"
        if time.monotonic() > until:
            raise InputError(
                f"{folder.absolute()}: found {found}; it must be on a file system that all "
                "processes share (and --out a path that is the same for all)"
            )
        time.sleep(0.2)


def _devices(placement: Placement) -> dict[str, Any]:
    device = placement.devices[0]
    return {
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": len(placement.devices),
        },
        "placement": placement.describe(),
    }


def _finish(job: Job) -> None:
    # Pictures need matplotlib and SciPy: seconds that a run should not begin with.
    from bnnmcmc.report.page import write_report

    with _timed(job, "results"), progress.working(job.console, "Scores, diagnostics, report"):
        write_results(Run.open(job.store.folder), job.store, job.config.run.arviz)
    # The report shows the time of this very stage, so it comes last, after the commit.
    job.store.commit(stage="done")
    write_report(job.store.folder)


# ------------------------------------------------------------------------------------- stages


def train_ensemble(job: Job) -> bool:
    """Train all members; return False if interrupted."""
    config, dataset = job.config.ensemble, job.dataset
    dtype, placement = jnp.result_type(float), job.placement.for_training
    held_out = dataset.validation if len(dataset.validation) else dataset.train
    rows = [job.posterior.arrays(dataset.x[p], dataset.y[p]) for p in (dataset.train, held_out)]
    training = build_training(
        job.posterior,
        build.make_ensemble_optimiser(job.config),
        placement,
        rows=len(dataset.train),
        validation_rows=len(dataset.validation),
        batch_size=config.batch_size or None,
        max_epochs=config.max_epochs,
        patience=config.patience,
    )
    data = replicate((*rows[0], *rows[1]), placement)
    _sampler(job, _sampling_data(job))  # compiles while members train
    entry = job.manifest["checkpoint"]
    if entry is None:
        members, done = start_members(training, job.seed), 0
        history = np.zeros((job.placement.chains, 0, 2), dtype)
    else:
        template = {
            "history": jax.ShapeDtypeStruct((0, entry["position"], 2), dtype),
            "members": training.start.eval_shape(
                indices(placement), stage_key(job.seed, "ensemble-init")
            ),
        }
        restored = _own(job, job.store.restore(template))
        members, done = spread(restored["members"], placement), entry["position"]
        history = restored["history"]
    stop_at = job.stop.share(TRAINING_SHARE)
    stopped = _count(job, members[1].stopped)
    with (
        _timed(job, "ensemble"),
        progress.stage(job.console, "Ensemble", config.max_epochs, "epochs", done) as update,
    ):
        for block in run_epochs(
            training, members, job.seed, data, first=done, least=job.group.least
        ):
            members, done = block.members, block.start + block.count
            history = np.concatenate([history, block.history], axis=1)
            stopped = _count(job, members[1].stopped)
            loss = np.min(gather(members[1].best_loss, placement))
            update(done, f"best loss {loss:.3f}, {stopped} of {config.members} stopped")
            _live(job, "ensemble", done, config.max_epochs, "epochs", _losses(block.history))
            tree = {"history": history, "members": gather(members, placement)}
            _commit(job, checkpoint=job.store.checkpoint("ensemble", done, tree))
            if job.stop.at(stop_at):
                break
        complete = done >= config.max_epochs or stopped == config.members
        if job.stop.interrupted and not complete:
            return False
        update(done, f"{done} epochs, {stopped} members stopped early", finished=True)
    tree = {"history": history, "members": gather(members, placement)}
    if not job.group.lead:
        return True
    if job.group.count > 1:
        tree = job.store.restore(tree)
    notes = list(job.manifest["notes"])
    if not complete:
        notes.append(f"training was ended by the time budget after {done} epochs")
    ensemble = finish_ensemble(tree["members"][1], tree["history"])
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
    sampler = _sampler(job, data)
    program = sampler.program
    carry, done, records = _begin_warmup(job, sampler, data)
    thin, total = program.warmup.thin, program.warmup.records
    planned = job.manifest["planned"]
    stop_at = job.stop.share(PLANNED_SHARE if planned else WARMUP_SHARE)
    # MCLMC's tuning, or a schedule, is of use only when it is complete: a warm-up that does not fit
    # in the budget is planned anew. Window adaptation can end at any time, and its first steps tell
    # no speed.
    may_plan = stop_at is not None and not program.kernel.exact and not done and not planned
    plan, measured_steps, measured_seconds = None, 0, 0.0
    with (
        _timed(job, "warmup"),
        progress.stage(
            job.console, "Warm-up", program.warmup.total, "steps", done * thin
        ) as update,
    ):
        begun = done
        for block in run_blocks(
            program, "warmup", carry, job.seed, data, first=done, least=job.group.least
        ):
            carry, done = block.carry, block.start + block.count
            records = _join_records(records, block.stats)
            update(min(done * thin, program.warmup.total), _note(block.stats))
            steps, planned_steps = min(done * thin, program.warmup.total), program.warmup.total
            _live(job, "warmup", steps, planned_steps, "steps", _last(block.stats))
            seconds = max(job.group.share(block.seconds))
            # The first block may have waited for its compilation.
            if may_plan and block.start != begun:
                measured_steps += block.count * thin
                measured_seconds += seconds
                if measured_seconds >= CALIBRATION_SECONDS:
                    may_plan = False
                    plan = _plan(job, measured_seconds / measured_steps, sampler, done * thin)
            plan = job.group.first(plan)
            if plan is not None:
                update(done * thin, "planned anew for the time budget", finished=True)
                break
            tree = {"carry": gather(at_rest(carry), job.placement), "records": records}
            _commit(job, checkpoint=job.store.checkpoint("warmup", done, tree))
            if job.stop.at(stop_at):
                break
    if job.stop.interrupted and done < total:
        return False
    if plan is not None:
        # The tuning's schedule depends on its length: begin again with the new one.
        job.store.commit(checkpoint=None, planned=True, **plan)
        job.store.drop_old_checkpoints()
        job.store.follow()
        return warm_up(job)
    if job.group.lead and job.group.count > 1 and records is not None:
        tree = {"carry": gather(at_rest(carry), job.placement), "records": records}
        records = job.store.restore(tree)["records"]
    carry = gather(finish_warmup(program, carry), job.placement)
    entry = job.store.checkpoint("sampling", 0, carry)
    if not job.group.lead:
        return True
    notes = list(job.manifest["notes"])
    if done < total:
        notes.append(
            f"warm-up was ended by the time budget after {done * thin} of "
            f"{program.warmup.total} steps"
        )
    store.write_arrays(job.store.folder / "warmup.npz", records or {})
    shapes = {n: np.dtype(shape.dtype) for n, shape in sampler.shapes.sampling_stats.items()}
    _create_arrays(job, shapes)
    job.store.commit(
        stage="sampling",
        blocks=[],
        statistics=sorted(shapes),
        checkpoint=entry,
        notes=notes,
    )
    job.store.drop_old_checkpoints()
    return True


def draw(job: Job) -> bool:
    """Draw until the planned number is there or a target is met; return False if interrupted."""
    data = _sampling_data(job)
    manifest = job.manifest
    sampler = _sampler(job, data)
    threading.Thread(target=_load_for_results, args=(job,), name="load-ahead").start()
    carry = spread(_own(job, job.store.restore(sampler.shapes.sampling)), job.placement)
    done, total, folder = manifest["checkpoint"]["position"], manifest["draws"], job.store.folder
    for path in (folder / "draws", folder / "stats") if job.group.lead else ():
        store.settle_shares(path, job.placement.chains, manifest["blocks"])
        store.resize_arrays(path, total)
    late = job.stop.at(job.stop.draws_deadline(done) if done else None)
    steps, first = manifest["thin"], job.placement.first
    checks, note = None, ""
    with (
        _timed(job, "sampling"),
        progress.stage(job.console, "Sampling", total * steps, "steps", done * steps) as update,
    ):
        limit = job.config.run.block_draws or None
        stopped = dict(manifest.get("stopped_chains") or {})
        some_go_on = len(stopped) < manifest["chains"]
        checks = _begin_checks(job, done) if some_go_on else None
        if done < total and not late and some_go_on and not (checks and checks.met):
            for block in run_blocks(
                sampler.program,
                "sampling",
                carry,
                job.seed,
                data,
                first=done,
                max_count=limit,
                least=job.group.least,
                block_end=checks.next if checks else None,
                watch=_watch(job, stopped),
            ):
                done = block.start + block.count
                assert block.draws is not None
                assert block.stopped is not None
                stopped = _all_stopped(job, block.stopped)
                changes: dict[str, Any] = {"stopped_chains": stopped}
                if checks:
                    checks.add(block.draws)
                    if checks.due or done == total:
                        checks.check()
                    changes["checks"] = checks.history
                leaves = dict(
                    zip(job.layout.names, trees.split_flat(block.draws, job.layout), strict=True)
                )
                checksums = {
                    "draws": store.append(folder / "draws", block.start, leaves, first),
                    "stats": store.append(folder / "stats", block.start, block.stats, first),
                }
                record = {"start": block.start, "count": block.count, **_joined(job, checksums)}
                tree = gather(at_rest(block.carry), job.placement)
                _commit(
                    job,
                    blocks=[*job.manifest["blocks"], record],
                    checkpoint=job.store.checkpoint("sampling", done, tree),
                    **changes,
                )
                note = _note(
                    block.stats,
                    health.say_now(
                        block.stats,
                        steps,
                        wanted=sampler.program.kernel.wanted,
                        stopped=len(stopped),
                    ),
                )
                _live(job, "sampling", done, total, "draws", _last(block.stats))
                if checks:
                    note = f"{say_progress(checks.target, checks.history)}, {note}"
                update(done * steps, note)
                if len(stopped) == job.manifest["chains"]:
                    break
                if checks and checks.met:
                    break
                if job.stop.at(job.stop.draws_deadline(done)):
                    break
                del block, leaves  # as large as what the next block takes
        met = checks is not None and checks.met
        if len(stopped) == job.manifest["chains"]:
            _give_up(job)
        if job.stop.interrupted and done < total and not met:
            return False
        if met and done < total:
            update(done * steps, note, finished=True)
    job.store.commit(stage="results", stopped="time budget" if done < total and not met else None)
    if checks and job.group.lead:
        said = say_outcome(job.manifest)
        job.console.print(f"Sampling: {said}", highlight=False, markup=False, soft_wrap=True)
    return True


def _watch(job: Job, stopped: dict[str, int]) -> health.Watch:
    """Return what was seen of this process's chains so far, from the last draws' statistics."""
    first, chains = job.placement.first, job.placement.chains
    own = {int(c) - first: draw for c, draw in stopped.items() if 0 <= int(c) - first < chains}
    watch = health.nothing_seen(chains, own)
    blocks, kept = job.manifest["blocks"], 0
    for number in range(len(blocks) - 1, -1, -1):
        kept += blocks[number]["count"]
        if kept > health.STOP_AFTER:
            blocks = blocks[number:]
            break
    path, names = job.store.folder / "stats", job.manifest["statistics"]
    for block, stats in zip(blocks, store.read_blocks(path, names, blocks), strict=True):
        watch = health.look(watch, _own(job, stats), block["start"], job.manifest["thin"])
    return watch


def _all_stopped(job: Job, stopped: np.ndarray) -> dict[str, int]:
    """Return chain -> after how many draws it was stopped, of all processes."""
    own = health.stopped_chains(stopped, job.placement.first)
    parts = job.group.share({str(chain): draw for chain, draw in own.items()})
    return {chain: draw for part in parts for chain, draw in part.items()}


def _give_up(job: Job) -> None:
    """End a run without a chain that goes on; what it has computed stays."""
    job.store.commit(stopped="every chain was stopped")
    job.store.follow()
    folder, manifest = job.store.folder, job.manifest
    names, blocks = manifest["statistics"], manifest["blocks"]
    found = list(store.read_blocks(folder / "stats", names, blocks))
    stats = {name: np.concatenate([part[name] for part in found], axis=1) for name in names}
    chains = {int(c): draw for c, draw in job.manifest["stopped_chains"].items()}
    raise InputError(
        f"{health.say_all_stopped(stats, chains, manifest['thin'])}. What was drawn is kept in "
        f"{folder}; look at it with: bnnmcmc diagnose {folder}"
    )


def _begin_checks(job: Job, done: int) -> Checks | None:
    """Return the checks of the run's target with the draws so far, or None without a target."""
    target, history = target_of(job.manifest)
    if not target.wanted:
        return None
    if done < job.manifest["draws"]:
        # One made where an earlier cap was is not one of an undisturbed run.
        history = [c for c in history if next_check(target.every, c["draw"] - 1) == c["draw"]]
    dataset = job.dataset
    inputs = dataset.validation if len(dataset.validation) else dataset.train
    checks = watch(
        target,
        job.posterior,
        job.layout,
        job.config.ensemble.members,
        dataset.x[inputs],
        (dataset.x[dataset.validation], dataset.y[dataset.validation]) if target.lppd else None,
        share=job.group.share,
        history=history,
    )
    if done and not checks.met:
        for block in stored_draws(job.store.folder, job.manifest, job.layout).blocks():
            checks.add(_own(job, block))
        if checks.due or (done >= job.manifest["draws"] and not checks.checked):
            checks.check()
            job.store.commit(checks=checks.history)
    return checks


# -------------------------------------------------------------------------------------- parts


@contextmanager
def _timed(job: Job, stage: str) -> Iterator[None]:
    """Count the seconds of a stage, with those of earlier sittings."""
    clock = job.clock
    clock.stage, clock.begun, clock.before = stage, time.monotonic(), job.manifest["seconds"]
    try:
        yield
    finally:
        # No more than that: others may be writing their part of the next checkpoint.
        peaks = {**job.manifest.get("peak_bytes", {}), stage: _peak_bytes()}
        job.store.commit(seconds=job.clock.seconds(), peak_bytes=peaks)


def _peak_bytes() -> int:
    """Return the largest resident set of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _commit(job: Job, **changes: Any) -> None:
    """Commit a block, with the time so far, and drop what it replaces.

    All processes must meet between this and the next checkpoint.
    """
    job.store.commit(seconds=job.clock.seconds(), **changes)
    job.store.drop_old_checkpoints()


def _live(job: Job, stage: str, done: int, total: int, unit: str, values) -> None:
    """Write down how far the run is, for a page that is looked at while it goes on."""
    if job.group.lead:
        job.live.add(stage, done, total, unit, values)


def _losses(history: np.ndarray) -> dict[str, np.ndarray]:
    """Return the last losses of members that still train, from a block (member, epoch, 2)."""
    names = ("training loss", "validation loss")
    return {n: v for n, v in zip(names, history[:, -1].T, strict=True) if np.isfinite(v).any()}


def _last(stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the statistics of the last draw that say how chains do."""
    names = ("log_density", "step_size", "acceptance_rate", "energy_error_squared")
    return {name: stats[name][:, -1] for name in names if name in stats}


def _own(job: Job, tree: Any) -> Any:
    """Return this process's chains of a pytree with all chains."""
    first, last = job.placement.first, job.placement.first + job.placement.chains
    return jax.tree.map(lambda leaf: leaf[first:last], tree)


def _count(job: Job, flags: jax.Array) -> int:
    """Count the chains of all processes whose flag is set."""
    return sum(job.group.share(int(gather(flags, job.placement).sum())))


def _joined(job: Job, checksums: dict[str, int]) -> dict[str, Any]:
    """Return what a block's record says of its parts, all of which are then on disk."""
    parts = job.group.share(checksums)
    if len(parts) == 1:
        return checksums
    return {name: [part[name] for part in parts] for name in checksums} | {
        "share": job.placement.chains
    }


def _load_for_results(job: Job) -> None:
    """Import what scores and report need: three seconds, while chains are drawn."""
    modules = ("bnnmcmc.report.page", "arviz_plots")
    loads: list[Callable[[], Any]] = [partial(importlib.import_module, name) for name in modules]
    for load in (diagnostics.load, *loads):
        if job.stop.interrupted:
            return
        # Should it fail, then it fails again where it is needed, and is reported there.
        with suppress(Exception):
            load()


def _sampling_data(job: Job) -> tuple[jax.Array, jax.Array]:
    rows = build.sampling_rows(job.config, job.dataset)
    return replicate(job.posterior.arrays(*rows), job.placement)


def _sampler(job: Job, data) -> Ahead:
    """Return the sampler for the steps planned by now; its compilation begins at the first call."""
    steps = tuple(job.manifest[name] for name in ("warmup", "draws", "thin"))
    if steps not in job.samplers:
        program = build_program(
            RowDensity(job.posterior.log_prior, job.posterior.log_likelihood),
            build.make_kernel(job.config),
            job.layout,
            job.placement,
            warmup=steps[0],
            draws=steps[1],
            thin=steps[2],
            sampled=trees.chosen_leaves(job.config.sampler.leaves, job.layout),
            begun_with=job.config.sampler.draws,
        )
        needed = ("draw",) if job.manifest["stage"] == "sampling" else FUNCTIONS
        job.samplers[steps] = Ahead(program, data, needed)
    return job.samplers[steps]


def _begin_warmup(job: Job, sampler: Ahead, data) -> tuple[Any, int, dict[str, np.ndarray] | None]:
    """Return where the warm-up stands: carry, records done, their statistics."""
    entry = job.manifest["checkpoint"]
    if entry is None:
        members, _ = read_members(job.store.folder, job.manifest, job.posterior)
        members = chain_starts(job.posterior, members)
        # The very arrays that the start was checked on: the check is compiled already.
        rows = job.posterior.arrays(*build.sampling_rows(job.config, job.dataset))
        check_finite(job.posterior, members, *rows)
        positions = trees.flatten_stacked(_own(job, members))
        return start_chains(sampler.program, positions, job.seed, data), 0, None
    shapes, done = sampler.shapes, entry["position"]
    records = {n: jax.ShapeDtypeStruct((0, done), s.dtype) for n, s in shapes.warmup_stats.items()}
    restored = _own(job, job.store.restore({"carry": shapes.warmup, "records": records}))
    return spread(restored["carry"], job.placement), done, restored["records"]


def _join_records(records, stats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Append statistics (chain, count) to records (chain, record)."""
    if records is None:
        return stats
    return {name: np.concatenate([records[name], new], axis=1) for name, new in stats.items()}


def _create_arrays(job: Job, stats: dict[str, np.dtype]) -> None:
    folder, manifest = job.store.folder, job.manifest
    dtype = np.dtype(jnp.result_type(float))
    shapes = dict(zip(job.layout.names, job.layout.shapes, strict=True))
    chains, draws = manifest["chains"], manifest["draws"]
    share = job.placement.chains
    types = dict.fromkeys(shapes, dtype)
    store.create_arrays(folder / "draws", shapes, types, chains, draws, share)
    store.create_arrays(folder / "stats", dict.fromkeys(stats, ()), stats, chains, draws, share)


def _plan(job: Job, step_seconds: float, sampler: Ahead, steps_done: int) -> dict[str, Any] | None:
    """Return changes to the manifest, fewer steps and draws, if the planned ones do not fit."""
    warmup, draws, thin = (job.manifest[name] for name in ("warmup", "draws", "thin"))
    left = max(0.0, (job.stop.sampling_deadline or 0.0) - time.monotonic())
    cold = sampler.cold_seconds
    planned = fewer_steps(warmup, draws, thin, step_seconds, steps_done, left, cold)
    if planned is None:
        return None
    fewer = dict(zip(("warmup", "draws"), planned, strict=True))
    note = (
        f"planned for the time budget: {fewer['warmup']} of {warmup} warm-up steps and "
        f"{fewer['draws']} of {draws} draws per chain"
    )
    return {**fewer, "notes": [*job.manifest["notes"], note]}


def _note(stats: dict[str, np.ndarray], trouble: str = "") -> str:
    """Say in a few words how the chains do that go on."""
    going = ~np.isnan(stats["log_density"][:, -1])
    if going.any():
        stats = {name: values[going] for name, values in stats.items()}
    parts = [trouble] if trouble else []
    parts.append(f"log-density {np.median(stats['log_density'][:, -1]):.4g}")
    if "acceptance_rate" in stats:
        parts.append(f"acceptance {np.mean(stats['acceptance_rate']):.2f}")
    if "energy_error_squared" in stats:
        parts.append(f"EEVPD {np.mean(stats['energy_error_squared']):.2g}")
    if "step_size" in stats:
        parts.append(f"step size {np.median(stats['step_size'][:, -1]):.2g}")
    if "diverging" in stats and stats["diverging"].sum():
        parts.append(f"{stats['diverging'].sum()} divergent steps")
    return ", ".join(parts)


def _remove_partial_files(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for pattern in ("**/.*.tmp", "**/.*.tmp.old", "**/*.partial"):
        for path in list(folder.glob(pattern)):
            # Zarr trees are folders.
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
