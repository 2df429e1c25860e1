"""What a run needs in memory at most, stage by stage, and what there is.

The predictions are sums of the arrays that a stage holds at one time, copies included: on the
devices, on the host, and on their way to the disk.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnnmcmc import diagnostics, trees
from bnnmcmc.config import Config
from bnnmcmc.data import Dataset
from bnnmcmc.ensemble import MAX_BLOCK_EPOCHS
from bnnmcmc.errors import InputError
from bnnmcmc.placement import Placement
from bnnmcmc.posterior import Posterior, activation_bytes, position_shapes
from bnnmcmc.predictive import BATCH, CHUNK_BYTES, MAX_SAMPLES
from bnnmcmc.results import (
    MAX_DIAGNOSED_DRAWS,
    MAX_DIAGNOSED_WEIGHTS,
    MIN_DIAGNOSED_DRAWS,
    TOTAL_DIAGNOSED,
)
from bnnmcmc.run import ARVIZ_BYTES, MAX_FUNCTION_ROWS
from bnnmcmc.samplers.kernel import Kernel, MinibatchKernel, RowDensity
from bnnmcmc.sampling import WARMUP_RECORDS, Program, build_program

# What Python, JAX, its compiler and the compiled programs take before any data.
BASE_BYTES = 550 * 2**20
# ArviZ, SciPy and matplotlib, which come in for diagnostics and report.
RESULT_BYTES = 450 * 2**20
# A state lies on the devices, in the loop that changes it, gathered on the host, and twice in the
# file that is being written.
STATE_COPIES = 5
# A block of draws: on the devices, in the loop, gathered, cut to length, split by leaf, written.
BLOCK_COPIES = 6
# Statistics of a draw, in numbers.
STATISTICS = 8
# XLA's workspace beyond the residuals of a gradient, and the threads' own.
WORKSPACE = 1.5


class Need(NamedTuple):
    """Bytes at most.

    Parameters
    ----------
    host : dict
        Stage -> main memory; on CPUs that is the devices' memory too.
    device : dict
        Stage -> memory of one device; empty on CPUs.
    """

    host: dict[str, float]
    device: dict[str, float]

    @property
    def worst(self) -> float:
        """Main memory of the stage that needs the most."""
        return max(self.host.values())


def memory_need(
    config: Config,
    dataset: Dataset,
    posterior: Posterior,
    placement: Placement,
    kernel: Kernel | MinibatchKernel,
    optimiser: optax.GradientTransformation,
) -> Need:
    """Predict the memory that a run needs at most. Nothing is computed.

    Parameters
    ----------
    config : Config
    dataset : Dataset
    posterior : Posterior
        With the placement's ``row_chunk``.
    placement : Placement
    kernel : Kernel or MinibatchKernel
    optimiser : optax.GradientTransformation

    Returns
    -------
    Need
    """
    position = position_shapes(posterior)
    of = trees.layout(position)
    item = jnp.result_type(float).itemsize
    devices, chains = len(placement.devices), placement.chains
    draws, ensemble = config.sampler.draws, config.ensemble
    train, validation = len(dataset.train), len(dataset.validation)
    sampled = train + (validation if config.sampler.rows == "train+validation" else 0)
    width = dataset.x.shape[1] + (dataset.y.shape[1] if dataset.y.ndim == 2 else 1)
    activations = _activations(posterior, dataset)

    # What each device holds, and what the one or the other stage works with.
    table = item * width * (2 * train + 2 * validation + sampled)
    batch = min(ensemble.batch_size or train, posterior.row_chunk or train)
    held_out = min(validation or train, posterior.row_chunk or train)
    training_work = WORKSPACE * activations(max(batch, held_out))
    sampling_work = WORKSPACE * activations(min(sampled, posterior.row_chunk or sampled))
    member = 2 * _bytes(position) + _bytes(jax.eval_shape(optimiser.init, position))
    program = build_program(
        RowDensity(
            lambda position: -sum((leaf**2).sum() for leaf in jax.tree.leaves(position)),
            lambda position, rows: rows.sum(),
        ),
        kernel,
        of,
        # For its shapes, any device will do.
        replace(placement, devices=tuple(jax.devices()[:1])),
        warmup=config.sampler.warmup,
        draws=draws,
        thin=config.sampler.thin,
        sampled=trees.chosen_leaves(config.sampler.leaves, of),
    )
    members, history = chains * member, 2 * item * chains * ensemble.max_epochs
    epochs = 2 * item * chains * min(MAX_BLOCK_EPOCHS, ensemble.max_epochs)
    # With the statistics of the warm-up, which go into its checkpoints.
    states = _state_bytes(program, sampled) + WARMUP_RECORDS * chains * STATISTICS * item
    block = program.capacity * chains * (of.size * item + 64)
    together = _at_work(placement)
    trained_together = _at_work(placement.for_training)
    host_table = 4 * (dataset.x.nbytes + dataset.y.nbytes)
    results = RESULT_BYTES + _results(config, dataset, of, item, draws)

    if placement.devices[0].platform == "cpu":
        base = BASE_BYTES + host_table + devices * table
        return Need(
            {
                "training": base
                + STATE_COPIES * (members + history)
                + 2 * epochs
                + devices * trained_together * training_work,
                "sampling": base
                + STATE_COPIES * states
                + BLOCK_COPIES * block
                + devices * together * sampling_work,
                "results": base + results + block,
            },
            {},
        )
    base = BASE_BYTES + host_table
    on_device: Callable[[float], float] = lambda total: total / devices  # noqa: E731
    return Need(
        {
            # What runs the GPU takes about as much again as a CPU's.
            "training": 3 * BASE_BYTES + base + 3 * (members + history) + epochs,
            "sampling": 3 * BASE_BYTES + base + 3 * states + 4 * block,
            "results": 3 * BASE_BYTES + base + results + block,
        },
        {
            "training": table
            + on_device(2 * members + 2 * epochs)
            + trained_together * training_work,
            "sampling": table + on_device(2 * states + 2 * block) + together * sampling_work,
        },
    )


def _at_work(placement: Placement) -> int:
    """Return how many chains a device works on at once."""
    if placement.mode == "map":
        return placement.group
    return -(-placement.chains // len(placement.devices))


def _activations(posterior: Posterior, dataset: Dataset) -> Callable[[int], float]:
    """Return the function from a number of rows to the bytes a gradient over them keeps."""
    x, y = posterior.arrays(dataset.x[:2], dataset.y[:2])
    # Tables may be filled up to whole registers: a larger one tells the cost of a row.
    shapes = [jax.ShapeDtypeStruct((1024, *a.shape[1:]), a.dtype) for a in (x, y)]
    per_row = activation_bytes(posterior, *shapes) / 1024
    return lambda rows: max(rows, 1024) * per_row


def _state_bytes(program: Program, rows: int) -> int:
    """Return the bytes of what all chains carry on, in warm-up or sampling."""
    chains = program.placement.padded
    positions = jax.ShapeDtypeStruct((chains, program.layout.size), jnp.result_type(float))
    index = jax.ShapeDtypeStruct((chains,), jnp.int32)
    data = (jax.ShapeDtypeStruct((rows,), jnp.result_type(float)),)
    warming = program.start.eval_shape((index, positions), jax.random.key(0), data)
    sampling = program.finish.eval_shape(warming)
    flight = program.depart.eval_shape(sampling[1:3]) if program.runs_ahead else ()
    return max(_bytes(warming), _bytes(sampling)) + _bytes(flight)


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _results(config: Config, dataset: Dataset, of: trees.Layout, item: int, draws: int) -> float:
    chains, rows, test = config.ensemble.members, len(dataset.x), len(dataset.test)
    outputs = dataset.y.shape[1] if dataset.y.ndim == 2 else len(dataset.encoding.classes or "12")
    statistics = 4 * chains * draws * STATISTICS * item
    # As in `results.diagnose`.
    most = max(MIN_DIAGNOSED_DRAWS, min(MAX_DIAGNOSED_DRAWS, TOTAL_DIAGNOSED // chains))
    looked_at = chains * min(draws, most)
    few = min(max(diagnostics.MAX_SEQUENCES // chains, diagnostics.MIN_COORDINATES), 200)
    functions = MAX_FUNCTION_ROWS * outputs
    weights = min(of.size, MAX_DIAGNOSED_WEIGHTS)
    diagnosed = looked_at * (item * (2 * weights + 3 * functions) + 8 * 8 * few)
    samples = 5 * item * min(MAX_SAMPLES, chains * draws) * test * outputs
    # Draws are read, joined to a batch, filled up, and copied to the devices.
    batch = 6 * min(BATCH, chains * draws) * of.size * item
    predicted = CHUNK_BYTES + samples + batch
    every_draw = config.run.arviz in ("netcdf", "zarr")
    tree = chains * draws * item * (of.size + 2 * rows * outputs)
    arviz = 3 * (tree if every_draw else min(tree, 2 * ARVIZ_BYTES))
    if config.run.arviz == "none":
        arviz = 0
    # Diagnostics predict too, and the memory of one is not always given back before the next.
    return statistics + max(diagnosed + batch, predicted, arviz + batch)


def available_memory() -> float | None:
    """Return the bytes of main memory that this process may still take, None if unknown.

    What the operating system calls available, or what is left of the control group's limit.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append(1024 * kilobytes["MemAvailable"])
    except (OSError, ValueError, KeyError, IndexError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    found += [left for left in map(_left_in_group, _control_groups()) if left is not None]
    return min(found) if found else None


def _control_groups() -> list[tuple[Path, Path]]:
    """Return the files that hold limit and use of the groups this process is in, innermost first.

    Both versions of Linux's control groups; a container may see its own group as the root.
    """
    pairs = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, use = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            use = "memory.usage_in_bytes"
        else:
            continue
        folder = root / name.strip("/")
        for place in (folder, *(p for p in folder.parents if root in (p, *p.parents))):
            pairs.append((place / limit, place / use))
    return pairs


def _left_in_group(files: tuple[Path, Path]) -> int | None:
    """Return what is left of a control group's limit; None without one."""
    try:
        limit, use = (path.read_text().strip() for path in files)
        statistics = files[1].with_name("memory.stat").read_text().split()
        # Of the pages that the use counts, those of files can go.
        index = statistics.index("inactive_file")
        return int(limit) - int(use) + int(statistics[index + 1])
    except (OSError, ValueError, IndexError):  # "max" is no number: no limit
        return None


def check_memory(need: Need, placement: Placement, available: float | None = None) -> None:
    """Raise InputError if a run cannot fit, with the numbers.

    Parameters
    ----------
    need : Need
    placement : Placement
    available : float, optional
        Bytes of main memory; asked of the operating system if not given.
    """
    free = available_memory() if available is None else available
    for what, stages, limit in (
        ("main memory", need.host, free),
        ("the device's memory", need.device, _device_memory(placement)),
    ):
        if not stages or limit is None or max(stages.values()) <= limit:
            continue
        parts = ", ".join(f"{stage} {size / 1e9:.2f} GB" for stage, size in stages.items())
        worst = max(stages, key=lambda stage: stages[stage])
        raise InputError(
            f"memory: the run needs up to {stages[worst] / 1e9:.2f} GB of {what} ({parts}), but "
            f"{limit / 1e9:.2f} GB are available; {ADVICE[worst]}"
        )


ADVICE = {
    "training": "lower ensemble.members, the widths in model.hidden, ensemble.max_epochs, or "
    "ensemble.batch_size",
    "sampling": "lower ensemble.members, the widths in model.hidden, run.row_chunk, or (in mode "
    "map) run.group",
    "results": 'lower ensemble.members or sampler.draws, or set run.arviz = "none"',
}


def _device_memory(placement: Placement) -> float | None:
    device = placement.devices[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    return (stats or {}).get("bytes_limit")
