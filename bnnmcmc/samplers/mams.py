"""Metropolis-adjusted microcanonical sampling: the dynamics of MCLMC without its bias."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation

from bnnmcmc.errors import InputError
from bnnmcmc.samplers import kronecker
from bnnmcmc.samplers.kernel import Kernel, Warmup
from bnnmcmc.samplers.mclmc import INTEGRATORS, isokinetic_step, mclmc
from bnnmcmc.samplers.options import check_acceptance, check_jitter

# The end of the warm-up that is adjusted: a fifth of its steps, and no more than this.
ADJUSTED_SHARE, MAX_ADJUSTED = 5, 300
# An adjusted step is shorter than one with the energy variance of the unadjusted phase; where the
# search for its size begins.
FIRST_SHARE = 0.3
METRICS = ("kronecker", "identity")
# An energy error beyond this is called a divergence (the limit of Stan).
MAX_ENERGY_ERROR = 1000.0


class MAMSParams(NamedTuple):
    """Step size and mean trajectory length L (scalars), and the metric (None: identity)."""

    step_size: jax.Array
    trajectory_length: jax.Array
    metric: kronecker.Factors | None = None


class MAMSInfo(NamedTuple):
    """Statistics of one transition."""

    log_density: jax.Array
    acceptance_rate: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array
    trajectory_length: jax.Array


class MAMSAdaptation(NamedTuple):
    """Tuning of the unadjusted phase; dual averaging, L and moments of the adjusted one."""

    unadjusted: Any
    step_size: Any
    trajectory_length: jax.Array
    adjusted: jax.Array
    mean: jax.Array
    squares: jax.Array


def mams(
    integrator: str = "leapfrog",
    jitter: float = 0.5,
    max_steps: int = 128,
    target_acceptance: float = 0.9,
    energy_variance_start: float = 5.0,
    energy_variance_end: float = 0.05,
    initial_step_size: float = 0.005,
    metric: str = "kronecker",
    damping: float = 1000.0,
) -> Kernel:
    r"""Build the Metropolis-adjusted microcanonical sampler (MAMS).

    A draw begins with a new direction, uniform on the sphere, and follows the isokinetic dynamics
    (blackjax's integrators) for n steps of :math:`\epsilon`. Each step changes the energy by
    :math:`\Delta E_i = \Delta K_i - \Delta \log p_i`, and the end is accepted with probability

    .. math:: \min\bigl(1, \exp(-\textstyle\sum_i \Delta E_i)\bigr),

    so the target is left invariant, whatever the step size. The number of steps is uniform around
    :math:`L / \epsilon`, with relative half-width ``jitter``, and does not look at the state.

    The warm-up walks to the typical set without adjustment (`mclmc` with the same options, hot at
    first). Its last fifth, at most 300 transitions, is adjusted: dual averaging finds the step size
    for ``target_acceptance``. L is the largest :math:`\sqrt{\sum_i \mathrm{Var}[\theta_i]}`, of the
    last steps without adjustment or of those with it so far.

    Parameters
    ----------
    integrator : str
        ``"leapfrog"`` (one gradient a step) or ``"minimal_norm"`` (two).
    jitter : float
        Relative half-width of the number of steps, in [0, 1); 0 fixes it.
    max_steps : int
        Most steps of a trajectory, on average.
    target_acceptance : float
        Acceptance rate the warm-up aims at, in (0, 1).
    energy_variance_start, energy_variance_end, initial_step_size : float
        Of the unadjusted phase: see `mclmc`.
    metric : str
        ``"kronecker"`` or ``"identity"``: found in the unadjusted phase (see `mclmc`), and then
        that of the trajectories.
    damping : float
        Of the metric: see `mclmc`.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.

    References
    ----------
    Robnik, Cohn-Gordon and Seljak (2025), 2503.01707.
    """
    check_jitter(jitter)
    if max_steps < 1:
        raise InputError(f"sampler.max_steps: found {max_steps}, expected at least 1")
    check_acceptance(target_acceptance)
    if metric not in METRICS:
        raise InputError(f"sampler.metric: found {metric!r}, expected one of {', '.join(METRICS)}")
    unadjusted = mclmc(
        integrator,
        energy_variance_start,
        energy_variance_end,
        initial_step_size,
        metric=metric,
        damping=damping,
    )
    gradients = INTEGRATORS[integrator][1]

    def for_matrices(matrices: tuple[kronecker.Matrix, ...]) -> Kernel:
        walker = (
            unadjusted if unadjusted.for_matrices is None else unadjusted.for_matrices(matrices)
        )

        def step(key, state, params, log_density):
            key_length, key_direction = jax.random.split(key)
            mean = jnp.clip(params.trajectory_length / params.step_size, 1.0, max_steps)
            spread = jax.random.uniform(key_length, (), mean.dtype, 1 - jitter, 1 + jitter)
            count = jnp.maximum(jnp.round(mean * spread), 1).astype(jnp.int32)
            noise = jax.random.normal(key_direction, state.position.shape, state.position.dtype)
            start = state._replace(momentum=noise * jax.lax.rsqrt(noise @ noise))
            move = isokinetic_step(integrator, log_density, params.metric, matrices)

            # A trajectory that leaves the finite numbers does so in both directions of time.
            def goes_on(loop):
                _, kinetic, done = loop
                return (done < count) & jnp.isfinite(kinetic)

            def advance(loop):
                at, kinetic, done = loop
                at, change = move(at, params.step_size)
                finite = jnp.isfinite(at.logdensity) & jnp.isfinite(
                    at.logdensity_grad @ at.momentum
                )
                return at, jnp.where(finite, kinetic + change, jnp.nan), done + 1

            nought = jnp.zeros((), state.position.dtype), jnp.zeros((), jnp.int32)
            end, kinetic, done = jax.lax.while_loop(goes_on, advance, (start, *nought))
            error = kinetic - end.logdensity + state.logdensity
            error = jnp.where(jnp.isnan(error), jnp.inf, error)
            rate = _acceptance_rate(error)
            accepted = jax.random.uniform(jax.random.fold_in(key, 2), (), rate.dtype) < rate
            state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), end, start)
            return state, MAMSInfo(
                state.logdensity,
                rate,
                error > MAX_ENERGY_ERROR,
                done * gradients,
                params.step_size,
                params.trajectory_length,
            )

        def warmup(num_steps: int) -> Warmup:
            return _warmup(step, walker, num_steps, target_acceptance, matrices)

        return Kernel(
            "mams",
            walker.init,
            warmup,
            step,
            exact=True,
            gradients_per_step=None,
            wanted={"acceptance_rate": target_acceptance},
            for_matrices=None if metric == "identity" else for_matrices,
        )

    return for_matrices(())


def _acceptance_rate(error: jax.Array) -> jax.Array:
    return jnp.exp(jnp.minimum(-error, 0.0))


def _warmup(step, walker: Kernel, num_steps: int, target: float, matrices) -> Warmup:
    average_init, average_update, average_final = dual_averaging_adaptation(target)
    switch = num_steps - min(num_steps // ADJUSTED_SHARE, MAX_ADJUSTED)
    rules = walker.warmup(switch)

    def init(position: jax.Array) -> MAMSAdaptation:
        adaptation = rules.init(position)
        return MAMSAdaptation(
            adaptation,
            average_init(adaptation.params.step_size),
            adaptation.params.decoherence_length,
            jnp.zeros((), jnp.int32),
            jnp.zeros_like(position),
            jnp.zeros_like(position),
        )

    def begin_adjusted(a: MAMSAdaptation) -> MAMSAdaptation:
        # Untuned, the step size is the one asked for.
        share = jnp.where(a.unadjusted.weight_sum > 0, FIRST_SHARE, 1.0)
        return a._replace(
            step_size=average_init(share * rules.finish(a.unadjusted).step_size),
            # From the moments. The length for which a direction persists in Langevin dynamics,
            # which `finish` gives, is too short for trajectories that begin with a new one.
            trajectory_length=a.unadjusted.params.decoherence_length,
        )

    def walk(key, state, a: MAMSAdaptation, t, log_density):
        state, inner, info = rules.step(key, state, a.unadjusted, t, log_density)
        return (
            state,
            a._replace(unadjusted=inner),
            MAMSInfo(
                info.log_density,
                jnp.where(info.diverging, 0.0, 1.0).astype(info.log_density.dtype),
                info.diverging,
                info.gradients,
                info.step_size,
                info.decoherence_length,
            ),
        )

    def adjust(key, state, a: MAMSAdaptation, t, log_density):
        a = jax.lax.cond(t == switch, begin_adjusted, lambda a: a, a)
        size, metric = jnp.exp(a.step_size.log_step_size), a.unadjusted.params.metric
        params = MAMSParams(size, a.trajectory_length, metric)
        state, info = step(key, state, params, log_density)
        position = state.position
        # L is a length in the coordinates of the metric.
        if metric is not None:
            position = kronecker.scale(a.unadjusted.estimate.inverse, matrices, position)
        count = a.adjusted + 1
        mean = a.mean + (position - a.mean) / count
        squares = a.squares + (position - a.mean) * (position - mean)
        # A chain that has not been everywhere yet takes the posterior for narrower than it is.
        seen = jnp.sqrt(jnp.sum(squares) / count)
        return (
            state,
            MAMSAdaptation(
                a.unadjusted,
                average_update(a.step_size, info.acceptance_rate),
                jnp.maximum(a.trajectory_length, seen),
                count,
                mean,
                squares,
            ),
            info,
        )

    def warm(key, state, a, t, log_density):
        return jax.lax.cond(
            t < switch,
            lambda state, a: walk(key, state, a, t, log_density),
            lambda state, a: adjust(key, state, a, t, log_density),
            state,
            a,
        )

    def finish(a: MAMSAdaptation) -> MAMSParams:
        early = begin_adjusted(a)
        a = jax.tree.map(lambda x, y: jnp.where(a.adjusted > 0, x, y), a, early)
        average = a.step_size
        size = jnp.where(a.adjusted > 0, average_final(average), jnp.exp(average.log_step_size))
        return MAMSParams(size, a.trajectory_length, a.unadjusted.params.metric)

    return Warmup(init, warm, finish)
