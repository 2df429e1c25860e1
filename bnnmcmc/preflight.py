"""Before a run: does everything fit, is the density finite, what will it cost.

What cannot work is refused here, before any long work.
"""

import importlib.metadata
import math
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape

from bnnmcmc import build, trees
from bnnmcmc.calibration import gradient_walk
from bnnmcmc.config import Config, HMCConfig, MAMSConfig, MinibatchSection, NUTSConfig
from bnnmcmc.data import Dataset
from bnnmcmc.ensemble import build_training, run_epochs, start_members
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.memory import Need, available_memory, check_memory, memory_need
from bnnmcmc.placement import QUICK, Placement, replicate, spread
from bnnmcmc.posterior import Posterior, check_finite
from bnnmcmc.processes import Group
from bnnmcmc.progress import duration
from bnnmcmc.recalibration import SMALLEST_HELD_OUT
from bnnmcmc.run import position_layout
from bnnmcmc.samplers.kernel import MinibatchKernel
from bnnmcmc.samplers.network import walk_steps
from bnnmcmc.sampling import check_rows
from bnnmcmc.targets import Target, check_target

# Packages that decide what a draw's bits are, and others worth knowing.
PINNED = ("bnnmcmc", "jax", "jaxlib", "blackjax", "numpyro", "optax")
NOTED = ("numpy", "scipy", "scikit-learn", "arviz", "zarr", "pandas")
# What a start that was cut off before its first commit may leave behind.
SETUP_FILES = {"config.toml", "data.npz", "scaling.json", ".lock"}
CHECKED_STARTS = 64
# A tree of NUTS in a BNN is between these depths, as a rule.
NUTS_DEPTHS = (6, 9)


def check_model(
    config: Config,
    dataset: Dataset,
    group: Group | None = None,
    folder: Path | None = None,
    draws: int = 0,
) -> tuple[Posterior, Placement]:
    """Build posterior and placement (of this process) and check them before any long work.

    Parameters
    ----------
    config : Config
    dataset : Dataset
    group : Group, optional
    folder : Path, optional
        Where the draws will go, if they are to go anywhere.
    draws : int
        How many per chain.

    Raises
    ------
    InputError
        A part cannot be built, shapes do not fit, disk or memory do not suffice, or the density is
        not finite at the start.
    """
    target = Target(**config.stop.model_dump())
    check_target(target, rows=config.sampler.rows, validation=len(dataset.validation))
    posterior = build.make_posterior(config, dataset.encoding)
    if folder is not None:
        check_disk(folder, position_layout(posterior), config.ensemble.members, draws)
    check_parts(config, dataset, posterior)
    placement = build.make_placement(config, posterior, dataset, group)
    posterior = replace(posterior, row_chunk=placement.row_chunk)
    check_memory(need(config, dataset, posterior, placement), placement)
    x, y = posterior.arrays(*build.sampling_rows(config, dataset))
    key = stage_key(config.run.seed, "ensemble-init")
    count = min(config.ensemble.members, CHECKED_STARTS)
    starts = _starts(posterior, key)
    check_finite(posterior, starts(jnp.arange(count)), x, y, label="member")
    return posterior, placement


def check_parts(config: Config, dataset: Dataset, posterior: Posterior) -> None:
    """Check that weights of chains, leaves, kernel, batches and optimiser fit the data.

    Parameters
    ----------
    config : Config
    dataset : Dataset
    posterior : Posterior

    Raises
    ------
    InputError
        The message names the field.
    """
    if config.pool.weights != "equal" and not len(dataset.validation):
        raise InputError(
            f'pool.weights: "{config.pool.weights}" is fitted on the validation rows, but there '
            "are none; hold some out for validation, or take equal weights"
        )
    needed = SMALLEST_HELD_OUT[config.calibration.method]
    if len(dataset.validation) < needed:
        raise InputError(
            f'calibration.method: "{config.calibration.method}" needs at least {needed} validation '
            f"rows, found {len(dataset.validation)}; hold more out for validation, or take "
            'method = "none"'
        )
    of = position_layout(posterior)
    build.sampled_size(config, of)
    build.check_own_kernel(config, of)
    check_rows(build.make_kernel(config), build.sampling_rows(config, dataset))
    build.make_ensemble_optimiser(config)


def _starts(posterior: Posterior, key: jax.Array) -> Callable[[jax.Array], Any]:
    """Return the function from the numbers of members to where untrained ones' chains begin."""
    each = jax.vmap(lambda i: posterior.start(posterior.init(jax.random.fold_in(key, i))))
    return jax.jit(each, compiler_options=QUICK)


def need(config: Config, dataset: Dataset, posterior: Posterior, placement: Placement) -> Need:
    """Return what the run that a config describes needs in memory."""
    return memory_need(
        config,
        dataset,
        posterior,
        placement,
        build.make_kernel(config),
        build.make_ensemble_optimiser(config),
    )


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
    # A cut-off start has left its lock file; without it, a config.toml there is the user's own.
    ours = SETUP_FILES if ".lock" in found else set()
    others = [n for n in found if n not in ours and not (ours and n.endswith(".tmp"))]
    if others:
        raise InputError(
            f"{folder}: is not empty (it holds {others[0]!r}); choose another folder with --out"
        )


def draw_bytes(of: trees.Layout, chains: int, draws: int) -> int:
    """Return how much disk draws and their statistics need, in bytes."""
    return jnp.result_type(float).itemsize * chains * draws * (of.size + 8)


def check_disk(folder: Path, of: trees.Layout, chains: int, draws: int) -> None:
    """Raise InputError if the disk has not enough room for so many draws per chain."""
    place = folder
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, draw_bytes(of, chains, draws)
    if needed > free:
        raise InputError(
            f"{folder}: the draws need {needed / 1e9:.2f} GB ({chains} chains x {draws} draws x "
            f"{of.size} parameters), but the disk has {free / 1e9:.2f} GB free; lower "
            "sampler.draws, raise sampler.thin, or use another disk with --out"
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


class Estimate(NamedTuple):
    """What a run would need.

    Parameters
    ----------
    parameters : int
        Of one network and its likelihood.
    sampled : int
        How many of these are sampled.
    memory : Need
        At most, by stage.
    disk : float
        Bytes of draws.
    epoch_seconds : float
        One epoch of all members.
    max_epochs : int
        Most epochs; members stop early, so training rarely takes that long.
    gradient_seconds : float
        One gradient of the log-density of every chain.
    sampling_seconds : tuple of float
        Shortest and longest time of warm-up and sampling to expect; infinity where a kernel of the
        user's own does not say.
    """

    parameters: int
    sampled: int
    memory: Need
    disk: float
    epoch_seconds: float
    max_epochs: int
    gradient_seconds: float
    sampling_seconds: tuple[float, float]


def estimate(
    config: Config, dataset: Dataset, posterior: Posterior, placement: Placement
) -> Estimate:
    """Measure the cost of one epoch and one gradient, and add up.

    Parameters
    ----------
    config : Config
    dataset : Dataset
    posterior : Posterior
    placement : Placement

    Returns
    -------
    Estimate
    """
    of = position_layout(posterior)
    epoch = _epoch_seconds(config, dataset, posterior, placement)
    gradient = _gradient_seconds(config, dataset, posterior, placement, of)
    rows = len(build.sampling_rows(config, dataset)[0])
    sampler, (least, most) = config.sampler, gradient_counts(config, rows)
    return Estimate(
        of.size,
        build.sampled_size(config, of),
        need(config, dataset, posterior, placement),
        draw_bytes(of, config.ensemble.members, sampler.draws),
        epoch,
        config.ensemble.max_epochs,
        gradient,
        (least * gradient, most * gradient),
    )


def gradient_counts(config: Config, rows: int = 1) -> tuple[float, float]:
    """Return how many gradients a chain takes in warm-up and sampling: the least and the most.

    Those of a batch count as its share of the ``rows`` sampled on. The most is infinite where a
    kernel of the user's own does not say.
    """
    sampler = config.sampler
    steps = sampler.warmup + sampler.draws * sampler.thin
    match sampler:
        case HMCConfig():
            return (steps * sampler.num_leapfrog,) * 2
        case MAMSConfig():
            # The unadjusted part of the warm-up takes one or two gradients a step.
            longest = sampler.max_steps * (1 if sampler.integrator == "leapfrog" else 2)
            return steps, steps * longest
        case NUTSConfig():
            depths = [min(depth, sampler.max_depth) for depth in NUTS_DEPTHS]
            walk = walk_steps(sampler.warmup) if sampler.adaptation == "network" else 0
            least, most = [walk + (steps - walk) * (2**depth - 1) for depth in depths]
            return least, most
        case MinibatchSection():
            # With an anchor: what the batch shows there too, and every so often all rows.
            seen = 2 if sampler.anchor else 1
            # The energy error of a warm-up step of SMILE takes two gradients on one batch.
            batches = steps * seen + (sampler.warmup if sampler.kernel == "smile" else 0)
            anchors = -(-sampler.warmup // sampler.anchor) if sampler.anchor else 0
            anchors += -(-(steps - sampler.warmup) // sampler.anchor) if sampler.anchor else 0
            return (batches * sampler.batch_size / rows + anchors,) * 2
        case _:
            # A step without a gradient takes a density at least, which is not much cheaper.
            kernel = build.make_kernel(config)
            per_step = kernel.gradients_per_step
            share = kernel.batch_size / rows if isinstance(kernel, MinibatchKernel) else 1
            least = steps * share * max(per_step or 1, 1)
            return least, math.inf if per_step is None else least


def _epoch_seconds(config, dataset: Dataset, posterior, placement: Placement) -> float:
    chosen = config.ensemble
    held_out = dataset.validation if len(dataset.validation) else dataset.train
    rows = [posterior.arrays(dataset.x[p], dataset.y[p]) for p in (dataset.train, held_out)]
    training = build_training(
        posterior,
        build.make_ensemble_optimiser(config),
        placement,
        rows=len(dataset.train),
        validation_rows=len(dataset.validation),
        batch_size=chosen.batch_size or None,
        max_epochs=6,
        patience=chosen.patience,
    )
    data = replicate((*rows[0], *rows[1]), placement)
    members = start_members(training, config.run.seed)
    blocks = run_epochs(training, members, config.run.seed, data, max_count=2)
    seconds = [block.seconds / block.count for block in blocks]
    return float(np.min(seconds[1:] or seconds))


def _gradient_seconds(config, dataset, posterior, placement, of) -> float:
    rows = build.sampling_rows(config, dataset)
    data = replicate(posterior.arrays(*rows), placement)
    compiled = gradient_walk(posterior, of, placement)
    key = stage_key(config.run.seed, "ensemble-init")
    starts = _starts(posterior, key)
    flat = spread(trees.flatten_stacked(starts(jnp.arange(placement.chains))), placement)
    jax.block_until_ready(compiled(flat, np.int32(1), *data))
    count, seconds = 1, 0.0
    while seconds < 0.3 and count < 10_000:
        count *= 4
        begun = time.monotonic()
        jax.block_until_ready(compiled(flat, np.int32(count), *data))
        seconds = time.monotonic() - begun
    return seconds / count


def _say_memory(need: Need) -> str:
    parts = ", ".join(f"{stage} {size / 1e9:.1f}" for stage, size in need.host.items())
    text = f"at most about {need.worst / 1e9:.1f} GB ({parts})"
    if need.device:
        text += f", and {max(need.device.values()) / 1e9:.1f} GB on each device"
    free = available_memory()
    return text if free is None else f"{text}; {free / 1e9:.1f} GB are available"


def print_estimate(
    console: Console, config: Config, dataset: Dataset, placement: Placement, cost: Estimate
) -> None:
    """Print what `bnnmcmc check` found."""
    parts = [len(rows) for rows in (dataset.train, dataset.validation, dataset.test)]
    sampler, (low, high) = config.sampler, cost.sampling_seconds
    if math.isinf(high):
        time_needed = f"at least {duration(low)}"
    else:
        upper = "" if low == high else f" to {duration(high)}"
        time_needed = f"about {duration(low)}{upper}"
    steps = sampler.warmup + sampler.draws * sampler.thin
    encoding = dataset.encoding
    classes = f", {len(encoding.classes)} classes" if encoding.classes else ""
    most = " at most" if Target(**config.stop.model_dump()).wanted else ""
    part = f", {cost.sampled} of them sampled" if cost.sampled < cost.parameters else ""
    lines = {
        "data": f"{dataset.name}: {len(dataset.x)} rows, {dataset.x.shape[1]} features, "
        f"{encoding.task} of {', '.join(t.name for t in encoding.targets)}{classes}",
        "split": f"{parts[0]} train, {parts[1]} validation, {parts[2]} test",
        "model": f"{cost.parameters} parameters{part}; density and gradient are finite at the "
        "start",
        "chains": f"{placement.describe()} ({placement.reason})",
        "memory": _say_memory(cost.memory),
        "disk": f"{cost.disk / 1e6:.1f} MB of draws",
        "training": f"{duration(cost.epoch_seconds * cost.max_epochs)} at most "
        f"({cost.max_epochs} epochs of {1e3 * cost.epoch_seconds:.2g} ms; members stop early)",
        "sampling": f"{time_needed}{most} ({steps} {sampler.kernel} steps per chain, "
        f"{1e3 * cost.gradient_seconds:.2g} ms per gradient of all chains)",
    }
    for name, text in lines.items():
        console.print(f"[green]✓[/] [dim]{name:<9}[/] {escape(text)}")
