"""The No-U-Turn sampler (blackjax), with window adaptation."""

from typing import NamedTuple

import blackjax
import jax

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.kernel import Kernel
from bnnmcmc.samplers.window import window_warmup


class NUTSInfo(NamedTuple):
    """Statistics of one NUTS transition."""

    log_density: jax.Array
    energy: jax.Array
    acceptance_rate: jax.Array
    tree_depth: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array


def nuts(
    max_depth: int = 10, target_acceptance: float = 0.8, initial_step_size: float = 0.01
) -> Kernel:
    """Build the No-U-Turn sampler with a diagonal metric.

    Parameters
    ----------
    max_depth : int
        Largest number of doublings: a draw costs at most ``2**max_depth - 1`` gradients.
    target_acceptance : float
        Mean acceptance statistic the warm-up aims at, in (0, 1).
    initial_step_size : float
        Step size at the first warm-up step.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.

    References
    ----------
    Hoffman and Gelman (2014), JMLR 15; multinomial variant of Betancourt (2017), 1701.02434.
    """
    if not 1 <= max_depth <= 20:
        raise InputError(f"sampler.max_depth: found {max_depth}, expected 1 to 20")
    if not 0 < target_acceptance < 1:
        raise InputError(
            f"sampler.target_acceptance: found {target_acceptance}, expected between 0 and 1"
        )
    if not initial_step_size > 0:
        raise InputError(
            f"sampler.initial_step_size: found {initial_step_size}, expected more than 0"
        )
    transition = blackjax.nuts.build_kernel()

    def init(key, position, log_density):
        return blackjax.nuts.init(position, log_density)

    def step(key, state, params, log_density):
        state, info = transition(
            key, state, log_density, params.step_size, params.inverse_mass_matrix, max_depth
        )
        return state, NUTSInfo(
            state.logdensity,
            info.energy,
            info.acceptance_rate,
            info.num_trajectory_expansions,
            info.is_divergent,
            info.num_integration_steps,
            params.step_size,
        )

    def warmup(num_steps: int):
        return window_warmup(step, num_steps, initial_step_size, target_acceptance)

    return Kernel("nuts", init, warmup, step, exact=True, gradients_per_step=None)
