"""Window adaptation: step size by dual averaging, metric from windows of draws.

Stan's schedule (Stan Reference Manual, "HMC algorithm parameters"), composed step by step from
blackjax's parts so that a warm-up can stop and go on between any two steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.adaptation.window_adaptation import build_schedule

from bnnmcmc.samplers.kernel import Warmup
from bnnmcmc.samplers.mass import Metric, estimator


class HamiltonianParams(NamedTuple):
    """Step size (scalar) and metric (see `mass`)."""

    step_size: jax.Array
    inverse_mass_matrix: Metric


class WindowState(NamedTuple):
    """Dual averaging, the window's draws, the metric in use, and the number of steps done."""

    step_size: Any
    window: Any
    inverse_mass_matrix: Metric
    steps: jax.Array


def window_warmup(
    step,
    gradient,
    num_steps: int,
    initial_step_size: float,
    target: float,
    metric: str,
    max_rank: int,
    cutoff: float,
) -> Warmup:
    """Build the warm-up of a Hamiltonian kernel.

    Parameters
    ----------
    step : callable
        ``step(key, state, HamiltonianParams, log_density) -> (state, Info)``; Info has
        ``acceptance_rate``.
    gradient : callable
        ``gradient(state)``: that of the log-density, (size,).
    num_steps : int
        Length of the warm-up, which sets the windows.
    initial_step_size : float
        Where dual averaging starts.
    target : float
        Acceptance rate aimed at.
    metric, max_rank, cutoff
        See `mass.estimator`.

    Returns
    -------
    Warmup
        In halves only for the diagonal metric: the others' estimates cost more than a gradient.
    """
    average_init, average_update, average_final = dual_averaging_adaptation(target)
    schedule = build_schedule(max(num_steps, 1)).astype(jnp.int32)
    estimate = estimator(metric, max_rank, cutoff, longest_window(schedule))

    def init(position: jax.Array) -> WindowState:
        unit, window = estimate.init(position)
        size = jnp.asarray(initial_step_size, position.dtype)
        return WindowState(average_init(size), window, unit, jnp.zeros((), jnp.int32))

    def params_in_use(adaptation: WindowState) -> HamiltonianParams:
        return HamiltonianParams(
            jnp.exp(adaptation.step_size.log_step_size), adaptation.inverse_mass_matrix
        )

    def end_window(adaptation: WindowState) -> WindowState:
        found, window = estimate.final(adaptation.window)
        return adaptation._replace(
            step_size=average_init(average_final(adaptation.step_size)),
            window=window,
            inverse_mass_matrix=found,
        )

    def adapt(adaptation, state, info, t):
        slow, window_ends = schedule[t, 0] == 1, schedule[t, 1] == 1
        window = jax.lax.cond(
            slow,
            lambda w: estimate.update(w, state.position, gradient(state)),
            lambda w: w,
            adaptation.window,
        )
        adaptation = WindowState(
            average_update(adaptation.step_size, info.acceptance_rate),
            window,
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

    if not estimate.cheap:
        return Warmup(init, warm, finish)
    return Warmup(init, warm, finish, params_in_use, adapt)


def longest_window(schedule: jax.Array) -> int:
    """Return the most slow steps up to the end of a window, of a schedule as blackjax builds it."""
    slow, ends = np.asarray(schedule).T
    windows = np.split(slow, np.flatnonzero(ends) + 1)
    return int(max(window.sum() for window in windows))
