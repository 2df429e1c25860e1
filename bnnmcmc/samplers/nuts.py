"""The No-U-Turn sampler as a state machine: one leapfrog step, one gradient, at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.kernel import Kernel, Trajectories, trajectory_step
from bnnmcmc.samplers.window import window_warmup

# A leapfrog step that loses more than this in energy ends the trajectory (the limit of Stan).
MAX_ENERGY_ERROR = 1000.0


class NUTSState(NamedTuple):
    """Position (size,), its log-density (scalar) and gradient (size,)."""

    position: jax.Array
    logdensity: jax.Array
    gradient: jax.Array


class NUTSInfo(NamedTuple):
    """Statistics of one NUTS transition."""

    log_density: jax.Array
    energy: jax.Array
    acceptance_rate: jax.Array
    tree_depth: jax.Array
    diverging: jax.Array
    gradients: jax.Array
    step_size: jax.Array


class Ends(NamedTuple):
    """The first and the last point of a trajectory, (2, size) each."""

    position: jax.Array
    momentum: jax.Array
    gradient: jax.Array


class Part(NamedTuple):
    """A stretch of a trajectory: a state drawn from it, and what is summed over its points.

    Points have weight exp(H_0 - H), where H_0 is the energy at the start of the trajectory.
    """

    state: NUTSState
    energy: jax.Array
    log_weight: jax.Array
    momentum_sum: jax.Array


class Tree(NamedTuple):
    """A trajectory under construction.

    Parameters
    ----------
    key : array of uint32
        Key data: the random numbers of the leapfrog steps.
    directions : uint32
        Bit j says whether doubling j goes forwards in time.
    start_energy : scalar
    depth, leaf, gradients : int32
        Doublings done; points of the doubling under way; leapfrog steps altogether.
    ends : Ends
    whole, new : Part
        The trajectory up to the last doubling; the doubling under way.
    acceptance : scalar
        Sum of min(1, exp(H_0 - H)) over all points but the start.
    diverging, turning : bool
    """

    key: jax.Array
    directions: jax.Array
    start_energy: jax.Array
    depth: jax.Array
    leaf: jax.Array
    gradients: jax.Array
    ends: Ends
    whole: Part
    new: Part
    acceptance: jax.Array
    diverging: jax.Array
    turning: jax.Array


class Checkpoints(NamedTuple):
    """Momentum, and sum of momenta up to there, at the first points of open subtrees."""

    momentum: jax.Array
    momentum_sum: jax.Array

VARIANT = "loop"

def nuts(
    max_depth: int = 10, target_acceptance: float = 0.8, initial_step_size: float = 0.01
) -> Kernel:
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

    def init(key, position, log_density):
        return NUTSState(position, *jax.value_and_grad(log_density)(position))

    def scratch(position):
        rows = jnp.zeros((max_depth, *position.shape), position.dtype)
        return Checkpoints(rows, rows)

    def begin(key, state, params):
        key_momentum, key_directions, key_leaves = jax.random.split(key, 3)
        noise = jax.random.normal(key_momentum, state.position.shape, state.position.dtype)
        momentum = noise / jnp.sqrt(params.inverse_mass_matrix)
        energy = kinetic_energy(momentum, params.inverse_mass_matrix) - state.logdensity
        zero, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
        whole = Part(state, energy, jnp.zeros_like(energy), momentum)
        return Tree(
            jax.random.key_data(key_leaves),
            jax.random.bits(key_directions, (), jnp.uint32),
            energy,
            zero,
            zero,
            zero,
            Ends(*(jnp.stack([x, x]) for x in (state.position, momentum, state.gradient))),
            whole,
            whole,
            jnp.zeros_like(energy),
            false,
            false,
        )

    def advance(tree, checkpoints, params, log_density):
        metric, dtype = params.inverse_mass_matrix, tree.start_energy.dtype
        forwards = (tree.directions >> tree.depth.astype(jnp.uint32)) & 1 == 1
        at = jax.tree.map(lambda x: jnp.where(forwards, x[1], x[0]), tree.ends)
        step_size = jnp.where(forwards, params.step_size, -params.step_size)
        momentum = at.momentum + 0.5 * step_size * at.gradient
        position = at.position + step_size * metric * momentum
        log_density_there, gradient = jax.value_and_grad(log_density)(position)
        momentum = momentum + 0.5 * step_size * gradient
        is_end = jnp.stack([~forwards, forwards])[:, None]
        ends = jax.tree.map(
            lambda x, old: jnp.where(is_end, x, old), Ends(position, momentum, gradient), tree.ends
        )
        energy = kinetic_energy(momentum, metric) - log_density_there
        gain = tree.start_energy - energy
        gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
        diverging = gain < -MAX_ENERGY_ERROR

        key = jax.random.fold_in(jax.random.wrap_key_data(tree.key), tree.gradients)
        log_uniform = jnp.log(jax.random.uniform(key, (2,), dtype))
        first, old = tree.leaf == 0, tree.new
        log_weight = jnp.where(first, gain, jnp.logaddexp(old.log_weight, gain))
        take = first | (log_uniform[0] < gain - log_weight)
        there = NUTSState(position, log_density_there, gradient)
        state, new_energy = jax.tree.map(
            lambda a, b: jnp.where(take, a, b), (there, energy), (old.state, old.energy)
        )
        momentum_sum = momentum + jnp.where(first, 0.0, old.momentum_sum)
        new = Part(state, new_energy, log_weight, momentum_sum)
        checkpoints, turning = check(checkpoints, tree.leaf, momentum, momentum_sum, metric)

        whole = tree.whole
        done = tree.leaf + 1 == jnp.left_shift(1, tree.depth)
        good = done & ~turning & ~diverging

        def merge():
            take = log_uniform[1] < log_weight - whole.log_weight
            state, energy = jax.tree.map(
                lambda a, b: jnp.where(take, a, b),
                (new.state, new.energy),
                (whole.state, whole.energy),
            )
            momentum_sum = whole.momentum_sum + new.momentum_sum
            log_weight_ = jnp.logaddexp(whole.log_weight, log_weight)
            return Part(state, energy, log_weight_, momentum_sum), is_turning(
                ends.momentum[0], ends.momentum[1], momentum_sum, metric
            )

        whole, turned = jax.lax.cond(good, merge, lambda: (whole, turning))
        over = done | turning | diverging
        return tree._replace(
            depth=tree.depth + over,
            leaf=jnp.where(over, 0, tree.leaf + 1),
            gradients=tree.gradients + 1,
            ends=ends,
            whole=whole,
            new=new,
            acceptance=tree.acceptance + jnp.exp(jnp.minimum(gain, 0.0)),
            diverging=diverging,
            turning=turned,
        ), checkpoints

    def check(checkpoints, leaf, momentum, momentum_sum, metric):
        row = jax.lax.population_count(leaf >> 1)
        open_ = jax.lax.population_count((~leaf & (leaf + 1)) - 1)  # trailing ones
        even = open_ == 0
        lowest = row - open_ + 1
        if VARIANT == "none":
            return checkpoints, jnp.asarray(False)
        write = lambda rows, value: jax.lax.dynamic_update_index_in_dim(
            rows,
            jnp.where(even, value, jax.lax.dynamic_index_in_dim(rows, row, keepdims=False)),
            row, 0)
        checkpoints = Checkpoints(write(checkpoints.momentum, momentum), write(checkpoints.momentum_sum, momentum_sum))
        if VARIANT == "loop":
            def body(c):
                i, _ = c
                r = jax.lax.dynamic_index_in_dim(checkpoints.momentum, i, keepdims=False)
                s = jax.lax.dynamic_index_in_dim(checkpoints.momentum_sum, i, keepdims=False)
                return i - 1, is_turning(r, momentum, momentum_sum - s + r, metric)
            _, turning = jax.lax.while_loop(lambda c: (c[0] >= lowest) & ~c[1], body, (row, jnp.asarray(False)))
            return checkpoints, turning
        def rows():
            velocity = metric * momentum
            rest = momentum_sum - 0.5 * momentum
            R, S = checkpoints
            if VARIANT == "dots":
                # rho_i = rest - (S_i - R_i/2)
                T = 0.5 * R - S
                right = T @ velocity + velocity @ rest
                left = R @ (metric * rest) + jnp.sum(R * metric * T, axis=1)
            else:
                rho = rest - (S - 0.5 * R)
                right = rho @ velocity
                left = jnp.einsum("id,id->i", R * metric, rho)
            i = jnp.arange(max_depth)
            return jnp.any((i >= lowest) & (i <= row) & ((left <= 0) | (right <= 0)))
        return checkpoints, jax.lax.cond(even, lambda: jnp.asarray(False), rows)

    def finished(tree):
        return tree.diverging | tree.turning | (tree.depth == max_depth)

    def end(tree, params):
        state = tree.whole.state
        return state, NUTSInfo(
            state.logdensity,
            tree.whole.energy,
            tree.acceptance / tree.gradients.astype(tree.acceptance.dtype),
            tree.depth,
            tree.diverging,
            tree.gradients,
            params.step_size,
        )

    trajectories = Trajectories(scratch, begin, advance, finished, end)
    step = trajectory_step(trajectories)

    def warmup(num_steps: int):
        return window_warmup(step, num_steps, initial_step_size, target_acceptance)

    return Kernel("nuts", init, warmup, step, True, None, trajectories)


def kinetic_energy(momentum, metric):
    return 0.5 * jnp.dot(momentum, metric * momentum)


def is_turning(first, last, total, metric):
    """generalised criterion"""
    rho = total - 0.5 * (first + last)
    return (jnp.dot(metric * first, rho) <= 0) | (jnp.dot(metric * last, rho) <= 0)
