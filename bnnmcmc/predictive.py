"""The pooled posterior predictive, streamed over draws.

Draws come in blocks, rows in chunks: memory is set by their sizes, not by how many there are.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.likelihoods import class_probabilities
from bnnmcmc.placement import Placement, gather, over_chains, place, replicate, spread

# Most draws that go through one compiled call, and most predictive samples kept per row.
BATCH = 512
MAX_SAMPLES = 10_000
# Predictions of more rows come without samples, unless these are asked for.
MAX_SAMPLED_ROWS = 5000
MIN_SAMPLES = 2_000
# Rows are filled up to a multiple of this.
ROW_STEP = 32
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
    weights : numpy array (chain,), optional
        What each chain counts in a pool, adding up to one; all the same if not given.
    """

    layout: trees.Layout
    chains: int
    draws: int
    blocks: Callable[[], Iterable[np.ndarray]]
    weights: np.ndarray | None = None

    @property
    def shares(self) -> np.ndarray:
        """What one draw of each chain counts in a pool, (chain,); all draws together count one."""
        if self.weights is None:
            return np.full(self.chains, 1 / (self.chains * self.draws))
        return np.asarray(self.weights, np.float64) / self.draws


class Components(NamedTuple):
    """All that is needed to compute the mixture that pools draws, for some rows.

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
    x : numpy array (rows, features)
        As the network sees them.
    first_row : int
        The number of the first row.
    """

    posterior: Any
    draws: Draws
    x: np.ndarray
    first_row: int = 0


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
        Draws from the mixture (regression), by posterior draw, then chain: as many from each, or
        in proportion to its weight, the largest of which keeps all.
    probabilities : numpy array (rows, classes) or None
        Pooled class probabilities (classification).
    expected_entropy : numpy array (rows,) or None
        Mean over draws of the entropy of a draw's class probabilities, in nats.
    components : Components or None
        What the mixture is made of, to compute more of it (see `bnnmcmc.mixture`).
    """

    log_density: np.ndarray | None
    mean: np.ndarray | None
    variance: np.ndarray | None
    epistemic: np.ndarray | None
    samples: np.ndarray | None
    probabilities: np.ndarray | None
    expected_entropy: np.ndarray | None = None
    components: Components | None = None


def _batches(draws: Draws, size: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (draw number, flat position) batches of ``size`` or BATCH draws (or fewer at last).

    A draw's number is ``draw * chains + chain``, and draws come in that order, however they are
    stored: sums over batches are then the same to the last bit, too.
    """
    size = size or BATCH
    held = np.empty((0, draws.layout.size))
    first = seen = 0
    for piece in _pieces(draws):
        seen += len(piece)
        held = np.concatenate([held, piece]) if len(held) else piece
        while len(held) >= size:
            yield first + np.arange(size), held[:size]
            first, held = first + size, held[size:]
    if len(held):
        yield first + np.arange(len(held)), held
    if seen != draws.chains * draws.draws:
        found = seen // draws.chains
        raise ValueError(f"blocks() gave {found} draws per chain, expected {draws.draws}")


def _pieces(draws: Draws) -> Iterator[np.ndarray]:
    """Yield (count, size) flat positions, all chains of a draw together, about BATCH at a time."""
    count = -(-BATCH // draws.chains)
    for block in draws.blocks():
        for low in range(0, block.shape[1], count):
            yield np.swapaxes(block[:, low : low + count], 0, 1).reshape(-1, block.shape[-1])


def thinned(draws: Draws, every: int) -> Draws:
    """Keep every so many draws of each chain, without reading them."""

    def blocks() -> Iterator[np.ndarray]:
        first = 0
        for block in draws.blocks():
            # A copy: a view would keep the whole block alive for as long as the few draws.
            yield block if every == 1 else block[:, -first % every :: every].copy()
            first += block.shape[1]

    return draws._replace(draws=-(-draws.draws // every), blocks=blocks)


def thinned_to(draws: Draws, count: int) -> Draws:
    """Keep about so many draws of all chains together: evenly spaced, as many of each chain.

    Every m-th draw of each chain from its first, with the smallest m that leaves no more than
    ``count``; but one of each chain at least.
    """
    if count < 1:
        raise InputError(f"draws: found {count}, expected at least 1")
    return thinned(draws, -(-draws.draws // max(1, count // draws.chains)))


def chain_log_densities(posterior, draws: Draws, x, y) -> np.ndarray:
    r"""Return each chain's own log predictive density, pooled over its draws.

    .. math:: \log \frac1S \sum_s p(y_i \mid x_i, \theta_{ks})

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
    x : array (rows, features)
    y : array (rows, targets) or (rows,)

    Returns
    -------
    numpy array (chain, rows), float64

    Raises
    ------
    InputError
        As `pool`.
    """
    _check_rows(posterior, x, y)
    width, found = posterior.likelihood.num_outputs, []
    chunk = max(1, CHUNK_BYTES // (8 * BATCH * width))
    evaluator = _density_evaluator(posterior, draws.layout, _batch_size(draws))
    for low in range(0, len(x), chunk):
        here = slice(low, low + chunk)
        _, *shared = _shared(
            posterior, evaluator.placement, np.arange(len(x[here])), x[here], y[here]
        )
        total = np.full((draws.chains, len(x[here])), -np.inf)
        for numbers, flat in _batches(draws):
            each = evaluator.evaluate(numbers, flat, *shared)["log_density"].astype(np.float64)
            np.logaddexp.at(total, numbers % draws.chains, each)
        found.append(total - np.log(draws.draws))
    return np.concatenate(found, axis=1)


def pool(
    posterior,
    draws: Draws,
    x,
    y=None,
    *,
    seed: int = 0,
    first_row: int = 0,
    samples: bool = True,
) -> Pooled:
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
    first_row : int
        The number of the first row, if ``x`` is a part of a longer table: predictive samples are
        then those of the whole table.
    samples : bool
        Draw predictive samples. They take up to 40 kB per row and target.

    Returns
    -------
    Pooled
        A NaN in any draw makes the result NaN: nothing is left out. There are at least
        MIN_SAMPLES predictive samples, and at most MAX_SAMPLES (or one per chain, if there are
        more chains), as many from every chain; of weighted chains those that are in proportion to
        the weights, which are fewer. A sample depends on the seed, the draw and the row's place in
        ``x``, not on blocks or chunks.

    Raises
    ------
    InputError
        No rows, or targets that do not fit the rows or the likelihood.
    """
    _check_rows(posterior, x, y)
    every, per_draw, chunk = _sizes(posterior, draws, samples)
    evaluator = _evaluator(posterior, draws.layout, per_draw, y is not None, _batch_size(draws))
    key = stage_key(seed, "prediction")
    parts = []
    for low in range(0, len(x), chunk):
        here = slice(low, low + chunk)
        rows = first_row + np.arange(len(x))[here]
        # A few more rows, so that tables of nearly equal length share a compilation.
        filled = _filled(len(rows), chunk)
        some = [rows, x[here], *([] if y is None else [y[here]])]
        shared = _shared(
            posterior, evaluator.placement, *(fill_rows(part, filled) for part in some)
        )
        found = _pool_rows(draws, evaluator, every, key, shared)
        parts.append(_first_rows(found, len(rows)))
    components = Components(posterior, draws, np.asarray(x), first_row)
    return replace(_join(parts), components=components)


def _sizes(posterior, draws: Draws, samples: bool) -> tuple[int, int, int]:
    """Return of how many draws one is sampled from, how often, and the rows of a call of `pool`."""
    total = draws.chains * draws.draws
    # Every so many draws of each chain: a stride over all draws could miss whole chains.
    every = -(-draws.draws // max(1, MAX_SAMPLES // draws.chains))
    per_draw = -(-MIN_SAMPLES // total) if samples else 0
    kept = draws.chains * -(-draws.draws // every) * per_draw
    width = posterior.likelihood.num_outputs
    return every, per_draw, max(1, CHUNK_BYTES // (8 * max(kept, BATCH) * width))


def data_sets(
    posterior, draws: Draws, x, y, *, seed: int = 0, repeat: int = 0, like: Draws | None = None
):
    r"""Draw a whole data set from each draw: what the model says could have been observed.

    .. math:: y^\text{rep}_s \sim \prod_i p(y_i \mid x_i, \theta_s)

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
        Of the posterior, or of the prior.
    x : array (rows, features)
    y : array (rows, targets) or (rows,)
        Observed targets; only their shape matters.
    seed, repeat : int
        Another repeat is another data set of each draw.
    like : Draws, optional
        `pool` was called with these draws, and samples, on as many rows: what was compiled for it
        is used again.

    Returns
    -------
    numpy array (sets, rows, targets), or (sets, rows) class indices as floating-point numbers
        In the order of `Pooled.samples`. NaN where a draw says nothing finite.

    Raises
    ------
    InputError
        As `pool`.
    """
    _check_rows(posterior, x, y)
    like = draws if like is None else like
    _, per_draw, chunk = _sizes(posterior, like, samples=True)
    evaluator = _evaluator(posterior, draws.layout, per_draw, True, _batch_size(like))
    key, of_classes = (stage_key(seed, stage) for stage in ("prediction", "class-draws"))
    if repeat:
        key, of_classes = (jax.random.fold_in(each, repeat) for each in (key, of_classes))
    classes = posterior.likelihood.task == "classification"
    uniform = np.random.default_rng(np.asarray(jax.random.key_data(of_classes)))
    found = []
    for low in range(0, len(x), chunk):
        rows = np.arange(low, min(low + chunk, len(x)))
        filled = _filled(len(rows), chunk)
        some = (fill_rows(part, filled) for part in (rows, x[rows], y[rows]))
        shared = _shared(posterior, evaluator.placement, *some)
        sets = []
        for numbers, flat in _batches(draws, _batch_size(like)):
            each = evaluator.evaluate(numbers, flat, key, *shared)
            if classes:
                p = each["probabilities"][:, : len(rows)]
                sets.append(_drawn_classes(p, uniform.random(p.shape[:2])))
            else:
                sets.append(each["samples"][:, 0, : len(rows)])
        found.append(np.concatenate(sets))
    values = np.concatenate(found, axis=1)
    return values if draws.weights is None else _by_weight(values[:, None], draws)


def _drawn_classes(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Return a class of each row by its probabilities (..., classes); NaN stays NaN."""
    upto = np.cumsum(probabilities, axis=-1, dtype=np.float64)
    # Scaled, for probabilities that add up to a little less than one.
    drawn = (upto <= uniform[..., None] * upto[..., -1:]).sum(axis=-1).astype(np.float64)
    return np.where(np.isnan(upto[..., -1]), np.nan, drawn)


def _check_rows(posterior, x, y) -> None:
    if np.ndim(x) != 2 or len(x) == 0:
        raise InputError(f"x: found shape {np.shape(x)}, expected (rows, features), at least 1 row")
    if y is None:
        return
    regression = posterior.likelihood.task == "regression"
    if np.ndim(y) != (2 if regression else 1) or len(y) != len(x):
        expected = "(rows, targets)" if regression else "(rows,)"
        raise InputError(
            f"y: found shape {np.shape(y)}, expected {expected} with the {len(x)} rows of x"
        )


def _batch_size(draws: Draws) -> int:
    return min(BATCH, draws.chains * draws.draws)


class _Evaluator(NamedTuple):
    placement: Placement
    evaluate: Callable[..., dict[str, np.ndarray]]


@functools.lru_cache(maxsize=16)
def _evaluator(posterior, of: trees.Layout, per_draw: int, scored: bool, batch: int) -> _Evaluator:
    """Compile the evaluation of a batch of draws on rows, spread over the devices."""
    unravel = trees.unraveler(trees.unflatten(jnp.zeros((of.size,)), of))
    likelihood = posterior.likelihood
    placement = place(batch)

    def one(draw, key, rows, x, y):
        number, flat = draw
        position = unravel(flat)
        outputs = posterior.network.apply(posterior.network_params(position), x)
        distribution = likelihood.distribution(position["likelihood"], outputs)
        draw_key = jax.random.fold_in(key, number)

        def sample_row(row, output):
            # A key per row, so that a sample does not depend on which rows share a call.
            alone = likelihood.distribution(position["likelihood"], output[None])
            samples = alone.sample(jax.random.fold_in(draw_key, row), (per_draw,))[:, 0]
            # What is drawn from counts with a rate that is no number would be a number.
            counts = jnp.issubdtype(samples.dtype, jnp.integer)
            return jnp.where(jnp.isnan(alone.mean[0]), jnp.nan, samples) if counts else samples

        result = {}
        if scored:
            result["log_density"] = distribution.log_prob(y)
        if likelihood.task == "classification":
            result["probabilities"] = class_probabilities(distribution)
        else:
            result["mean"] = distribution.mean
            result["variance"] = distribution.variance
            if per_draw:
                result["samples"] = jax.vmap(sample_row, out_axes=1)(rows, outputs)
        return result

    compiled = over_chains(one, placement)

    def evaluate(numbers, flat, key, rows, x, y):
        # Fill up to the one compiled shape with the last draw again, and cut it off after.
        padded = (fill_rows(numbers, batch).astype(np.int32), fill_rows(flat, batch))
        found = gather(compiled(spread(padded, placement), key, rows, x, y), placement)
        return {name: value[: len(numbers)] for name, value in found.items()}

    return _Evaluator(placement, evaluate)


def _filled(rows: int, most: int) -> int:
    """Return how many rows go into a call that has so many to evaluate."""
    return min(most, -(-rows // ROW_STEP) * ROW_STEP)


def fill_rows(values: Any, rows: int) -> Any:
    """Return an array with its last row repeated until there are so many rows."""
    values = np.asarray(values)
    return np.concatenate([values, np.repeat(values[-1:], rows - len(values), axis=0)])


def _first_rows(pooled: Pooled, rows: int) -> Pooled:
    """Cut off the rows that filled up a call."""

    def cut(name: str) -> Any:
        value = getattr(pooled, name)
        return None if value is None else value[:rows]

    samples = None if pooled.samples is None else pooled.samples[:, :rows]
    names = ("log_density", "mean", "variance", "epistemic", "probabilities", "expected_entropy")
    return replace(pooled, **{name: cut(name) for name in names}, samples=samples)


def _shared(posterior, placement: Placement, rows: np.ndarray, x, y=None) -> tuple:
    """Put some rows, and their numbers, on the devices (a zero where there are no targets)."""
    dtype = jnp.result_type(float)
    target = jnp.int32 if posterior.likelihood.task == "classification" else dtype
    y = jnp.asarray(0 if y is None else y, target)
    return replicate((jnp.asarray(rows, jnp.int32), jnp.asarray(x, dtype), y), placement)


def _pool_rows(draws: Draws, evaluator: _Evaluator, every: int, key, shared: tuple) -> Pooled:
    shares = draws.shares
    log_density: Any = None
    sums: dict[str, Any] = {}
    samples: Any = None
    for numbers, flat in _batches(draws):
        found = evaluator.evaluate(numbers, flat, key, *shared)
        draw, chain = np.divmod(numbers, draws.chains)
        share = shares[chain]
        # float64 on the host: sums over many draws lose nothing. A NaN or an infinity in a draw
        # shall show in the result, not in a warning.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            if "log_density" in found:
                each = found["log_density"].astype(np.float64) + np.log(share)[:, None]
                batch = np.logaddexp.reduce(each, axis=0)
                log_density = batch if log_density is None else np.logaddexp(log_density, batch)
            if "probabilities" in found:
                p = found["probabilities"].astype(np.float64)
                _add(sums, "probabilities", np.tensordot(share, p, axes=1))
                _add(sums, "entropy", np.tensordot(share, entropy(p), axes=1))
                continue
            mean = found["mean"].astype(np.float64)
            _add(sums, "variance", np.tensordot(share, found["variance"].astype(float), axes=1))
            _add_squares(sums, mean, share)
        if "samples" not in found:
            continue
        if samples is None:
            slots = draws.chains * -(-draws.draws // every)
            samples = np.empty((slots, *found["samples"].shape[1:]), found["samples"].dtype)
        chosen = draw % every == 0
        samples[draw[chosen] // every * draws.chains + chain[chosen]] = found["samples"][chosen]
    if "probabilities" in sums:
        return Pooled(log_density, None, None, None, None, sums["probabilities"], sums["entropy"])
    epistemic = sums["squares"] / sums["n"]
    if samples is not None:
        weighted = draws.weights is not None
        flat = samples.reshape(-1, *samples.shape[2:])
        samples = _by_weight(samples, draws) if weighted else flat
    return Pooled(
        log_density,
        sums["centre"],
        sums["variance"] + epistemic,
        epistemic,
        samples,
        None,
    )


def entropy(probabilities: np.ndarray) -> np.ndarray:
    r"""Return the entropy :math:`-\sum_c p_c \log p_c` over the last axis, in nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(probabilities == 0, 0.0, np.log(probabilities))
    return -(probabilities * logs).sum(axis=-1)


def _by_weight(samples: np.ndarray, draws: Draws) -> np.ndarray:
    """Return those of the samples that stay, so that chains have them in proportion to weights.

    ``samples`` (slots, per draw, rows, targets), the slots by ``draw * chains + chain``; the chain
    of most weight keeps all of its own.
    """
    assert draws.weights is not None
    per_draw = samples.shape[1]
    each = len(samples) // draws.chains * per_draw
    kept = []
    for chain, weight in enumerate(draws.weights / np.max(draws.weights)):
        count = round(each * weight)
        # Evenly spaced over the chain.
        at = np.arange(count) * each // max(count, 1)
        kept.append((at // per_draw * draws.chains + chain) * per_draw + at % per_draw)
    return samples.reshape(-1, *samples.shape[2:])[np.sort(np.concatenate(kept))]


def _add(sums: dict, name: str, value) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _add_squares(sums: dict, mean: np.ndarray, share: np.ndarray) -> None:
    """Merge weighted squared deviations of a batch: no cancellation at large means.

    As Chan et al. (1983), with weights in the place of counts.
    """
    n = share.sum()
    if n == 0:  # draws of chains that count nothing
        return
    centre = np.tensordot(share, mean, axes=1) / n
    squares = np.tensordot(share, np.square(mean - centre), axes=1)
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
        join("expected_entropy"),
    )


def per_draw(
    posterior, draws: Draws, x, y=None, *, seed: int = 0, batch: int | None = None
) -> dict[str, np.ndarray]:
    """Evaluate every single draw on a few rows, for diagnostics and ArviZ.

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
        See `thinned` for long chains.
    x : array (rows, features)
    y : array, optional
    seed : int
        For the predictive samples.
    batch : int, optional
        Draws in a compiled call, at most BATCH; calls with different numbers of draws can then
        share one compilation. As many as there are draws, up to BATCH, if not given.

    Returns
    -------
    dict
        "mean", "variance" and "samples" (chain, draw, rows, targets), or "probabilities"
        (chain, draw, rows, classes); "log_density" (chain, draw, rows) if ``y`` is given.

    Raises
    ------
    InputError
        As `pool`.
    """
    _check_rows(posterior, x, y)
    batch = batch or _batch_size(draws)
    evaluator = _evaluator(posterior, draws.layout, 1, y is not None, batch)
    shared = _shared(posterior, evaluator.placement, np.arange(len(x)), x, y)
    key = stage_key(seed, "prediction")
    result: dict[str, np.ndarray] = {}
    for numbers, flat in _batches(draws, batch):
        draw, chain = np.divmod(numbers, draws.chains)
        for name, value in evaluator.evaluate(numbers, flat, key, *shared).items():
            if name == "samples":
                value = value[:, 0]
            if name not in result:
                shape = (draws.chains, draws.draws, *value.shape[1:])
                result[name] = np.empty(shape, value.dtype)
            result[name][chain, draw] = value
    return result


def network_outputs(components: Components) -> tuple[Any, np.ndarray]:
    """Return what every single draw's network puts out for every row.

    Parameters
    ----------
    components : Components
        Memory grows with draws times rows.

    Returns
    -------
    params : pytree
        The likelihood's own parameters, leaves (draws, *leaf).
    outputs : numpy array (draws, rows, outputs)
        Draws are in the order of their numbers, ``draw * chains + chain``.
    """
    posterior, draws = components.posterior, components.draws
    batch = _batch_size(draws)
    evaluator = _output_evaluator(posterior, draws.layout, batch)
    x = jnp.asarray(components.x, jnp.result_type(float))
    (x,) = replicate((x,), evaluator.placement)
    outputs, params = None, []
    for numbers, flat in _batches(draws):
        found = evaluator.evaluate(numbers, flat, x)["outputs"]
        if outputs is None:
            outputs = np.empty((draws.chains * draws.draws, *found.shape[1:]), found.dtype)
        outputs[numbers] = found
        own = trees.unflatten(flat, draws.layout)["likelihood"]
        params.append(jax.tree.map(np.array, own))  # copies: views would keep all weights
    assert outputs is not None
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *params), outputs


@functools.lru_cache(maxsize=16)
def _output_evaluator(posterior, of: trees.Layout, batch: int) -> _Evaluator:
    """Compile the network's outputs of a batch of draws on rows, spread over the devices."""

    def one(position, x):
        return {"outputs": posterior.network.apply(posterior.network_params(position), x)}

    return _of_positions(one, of, batch)


@functools.lru_cache(maxsize=16)
def _density_evaluator(posterior, of: trees.Layout, batch: int) -> _Evaluator:
    """Compile the log-likelihoods of rows under a batch of draws, spread over the devices."""

    def one(position, x, y):
        return {"log_density": posterior.pointwise_log_likelihood(position, x, y)}

    return _of_positions(one, of, batch)


def _of_positions(one: Callable[..., Any], of: trees.Layout, batch: int) -> _Evaluator:
    """Compile ``one(position, *shared)`` for batches of flat positions."""
    unravel = trees.unraveler(trees.unflatten(jnp.zeros((of.size,)), of))
    placement = place(batch)
    compiled = over_chains(lambda flat, *shared: one(unravel(flat), *shared), placement)

    def evaluate(numbers, flat, *shared):
        padded = spread(fill_rows(flat, batch), placement)
        found = gather(compiled(padded, *shared), placement)
        return {name: value[: len(numbers)] for name, value in found.items()}

    return _Evaluator(placement, evaluate)
