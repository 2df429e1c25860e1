"""The pooled posterior predictive, streamed over draws.

Draws come in blocks, rows in chunks: memory is set by their sizes, not by how many there are.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.keys import stage_key
from bnnmcmc.likelihoods import class_probabilities
from bnnmcmc.placement import gather, over_chains, place, replicate, spread

# Most draws that go through one compiled call, and most predictive samples kept per row.
BATCH = 512
MAX_SAMPLES = 10_000
MIN_SAMPLES = 2_000
CHUNK_BYTES = 256 * 2**20


class Draws(NamedTuple):
    """Where draws come from: memory or a store, all chains together.

    Parameters
    ----------
    layout : trees.Layout
        Of one position.
    chains, draws : int
        How many.
    blocks : callable
        ``blocks()`` iterates over NumPy arrays (chain, count, size) in order.
    """

    layout: trees.Layout
    chains: int
    draws: int
    blocks: Callable[[], Iterable[np.ndarray]]


def draws_in_memory(tree: Any) -> Draws:
    """Wrap a pytree with leaves (chain, draw, *leaf)."""
    of = trees.layout(trees.first(trees.first(tree)))
    flat = np.asarray(trees.flatten_stacked(tree, leading=2))
    return Draws(of, flat.shape[0], flat.shape[1], lambda: [flat])


@dataclass(frozen=True)
class Pooled:
    """The pooled predictive for some rows, on the scale the model was trained on.

    Parameters
    ----------
    log_density : numpy array (rows,) or None
        ``log(1/S sum_s p(y | draw s))`` over all S draws of all chains; None without targets.
    mean, variance : numpy array (rows, targets) or None
        Of the mixture (regression).
    epistemic : numpy array (rows, targets) or None
        Variance over draws of the draws' means; the rest of ``variance`` is noise.
    samples : numpy array (samples, rows, targets) or None
        Draws from the mixture (regression), evenly spread over the posterior draws.
    probabilities : numpy array (rows, classes) or None
        Pooled class probabilities (classification).
    """

    log_density: np.ndarray | None
    mean: np.ndarray | None
    variance: np.ndarray | None
    epistemic: np.ndarray | None
    samples: np.ndarray | None
    probabilities: np.ndarray | None


def _batches(draws: Draws) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (draw number, flat position) batches of at most BATCH draws, over all chains.

    A draw's number is ``draw * chains + chain``: it does not depend on how draws are stored.
    """
    start = 0
    for block in draws.blocks():
        count = block.shape[1]
        numbers = (start + np.arange(count))[None, :] * draws.chains
        numbers = (numbers + np.arange(draws.chains)[:, None]).reshape(-1)
        flat = block.reshape(-1, block.shape[-1])
        for low in range(0, len(flat), BATCH):
            yield numbers[low : low + BATCH], flat[low : low + BATCH]
        start += count


def pool(posterior, draws: Draws, x, y=None, *, seed: int = 0) -> Pooled:
    """Pool the predictive distributions of all draws.

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
    x : array (rows, features)
    y : array (rows, targets) or (rows,), optional
        Targets to score.
    seed : int
        For the predictive samples.

    Returns
    -------
    Pooled
        A NaN in any draw makes the result NaN: nothing is left out.
    """
    total = draws.chains * draws.draws
    every = max(1, total // MAX_SAMPLES)
    per_draw = max(1, -(-MIN_SAMPLES // total))
    kept = -(-total // every) * per_draw
    targets = y.shape[1] if y is not None and y.ndim == 2 else 1
    rows = max(1, min(len(x), CHUNK_BYTES // (8 * max(kept, BATCH) * targets)))
    evaluator = _evaluator(posterior, draws.layout, per_draw, y is not None, _batch_size(draws))
    parts = []
    for low in range(0, len(x), rows):
        here = slice(low, low + rows)
        parts.append(
            _pool_rows(
                posterior,
                draws,
                evaluator,
                x[here],
                None if y is None else y[here],
                every,
                seed,
                low,
            )
        )
    return _join(parts)


def _batch_size(draws: Draws) -> int:
    return min(BATCH, draws.chains * draws.draws)


@functools.lru_cache(maxsize=16)
def _evaluator(posterior, of: trees.Layout, per_draw: int, scored: bool, batch: int):
    """Compile the evaluation of a batch of draws on rows, spread over the devices."""
    unravel = trees.unraveler(trees.unflatten(jnp.zeros((of.size,)), of))
    task = posterior.likelihood.task
    placement = place(batch)

    def one(draw, key, x, y):
        number, flat = draw
        distribution = posterior.distribution(unravel(flat), x)
        result = {}
        if scored:
            result["log_density"] = distribution.log_prob(y)
        if task == "classification":
            result["probabilities"] = class_probabilities(distribution)
        else:
            result["mean"] = distribution.mean
            result["variance"] = distribution.variance
            result["samples"] = distribution.sample(jax.random.fold_in(key, number), (per_draw,))
        return result

    compiled = over_chains(one, placement)

    def evaluate(numbers, flat, key, x, y):
        # Fill up to the one compiled shape with the last draw again, and cut it off after.
        missing = batch - len(numbers)
        padded = (
            np.concatenate([numbers, np.repeat(numbers[-1:], missing)]).astype(np.int32),
            np.concatenate([flat, np.repeat(flat[-1:], missing, axis=0)]),
        )
        found = gather(compiled(spread(padded, placement), key, x, y), placement)
        return {name: value[: len(numbers)] for name, value in found.items()}

    return placement, evaluate


def _shared(posterior, placement, x, y) -> tuple:
    """Put rows on the devices; without targets, a zero takes their place."""
    dtype = jnp.result_type(float)
    target = jnp.int32 if posterior.likelihood.task == "classification" else dtype
    y = jnp.asarray(0 if y is None else y, target)
    return replicate((jnp.asarray(x, dtype), y), placement)


def _pool_rows(posterior, draws, evaluator, x, y, every, seed, first_row) -> Pooled:
    placement, evaluate = evaluator
    shared = _shared(posterior, placement, x, y)
    classes = posterior.likelihood.task == "classification"
    key = jax.random.fold_in(stage_key(seed, "prediction"), first_row)
    total = draws.chains * draws.draws
    log_sum: Any = None
    sums: dict[str, Any] = {}
    samples = []
    for numbers, flat in _batches(draws):
        found = evaluate(numbers, flat, key, *shared)
        if "log_density" in found:
            # float64 on the host: sums over many draws lose nothing.
            values = found["log_density"].astype(np.float64)
            batch = np.logaddexp.reduce(values, axis=0)
            log_sum = batch if log_sum is None else np.logaddexp(log_sum, batch)
        if classes:
            _add(sums, "probabilities", found["probabilities"].astype(np.float64).sum(axis=0))
        else:
            mean = found["mean"].astype(np.float64)
            _add(sums, "mean", mean.sum(axis=0))
            _add(sums, "variance", found["variance"].astype(np.float64).sum(axis=0))
            _add_squares(sums, mean)
            chosen = found["samples"][numbers % every == 0]
            samples.append(chosen.reshape(-1, *chosen.shape[2:]))
    log_density = None if log_sum is None else log_sum - np.log(total)
    if classes:
        return Pooled(log_density, None, None, None, None, sums["probabilities"] / total)
    epistemic = sums["squares"] / total
    return Pooled(
        log_density,
        sums["mean"] / total,
        sums["variance"] / total + epistemic,
        epistemic,
        np.concatenate(samples),
        None,
    )


def _add(sums: dict, name: str, value) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _add_squares(sums: dict, mean: np.ndarray) -> None:
    """Merge squared deviations of a batch (Chan et al. 1983): no cancellation at large means."""
    n, centre = len(mean), mean.mean(axis=0)
    squares = np.square(mean - centre).sum(axis=0)
    if "squares" not in sums:
        sums.update(n=n, centre=centre, squares=squares)
        return
    m, old = sums["n"], sums["centre"]
    delta = centre - old
    sums.update(
        n=m + n,
        centre=old + delta * n / (m + n),
        squares=sums["squares"] + squares + np.square(delta) * m * n / (m + n),
    )


def _join(parts: list[Pooled]) -> Pooled:
    def join(name: str, axis: int = 0):
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else np.concatenate(values, axis=axis)

    return Pooled(
        join("log_density"),
        join("mean"),
        join("variance"),
        join("epistemic"),
        join("samples", axis=1),
        join("probabilities"),
    )


def per_draw(posterior, draws: Draws, x, y=None, *, every: int = 1) -> dict[str, np.ndarray]:
    """Evaluate single draws on a few rows, for diagnostics and ArviZ.

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
    x : array (rows, features)
    y : array, optional
    every : int
        Keep every so many draws of each chain.

    Returns
    -------
    dict
        "mean", "variance" and "samples" (chain, draw, rows, targets), or "probabilities"
        (chain, draw, rows, classes); "log_density" (chain, draw, rows) if ``y`` is given.
    """
    evaluator = _evaluator(posterior, draws.layout, 1, y is not None, _batch_size(draws))
    shared, key = _shared(posterior, evaluator[0], x, y), stage_key(0, "prediction")
    count = -(-draws.draws // every)
    result: dict[str, np.ndarray] = {}
    for numbers, flat in _batches(draws):
        chosen = (numbers // draws.chains) % every == 0
        if not chosen.any():
            continue
        numbers = numbers[chosen]
        found = evaluator[1](numbers, flat[chosen], key, *shared)
        slots = (numbers % draws.chains, numbers // draws.chains // every)
        for name, value in found.items():
            if name == "samples":
                value = value[:, 0]
            if name not in result:
                result[name] = np.empty((draws.chains, count, *value.shape[1:]), value.dtype)
            result[name][slots] = value
    return result
