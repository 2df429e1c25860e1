"""A whole fit in memory: train the ensemble, warm up, draw, and draw more later.

What the command line does in a run folder, without the folder. What a fit comes to is NumPy arrays
and plain values, so that it can be copied and pickled; programs are compiled once for all fits of
the same model and shapes.
"""

import json
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from bnnmcmc import build, health, preflight, progress, trees
from bnnmcmc.ahead import Ahead
from bnnmcmc.config import Config, with_placement
from bnnmcmc.data import Dataset, Encoding
from bnnmcmc.ensemble import (
    Ensemble,
    Training,
    build_training,
    finish_ensemble,
    mean_one,
    run_epochs,
    start_members,
)
from bnnmcmc.errors import InputError
from bnnmcmc.placement import Placement, gather, replicate, spread
from bnnmcmc.posterior import Posterior, chain_starts, check_finite
from bnnmcmc.predictive import ROW_STEP, Draws, fill_rows
from bnnmcmc.run import Run, chain_status, describe, position_layout
from bnnmcmc.samplers.kernel import Kernel, RowDensity
from bnnmcmc.sampling import (
    Block,
    Program,
    at_rest,
    build_program,
    finish_warmup,
    join_stats,
    run_blocks,
    start_chains,
)
from bnnmcmc.stopping import (
    CALIBRATION_SECONDS,
    PLANNED_SHARE,
    TRAINING_SHARE,
    WARMUP_SHARE,
    fewer_steps,
)


class Steps(NamedTuple):
    """Warm-up steps, kept draws, and steps per kept draw, of each chain."""

    warmup: int
    draws: int
    thin: int


@dataclass(frozen=True, eq=False)
class Fit:
    """What training and sampling came to.

    Parameters
    ----------
    config : Config
        With the placement as it was chosen.
    dataset : Dataset
        What was trained, and sampled, on.
    weights : numpy array (rows of the data set,) or None
        What each row counts for in the likelihood.
    ensemble : Ensemble
    steps : Steps
        As they were made.
    carry : pytree
        The chains after the last draw, from where they can go on.
    flat : numpy array (chain, draw, size)
        Draws.
    stats, warmup_stats : dict
        name -> (chain, draw) and (chain, record).
    status : tuple of ChainStatus
    stopped : dict
        Chain -> after how many draws it was stopped.
    notes : tuple of str
        What the time budget cut short.
    """

    config: Config
    dataset: Dataset
    weights: np.ndarray | None
    ensemble: Ensemble
    steps: Steps
    carry: Any
    flat: np.ndarray
    stats: dict[str, np.ndarray]
    warmup_stats: dict[str, np.ndarray]
    status: tuple[health.ChainStatus, ...]
    stopped: dict[int, int]
    notes: tuple[str, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the run, which holds functions, and is made again when it is asked for."""
        return {name: value for name, value in self.__dict__.items() if name != "run"}

    @cached_property
    def run(self) -> Run:
        """The draws with the model they belong to, for predictions, diagnostics and ArviZ."""
        posterior = posterior_of(self.config, self.dataset.encoding)
        x, y = build.sampling_rows(self.config, self.dataset)
        return Run(
            posterior,
            _as_draws(posterior, self.flat),
            self.stats,
            x,
            y,
            self.status,
            self.config.run.seed,
            self.dataset,
            self.warmup_stats,
            self.ensemble.positions,
            self.ensemble.validation_loss,
            stopped=self.stopped,
            pooling=self.config.pool.weights,
            pool_size=self.config.pool.draws,
            calibration=self.config.calibration.method,
            sampled=trees.chosen_leaves(self.config.sampler.leaves, position_layout(posterior)),
            described=describe(self.config),
        )


def fit(
    config: Config,
    dataset: Dataset,
    weights: np.ndarray | None = None,
    *,
    budget: float | None = None,
    console: Console,
) -> Fit:
    """Train the ensemble and sample with one chain per member.

    Parameters
    ----------
    config : Config
        Of the model, the ensemble, the sampler, and the run's seed and placement.
    dataset : Dataset
    weights : numpy array (rows of the data set,), optional
        What each row counts for in the likelihood; 1 if not given.
    budget : float, optional
        Seconds for everything; fewer steps and draws are made if needed.
    console : Console
        Where progress is shown.

    Returns
    -------
    Fit

    Raises
    ------
    InputError
        Model and data do not fit together, or every chain was stopped.
    """
    begun = time.monotonic()
    deadline = None if budget is None else begun + budget
    posterior = posterior_of(config, dataset.encoding)
    preflight.check_parts(config, dataset, posterior)
    placement = build.make_placement(config, posterior, dataset)
    chunked = replace(posterior, row_chunk=placement.row_chunk)
    preflight.check_memory(preflight.need(config, dataset, chunked, placement), placement)
    config = with_placement(config, build.chosen_fields(config, dataset, placement))
    data = _sampling_data(config, dataset, weights, posterior, placement)
    steps = Steps(config.sampler.warmup, config.sampler.draws, config.sampler.thin)
    sampler = _sampler(config, dataset.encoding, placement, steps, data)
    try:
        # The sampler compiles meanwhile.
        ensemble, notes = _train(config, dataset, weights, placement, deadline, console)
    except BaseException:
        sampler.cancel()
        raise
    members = chain_starts(posterior, ensemble.positions)
    check_finite(posterior, members, *data[:2])
    steps, carry, warmup_stats, more = _warm_up(
        config, dataset, steps, members, data, placement, deadline, console
    )
    program = _sampler(config, dataset.encoding, placement, steps, data).program
    carry, blocks, stopped = _draw(
        program, config.run.seed, carry, data, 0, steps, None, deadline, console
    )
    flat = _joined(blocks)
    return _fitted(
        config,
        dataset,
        weights,
        ensemble,
        steps._replace(draws=flat.shape[1]),
        gather(at_rest(carry), placement),
        flat,
        join_stats(blocks),
        warmup_stats,
        stopped,
        notes + more + _cut_short(flat.shape[1], steps.draws),
    )


def more_draws(old: Fit, draws: int, *, budget: float | None = None, console: Console) -> Fit:
    """Go on from the last draw: the draws are those of one longer fit.

    Parameters
    ----------
    old : Fit
    draws : int
        Draws per chain to add.
    budget, console : optional
        As in `fit`.

    Returns
    -------
    Fit
    """
    deadline = None if budget is None else time.monotonic() + budget
    posterior = posterior_of(old.config, old.dataset.encoding)
    placement = build.make_placement(old.config, posterior, old.dataset)
    data = _sampling_data(old.config, old.dataset, old.weights, posterior, placement)
    done = old.steps.draws
    steps = old.steps._replace(draws=done + draws)
    # A program for twice as many, for further calls: how many are drawn is not part of it.
    room = steps._replace(draws=1 << (steps.draws - 1).bit_length())
    program = _program(old.config, old.dataset.encoding, placement, room)
    watch = health.look(health.nothing_seen(len(old.flat)), old.stats, 0, steps.thin)
    carry, blocks, stopped = _draw(
        program,
        old.config.run.seed,
        spread(old.carry, placement),
        data,
        done,
        steps,
        watch,
        deadline,
        console,
        old.stats,
    )
    if not blocks:
        return old
    flat = np.concatenate([old.flat, _joined(blocks)], axis=1)
    new = join_stats(blocks)
    return _fitted(
        old.config,
        old.dataset,
        old.weights,
        old.ensemble,
        steps._replace(draws=flat.shape[1]),
        gather(at_rest(carry), placement),
        flat,
        {name: np.concatenate([old.stats[name], new[name]], axis=1) for name in new},
        old.warmup_stats,
        stopped,
        old.notes + _cut_short(flat.shape[1], steps.draws),
    )


def _cut_short(made: int, wanted: int) -> tuple[str, ...]:
    if made == wanted:
        return ()
    return (f"sampling was ended by the time budget after {made} of {wanted} draws",)


def _fitted(config, dataset, weights, ensemble, steps, carry, flat, stats, warmup, stopped, notes):
    draws = _as_draws(posterior_of(config, dataset.encoding), flat)
    wanted = build.make_kernel(config).wanted
    status = tuple(chain_status(draws, stats, steps.thin, wanted, stopped))
    return Fit(
        config,
        dataset,
        weights,
        ensemble,
        steps,
        carry,
        flat,
        stats,
        warmup,
        status,
        stopped,
        notes,
    )


def _as_draws(posterior: Posterior, flat: np.ndarray) -> Draws:
    of = position_layout(posterior)
    return Draws(of, flat.shape[0], flat.shape[1], lambda: [flat])


def _joined(blocks: list[Block]) -> np.ndarray:
    return np.concatenate([block.draws for block in blocks if block.draws is not None], axis=1)


# ------------------------------------------------------------------------------------- stages


def _train(config, dataset, weights, placement, deadline, console):
    """Return the ensemble, and what is to be said of it."""
    chosen, placement = config.ensemble, placement.for_training
    posterior = posterior_of(config, dataset.encoding)
    validation = dataset.validation if len(dataset.validation) else dataset.train
    data, sizes = [], []
    # Batches are of rows that are there; what counts whole may be filled up.
    fill = not chosen.batch_size
    for part in (dataset.train, validation):
        each = mean_one(None if weights is None else weights[part], len(part))
        arrays = _filled(posterior, dataset.x[part], dataset.y[part], each, fill)
        # Means over rows shall be means over those that are there.
        arrays[2] = arrays[2] * (len(arrays[2]) / len(part))
        data += arrays if fill or weights is not None else arrays[:2]
        sizes.append(len(arrays[0]))
    rows, held_out = sizes[0], sizes[1] if len(dataset.validation) else 0
    training = _training(config, dataset.encoding, placement, rows, held_out)
    members, history = start_members(training, config.run.seed), []
    stop_at = _share(deadline, TRAINING_SHARE)
    with progress.stage(console, "Ensemble", chosen.max_epochs, "epochs") as update:
        done = 0
        for block in run_epochs(training, members, config.run.seed, replicate(data, placement)):
            members, done = block.members, block.start + block.count
            history.append(block.history)
            stopped = int(gather(members[1].stopped, placement).sum())
            loss = np.min(gather(members[1].best_loss, placement))
            update(done, f"best loss {loss:.3f}, {stopped} of {chosen.members} stopped")
            if stop_at is not None and time.monotonic() >= stop_at:
                break
        update(done, f"{done} epochs, {stopped} members stopped early", finished=True)
    notes: tuple[str, ...] = ()
    if done < chosen.max_epochs and stopped < chosen.members:
        notes = (f"training was ended by the time budget after {done} epochs",)
    ensemble = finish_ensemble(gather(members[1], placement), np.concatenate(history, axis=1))
    return ensemble, notes


def _warm_up(config, dataset, steps, starts, data, placement, deadline, console, planned=False):
    """Return the steps as they were made, the carry for sampling, statistics, notes."""
    ahead = _sampler(config, dataset.encoding, placement, steps, data)
    program = ahead.program
    seed, thin = config.run.seed, program.warmup.thin
    carry = start_chains(program, trees.flatten_stacked(starts), seed, data)
    stop_at = _share(deadline, PLANNED_SHARE if planned else WARMUP_SHARE)
    # As in the pipeline: a warm-up with a schedule is of use only when it is complete.
    may_plan = deadline is not None and not program.kernel.exact and not planned
    blocks: list[Block] = []
    measured_steps, measured_seconds, plan = 0, 0.0, None
    with progress.stage(console, "Warm-up", steps.warmup, "steps") as update:
        for block in run_blocks(program, "warmup", carry, seed, data):
            carry = block.carry
            blocks.append(block._replace(carry=None))
            done = min((block.start + block.count) * thin, steps.warmup)
            update(done, "")
            # The first block may have waited for its compilation.
            if len(blocks) > 1 and may_plan and deadline is not None:
                measured_steps += block.count * thin
                measured_seconds += block.seconds
                if measured_seconds >= CALIBRATION_SECONDS:
                    may_plan, left = False, deadline - time.monotonic()
                    each = measured_seconds / measured_steps
                    plan = fewer_steps(
                        steps.warmup,
                        steps.draws,
                        steps.thin,
                        each,
                        done,
                        left,
                        ahead.cold_seconds,
                    )
                    if plan is not None:
                        update(done, "planned anew for the time budget", finished=True)
                        break
            if stop_at is not None and time.monotonic() >= stop_at:
                break
    if plan is not None:
        fewer = Steps(*plan, steps.thin)
        found = _warm_up(
            config, dataset, fewer, starts, data, placement, deadline, console, planned=True
        )
        note = (
            f"planned for the time budget: {fewer.warmup} of {steps.warmup} warm-up steps and "
            f"{fewer.draws} of {steps.draws} draws per chain"
        )
        return *found[:3], (note, *found[3])
    made = sum(block.count for block in blocks)
    notes: tuple[str, ...] = ()
    if made < program.warmup.records:
        notes = (
            f"warm-up was ended by the time budget after {made * thin} of {steps.warmup} steps",
        )
    return steps, finish_warmup(program, carry), join_stats(blocks), notes


def _draw(program, seed, carry, data, first, steps, watch, deadline, console, before=None):
    """Return the carry after the last draw, the blocks, and the chains that were stopped.

    ``before`` are the statistics of the draws up to ``first``.
    """
    blocks: list[Block] = []
    stopped = {} if watch is None else health.stopped_chains(watch.stopped)
    total, thin = steps.draws, steps.thin
    with progress.stage(console, "Sampling", total * thin, "steps", first * thin) as update:
        numbers = {"first": first, "last": total}
        for block in run_blocks(program, "sampling", carry, seed, data, **numbers, watch=watch):
            carry = block.carry
            blocks.append(block._replace(carry=None))
            assert block.stopped is not None
            stopped = health.stopped_chains(block.stopped)
            if len(stopped) == program.placement.chains:
                seen = join_stats(blocks)
                if before is not None:
                    seen = {n: np.concatenate([before[n], seen[n]], axis=1) for n in seen}
                raise InputError(health.say_all_stopped(seen, stopped, thin))
            note = f"log-density {np.nanmedian(block.stats['log_density'][:, -1]):.4g}"
            update((block.start + block.count) * thin, note)
            if deadline is not None and time.monotonic() >= deadline:
                break
    return carry, blocks, stopped


def _share(deadline: float | None, part: float) -> float | None:
    """Return when this part of the time until the deadline will be used up."""
    now = time.monotonic()
    return None if deadline is None else now + part * max(0.0, deadline - now)


def _sampling_data(config, dataset, weights, posterior, placement) -> tuple:
    rows = build.sampled_rows(config, dataset)
    each = np.ones(len(rows)) if weights is None else weights[rows]
    x, y = build.sampling_rows(config, dataset)
    # Batches of rows would lose what is filled up.
    whole = isinstance(build.make_kernel(config), Kernel)
    data = _filled(posterior, x, y, each, whole)
    return replicate(tuple(data if whole or weights is not None else data[:2]), placement)


def _filled(posterior, x, y, weights, fill: bool) -> list:
    """Return x, y and weights as the model computes with them, filled up with rows of weight 0.

    So the parts of a cross-validation, whose lengths differ by a row, share their programs.
    """
    rows = -(-len(x) // ROW_STEP) * ROW_STEP if fill else len(x)
    x, y = posterior.arrays(fill_rows(x, rows), fill_rows(y, rows))
    filled = np.zeros(rows, x.dtype)
    filled[: len(weights)] = weights
    return [x, y, filled]


# ---------------------------------------------------------------------------- compiled programs


@dataclass(frozen=True)
class _Described:
    """A model in words: what is built for one is used for all of the same words."""

    words: str
    config: Config = field(compare=False)
    encoding: Encoding = field(compare=False)


def _described(config: Config, encoding: Encoding, *sections: str) -> _Described:
    levels = [target.level for target in encoding.targets]
    sizes = [len(encoding.feature_names), levels, len(encoding.classes or ())]
    parts = [getattr(config, section).model_dump(mode="json") for section in sections]
    return _Described(json.dumps([jax.config.jax_enable_x64, sizes, parts]), config, encoding)


def posterior_of(config: Config, encoding: Encoding) -> Posterior:
    """Return the posterior of a config: the same object for equal ones (see `make_posterior`)."""
    return _posterior(_described(config, encoding, "model", "likelihood", "prior"))


@lru_cache(maxsize=64)
def _posterior(described: _Described) -> Posterior:
    return build.make_posterior(described.config, described.encoding)


def _training(
    config: Config, encoding: Encoding, placement: Placement, rows: int, validation_rows: int
) -> Training:
    described = _described(config, encoding, "model", "likelihood", "prior", "ensemble")
    return _built_training(described, placement, rows, validation_rows)


@lru_cache(maxsize=32)
def _built_training(
    described: _Described, placement: Placement, rows: int, validation_rows: int
) -> Training:
    ensemble = described.config.ensemble
    return build_training(
        posterior_of(described.config, described.encoding),
        build.make_ensemble_optimiser(described.config),
        placement,
        rows=rows,
        validation_rows=validation_rows,
        batch_size=ensemble.batch_size or None,
        max_epochs=ensemble.max_epochs,
        patience=ensemble.patience,
    )


def _sampler(
    config: Config, encoding: Encoding, placement: Placement, steps: Steps, data: tuple
) -> Ahead:
    """Return the sampler, whose compilation begins with the first call."""
    described = _described(config, encoding, "model", "likelihood", "prior", "sampler")
    shapes = (jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in data)
    arguments = (described, placement, steps, tuple(shapes))
    if (sampler := _built_sampler(*arguments)).failed:  # such as for lack of memory: try again
        _built_sampler.cache_clear()
        sampler = _built_sampler(*arguments)
    return sampler


@lru_cache(maxsize=32)
def _built_sampler(
    described: _Described, placement: Placement, steps: Steps, shapes: tuple
) -> Ahead:
    return Ahead(_built_program(described, placement, steps), shapes)


def _program(config: Config, encoding: Encoding, placement: Placement, steps: Steps) -> Program:
    described = _described(config, encoding, "model", "likelihood", "prior", "sampler")
    return _built_program(described, placement, steps)


@lru_cache(maxsize=32)
def _built_program(described: _Described, placement: Placement, steps: Steps) -> Program:
    config = described.config
    posterior = posterior_of(config, described.encoding)
    of = position_layout(posterior)
    at_work = replace(posterior, row_chunk=placement.row_chunk)
    return build_program(
        RowDensity(at_work.log_prior, at_work.log_likelihood),
        build.make_kernel(config),
        of,
        placement,
        warmup=steps.warmup,
        draws=steps.draws,
        thin=steps.thin,
        sampled=trees.chosen_leaves(config.sampler.leaves, of),
        begun_with=config.sampler.draws,
    )
