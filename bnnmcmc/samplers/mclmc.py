"""Microcanonical Langevin Monte Carlo (blackjax, unadjusted), with the MILE tuning."""

from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc import integrators

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.kernel import Kernel, Warmup
from bnnmcmc.samplers.options import check_positive

INTEGRATORS = {
    "leapfrog": (integrators.isokinetic_velocity_verlet, 1),
    "minimal_norm": (integrators.isokinetic_mclachlan, 2),
}

# A step with a larger energy error is taken back (the limit of Stan for Hamiltonian Monte Carlo).
MAX_ENERGY_ERROR = 1000.0
# After such a step the bound on the step size rises by this factor at each good one.
CAP_GROWTH = 1.02

# Phase 3 keeps at most this many draws and coordinates to estimate autocorrelation times.
MAX_TUNING_DRAWS = 1000
MAX_TUNING_COORDINATES = 200
# A phase with fewer draws than this says nothing about L, which then stays as it was.
MIN_TUNING_DRAWS = 10
# Relative energy errors below this are rounding, and say only that the step size is too small.
ROUNDING = 1e-6
# What a step size that has turned out too long is corrected by: at least this factor, and by this
# power of the energy variance. Of a network's posterior the squared error grows faster than with
# the sixth power of the step size: with about the 13th (2x16 tanh, 353 rows, steps that double).
MIN_CORRECTION, CORRECTION_POWER = 0.5, 1.0 / 12.0
TUNINGS = ("averaged", "mile")


class MCLMCParams(NamedTuple):
    """Step size and momentum decoherence length L (scalars)."""

    step_size: jax.Array
    decoherence_length: jax.Array


class MCLMCInfo(NamedTuple):
    """Statistics of one MCLMC step; ``energy_error_squared`` is per dimension (EEVPD)."""

    log_density: jax.Array
    energy_error_squared: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array
    decoherence_length: jax.Array


class MILEState(NamedTuple):
    """Running estimates of the three phases."""

    params: MCLMCParams
    weight_sum: jax.Array
    weighted_error: jax.Array
    max_step_size: jax.Array
    moment_weight: jax.Array
    mean: jax.Array
    squares: jax.Array
    kept: jax.Array
    num_kept: jax.Array
    error_sum: jax.Array
    num_errors: jax.Array


def mclmc(
    integrator: str = "leapfrog",
    energy_variance_start: float = 5.0,
    energy_variance_end: float = 0.05,
    initial_step_size: float = 0.005,
    tuning: str = "averaged",
) -> Kernel:
    r"""Build unadjusted MCLMC, tuned per chain as in MILE, or nearly so.

    A step moves position and direction :math:`u` along the isokinetic dynamics for :math:`\epsilon`
    (blackjax's integrators) and then turns the direction a little, with
    :math:`z \sim N(0, I_d)`:

    .. math:: u \leftarrow \frac{u + \nu z}{\lVert u + \nu z \rVert}, \quad
              \nu = \sqrt{(e^{2 \epsilon / L} - 1) / d}.

    The warm-up has three phases. In the first eight tenths the step size follows the energy
    error :math:`\Delta E`: with :math:`\xi = \Delta E^2 / (d v)`, weights
    :math:`w = \exp(-\tfrac12 (\ln \xi / 9)^2)` and memory :math:`\lambda = 99/101`,

    .. math:: \bar x \leftarrow \lambda \bar x + w \xi v \epsilon^{-6}, \quad
              \tau \leftarrow \lambda \tau + w, \quad
              \epsilon = (v \tau / \bar x)^{1/6},

    where the wanted energy variance per dimension v falls linearly from
    ``energy_variance_start`` to ``energy_variance_end``. In the next tenth the moments of the
    position give :math:`L = \sqrt{\sum_i \mathrm{Var}[\theta_i]}` (the step size still adapts);
    in the last tenth :math:`L = 0.4\, \epsilon\, \mathrm{mean}_i(n / \mathrm{ESS}_i)`, and the mean
    :math:`\bar v` of :math:`\Delta E^2 / d` there, if it is beyond v, at last gives
    :math:`\epsilon \leftarrow \epsilon\, (v / \bar v)^{1/12}`: the step size so far was the last
    of a fluctuating sequence, too long in some chains. (A power of 1/6, right for small steps,
    overshoots: the error of large ones grows faster than their sixth power.) Starts at
    :math:`L = \max(\sqrt d, 15)`. A step that leaves the finite numbers, or
    whose energy error is beyond :math:`\max(1000, 30 \sqrt d)`, is taken back, counts as
    diverging, and caps the step size at 0.8 of what it was (the cap then rises by 2 % a step). As
    long as energy errors are no more than rounding, the step size doubles. A warm-up that ends
    early hands over the step size for ``energy_variance_end``, so its draws are not hotter. L and
    the step size stay as they are where a phase has fewer than ten draws.

    Bias. There is no accept-reject step, so draws are spread too wide. With the leapfrog and
    :math:`x = 0.45\, (d v)^{1/3}`, v being ``energy_variance_end``, the variance of a parameter
    is too large by a factor of up to :math:`1 / (1 - x)`; its mean is off by up to
    :math:`x / 5` standard deviations and the probability below a quantile by up to :math:`x / 8`.
    This was measured, not proved: on known posteriors of 2 to 11 dimensions for v of 1e-4 and
    0.05 and on a normal of 100 dimensions and condition :math:`10^4` for 1e-4, and tests hold it
    there. It is the narrowest axes that are so wide: with scale :math:`\sigma` on an axis of a
    normal the factor is at most :math:`1 / (1 - \epsilon^2 / (4 d \sigma^2))`, and where all
    axes are alike, the excess is :math:`0.43\, v^{1/3}` whatever d (16 % for 0.05, 2 % for 1e-4).
    Where x comes near 1 nothing is promised: for 0.05 the narrowest of the hundred axes had 2.3 to
    2.8 times its variance.

    ``tuning="mile"`` is the published form, for comparison: it averages
    :math:`\xi \epsilon^{-6}`, which remembers v as well (while v falls, the step size lags behind,
    and the wanted end value is never reached); there is no correction by :math:`\bar v`, no bound
    on the energy error of a step, no doubling, and a cap on the step size stays. Published values
    are 0.5 and 0.1 for the energy variance.

    Parameters
    ----------
    integrator : str
        ``"leapfrog"`` (one gradient a step) or ``"minimal_norm"`` (two).
    energy_variance_start, energy_variance_end : float
        Wanted energy error variance per dimension, at the start and end of tuning. The end value
        sets the bias of the draws: there is no accept-reject step.
    initial_step_size : float
        Step size at the first warm-up step.
    tuning : str
        ``"averaged"`` or ``"mile"``.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.

    References
    ----------
    Robnik and Seljak (2023), 2303.18221; Sommer et al. (2025), 2502.06335 (MILE), appendix.
    """
    if integrator not in INTEGRATORS:
        raise InputError(
            f"sampler.integrator: found {integrator!r}, expected one of {', '.join(INTEGRATORS)}"
        )
    if tuning not in TUNINGS:
        raise InputError(f"sampler.tuning: found {tuning!r}, expected one of {', '.join(TUNINGS)}")
    published = tuning == "mile"
    check_positive(
        energy_variance_start=energy_variance_start,
        energy_variance_end=energy_variance_end,
        initial_step_size=initial_step_size,
    )
    rule, gradients = INTEGRATORS[integrator]

    def init(key, position, log_density):
        if position.shape[0] < 2:
            raise InputError(
                "microcanonical kernels need at least 2 parameters; use nuts for a single one"
            )
        return blackjax.mclmc.init(position, log_density, key)

    def step(key, state, params, log_density):
        # The parts of blackjax's kernel, without the four vectors of random numbers that it draws
        # besides: they would cost half a gradient of a small network.
        dimension = state.position.shape[0]
        moved, kinetic_change = rule(log_density, 1.0)(state, params.step_size)
        energy_change = kinetic_change - moved.logdensity + state.logdensity
        # A larger error leaves the posterior for good: from there only tiny steps are stable.
        # Comparisons with NaN are false, so a step out of the finite numbers is not kept either.
        limit = jnp.inf if published else max(MAX_ENERGY_ERROR, 30.0 * dimension**0.5)
        gradient = moved.logdensity_grad
        kept = (jnp.abs(energy_change) <= limit) & jnp.isfinite(gradient @ gradient)
        noise = jax.lax.optimization_barrier(
            jax.random.normal(key, state.position.shape, state.position.dtype)
        )
        # The bound keeps a step that is far too long in the finite numbers; noise prevails anyway.
        turned = jnp.minimum(2 * params.step_size / params.decoherence_length, 40.0)
        spread = jnp.sqrt(jnp.expm1(turned) / dimension)
        # After a step that was taken back: a new direction, the noise alone.
        direction = jnp.where(kept, moved.momentum + spread * noise, noise)
        state = jax.tree.map(lambda new, old: jnp.where(kept, new, old), moved, state)
        state = state._replace(momentum=direction * jax.lax.rsqrt(direction @ direction))
        return state, MCLMCInfo(
            state.logdensity,
            jnp.where(kept, jnp.square(energy_change) / dimension, 0.0),
            ~kept,
            jnp.asarray(gradients, jnp.int32),
            params.step_size,
            params.decoherence_length,
        )

    def warmup(num_steps: int) -> Warmup:
        return mile_warmup(
            step,
            num_steps,
            energy_variance_start,
            energy_variance_end,
            initial_step_size,
            published,
        )

    return Kernel(
        "mclmc",
        init,
        warmup,
        step,
        exact=False,
        gradients_per_step=gradients,
        wanted={"energy_error_squared": energy_variance_end},
    )


def mile_warmup(
    step, num_steps, variance_start, variance_end, initial_step_size, published=False
) -> Warmup:
    """Build the three-phase MILE warm-up around an MCLMC ``step`` (see `mclmc`)."""
    end_step_size = round(0.8 * num_steps)
    end_moments = round(0.9 * num_steps)
    tuning_draws = num_steps - end_moments
    every = max(1, -(-tuning_draws // MAX_TUNING_DRAWS))
    capacity = tuning_draws // every
    memory, cap_growth = (100 - 1) / (100 + 1), 1.0 if published else CAP_GROWTH

    def coordinates(position: jax.Array) -> jax.Array:
        stride = max(1, -(-position.shape[0] // MAX_TUNING_COORDINATES))
        return position[::stride]

    def init(position: jax.Array) -> MILEState:
        dimension, dtype = position.shape[0], position.dtype
        zero = jnp.zeros((), dtype)
        return MILEState(
            MCLMCParams(
                jnp.asarray(initial_step_size, dtype),
                jnp.asarray(max(dimension**0.5, 15.0), dtype),
            ),
            zero,
            zero,
            jnp.asarray(jnp.inf, dtype),
            zero,
            jnp.zeros_like(position),
            jnp.zeros_like(position),
            jnp.zeros((capacity, *coordinates(position).shape), dtype),
            jnp.zeros((), jnp.int32),
            zero,
            jnp.zeros((), jnp.int32),
        )

    def step_size_for(variance, a: MILEState) -> jax.Array:
        growth = (variance * a.weight_sum / a.weighted_error) ** (1.0 / 6.0)
        growth = jnp.where(a.weight_sum > 0, growth, 1.0)
        return jnp.minimum(a.params.step_size * growth, a.max_step_size)

    def tune_step_size(a: MILEState, info: MCLMCInfo, t) -> MILEState:
        epsilon = a.params.step_size
        last = end_moments + 1 if published else max(end_moments - 1, 1)
        progress = jnp.minimum(jnp.asarray(t, epsilon.dtype) / last, 1.0)
        wanted = variance_start * (1 - progress) + variance_end * progress
        # Times the reciprocal: XLA makes this of a division by what chains have in common, but not
        # in programs for one device, whose draws would then be others than those of several.
        xi = info.energy_error_squared * (1.0 / wanted) + 1e-8
        # A step taken back, or an error whose square overflows, says only that epsilon was too
        # large.
        failed = info.diverging | ~jnp.isfinite(xi)
        # Such errors would be remembered for long, and hold a far too small step size back.
        tiny = ~failed & (xi < ROUNDING) & (a.weight_sum == 0) & (not published)
        # What is averaged, besides the step size: the energy variance, or its share of v.
        scale = jnp.ones_like(wanted) if published else wanted
        unused = failed | tiny
        xi = jnp.where(unused, 1.0, xi)
        weight = jnp.where(unused, 0.0, jnp.exp(-0.5 * jnp.square(jnp.log(xi) / (6.0 * 1.5))))
        # The average is kept times the sixth power of the step size in use, which alone would
        # leave the range of float32.
        a = a._replace(
            params=a.params._replace(step_size=jnp.where(tiny, 2.0 * epsilon, epsilon)),
            weighted_error=memory * a.weighted_error + weight * xi * scale,
            weight_sum=memory * a.weight_sum + weight,
            max_step_size=jnp.where(failed, 0.8 * epsilon, cap_growth * a.max_step_size),
        )
        step_size = step_size_for(scale, a)
        return a._replace(
            params=a.params._replace(step_size=step_size),
            weighted_error=a.weighted_error * (step_size / epsilon) ** 6,
        )

    def add_moments(a: MILEState, position: jax.Array, info: MCLMCInfo) -> MILEState:
        weight = jnp.where(info.diverging, 0.0, info.step_size)
        total = a.moment_weight + weight
        share = jnp.where(total > 0, weight / total, 0.0)
        # Welford's recursion with weights: a mean far from zero costs no digits.
        mean = a.mean + share * (position - a.mean)
        squares = a.squares + weight * (position - a.mean) * (position - mean)
        return a._replace(moment_weight=total, mean=mean, squares=squares)

    def length_from_moments(a: MILEState) -> MILEState:
        if end_moments - end_step_size < MIN_TUNING_DRAWS:
            return a
        spread = jnp.sqrt(jnp.sum(a.squares) / a.moment_weight)
        length = jnp.where(
            (a.moment_weight > 0) & (spread > 0), spread, a.params.decoherence_length
        )
        return a._replace(params=a.params._replace(decoherence_length=length))

    def keep(a: MILEState, position: jax.Array, info: MCLMCInfo, t) -> MILEState:
        if capacity == 0:
            return a
        a = a._replace(
            error_sum=a.error_sum + info.energy_error_squared,
            num_errors=a.num_errors + ~info.diverging,
        )
        since = t - end_moments
        slot = since // every
        use = (since % every == every - 1) & (slot < capacity)
        kept = jax.lax.cond(
            use,
            lambda kept: kept.at[slot].set(coordinates(position)),
            lambda kept: kept,
            a.kept,
        )
        return a._replace(kept=kept, num_kept=a.num_kept + use)

    def adapt(a: MILEState, state, info, t) -> MILEState:
        def first_phases(a):
            a = tune_step_size(a, info, t)
            a = jax.lax.cond(
                t >= end_step_size, lambda a: add_moments(a, state.position, info), lambda a: a, a
            )
            return jax.lax.cond(t == end_moments - 1, length_from_moments, lambda a: a, a)

        def last_phase(a):
            return keep(a, state.position, info, t)

        return jax.lax.cond(t < end_moments, first_phases, last_phase, a)

    def warm(key, state, a: MILEState, t, log_density):
        state, info = step(key, state, a.params, log_density)
        return state, adapt(a, state, info, t), info

    def finish(a: MILEState) -> MCLMCParams:
        params = a.params
        if not published:
            corrected = jnp.where(
                (a.num_errors >= MIN_TUNING_DRAWS) & (a.error_sum > 0),
                # Never up: few errors can tell that a step is too long, but where rare ones
                # make up the mean, not that it is too short.
                jnp.clip(
                    (variance_end * a.num_errors / a.error_sum) ** CORRECTION_POWER,
                    MIN_CORRECTION,
                    1.0,
                ),
                1.0,
            )
            params = params._replace(step_size=step_size_for(variance_end, a) * corrected)
        if capacity < MIN_TUNING_DRAWS:
            return params
        # effective_sample_size wants (chain, draw, coordinate).
        ess = blackjax.diagnostics.effective_sample_size(a.kept[None])
        tau = every * capacity / ess
        length = 0.4 * a.params.step_size * jnp.mean(tau)
        usable = (a.num_kept == capacity) & jnp.isfinite(length) & (length > 0)
        return params._replace(
            decoherence_length=jnp.where(usable, length, params.decoherence_length)
        )

    return Warmup(init, warm, finish, lambda a: a.params, adapt)
