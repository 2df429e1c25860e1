"""What minibatch kernels share: batches, control variates, noise, schedules of the step size."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.kernel import RowTarget
from bnnmcmc.samplers.options import check_positive

SCHEDULES = ("constant", "cosine", "polynomial", "cyclic")
# The noise is averaged over about so many steps, and no longer after this part of the warm-up:
# the tuning that follows, and the draws, have one metric.
NOISE_MEMORY, NOISE_SHARE = 1000, 0.75


def draw_batch(key: jax.Array, rows: int, size: int) -> jax.Array:
    r"""Draw the numbers of the rows of a batch, one from each of ``size`` equal parts of the table.

    .. math:: i_j = \lfloor (j N + v_j) / B \rfloor, \quad v_j \sim U\{0, \dots, N - 1\}, \quad
              j = 0, \dots, B - 1

    Every row has the expected count B / N, so N / B times a sum over the batch is unbiased,
    whatever the order of the rows; its variance is at most that of a batch drawn at random, with
    replacement. A batch of as many rows as there are is all of them, once.

    Parameters
    ----------
    key : key
    rows : int
        N.
    size : int
        B, at most N.

    Returns
    -------
    jax.Array
        int32 (size,), ascending.
    """
    # j N may leave 32 bits: whole part and remainder of j N / B are taken here.
    whole, rest = np.divmod(np.arange(size, dtype=np.int64) * rows, size)
    within = jax.random.randint(key, (size,), 0, rows, jnp.int32)
    return jnp.asarray(whole, jnp.int32) + (jnp.asarray(rest, jnp.int32) + within) // size


class Anchor(NamedTuple):
    """A position (size,) with the log-density (scalar) and gradient (size,) over all rows there."""

    position: jax.Array
    logdensity: jax.Array
    gradient: jax.Array


class Landscape(NamedTuple):
    """The log-density as one step sees it.

    Parameters
    ----------
    log_density : callable
        ``log_density(position) -> scalar``, an unbiased estimate, with an unbiased gradient.
    anchor : Anchor or None
        To be carried on.
    error : array (size,) or None
        How far off the batch's gradient is at the anchor, where that over all rows is known.
    gradients, rows : int32
        What has been paid for it so far: gradients, and rows looked at.
    """

    log_density: Callable[[jax.Array], jax.Array]
    anchor: Anchor | None
    error: jax.Array | None
    gradients: jax.Array
    rows: jax.Array


def first_anchor(position: jax.Array, every: int, target: RowTarget) -> Anchor | None:
    """Return the anchor at the start of a chain, None if there are to be none (``every`` is 0)."""
    return _anchor_at(position, target) if every else None


def _anchor_at(position: jax.Array, target: RowTarget) -> Anchor:
    return Anchor(position, *jax.value_and_grad(target.log_density)(position))


def landscape(
    key: jax.Array,
    position: jax.Array,
    anchor: Anchor | None,
    t: jax.Array,
    target: RowTarget,
    batch_size: int,
    every: int,
) -> Landscape:
    r"""Draw a batch and return the log-density that it shows.

    Without an anchor this is :math:`\hat\ell_b(\theta)`, the target's estimate. With an anchor
    :math:`a` it is corrected by what is known there (control variates), in value and gradient:

    .. math:: \hat\ell_b(\theta) + \ell(a) - \hat\ell_b(a)
              + (\nabla \ell(a) - \nabla \hat\ell_b(a))^\top (\theta - a)

    Near the anchor, the noise of the batches cancels. In every ``every``-th step the anchor moves
    to where the chain is, at the cost of a gradient over all rows.

    Parameters
    ----------
    key : key
    position : array (size,)
        Where the chain is.
    anchor : Anchor or None
    t : int32
        Number of the step.
    target : RowTarget
    batch_size : int
    every : int
        Steps between two anchors; 0 for none.

    Returns
    -------
    Landscape

    References
    ----------
    Dubey et al. (2016), NeurIPS (SVRG-LD); Baker et al. (2019), 1706.05439.
    """
    batch = draw_batch(key, target.rows, batch_size)

    def count(number) -> jax.Array:
        return jnp.asarray(number, jnp.int32)

    if anchor is None:
        return Landscape(lambda p: target.estimate(p, batch), None, None, count(0), count(0))
    moves = t % every == 0
    at = jax.lax.cond(moves, lambda: _anchor_at(position, target), lambda: anchor)
    value, gradient = jax.value_and_grad(target.estimate)(at.position, batch)
    slope, height = at.gradient - gradient, at.logdensity - value
    return Landscape(
        lambda p: target.estimate(p, batch) + height + slope @ (p - at.position),
        at,
        slope,
        count(1) + moves,
        batch_size + moves * count(target.rows),
    )


class Noise(NamedTuple):
    """Variance of the gradient's noise and the scales made of it, by coordinate: (size,) each."""

    variance: jax.Array
    scale: jax.Array


def no_noise(position: jax.Array) -> Noise:
    """Return what is known of the noise before the first step: scales of one."""
    return Noise(jnp.zeros_like(position), jnp.ones_like(position))


def learn_noise(
    noise: Noise,
    squared: jax.Array,
    t: jax.Array,
    num_warmup: int,
    batch_share: float,
    damping: float,
) -> Noise:
    r"""Add to what is known of the noise, in the first three quarters of a warm-up.

    .. math:: s_i = (\lambda + \tfrac{B}{N} V_i)^{-1/2}

    V is the mean of what the steps so far have shown of the variance, at most about the last 1000:
    :math:`\tfrac12 (\hat g_{b,i} - \hat g_{b',i})^2` of what two batches show at one position, or
    at two close ones, or :math:`(\hat g_{b,i}(a) - g_i(a))^2` at an anchor. If it is that of
    gradients without control variates, :math:`\tfrac{B}{N} V_i` is the observed Fisher information,
    so :math:`s_i` is about the coordinate's conditional scale in the posterior if :math:`\lambda`
    is the prior's precision. With them V is less, and scales are longer and more alike.

    The scales are fixed for the draws, so these need no correction for scales that change with the
    position (the term :math:`\Gamma` of Riemannian methods); the warm-up goes without it.

    Parameters
    ----------
    noise : Noise
    squared : array (size,)
        What this step shows of the variance.
    t : int32
        Number of the step, from 0.
    num_warmup : int
    batch_share : float
        B / N.
    damping : float
        :math:`\lambda`.
    """

    def learn() -> Noise:
        weight = 1.0 / jnp.minimum(t + 1, NOISE_MEMORY).astype(squared.dtype)
        variance = noise.variance + weight * (squared - noise.variance)
        return Noise(variance, jax.lax.rsqrt(damping + batch_share * variance))

    return jax.lax.cond(t < round(NOISE_SHARE * num_warmup), learn, lambda: noise)


def step_sizes(
    schedule: str, first: float, last: float, num_warmup: int, cycle: int
) -> Callable[[jax.Array], jax.Array]:
    r"""Return the function from the number of a step to its size; the warm-up's first is 0.

    With n steps of warm-up, from :math:`\epsilon_0` = ``first`` to :math:`\epsilon` = ``last``:

    - ``"constant"``: :math:`\epsilon` throughout;
    - ``"cosine"``: half a cosine from the one to the other in the warm-up, then :math:`\epsilon`;
    - ``"polynomial"``: :math:`\epsilon_0 (1 + t / \tau)^{-1/3}`, which is :math:`\epsilon` at the
      end of the warm-up and goes on falling, and the bias with it, at the rate that suits the
      variance best (Teh et al. 2016);
    - ``"cyclic"``: half a cosine from the one to the other every ``cycle`` steps, always (Zhang et
      al. 2020). Draws every ``cycle`` steps (``thin``) are all from the end of a cycle, if the
      warm-up is made of whole ones.

    A schedule in the warm-up alone leaves sampling with one step size, so with one law.
    """
    if schedule == "cyclic":
        turn = optax.cosine_decay_schedule(first, cycle, last / first)
        # The last step of a cycle has the last size.
        return lambda t: turn((t % cycle) * (cycle / max(cycle - 1, 1)))
    if schedule == "constant" or num_warmup == 0 or first == last:
        return optax.constant_schedule(last)
    if schedule == "cosine":
        return optax.cosine_decay_schedule(first, num_warmup, last / first)
    tau = num_warmup / ((first / last) ** 3 - 1)
    return lambda t: first * (1 + t / tau) ** (-1 / 3)


def check_batches(
    batch_size: int, step_size: float, initial_step_size: float, schedule: str, cycle: int
) -> None:
    """Raise InputError if these options are out of range, or one of them would do nothing."""
    check_batch_size(batch_size)
    check_positive(step_size=step_size, initial_step_size=initial_step_size)
    if initial_step_size < step_size:
        raise InputError(
            f"sampler.initial_step_size: found {initial_step_size}, expected at least "
            f"sampler.step_size, {step_size}"
        )
    if schedule not in SCHEDULES:
        raise InputError(
            f"sampler.schedule: found {schedule!r}, expected one of {', '.join(SCHEDULES)}"
        )
    if (cycle < 2) if schedule == "cyclic" else cycle != 0:
        raise InputError(
            f"sampler.cycle: found {cycle}, expected at least 2 with schedule 'cyclic', and 0 "
            "without"
        )


def check_batch_size(batch_size: int) -> None:
    """Raise InputError if it is no number of rows."""
    if batch_size < 1:
        raise InputError(f"sampler.batch_size: found {batch_size}, expected at least 1")


def check_anchor(anchor: int) -> None:
    """Raise InputError if it is no number of steps between two anchors."""
    if anchor < 0:
        raise InputError(f"sampler.anchor: found {anchor}, expected at least 1, or 0 for none")
