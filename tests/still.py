"""A kernel that costs nothing to compile, for tests of what is around it."""

from typing import NamedTuple

import jax

from bnnmcmc import Kernel, Warmup


class State(NamedTuple):
    position: jax.Array
    logdensity: jax.Array


class Info(NamedTuple):
    log_density: jax.Array


def jitter(size=1e-4):
    """Walk at random, whatever the density: draws stay near the ensemble's members."""

    def init(key, position, log_density):
        return State(position, log_density(position))

    def step(key, state, params, log_density):
        moved = state.position + size * jax.random.normal(key, state.position.shape)
        return State(moved, state.logdensity), Info(moved.sum())

    def warmup(num_steps):
        def warm(key, state, adaptation, t, log_density):
            state, info = step(key, state, adaptation, log_density)
            return state, adaptation, info

        return Warmup(lambda position: position[0], warm, lambda adaptation: adaptation)

    return Kernel("jitter", init, warmup, step, exact=False, gradients_per_step=0)
