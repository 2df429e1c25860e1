"""The warm-up of a network's chain: from an optimiser's weights, by cheap steps, to the trees.

The weights are a mode, and far from the typical set. A trajectory spends hundreds of gradients on
each step of the way there, with a step size found at the wrong place; microcanonical Langevin
dynamics without adjustment spends one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.mcmc.integrators import IntegratorState

from bnnmcmc.errors import InputError
from bnnmcmc.samplers import mass
from bnnmcmc.samplers.kernel import Warmup
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.window import HamiltonianParams

# The end of the warm-up, with trees: a fifth of its steps, and no more than this.
TUNED_SHARE, MAX_TUNED = 5, 100
# The end of the walk that tells the metric, when it has cooled; with fewer draws it tells nothing.
WINDOW_SHARE, MIN_DRAWS = 5, 10
# A leapfrog step is shorter than the walk's; where the search for its size begins.
FIRST_SHARE = 0.3


class NetworkState(NamedTuple):
    """The walk's tuning, direction and draws; dual averaging, the metric, steps with trees."""

    walk: Any
    direction: jax.Array
    window: Any
    step_size: Any
    inverse_mass_matrix: mass.Metric
    tuned: jax.Array


def walk_steps(num_steps: int) -> int:
    """Return how many steps of such a warm-up are steps of the walk."""
    return num_steps - min(num_steps // TUNED_SHARE, MAX_TUNED)


def network_warmup(
    step: Callable[..., Any],
    short: Callable[..., Any],
    make_state: Callable[..., Any],
    walked: Callable[[Any], Any],
    num_steps: int,
    initial_step_size: float,
    target: float,
    metric: str,
    max_rank: int,
    cutoff: float,
) -> Warmup:
    """Build the warm-up: a walk by `mclmc`, hot at first; the metric; the step size.

    Of ``num_steps``, all but the last fifth (at most 100) are steps of the walk, one gradient each.
    The last fifth of the walk gives the metric, and the walk's step size the first one of dual
    averaging, which then sees trees: short ones for half of the rest.

    Parameters
    ----------
    step, short : callable
        The kernel's step, and a cheaper one of the same kind.
    make_state : callable
        ``make_state(position, logdensity, gradient) -> State``; a State is these three.
    walked : callable
        ``walked(MCLMCInfo) -> Info`` of the kernel.
    num_steps : int
        Steps of the whole warm-up.
    initial_step_size : float
        At the first step of the walk.
    target : float
        Acceptance rate aimed at.
    metric, max_rank, cutoff
        See `mass.estimator`; but the diagonal is that of draws and gradients
        (`mass.score_estimator`).

    Returns
    -------
    Warmup
    """
    average_init, average_update, average_final = dual_averaging_adaptation(target)
    # Hot at first: it has no metric.
    walker = mclmc(
        energy_variance_start=5.0,
        energy_variance_end=0.05,
        initial_step_size=initial_step_size,
        metric="identity",
    )
    switch = walk_steps(num_steps)
    tuning = num_steps - switch
    rules = walker.warmup(switch)
    looked_at = switch // WINDOW_SHARE
    every = max(1, looked_at // mass.MAX_WINDOW_DRAWS)
    if metric == "diagonal":
        estimate = mass.score_estimator()
    else:
        estimate = mass.estimator(metric, max_rank, cutoff, max(looked_at // every, 1))

    def init(position: jax.Array) -> NetworkState:
        if position.shape[0] < 2:
            raise InputError(
                'sampler.adaptation: found "network", which needs at least 2 parameters; use '
                '"window" for a single one'
            )
        unit, window = estimate.init(position)
        size = jnp.asarray(initial_step_size, position.dtype)
        return NetworkState(
            rules.init(position),
            jnp.zeros_like(position),
            window,
            average_init(size),
            unit,
            jnp.zeros((), jnp.int32),
        )

    def walk(key, state, a: NetworkState, t, log_density):
        def fresh():
            noise = jax.random.normal(jax.random.fold_in(key, 1), a.direction.shape)
            noise = noise.astype(a.direction.dtype)
            return noise * jax.lax.rsqrt(noise @ noise)

        direction = jax.lax.cond(t == 0, fresh, lambda: a.direction)
        position, log_density_here, gradient = state
        at = IntegratorState(position, direction, log_density_here, gradient)
        at, inner, info = rules.step(key, at, a.walk, t, log_density)
        # Every so many steps up to the last one.
        since_end = switch - 1 - t
        window = jax.lax.cond(
            (since_end < looked_at) & (since_end % every == 0),
            lambda w: estimate.update(w, at.position, at.logdensity_grad),
            lambda w: w,
            a.window,
        )
        state = make_state(at.position, at.logdensity, at.logdensity_grad)
        return state, a._replace(walk=inner, direction=at.momentum, window=window), walked(info)

    def first_step_size(a: NetworkState, speed) -> jax.Array:
        # Untuned, the step size is the one asked for. A step of the walk has its size for a length.
        walked_size = FIRST_SHARE * rules.finish(a.walk).step_size / speed
        return jnp.where(a.walk.weight_sum > 0, walked_size, initial_step_size).astype(speed.dtype)

    def begin_tuning(key, a: NetworkState) -> NetworkState:
        found, window = a.inverse_mass_matrix, a.window
        if looked_at // every >= MIN_DRAWS:
            found, window = estimate.final(a.window)
        noise = jax.random.normal(jax.random.fold_in(key, 2), a.direction.shape)
        velocity = mass.velocity(found, mass.momentum(found, noise.astype(a.direction.dtype)))
        return a._replace(
            window=window,
            inverse_mass_matrix=found,
            step_size=average_init(first_step_size(a, jnp.sqrt(velocity @ velocity))),
        )

    def tune(key, state, a: NetworkState, t, log_density):
        a = jax.lax.cond(t == switch, lambda a: begin_tuning(key, a), lambda a: a, a)
        # Short trees do not come to where a step is too long: begin anew from what they found.
        a = jax.lax.cond(
            (t == switch + tuning // 2) & (tuning > 1),
            lambda a: a._replace(step_size=average_init(average_final(a.step_size))),
            lambda a: a,
            a,
        )
        params = HamiltonianParams(jnp.exp(a.step_size.log_step_size), a.inverse_mass_matrix)
        state, info = jax.lax.cond(
            t < switch + tuning // 2,
            lambda state: short(key, state, params, log_density),
            lambda state: step(key, state, params, log_density),
            state,
        )
        average = average_update(a.step_size, info.acceptance_rate)
        return state, a._replace(step_size=average, tuned=a.tuned + 1), info

    def warm(key, state, a, t, log_density):
        return jax.lax.cond(
            t < switch,
            lambda state, a: walk(key, state, a, t, log_density),
            lambda state, a: tune(key, state, a, t, log_density),
            state,
            a,
        )

    def finish(a: NetworkState) -> HamiltonianParams:
        # Before the first tree the metric is the unit one, and momenta have the speed sqrt(size).
        speed = jnp.sqrt(jnp.asarray(a.direction.shape[0], a.direction.dtype))
        # Right after a restart the running average is still empty: take the value in use.
        average = a.step_size
        tuned = jnp.where(average.step > 1, average_final(average), jnp.exp(average.log_step_size))
        size = jnp.where(a.tuned > 0, tuned, first_step_size(a, speed))
        return HamiltonianParams(size, a.inverse_mass_matrix)

    return Warmup(init, warm, finish)
