"""Hamiltonian Monte Carlo (blackjax) with jittered trajectories, with window adaptation."""

from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc.metrics import gaussian_euclidean

from bnnmcmc.errors import InputError
from bnnmcmc.samplers import mass
from bnnmcmc.samplers.kernel import Kernel
from bnnmcmc.samplers.options import check_acceptance, check_jitter, check_positive
from bnnmcmc.samplers.window import window_warmup


class HMCInfo(NamedTuple):
    """Statistics of one HMC transition."""

    log_density: jax.Array
    energy: jax.Array
    acceptance_rate: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array


def hmc(
    num_leapfrog: int = 30,
    jitter: float = 0.5,
    target_acceptance: float = 0.8,
    initial_step_size: float = 0.01,
    metric: str = "diagonal",
    max_rank: int = 20,
    cutoff: float = 2.0,
) -> Kernel:
    """Build Hamiltonian Monte Carlo.

    The number of leapfrog steps of a draw is uniform on ``num_leapfrog - h .. num_leapfrog + h``
    with ``h = floor(jitter * num_leapfrog)``, so that no direction is in
    resonance with the trajectory; the choice does not look at the state, so the target stays
    invariant (Neal 2011, section 5.4.2.2).

    Parameters
    ----------
    num_leapfrog : int
        Mean number of leapfrog steps, one gradient each.
    jitter : float
        Relative half-width, in [0, 1); 0 fixes the length.
    target_acceptance : float
        Acceptance rate the warm-up aims at, in (0, 1).
    initial_step_size : float
        Step size at the first warm-up step.
    metric, max_rank, cutoff
        See `nuts`.

    Returns
    -------
    Kernel

    Raises
    ------
    InputError
        An argument out of range.
    """
    if num_leapfrog < 1:
        raise InputError(f"sampler.num_leapfrog: found {num_leapfrog}, expected at least 1")
    check_jitter(jitter)
    check_acceptance(target_acceptance)
    check_positive(initial_step_size=initial_step_size)
    mass.check_metric(metric, max_rank, cutoff)
    transition = blackjax.hmc.build_kernel()
    half = int(jitter * num_leapfrog)
    shortest, longest = num_leapfrog - half, num_leapfrog + half

    def init(key, position, log_density):
        return blackjax.hmc.init(position, log_density)

    def step(key, state, params, log_density):
        key_length, key_move = jax.random.split(key)
        length = jax.random.randint(key_length, (), shortest, longest + 1)
        used = params.inverse_mass_matrix
        new, info = transition(
            key_move, state, log_density, params.step_size, blackjax_metric(used), length
        )
        # blackjax gives the proposal's energy, also of a proposal that was turned down.
        kinetic = mass.kinetic(used, info.momentum)
        return new, HMCInfo(
            new.logdensity,
            jnp.where(info.is_accepted, info.energy, kinetic - state.logdensity),
            info.acceptance_rate,
            info.is_divergent,
            length,
            params.step_size,
        )

    def warmup(num_steps: int):
        options = initial_step_size, target_acceptance, metric, max_rank, cutoff
        return window_warmup(step, lambda state: state.logdensity_grad, num_steps, *options)

    fixed = num_leapfrog if shortest == longest else None
    return Kernel(
        "hmc",
        init,
        warmup,
        step,
        exact=True,
        gradients_per_step=fixed,
        wanted={"acceptance_rate": target_acceptance},
    )


def blackjax_metric(metric: mass.Metric):
    """Return the metric as blackjax takes it, with the root of a dense one as it is."""
    if not isinstance(metric, mass.Dense):
        return metric
    plain = gaussian_euclidean(jnp.ones(metric.inverse.shape[0], metric.inverse.dtype))

    def sample_momentum(key, position):
        return mass.momentum(metric, plain.sample_momentum(key, position))

    def kinetic_energy(momentum, position=None):
        return mass.kinetic(metric, momentum)

    return plain._replace(sample_momentum=sample_momentum, kinetic_energy=kinetic_energy)
