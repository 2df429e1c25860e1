"""Window adaptation: step size by dual averaging, diagonal metric from windows of draws.

Stan's schedule (Stan Reference Manual, "HMC algorithm parameters"), composed step by step from
blackjax's parts so that a warm-up can stop and go on between any two steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.adaptation.mass_matrix import mass_matrix_adaptation
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule

from bnnmcmc.samplers.kernel import Warmup


class HamiltonianParams(NamedTuple):
    """Step size (scalar) and diagonal inverse mass matrix (size,)."""

    step_size: jax.Array
    inverse_mass_matrix: jax.Array


class WindowState(NamedTuple):
    """Dual averaging, window moments, the metric in use, and the number of steps done."""

    step_size: Any
    moments: Any
    inverse_mass_matrix: jax.Array
    steps: jax.Array


def window_warmup(step, num_steps: int, initial_step_size: float, target: float) -> Warmup:
    """Build the warm-up of a Hamiltonian kernel.

    Parameters
    ----------
    step : callable
        ``step(key, state, HamiltonianParams, log_density) -> (state, Info)``; Info has
        ``acceptance_rate``.
    num_steps : int
        Length of the warm-up, which sets the windows.
    initial_step_size : float
        Where dual averaging starts.
    target : float
        Acceptance rate aimed at.

    Returns
    -------
    Warmup
    """
    average_init, average_update, average_final = dual_averaging_adaptation(target)
    moments_init, moments_update, moments_final = mass_matrix_adaptation(True)
    schedule = build_schedule(max(num_steps, 1)).astype(jnp.int32)

    def init(position: jax.Array) -> WindowState:
        moments = moments_init(position.shape[0])
        size = jnp.asarray(initial_step_size, position.dtype)
        return WindowState(
            average_init(size), moments, moments.inverse_mass_matrix, jnp.zeros((), jnp.int32)
        )

    def params_in_use(adaptation: WindowState) -> HamiltonianParams:
        return HamiltonianParams(
            jnp.exp(adaptation.step_size.log_step_size), adaptation.inverse_mass_matrix
        )

    def end_window(adaptation: WindowState) -> WindowState:
        moments = moments_final(adaptation.moments)
        return adaptation._replace(
            step_size=average_init(average_final(adaptation.step_size)),
            moments=moments,
            inverse_mass_matrix=moments.inverse_mass_matrix,
        )

    def adapt(adaptation, state, info, t):
        slow, window_ends = schedule[t, 0] == 1, schedule[t, 1] == 1
        moments = jax.lax.cond(
            slow, lambda m: moments_update(m, state.position), lambda m: m, adaptation.moments
        )
        adaptation = WindowState(
            average_update(adaptation.step_size, info.acceptance_rate),
            moments,
            adaptation.inverse_mass_matrix,
            adaptation.steps + 1,
        )
        return jax.lax.cond(window_ends, end_window, lambda a: a, adaptation)

    def warm(key, state, adaptation, t, log_density):
        state, info = step(key, state, params_in_use(adaptation), log_density)
        return state, adapt(adaptation, state, info, t), info

    def finish(adaptation: WindowState) -> HamiltonianParams:
        # Right after a restart the running average is still empty: take the value in use.
        average = adaptation.step_size
        size = jnp.where(
            average.step > 1, jnp.exp(average.log_step_size_avg), jnp.exp(average.log_step_size)
        )
        return HamiltonianParams(size, adaptation.inverse_mass_matrix)

    return Warmup(init, warm, finish, params_in_use, adapt)
