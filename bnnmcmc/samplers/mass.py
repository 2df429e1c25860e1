r"""Metrics of Hamiltonian kernels: inverse mass matrices, and their estimates from draws.

With mass matrix M, momenta have the law :math:`N(0, M)`, the kinetic energy is
:math:`\tfrac12 p^\top M^{-1} p`, and the velocity is :math:`M^{-1} p`. A metric is one of

- an array (size,): the diagonal of :math:`M^{-1}`;
- `blackjax`'s ``LowRankInverseMassMatrix``: a diagonal, changed in a few directions,
  :math:`M^{-1} = D (I + U (\Lambda - I) U^\top) D`, with orthonormal columns U (size, rank);
- `Dense`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.mass_matrix import mass_matrix_adaptation, welford_algorithm
from blackjax.mcmc.metrics import LowRankInverseMassMatrix

from bnnmcmc.errors import InputError

METRICS = ("diagonal", "low_rank", "dense")
# Largest position with a dense metric: two matrices of a gigabyte in all, in float32.
MAX_DENSE = 11_000
# A low-rank estimate looks at this many draws, the last ones of a window.
MAX_WINDOW_DRAWS = 500
# What is added to the sums of squares of draws and gradients (nutpie's gamma): directions that
# neither has seen keep the diagonal's scale.
SMALLEST_SQUARES = 1e-5


class Dense(NamedTuple):
    r""":math:`M^{-1}` (size, size), and a root :math:`R R^\top = M` (size, size)."""

    inverse: jax.Array
    root: jax.Array


type Metric = jax.Array | LowRankInverseMassMatrix | Dense


def velocity(metric: Metric, momentum: jax.Array) -> jax.Array:
    r"""Return :math:`M^{-1} p` (size,)."""
    if isinstance(metric, Dense):
        return metric.inverse @ momentum
    if isinstance(metric, LowRankInverseMassMatrix):
        scaled = metric.sigma * momentum
        return metric.sigma * _stretched(metric, metric.lam, scaled)
    return metric * momentum


def displacement(metric: Metric, step_size, momentum: jax.Array) -> jax.Array:
    r"""Return :math:`\epsilon M^{-1} p` (size,), of a leapfrog step of size epsilon."""
    if isinstance(metric, jax.Array):
        return step_size * metric * momentum
    return step_size * velocity(metric, momentum)


def momentum(metric: Metric, noise: jax.Array) -> jax.Array:
    """Return a momentum from N(0, M) (size,), given a standard normal (size,)."""
    if isinstance(metric, Dense):
        return metric.root @ noise
    if isinstance(metric, LowRankInverseMassMatrix):
        return _stretched(metric, jax.lax.rsqrt(metric.lam), noise) / metric.sigma
    return noise / jnp.sqrt(metric)


def kinetic(metric: Metric, momentum: jax.Array) -> jax.Array:
    r"""Return :math:`\tfrac12 p^\top M^{-1} p`."""
    return 0.5 * jnp.dot(momentum, velocity(metric, momentum))


def _stretched(metric: LowRankInverseMassMatrix, by: jax.Array, vector: jax.Array) -> jax.Array:
    return vector + metric.U @ ((by - 1.0) * (metric.U.T @ vector))


class Estimator(NamedTuple):
    """How a metric is estimated from the draws of a window.

    Parameters
    ----------
    init : callable
        ``init(position) -> (metric, window)``: the unit metric, and a window without draws.
    update : callable
        ``update(window, position, gradient) -> window``.
    final : callable
        ``final(window) -> (metric, empty window)``.
    cheap : bool
        Whether ``update`` and ``final`` cost less than a gradient, so that they may be computed
        at every gradient and used at few.
    """

    init: Callable[[jax.Array], tuple[Metric, Any]]
    update: Callable[[Any, jax.Array, jax.Array], Any]
    final: Callable[[Any], tuple[Metric, Any]]
    cheap: bool


def check_metric(metric: str, max_rank: int, cutoff: float) -> None:
    """Raise InputError if these options make no metric."""
    if metric not in METRICS:
        raise InputError(f"sampler.metric: found {metric!r}, expected one of {', '.join(METRICS)}")
    if max_rank < 1:
        raise InputError(f"sampler.max_rank: found {max_rank}, expected at least 1")
    if not cutoff >= 1:
        raise InputError(f"sampler.cutoff: found {cutoff}, expected at least 1")


def estimator(metric: str, max_rank: int, cutoff: float, longest: int) -> Estimator:
    """Return the estimator of a kind of metric.

    Parameters
    ----------
    metric : str
        One of `METRICS`.
    max_rank : int
        Most directions of a low-rank metric.
    cutoff : float
        Directions of a low-rank metric whose variance is within this factor of the diagonal's
        are left out.
    longest : int
        Most draws of a window.
    """
    if metric == "low_rank":
        return _low_rank(max_rank, cutoff, max(2, min(longest, MAX_WINDOW_DRAWS)))
    return _moments(metric == "diagonal")


def score_estimator() -> Estimator:
    r"""Return the diagonal :math:`\sqrt{\mathrm{Var}[x_i] / \mathrm{Var}[g_i]}`, gradients g.

    A chain that has not been everywhere yet takes the posterior for narrower than it is; gradients
    tell its width from where the chain is. (Seyboldt et al. 2026, section 3.1.)
    """
    init, update, final = welford_algorithm(True)

    def first(position):
        empty = init(position.shape[0])
        return jnp.ones_like(position), (empty, empty)

    def add(window, position, gradient):
        return update(window[0], position), update(window[1], gradient)

    def end(window):
        # Roots one by one: squares of a network's gradients may leave the range of float32.
        spread_x, spread_g = (jnp.sqrt(final(part)[0]) for part in window)
        seen = (spread_x > 0) & (spread_g > 0)
        metric = jnp.where(seen, spread_x / jnp.where(seen, spread_g, 1.0), 1.0)
        return metric, first(metric)[1]

    return Estimator(first, add, end, cheap=True)


def _moments(diagonal: bool) -> Estimator:
    """Return blackjax's (Stan's) regularised variances or covariances of the draws.

    A window of fewer than two draws a parameter gives the dense metric no more than the variances:
    the covariances would be of low rank, and the chain would hardly leave what it has seen.
    """
    init, update, final = mass_matrix_adaptation(diagonal)

    def first(position):
        size = position.shape[0]
        if not diagonal:
            _check_dense(size, position.dtype.itemsize)
        moments = init(size)
        unit = moments.inverse_mass_matrix
        return unit if diagonal else Dense(unit, unit), moments

    def end(moments):
        count = moments.wc_state.sample_size
        moments = final(moments)
        found = moments.inverse_mass_matrix
        if diagonal:
            return found, moments
        enough = count >= 2 * found.shape[0]
        return dense(jnp.where(enough, found, jnp.diag(jnp.diag(found)))), moments

    return Estimator(first, lambda moments, x, gradient: update(moments, x), end, cheap=diagonal)


def _check_dense(size: int, itemsize: int) -> None:
    if size > MAX_DENSE:
        gigabytes = 2 * size**2 * itemsize / 1e9
        raise InputError(
            f"sampler.metric: a dense metric of {size} parameters takes {gigabytes:.1f} GB per "
            f'chain, expected at most {MAX_DENSE} parameters; use metric = "low_rank"'
        )


def dense(covariance: jax.Array) -> Dense:
    """Return the metric with this inverse mass matrix (size, size)."""
    size, dtype = covariance.shape[0], covariance.dtype
    # Rounding alone must not make it singular.
    floor = 4 * jnp.finfo(dtype).eps * jnp.trace(covariance)
    covariance = covariance + floor * jnp.eye(size, dtype=dtype)
    lower = jnp.linalg.cholesky(covariance)
    inverted = jax.scipy.linalg.solve_triangular(lower, jnp.eye(size, dtype=dtype), lower=True)
    return Dense(covariance, inverted.T)


class Window(NamedTuple):
    """The last draws of a window and their gradients (capacity, size), and how many there were."""

    positions: jax.Array
    gradients: jax.Array
    number: jax.Array


def _low_rank(max_rank: int, cutoff: float, capacity: int) -> Estimator:
    def empty(like: jax.Array) -> Window:
        rows = jnp.zeros((capacity, like.shape[-1]), like.dtype)
        return Window(rows, rows, jnp.zeros((), jnp.int32))

    def init(position):
        size, dtype = position.shape[0], position.dtype
        rank = min(max_rank, size)
        return LowRankInverseMassMatrix(
            jnp.ones(size, dtype), jnp.zeros((size, rank), dtype), jnp.ones(rank, dtype)
        ), empty(position)

    def update(window, position, gradient):
        row = window.number % capacity
        return Window(
            window.positions.at[row].set(position),
            window.gradients.at[row].set(gradient),
            window.number + 1,
        )

    def final(window):
        metric = low_rank(
            window.positions,
            window.gradients,
            jnp.minimum(window.number, capacity),
            min(max_rank, window.positions.shape[1]),
            cutoff,
        )
        return metric, empty(window.positions)

    return Estimator(init, update, final, cheap=False)


def low_rank(
    positions: jax.Array, gradients: jax.Array, count, rank: int, cutoff: float
) -> LowRankInverseMassMatrix:
    r"""Estimate a low-rank metric from draws and gradients of the log-density there.

    The diagonal is :math:`\sigma_i = (\mathrm{Var}[x_i] / \mathrm{Var}[g_i])^{1/4}`. In its
    coordinates, in the space of the leading directions of draws and of gradients, with their
    covariances C and G, the inverse mass matrix is the geometric mean of C and :math:`G^{-1}`,

    .. math:: G^{-1/2} (G^{1/2} C\, G^{1/2})^{1/2} G^{-1/2}.

    Both C and :math:`G^{-1}` are the covariance, if the density is normal. All is computed from
    singular values of the draws: float32 has no digits for their squares. (blackjax's
    ``fisher_score_low_rank`` forms the covariances, and asks for float64.)

    Parameters
    ----------
    positions, gradients : array (rows, size)
        The first ``count`` rows are in use.
    count : int32
        May be traced.
    rank : int
        Number of directions, at most the size.
    cutoff : float
        A direction with a variance within this factor of one is left as it is.

    Returns
    -------
    LowRankInverseMassMatrix
        Unit where there are fewer than two draws.

    References
    ----------
    Seyboldt, Carlson and Carpenter (2026), 2603.18845, algorithm 1 (nutpie).
    """
    rows = len(positions)
    dtype = positions.dtype
    used = (jnp.arange(rows) < count)[:, None]
    number = jnp.maximum(count, 1).astype(dtype)

    def centred(values):
        values = jnp.where(used, values, 0.0)
        return jnp.where(used, values - values.sum(0) / number, 0.0)

    x, g = centred(positions), centred(gradients)
    spread_x, spread_g = (jnp.sqrt(jnp.sum(jnp.square(part), 0)) for part in (x, g))
    seen = (spread_x > 0) & (spread_g > 0)
    # The ratio of roots: squares of a network's gradients may leave the range of float32.
    sigma = jnp.where(seen, jnp.sqrt(spread_x / jnp.where(seen, spread_g, 1.0)), 1.0)
    x, g = x / sigma, g * sigma
    leading = [jnp.linalg.svd(part, full_matrices=False)[2][:rank] for part in (x, g)]
    basis, _ = jnp.linalg.qr(jnp.concatenate(leading).T)
    floor = SMALLEST_SQUARES**0.5 * jnp.eye(basis.shape[1], dtype=dtype)
    x, g = (jnp.concatenate([part @ basis, floor]) for part in (x, g))
    # G = V S^2 V'; with S V' C V S = W T^2 W', the mean is B B', B = V S^-1 W T^1/2.
    _, s, v = jnp.linalg.svd(g, full_matrices=False)
    w, t, _ = jnp.linalg.svd(s[:, None] * (v @ x.T), full_matrices=False)
    root = v.T @ (w / s[:, None] * jnp.sqrt(t))
    directions, scales, _ = jnp.linalg.svd(root, full_matrices=False)
    lam = jnp.square(scales)
    chosen = jnp.argsort(-jnp.abs(jnp.log(lam)))[:rank]
    lam = lam[chosen]
    lam = jnp.where((lam > cutoff) | (lam < 1 / cutoff), lam, 1.0)
    vectors = basis @ directions[:, chosen]
    short = rank - lam.shape[0]
    enough = count >= 2
    return LowRankInverseMassMatrix(
        jnp.where(enough, sigma, 1.0),
        jnp.pad(vectors, ((0, 0), (0, short))),
        jnp.where(enough, jnp.pad(lam, (0, short), constant_values=1.0), 1.0),
    )
