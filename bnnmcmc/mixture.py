"""The mixture that pools all draws: its distribution function, quantiles, density and samples.

Everything is computed from the draws' own distributions, a part of the rows at a time, so that
memory is set by the size of a part, not by how many rows and draws there are.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc.keys import stage_key
from bnnmcmc.likelihoods import Likelihood, cumulative, marginals
from bnnmcmc.placement import QUICK
from bnnmcmc.predictive import Components, fill_rows, network_outputs

# A part of the rows has about so many bytes of network outputs, of all draws together.
PART_BYTES = 64 * 2**20
# Outputs of all draws for all rows are kept between calls if they are no larger.
HELD_BYTES = 256 * 2**20
# Most steps to a root, and to widen a bracket that holds it but for rounding.
MAX_STEPS, MAX_DOUBLINGS = 100, 4
# So many draws, a power of two, are summed up in float32, in pairs; one sum of thousands would be
# off by 1e-5 and more.
GROUP = 128


class Part(NamedTuple):
    """What the draws predict for some rows.

    Parameters
    ----------
    rows : slice
    params : pytree
        The likelihood's own parameters, leaves (draws, *leaf).
    outputs : array (draws, rows, outputs)
    """

    rows: slice
    params: Any
    outputs: Any

    @property
    def length(self) -> int:
        """How many rows these are; what comes after them fills the part up."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, eq=False)
class Mixture:
    r"""The pooled predictive distribution of rows, as a mixture over draws.

    .. math:: F(y) = \sum_s w_s F_s(y), \qquad p(y) = \sum_s w_s p_s(y)

    Parameters
    ----------
    components : Components
    """

    components: Components

    @property
    def likelihood(self) -> Likelihood:
        """What the network's outputs mean."""
        return self.components.posterior.likelihood

    @property
    def weights(self) -> np.ndarray:
        """What each draw counts, (draws,), by ``draw * chains + chain``; they add up to one."""
        return np.tile(self.components.draws.shares, self.components.draws.draws)

    @functools.cached_property
    def computable(self) -> bool:
        """Whether there are distribution functions: not for all likelihoods of a user's own."""
        likelihood = self.likelihood
        if likelihood.task != "regression":
            return False

        def value(params, outputs):
            marginal = marginals(likelihood.distribution(params, outputs))
            return marginal and cumulative(marginal, jnp.zeros(marginal.batch_shape))

        outputs = jax.ShapeDtypeStruct((1, likelihood.num_outputs), jnp.result_type(float))
        try:
            return jax.eval_shape(value, jax.eval_shape(likelihood.init), outputs) is not None
        except NotImplementedError:  # how numpyro says that a family has none
            return False

    @functools.cached_property
    def _size(self) -> int:
        """How many rows make a part."""
        draws = self.components.draws
        each = 4 * draws.chains * draws.draws * self.likelihood.num_outputs
        return max(1, min(len(self.components.x), PART_BYTES // each))

    def parts(self) -> Iterator[Part]:
        """Yield the rows part by part; all parts are as long, the last one filled up."""
        rows = len(self.components.x)
        if self._held is not None:
            yield from self._held
            return
        for low in range(0, rows, self._size):
            yield self._part(low)

    @functools.cached_property
    def _held(self) -> list[Part] | None:
        draws, rows = self.components.draws, len(self.components.x)
        size = 4 * draws.chains * draws.draws * self.likelihood.num_outputs * rows
        if size > HELD_BYTES:
            return None
        return [self._part(low) for low in range(0, rows, self._size)]

    def _part(self, low: int) -> Part:
        x = self.components.x[low : low + self._size]
        filled = self.components._replace(x=fill_rows(x, self._size))
        params, outputs = network_outputs(filled)
        return Part(slice(low, low + len(x)), params, jnp.asarray(outputs))

    def _filled(self, values: np.ndarray, part: Part) -> np.ndarray:
        """Return the values of a part's rows, as many as a part has."""
        return fill_rows(np.asarray(values[part.rows], jnp.result_type(float)), self._size)

    def _weights(self) -> jax.Array:
        return jnp.asarray(self.weights, jnp.result_type(float))

    def cdf(self, y: np.ndarray) -> np.ndarray:
        """Return P(Y <= y) of each target, (rows, targets), for ``y`` of this shape."""
        weights, found = self._weights(), []
        for part in self.parts():
            values = self._filled(y, part)
            result = _cdf(self.likelihood, part.params, part.outputs, weights, values)
            found.append(_probability(result)[: part.length])
        return np.concatenate(found)

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Return the log-density of each row, (rows,), joint over its targets."""
        weights, found = self._weights(), []
        for part in self.parts():
            values = self._filled(y, part)
            result = _log_density(self.likelihood, part.params, part.outputs, weights, values)
            found.append(np.asarray(result, np.float64)[: part.length])
        return np.concatenate(found)

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        r"""Return quantiles (levels, rows, targets).

        The root of :math:`F(y) = p` by Chandrupatla's method; of counts the smallest y with
        :math:`F(y) \ge p`.
        """
        weights, found = self._weights(), []
        for part in self.parts():
            of_part = (self.likelihood, part.params, part.outputs, weights)

            def function(y, of_part=of_part):
                y = y.astype(jnp.result_type(float))
                return _probability(_cdf(*of_part, y))

            mean, variance = (np.asarray(m, np.float64) for m in _moments(*of_part))
            find = QUANTILES[self.likelihood.support]
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                result = [find(function, level, mean, np.sqrt(variance)) for level in levels]
            found.append(np.stack(result)[:, : part.length])
        return np.concatenate(found, axis=1)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Return samples (count, rows, targets).

        The draws are chosen in proportion to their weights, and evenly; a sample has the same draw
        in all rows, so that it is a function with noise. It depends on the seed, on its number
        and how many there are, and on the row's number.
        """
        key = stage_key(seed, "mixture")
        chosen = _systematic(self.weights, count, seed)
        found = []
        for part in self.parts():
            rows = self.components.first_row + part.rows.start + np.arange(self._size)
            few, samples = len(self.weights), []
            for low in range(0, count, few):
                numbers = np.arange(low, min(low + few, count))
                drawn = _sample(
                    self.likelihood,
                    *jax.tree.map(operator.itemgetter(chosen[numbers]), part[1:]),
                    numbers.astype(np.int32),
                    rows.astype(np.int32),
                    key,
                )
                samples.append(np.asarray(drawn)[:, : part.length])
            found.append(np.concatenate(samples))
        return np.concatenate(found, axis=1)


def _systematic(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose draws in proportion to weights: each floor or ceiling of ``count * weight`` times."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(weights))  # evenly spaced draws could be those of some chains
    at = (rng.random() + np.arange(count)) / count
    ends = np.cumsum(weights[order])
    chosen = order[np.searchsorted(ends / ends[-1], at, side="right").clip(max=len(weights) - 1)]
    return rng.permutation(chosen)


def _mixed(likelihood: Likelihood, params, outputs, weights, of_draw: Callable[..., Any]):
    """Return weighted sums of ``of_draw(distribution)`` over groups of draws, (groups, ...)."""

    def one(params, outputs):
        return of_draw(likelihood.distribution(params, outputs))

    each = jax.vmap(one)(params, outputs)
    each = each * weights.reshape(-1, *[1] * (each.ndim - 1))
    each = jnp.pad(each, [(0, -len(each) % GROUP), *[(0, 0)] * (each.ndim - 1)])
    sums = each.reshape(-1, GROUP, *each.shape[1:])
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _cdf(likelihood: Likelihood, params, outputs, weights, y):
    return _mixed(
        likelihood, params, outputs, weights, lambda found: cumulative(marginals(found), y)
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _log_density(likelihood: Likelihood, params, outputs, weights, y):
    def one(params, outputs):
        return likelihood.distribution(params, outputs).log_prob(y)

    each = jax.vmap(one)(params, outputs)
    return jax.nn.logsumexp(each + jnp.log(weights)[:, None], axis=0)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _moments(likelihood: Likelihood, params, outputs, weights):
    """Return mean and variance of the mixture, to begin a search with."""
    mixed = functools.partial(_mixed, likelihood, params, outputs, weights)
    mean = mixed(lambda found: found.mean).sum(0)
    return mean, mixed(lambda found: found.variance + (found.mean - mean) ** 2).sum(0)


def _probability(sums: jax.Array) -> np.ndarray:
    """Return the sum over groups; no rounding makes it less than 0 or more than 1."""
    return np.clip(np.asarray(sums, np.float64).sum(0), 0.0, 1.0)


def _quantile(function, level: float, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    # Cantelli's inequality: the quantile lies between these, but for rounding.
    low = mean - sd * np.sqrt((1 - level) / level)
    high = mean + sd * np.sqrt(level / (1 - level))
    f_low, f_high, step = function(low), function(high), 0.1 * sd
    for _ in range(MAX_DOUBLINGS):
        below, above = f_low > level, f_high < level
        if not (below.any() or above.any()):
            break
        low, high = np.where(below, low - step, low), np.where(above, high + step, high)
        f_low, f_high, step = function(low), function(high), 2 * step
    ends = (low, high, f_low - level, f_high - level)
    return find_root(lambda y: function(y) - level, *ends, 1e-6 * sd)


def _unit_quantile(function, level: float, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    # A mean that is no number makes the ends no numbers.
    low = np.where(np.isnan(mean), np.nan, 0.0)
    ends = (low, low + 1, low - level, low + 1 - level)
    # Much of the mass may lie at an end.
    return find_root(lambda y: function(y) - level, *ends, 1e-9 * sd)


def _count_quantile(function, level: float, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    unknown = np.isnan(mean)
    # Cantelli's inequality: there is no more to look for, but for rounding.
    most = np.where(unknown, 0.0, np.ceil(mean + sd * np.sqrt(level / (1 - level))) + 1)
    low, high = np.full_like(mean, -1.0), np.minimum(np.maximum(np.ceil(mean), 1.0), most)
    high = np.where(unknown, 0.0, high)
    while (short := (function(high) < level) & (high < most)).any():
        low = np.where(short, high, low)
        high = np.where(short, np.minimum(2 * high + 1, most), high)
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        enough = function(middle) >= level
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(unknown, np.nan, high)


QUANTILES = {"real": _quantile, "unit": _unit_quantile, "count": _count_quantile}


def find_root(
    function: Callable[[np.ndarray], np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
    f_low: np.ndarray,
    f_high: np.ndarray,
    tolerance: np.ndarray,
) -> np.ndarray:
    """Return where increasing functions, one for each element, are zero.

    Chandrupatla's method: inverse quadratic interpolation where it can be trusted, else bisection.

    Parameters
    ----------
    function : callable
        Elementwise.
    low, high : arrays
        Ends of brackets: the function is at most zero at the lower, at least zero at the upper.
    f_low, f_high : arrays
        The function there.
    tolerance : array
        Of the roots; no finer than rounding in float32 allows.

    Returns
    -------
    array
        NaN where the function is NaN.

    References
    ----------
    Chandrupatla (1997), Advances in Engineering Software 28.
    """

    def least_step(x):
        return tolerance + 4 * np.finfo(np.float32).eps * np.abs(x)

    share = np.full_like(low, 0.5)
    x1, x2, f1, f2 = low, high, f_low, f_high
    # A bracket without a change of sign, by rounding, has its root at the nearer end.
    same = (np.sign(f_low) == np.sign(f_high)) | np.isnan(f_low + f_high)
    for _ in range(MAX_STEPS):
        done = same | (f1 == 0) | (np.abs(x2 - x1) <= 2 * least_step(x1))
        if done.all():
            break
        x = np.where(done, x1, x1 + share * (x2 - x1))
        f = np.where(done, f1, function(x))
        stays = done | (np.sign(f) == np.sign(f1))
        x3, f3 = np.where(stays & ~done, x1, x2), np.where(stays & ~done, f1, f2)
        x2, f2 = np.where(stays, x2, x1), np.where(stays, f2, f1)
        x1, f1 = x, f
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
        inverse = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
        step = f1 / (f2 - f1) * f3 / (f2 - f3)
        step += (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        # Never nearer to an end than the tolerance.
        least = np.minimum(0.5, least_step(x1) / np.abs(x2 - x1))
        share = np.clip(np.where(inverse, step, 0.5), least, 1 - least)
    root = np.where(np.abs(f1) < np.abs(f2), x1, x2)
    return np.where(np.isnan(f_low + f_high), np.nan, root)


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _sample(likelihood: Likelihood, params, outputs, numbers, rows, key):
    def one(number, params, outputs):
        own = jax.random.fold_in(key, number)

        def of_row(row, output):
            found = likelihood.distribution(params, output[None])
            sample = found.sample(jax.random.fold_in(own, row))[0]
            # What is drawn from a count's distribution that is no number would be a number.
            return jnp.where(jnp.isnan(found.mean[0]), jnp.nan, sample)

        return jax.vmap(of_row)(rows, outputs)

    return jax.vmap(one)(numbers, params, outputs)
