"""The block loop: all chains advance by a block of kept draws, in one compiled call.

Inside a call there is no host: loops, thinning and adaptation run on the devices. Between calls
the caller gets the block's draws and the chains' state, and may store them, show progress, or
stop. How many draws a call makes is an argument of the compiled function, so any division into
blocks runs the same instructions and gives the same draws.

Chains of a kernel with trajectories that advance side by side do not wait for one another: see
`bnnmcmc.records.run_ahead`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import health, trees
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.placement import Placement, gather, indices, over_chains, place, replicate, spread
from bnnmcmc.records import Going, Schedule, no_flight, no_progress, record_steps, run_ahead
from bnnmcmc.samplers.contract import check_kernel
from bnnmcmc.samplers.kernel import Kernel, MinibatchKernel, RowDensity, RowTarget
from bnnmcmc.samplers.kronecker import matrices
from bnnmcmc.samplers.table import kernel_named

# A block is sized to take about this long, so that progress, Ctrl-C and time budgets are prompt.
TARGET_SECONDS = 1.0
# Most bytes of draws that one block may hold on the devices.
MAX_BLOCK_BYTES = 64 * 2**20
# Chains that run ahead keep their records in a buffer that is part of every checkpoint: it is
# smaller, but up to four times this where it would hold fewer than so many records.
AHEAD_BYTES, AHEAD_RECORDS, MIN_AHEAD = 8 * 2**20, 128, 8
WARMUP_RECORDS = 200


class Block(NamedTuple):
    """What one call computed.

    Parameters
    ----------
    start, count : int
        Records ``start .. start + count - 1``.
    draws : numpy array or None
        (chain, count, size) positions, None during warm-up; NaN after a chain was stopped.
    stats : dict
        name -> (chain, count); after a chain was stopped, NaN and for whole numbers 0.
    carry : pytree
        The chains' state after the block, on the devices.
    seconds : float
        Wall time of the call.
    ticks : numpy array or None
        (chain,) For chains that run ahead: how many gradients a chain could have made, with those
        it was left out of; what it did make is in ``stats["gradients"]``. Over a whole run, the
        ratio of the sums is the utilisation.
    stopped : numpy array (chain,) or None
        After how many draws a chain was stopped (see `health.look`), -1 for those that go on.
    """

    start: int
    count: int  # type: ignore[assignment]
    draws: np.ndarray | None
    stats: dict[str, np.ndarray]
    carry: Any
    seconds: float
    ticks: np.ndarray | None = None
    stopped: np.ndarray | None = None


class Program(NamedTuple):
    """The compiled functions of one sampling problem (see `build_program`)."""

    kernel: Kernel | MinibatchKernel
    placement: Placement
    layout: trees.Layout
    warmup: Schedule
    sampling: Schedule
    capacity: int
    runs_ahead: bool
    sampled: tuple[bool, ...] | None
    start: Any
    depart: Any
    warm: Any
    finish: Any
    draw: Any
    traces: dict[str, int]


def build_program(
    log_density: Callable[..., jax.Array],
    kernel: Kernel | MinibatchKernel,
    of: trees.Layout,
    placement: Placement,
    *,
    warmup: int,
    draws: int,
    thin: int,
    capacity: int | None = None,
    sampled: tuple[bool, ...] | None = None,
    begun_with: int | None = None,
) -> Program:
    """Compile (on first use) what is needed to sample a density.

    Parameters
    ----------
    log_density : callable
        ``log_density(position, *data) -> scalar``; position is a pytree, data are arrays. A
        `RowDensity` for a minibatch kernel.
    kernel : Kernel or MinibatchKernel
    of : trees.Layout
        Layout of one position.
    placement : Placement
    warmup, draws, thin : int
        Warm-up steps; kept draws per chain; steps per kept draw.
    capacity : int
        Most draws in one call, and how many of its draws a chain may be ahead of the others;
        chosen by memory if not given.
    sampled : tuple of bool, optional
        Which leaves are sampled (`trees.chosen_leaves`); the others stay where the chain starts.
    begun_with : int, optional
        Draws that the run was begun with, if it was extended since: the capacity is that of then,
        for checkpoints of chains that run ahead hold a buffer of its size.

    Returns
    -------
    Program
        ``traces`` counts how often each function was traced: once each, however many blocks.
    """
    dtype = jnp.result_type(float)
    template = trees.unflatten(jnp.zeros((of.size,), dtype), of)
    unravel = trees.unraveler(template)
    layers = matrices(of, sampled)
    if layers and isinstance(kernel, Kernel) and kernel.for_matrices is not None:
        kernel = kernel.for_matrices(layers)
    warm_rules = kernel.warmup(warmup)
    warm_schedule = Schedule(warmup, max(1, warmup // WARMUP_RECORDS))
    draw_schedule = Schedule(draws * thin, thin)
    # Of one chain alone, trajectories follow one another as they are.
    parts = kernel.trajectories if placement.together else None
    # A warm-up that is not in halves keeps step: what it does now and then, all chains do at once.
    warm_parts = parts if warm_rules.in_use is not None else None
    if capacity is None:
        row_bytes = placement.chains * (of.size * dtype.itemsize + 64)
        if parts is None:
            capacity = MAX_BLOCK_BYTES // row_bytes
        else:
            most = min(4 * AHEAD_BYTES // row_bytes, AHEAD_RECORDS)
            capacity = max(AHEAD_BYTES // row_bytes, most, MIN_AHEAD)
        capacity = int(np.clip(capacity, 1, max(begun_with or draws, 1)))
    traces = {"start": 0, "warm": 0, "finish": 0, "draw": 0}

    def position_of(flat, fixed):
        if sampled is not None:
            flat = trees.join(flat, fixed, of, sampled)
        return unravel(flat)

    def density_of(data, fixed) -> Any:
        if isinstance(kernel, MinibatchKernel):
            return _target(log_density, kernel, lambda flat: position_of(flat, fixed), data)
        return lambda flat: log_density(position_of(flat, fixed), *data)

    if isinstance(kernel, MinibatchKernel):
        take_step = kernel.sampling(warmup)
    else:

        def take_step(key, state, params, t, density):
            return kernel.step(key, state, params, density)

    def start_chain(chain, key, data):
        traces["start"] += 1
        index, position = chain
        fixed = None
        if sampled is not None:
            fixed = trees.part(position, of, [not use for use in sampled])
            position = trees.part(position, of, sampled)
        state = kernel.init(jax.random.fold_in(key, index), position, density_of(data, fixed))
        adaptation, index = warm_rules.init(position), (index, fixed)
        if warm_parts is None:
            return index, state, adaptation, None, None
        assert warm_rules.in_use is not None
        used = warm_rules.in_use(adaptation)
        progress = no_progress(warm_parts, state, used, WARMUP_RECORDS, keep=False)
        return index, state, adaptation, progress, None

    def depart_chain(chain):
        assert parts is not None
        return Going(jnp.asarray(True), no_flight(parts, *chain))

    def go_ahead(carry, key, first, count, data, schedule, capacity, in_use, adapt):
        assert parts is not None
        (index, fixed), *inner, going = carry
        inner, records = run_ahead(
            parts,
            jax.random.fold_in(key, index),
            (*inner, going.flight),
            going.active,
            first,
            count,
            schedule,
            capacity,
            density_of(data, fixed),
            in_use,
            adapt,
        )
        return ((index, fixed), *inner[:3], going._replace(flight=inner[3])), records

    def warm_chain(carry, key, first, count, data):
        traces["warm"] += 1
        if warm_parts is not None:
            rules = warm_rules.in_use, warm_rules.adapt
            return go_ahead(carry, key, first, count, data, warm_schedule, WARMUP_RECORDS, *rules)
        (index, fixed), state, adaptation, _, going = carry
        density, chain_key = density_of(data, fixed), jax.random.fold_in(key, index)

        def step(t, inner):
            state, adaptation = inner
            state, adaptation, info = warm_rules.step(
                jax.random.fold_in(chain_key, t), state, adaptation, t, density
            )
            return (state, adaptation), info

        (state, adaptation), records = record_steps(
            step, (state, adaptation), first, count, warm_schedule, WARMUP_RECORDS
        )
        return ((index, fixed), state, adaptation, None, going), (*records, None)

    def finish_chain(carry):
        traces["finish"] += 1
        index, state, adaptation, _, _ = carry
        params = warm_rules.finish(adaptation)
        if parts is None:
            return index, state, params, None, None
        return index, state, params, no_progress(parts, state, params, capacity, keep=True), None

    def draw_chain(carry, key, first, count, data):
        traces["draw"] += 1
        if parts is not None:
            rules = (lambda params: params), (lambda params, state, info, t: params)
            return go_ahead(carry, key, first, count, data, draw_schedule, capacity, *rules)
        (index, fixed), state, params, _, going = carry
        density, chain_key = density_of(data, fixed), jax.random.fold_in(key, index)

        def step(t, state):
            return take_step(jax.random.fold_in(chain_key, t), state, params, t, density)

        state, records = record_steps(
            step,
            state,
            first,
            count,
            draw_schedule,
            capacity,
            keep=lambda state: state.position,
            active=going.active,
            together=placement.together,
        )
        return ((index, fixed), state, params, None, going), (*records, None)

    return Program(
        kernel,
        placement,
        of,
        warm_schedule,
        draw_schedule,
        capacity,
        parts is not None,
        sampled,
        over_chains(start_chain, placement),
        over_chains(depart_chain, placement),
        over_chains(warm_chain, placement, donate=True),
        over_chains(finish_chain, placement),
        over_chains(draw_chain, placement, donate=True),
        traces,
    )


def _target(
    density: Callable[..., jax.Array],
    kernel: MinibatchKernel,
    position_of: Callable[[jax.Array], Any],
    data: tuple,
) -> RowTarget:
    """Return what a minibatch kernel sees of a density that is a sum over rows."""
    if not isinstance(density, RowDensity):
        raise InputError(
            f"log_density: the kernel {kernel.name} looks at batches of rows, so it needs "
            "bnnmcmc.RowDensity(log_prior, log_likelihood), not one function of all rows"
        )
    rows = check_rows(kernel, data)

    def estimate(flat, batch):
        position, some = position_of(flat), (values[batch] for values in data)
        scale = rows / kernel.batch_size
        return density.log_prior(position) + scale * density.log_likelihood(position, *some)

    return RowTarget(rows, lambda flat: density(position_of(flat), *data), estimate)


def check_rows(kernel: Kernel | MinibatchKernel, data: tuple) -> int:
    """Return the number of rows of the data, which must hold a batch of the kernel.

    Raises
    ------
    InputError
        A minibatch kernel and data without rows, with different numbers of them, or fewer than its
        batch size.
    """
    lengths = {np.shape(values)[:1] for values in data}
    rows = min((length[0] for length in lengths if length), default=0)
    if isinstance(kernel, MinibatchKernel):
        if len(lengths) != 1 or () in lengths:
            raise InputError(
                f"data: found arrays of shapes {[np.shape(values) for values in data]}, expected "
                "the same number of rows on all leading axes"
            )
        if kernel.batch_size > rows:
            raise InputError(
                f"sampler.batch_size: found {kernel.batch_size}, but there are {rows} rows; give "
                "at most that"
            )
    return rows


def start_chains(program: Program, positions: jax.Array, seed: int, data: tuple) -> Any:
    """Return the carry of all chains before the first warm-up step.

    A carry is ((index, fixed part of the position or None), state, adaptation or parameters,
    `Progress` or None, `Going` or None): the fourth for chains that run ahead, the last for
    chains on their way.

    Parameters
    ----------
    program : Program
    positions : array (chain, size)
        Flat start positions.
    seed : int
    data : tuple of arrays
        As made by `replicate`.
    """
    placement = program.placement
    positions = spread(positions.astype(jnp.result_type(float)), placement)
    chains = (indices(placement), positions)
    return program.start(chains, stage_key(seed, "sampler-init"), data)


def finish_warmup(program: Program, carry: Any) -> Any:
    """Return the carry for sampling from the carry of a (possibly unfinished) warm-up."""
    return program.finish(at_rest(carry))


def at_rest(carry: Any) -> Any:
    """Return a carry without the trajectories under way: all that a checkpoint needs.

    From there chains begin these trajectories anew, and go on to the same draws.
    """
    return (*carry[:4], None)


def departed(program: Program, carry: Any) -> Any:
    """Return a carry with which a block can begin: trajectories are for chains with `Progress`."""
    if carry[4] is not None:
        return carry
    if carry[3] is not None:
        return (*carry[:4], program.depart(carry[1:3]))
    active = np.ones(program.placement.chains, bool)
    return (*carry[:4], Going(spread(active, program.placement), None))


def run_blocks(
    program: Program,
    stage: str,
    carry: Any,
    seed: int,
    data: tuple,
    *,
    first: int = 0,
    last: int | None = None,
    max_count: int | None = None,
    least: Callable[[int], int] = int,
    block_end: Callable[[int], int] | None = None,
    watch: health.Watch | None = None,
) -> Iterator[Block]:
    """Advance all chains from record ``first`` to ``last``, yielding a block at a time.

    Parameters
    ----------
    program : Program
    stage : str
        "warmup" or "sampling".
    carry : pytree
        From `start_chains` or `finish_warmup`, or from a block of an earlier call (also `at_rest`).
        Its buffers are given away: use the carry of the last block afterwards.
    seed : int
    data : tuple of arrays
    first, last : int
        Record range; all records of the stage if not given.
    max_count : int
        Most records in one block; by time and memory if not given.
    least : callable
        Returns the least of a number over all processes, which then advance by equal blocks.
    block_end : callable, optional
        Returns the number of records at which a block that begins with this one must have ended.
    watch : health.Watch, optional
        What is known of the draws before ``first``, if there are any: chains that fail repeatedly
        are stopped, wherever blocks begin.

    Yields
    ------
    Block
    """
    warming = stage == "warmup"
    advance = program.warm if warming else program.draw
    schedule = program.warmup if warming else program.sampling
    capacity = WARMUP_RECORDS if warming else program.capacity
    # Half of the records leaves the other half to chains that are ahead at the end of a block.
    ahead = carry[3] is not None and capacity < schedule.records
    limit = min(max(1, capacity // 2) if ahead else capacity, max_count or capacity)
    key = stage_key(seed, stage)
    last = schedule.records if last is None else last
    carry = departed(program, carry)
    chains, watch = program.placement.chains, watch or health.nothing_seen(program.placement.chains)
    active = np.ones(chains, bool)
    count, compiled = 1, False
    while first < last:
        if not np.array_equal(active, watch.stopped < 0):
            active = watch.stopped < 0
            carry = (*carry[:4], carry[4]._replace(active=spread(active, program.placement)))
        end = last if block_end is None else min(last, block_end(first))
        n = least(min(count, limit, end - first))
        begun = time.monotonic()
        carry, records = advance(carry, key, np.int32(first), np.int32(n), data)
        # Slicing on the host, after one copy: slicing on the device would compile per length.
        kept, stats, ticks = gather(records, program.placement)
        if kept is not None and program.sampled is not None:
            fixed = gather(carry[0][1], program.placement)
            fixed = np.broadcast_to(fixed[:, None], (*kept.shape[:2], fixed.shape[-1]))
            kept = trees.join(kept, fixed, program.layout, program.sampled)
        seconds = time.monotonic() - begun
        del records  # each copy of a block's draws goes as soon as there is the next one
        # Copies: a view would keep the whole buffer alive for as long as the block.
        kept = None if kept is None else kept[:, :n].copy()
        stats = {name: values[:, :n].copy() for name, values in stats.items()}
        if not warming:
            watch = health.look(watch, stats, first, schedule.thin)
            _blank_stopped(watch.stopped, first, kept, stats)
        stopped = None if warming else watch.stopped
        block = Block(first, n, kept, stats, carry, seconds, ticks, stopped)
        del kept, stats
        first += n
        if compiled:  # the first call's time holds the compilation
            wanted = n * TARGET_SECONDS / max(seconds, 1e-6)
            count = int(np.clip(wanted, max(1, n // 4), 4 * n))
        compiled = True
        yield block
        del block


def _blank_stopped(stopped: np.ndarray, first: int, kept: Any, stats: dict) -> None:
    """Take out what a chain did after it was stopped: how much depends on the block."""
    for chain in np.flatnonzero(stopped >= 0):
        rest = slice(max(0, stopped[chain] - first), None)
        for values in (kept, *stats.values()):
            values[chain, rest] = np.nan if values.dtype.kind == "f" else 0


class Samples(NamedTuple):
    """Draws and statistics of all chains.

    Parameters
    ----------
    draws : pytree
        NumPy leaves (chain, draw, *leaf).
    stats : dict
        name -> (chain, draw): "log_density" and the kernel's statistics.
    warmup_stats : dict
        name -> (chain, record), evenly spaced over the warm-up.
    params : NamedTuple
        The kernel's adapted parameters, (chain, ...) each.
    kernel : str
        The kernel's name.
    stopped : dict
        Chain -> after how many draws it was stopped, for those that failed repeatedly (see
        `health.look`); what comes after that is NaN.
    """

    draws: Any
    stats: dict[str, np.ndarray]
    warmup_stats: dict[str, np.ndarray]
    params: Any
    kernel: str
    stopped: dict[int, int] = {}  # noqa: RUF012  (never changed)

    def __repr__(self) -> str:
        chains, draws = self.stats["log_density"].shape
        return f"<Samples: {chains} chains x {draws} draws by {self.kernel}>"


def sample_density(
    log_density: Callable[..., jax.Array],
    positions: Any,
    *,
    kernel: str | Kernel | MinibatchKernel = "nuts",
    warmup: int = 1000,
    draws: int = 1000,
    thin: int = 1,
    seed: int = 0,
    data: tuple = (),
    placement: Placement | None = None,
    on_block: Callable[[str, Block, Schedule], Any] | None = None,
    block_end: Callable[[int], int] | None = None,
    leaves: Sequence[str] = (),
) -> Samples:
    """Sample any log-density over a pytree with one chain per start position.

    Parameters
    ----------
    log_density : callable
        ``log_density(position, *data) -> scalar``, unnormalised. For a minibatch kernel a
        ``bnnmcmc.RowDensity(log_prior, log_likelihood)``.
    positions : pytree
        Start positions, chains stacked on the leading axis: leaves (chain, *leaf).
    kernel : str, Kernel or MinibatchKernel
        "nuts", "hmc", "mams", "mclmc", "smile", "sghmc", "sgld", or a kernel made with its options
        (``bnnmcmc.nuts(...)``). MCLMC with its default options is tuned for large networks; in few
        dimensions its bias shows.
    warmup, draws, thin : int
        Warm-up steps; kept draws per chain; steps per kept draw.
    seed : int
        Equal seeds give equal draws.
    data : tuple of arrays
        Further arguments of ``log_density``; for a minibatch kernel the rows are on their leading
        axes.
    placement : Placement
        Where the chains run; chosen from the devices at hand if not given.
    on_block : callable
        ``on_block(stage, block, schedule)`` after each block, for progress; if it returns True,
        sampling ends with that block, and there are fewer draws.
    block_end : callable, optional
        ``block_end(first)``: the number of draws at which a block that begins with draw ``first``
        must have ended, so that ``on_block`` sees it.
    leaves : sequence of str
        Sample only the leaves in whose dotted names one of these regular expressions is found;
        the others stay at each chain's start position. All if not given.

    Returns
    -------
    Samples

    Raises
    ------
    InputError
        A start position with a non-finite density, counts out of range, a kernel that does not
        keep the protocol (see `Kernel`), a density or data that a minibatch kernel cannot take
        batches of, or every chain was stopped because it failed repeatedly.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> def log_density(position):
    ...     return -0.5 * jnp.sum(position["x"] ** 2)
    >>> samples = sample_density(log_density, {"x": jnp.zeros((4, 3))}, kernel="nuts",
    ...                          warmup=200, draws=100)
    >>> samples.draws["x"].shape
    (4, 100, 3)
    """
    for name, value, least in (("warmup", warmup, 0), ("draws", draws, 1), ("thin", thin, 1)):
        if value < least:
            raise InputError(f"{name}: found {value}, expected at least {least}")
    leading = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(positions)}
    if len(leading) != 1 or leading == {()}:
        raise InputError(
            f"positions: leaves have leading axes {sorted(leading)}, expected one common number "
            "of chains"
        )
    chains = leading.pop()[0]
    placement = placement or place(chains)
    if placement.chains != chains:
        raise InputError(f"placement is for {placement.chains} chains, positions hold {chains}")
    of = trees.layout(trees.first(positions))
    data = tuple(jnp.asarray(value) for value in data)
    chosen, sampled = kernel_named(kernel), trees.chosen_leaves(leaves, of)
    if not isinstance(kernel, str):
        check_kernel(chosen, trees.chosen_size(sampled, of), warmup, f"kernel {chosen.name!r}")
    check_rows(chosen, data)
    result = jax.eval_shape(log_density, trees.first(positions), *data)
    if getattr(result, "shape", None) != ():
        raise InputError(
            f"log_density: returns {result} for one position, expected a scalar, such as the sum "
            "of a density's terms"
        )
    program = build_program(
        log_density,
        chosen,
        of,
        placement,
        warmup=warmup,
        draws=draws,
        thin=thin,
        sampled=sampled,
    )
    data = replicate(data, placement)
    carry = start_chains(program, trees.flatten_stacked(positions), seed, data)
    densities = gather(carry[1].logdensity, placement)
    if not np.all(np.isfinite(densities)):
        bad = int(np.flatnonzero(~np.isfinite(densities))[0])
        raise InputError(
            f"chain {bad}: the log-density at the start position is {densities[bad]}, "
            "expected a finite number"
        )
    blocks: dict[str, list[Block]] = {"warmup": [], "sampling": []}
    stopped: dict[int, int] = {}
    for stage, schedule in (("warmup", program.warmup), ("sampling", program.sampling)):
        if stage == "sampling":
            carry = finish_warmup(program, carry)
        end = block_end if stage == "sampling" else None
        for block in run_blocks(program, stage, carry, seed, data, block_end=end):
            carry = block.carry
            blocks[stage].append(block._replace(carry=None))
            if block.stopped is not None:
                stopped = health.stopped_chains(block.stopped)
            if len(stopped) == chains:
                found = join_stats(blocks["sampling"])
                raise InputError(health.say_all_stopped(found, stopped, thin))
            if on_block and on_block(stage, block, schedule) is True and stage == "sampling":
                break
    flat = np.concatenate([b.draws for b in blocks["sampling"] if b.draws is not None], axis=1)
    return Samples(
        trees.unflatten(flat, of),
        join_stats(blocks["sampling"]),
        join_stats(blocks["warmup"]),
        gather(carry[2], placement),
        chosen.name,
        stopped,
    )


def join_stats(blocks: list[Block]) -> dict[str, np.ndarray]:
    """Concatenate the statistics of blocks along the draw axis."""
    if not blocks:
        return {}
    return {n: np.concatenate([b.stats[n] for b in blocks], axis=1) for n in blocks[0].stats}
