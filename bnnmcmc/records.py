"""From steps to records: the loops over the steps of one chain, thinned on the device.

`record_steps` is for kernels whose steps all chains take together. `run_ahead` is for kernels
whose steps are trajectories of unequal length: chains that advance side by side make one
gradient each at a time (a tick), and one that is through with a trajectory begins its next.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnnmcmc.placement import TOGETHER
from bnnmcmc.samplers.kernel import REDUCTIONS, Trajectories


class Schedule(NamedTuple):
    """How steps are grouped into records: ``total`` steps, one record every ``thin``."""

    total: int
    thin: int

    @property
    def records(self) -> int:
        """Number of records; the last may cover fewer steps."""
        return -(-self.total // self.thin)


def record_steps(
    step,
    carry,
    first,
    count,
    schedule: Schedule,
    capacity: int,
    keep=None,
    active=True,
    together: bool = False,
):
    """Run records ``first .. first + count - 1`` of one chain into buffers of ``capacity``.

    ``first`` and ``count`` are traced: one compiled loop serves every block. Returns the carry
    and ``(kept positions or None, statistics)``. A chain that is not ``active`` makes no step, and
    its records mean nothing; where chains advance ``together``, it steps along until none is.
    """
    if together:
        # One condition for all of them: else each step would be a choice between old and new.
        active = jax.lax.pmax(jnp.asarray(active, jnp.int32), TOGETHER) > 0
    zero = _no_sums(jax.eval_shape(lambda c: step(jnp.zeros((), jnp.int32), c)[1], carry))
    buffers = {n: jnp.zeros((capacity, *z.shape), z.dtype) for n, z in zero.items()}
    kept = None
    if keep is not None:
        position = keep(carry)
        kept = jnp.zeros((capacity, *position.shape), position.dtype)

    def one_record(i, loop):
        carry, kept, buffers = loop
        low = (first + i) * schedule.thin
        high = jnp.minimum(low + schedule.thin, schedule.total)
        high = jnp.where(active, high, low)

        def one_step(t, inner):
            carry, sums = inner
            carry, info = step(t, carry)
            return carry, _accumulate(sums, info._asdict())

        carry, sums = jax.lax.fori_loop(low, high, one_step, (carry, zero))
        sums = _reduced(sums, high - low)
        if kept is not None:
            kept = kept.at[i].set(keep(carry))
        return carry, kept, {n: buffers[n].at[i].set(sums[n]) for n in buffers}

    carry, kept, buffers = jax.lax.fori_loop(0, count, one_record, (carry, kept, buffers))
    return carry, (kept, buffers)


class Progress(NamedTuple):
    """How far a chain that runs ahead is in its stage.

    Parameters
    ----------
    steps : int32
        Steps done.
    sums : dict
        Statistics of the record under way.
    positions : array (capacity + 1, size) or None
        Record r is in row ``r % capacity``; the last row is a waste bin. None in a warm-up.
    stats : dict
        name -> (capacity + 1,), in the same rows.
    """

    steps: jax.Array
    sums: dict[str, jax.Array]
    positions: jax.Array | None
    stats: dict[str, jax.Array]


class Flight(NamedTuple):
    """Whether a trajectory is under way, the trajectory, and its scratch memory.

    A trajectory follows from the chain's state, its parameters and the number of its step:
    without its flight, a chain begins the trajectory anew, to the same end.
    """

    busy: jax.Array
    trajectory: Any
    scratch: Any


class Going(NamedTuple):
    """What a chain on its way has that a checkpoint does without.

    Parameters
    ----------
    active : bool
        False for a chain that was stopped: nobody waits for it, and it makes no gradients (or,
        side by side with others, gradients that count for nothing).
    flight : Flight or None
        For chains that run ahead.
    """

    active: jax.Array
    flight: Flight | None


def no_progress(parts: Trajectories, state, params, capacity: int, keep: bool) -> Progress:
    """Return the progress of a chain before the first step of a stage."""
    info = jax.eval_shape(lambda: parts.end(_some_trajectory(parts, state, params), params)[1])
    zero = _no_sums(info)
    size, dtype = state.position.shape, state.position.dtype
    return Progress(
        jnp.zeros((), jnp.int32),
        zero,
        jnp.zeros((capacity + 1, *size), dtype) if keep else None,
        {n: jnp.zeros((capacity + 1, *z.shape), z.dtype) for n, z in zero.items()},
    )


def no_flight(parts: Trajectories, state, params) -> Flight:
    """Return the flight of a chain without a trajectory."""
    empty = _zeros(lambda: _some_trajectory(parts, state, params))
    return Flight(jnp.asarray(False), empty, parts.scratch(state.position))


def run_ahead(
    parts: Trajectories,
    key: jax.Array,
    carry: tuple[Any, Any, Progress, Flight],
    active,
    first,
    count,
    schedule: Schedule,
    capacity: int,
    log_density,
    in_use: Callable[[Any], Any],
    adapt: Callable[[Any, Any, Any, Any], Any],
):
    """Advance a chain until it and those it advances with have records up to ``first + count``.

    A chain that has them goes on, as long as its records ``first, first + 1, ...`` fit in
    ``capacity`` rows. Runs inside `over_chains`, for chains that advance together. The condition
    to go on is one for all of them: else JAX would make each tick a choice between the old and the
    new of everything, draws included.

    Parameters
    ----------
    parts : Trajectories
    key : key
        The chain's.
    carry : tuple
        State, parameters (in a warm-up: adaptation), `Progress`, `Flight`.
    active : bool
        Whether the chain goes on at all (`Going`).
    first, count : int32
        Traced.
    schedule : Schedule
    capacity : int
    log_density : callable
    in_use : callable
        ``in_use(parameters) -> params`` of a trajectory.
    adapt : callable
        ``adapt(parameters, state, info, t) -> parameters`` after step t.

    Returns
    -------
    carry : tuple
    records : tuple
        Positions (capacity, size) or None, statistics (capacity,), both from record ``first`` on;
        and the number of ticks.
    """
    total, thin = schedule

    def completed(progress: Progress):
        return jnp.where(progress.steps == total, schedule.records, progress.steps // thin)

    def behind(loop):
        done = jnp.where(active, completed(loop[0][2]), first + count)
        return jax.lax.pmin(done, TOGETHER) < first + count

    def tick(loop):
        (state, params, progress, flight), ticks = loop
        t, used = progress.steps, in_use(params)
        begins = ~flight.busy & (t < total) & active

        def randomise():
            return parts.randomise(jax.random.fold_in(key, t), state.position)

        # Random numbers cost as much as a good part of a cheap gradient.
        any_begins = jax.lax.pmax(begins.astype(jnp.int32), TOGETHER) > 0
        noise = jax.lax.cond(any_begins, randomise, lambda: _zeros(randomise))
        trajectory = _select(begins, parts.begin(noise, state, used), flight.trajectory)
        busy = flight.busy | begins
        # All compute; the result counts for those with a trajectory that goes on.
        moved, scratch = parts.advance(trajectory, flight.scratch, used, log_density)
        trajectory = _select(busy & ~parts.finished(trajectory), moved, trajectory)

        # A finished trajectory waits while there is no room for the record it completes.
        record = t // thin
        ends = busy & parts.finished(trajectory) & (record < first + capacity)
        reached, info = parts.end(trajectory, used)
        state = _select(ends, reached, state)
        params = _select(ends, adapt(params, reached, info, t), params)
        sums = _select(ends, _accumulate(progress.sums, info._asdict()), progress.sums)
        steps = t + ends
        full = ends & ((steps % thin == 0) | (steps == total))
        row = jnp.where(full, record % capacity, capacity)
        kept = progress.positions
        if kept is not None:
            kept = kept.at[row].set(state.position)
        values = _reduced(sums, jnp.maximum(steps - record * thin, 1))
        stats = {n: progress.stats[n].at[row].set(values[n]) for n in values}
        sums = jax.tree.map(lambda value: jnp.where(full, 0, value).astype(value.dtype), sums)
        progress = Progress(steps, sums, kept, stats)
        return (state, params, progress, Flight(busy & ~ends, trajectory, scratch)), ticks + 1

    flight = carry[3]
    carry = (*carry[:3], flight._replace(busy=flight.busy & active))
    carry, ticks = jax.lax.while_loop(behind, tick, (carry, jnp.zeros((), jnp.int32)))
    rows = (first + jnp.arange(capacity)) % capacity
    _, _, progress, _ = carry
    kept = None if progress.positions is None else progress.positions[rows]
    return carry, (kept, {n: values[rows] for n, values in progress.stats.items()}, ticks)


def _some_trajectory(parts: Trajectories, state, params):
    return parts.begin(parts.randomise(jax.random.key(0), state.position), state, params)


def _zeros(function):
    """Return zeros like the function's result."""
    shapes = jax.eval_shape(function)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _select(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _no_sums(info) -> dict[str, jax.Array]:
    def dtype(name, shape):
        return jnp.int32 if REDUCTIONS[name] in ("sum", "max") else shape.dtype

    return {n: jnp.zeros(s.shape, dtype(n, s)) for n, s in info._asdict().items()}


def _accumulate(sums: dict, info: dict) -> dict:
    result = {}
    for name, value in info.items():
        rule, so_far = REDUCTIONS[name], sums[name]
        value = jnp.asarray(value).astype(so_far.dtype)
        if rule == "last":
            result[name] = value
        elif rule == "max":
            result[name] = jnp.maximum(so_far, value)
        else:
            result[name] = so_far + value
    return result


def _reduced(sums: dict, steps) -> dict:
    """Return the statistics of a record from the sums over its steps."""
    return {n: v / steps.astype(v.dtype) if REDUCTIONS[n] == "mean" else v for n, v in sums.items()}
