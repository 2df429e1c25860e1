"""A warm-up that ends itself, once log-density and step size have settled."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnnmcmc.samplers.kernel import Warmup

# The log-density is compared between windows of this share of the warm-up.
WINDOWS = 20
# Shorter windows tell a trend from noise too badly: such a warm-up runs its length.
SHORTEST_WINDOW = 50
# Means of windows differ by less than this times their spread, step sizes by less than this factor.
SETTLED_SHIFT, SETTLED_GROWTH = 0.5, 1.25


class Settling(NamedTuple):
    """The adaptation, its clock, and what the windows have shown so far.

    Parameters
    ----------
    inner : pytree
        State of the warm-up that may end early.
    clock : int32
        The step of that warm-up which is next; it jumps.
    total, spread : scalar
        Sums over the window of the log-density (less that of the window's start), and of its
        distance from the last window's mean.
    start : scalar
        Log-density at the window's start.
    means, step_sizes : array (2,)
        Mean log-density and last step size of the window before last, and of the last.
    windows : int32
        How many are complete.
    info : Info
        Of the last step.
    """

    inner: Any
    clock: jax.Array
    total: jax.Array
    spread: jax.Array
    start: jax.Array
    means: jax.Array
    step_sizes: jax.Array
    windows: jax.Array
    info: Any


def until_settled(
    rules: Warmup, num_steps: int, resume_at: int, no_info: Callable[[jax.Array], Any]
) -> Warmup:
    r"""Return the warm-up that skips to its last phases when a chain has settled.

    Up to step ``resume_at``, twentieths of the warm-up are compared. With mean log-density
    :math:`m_k` in window k and mean distance :math:`s_k` from :math:`m_{k-1}` in it, the chain has
    settled if :math:`|m_k - m_{k-1}|` and :math:`|m_k - m_{k-2}|` are below :math:`s_k / 2` and
    the step size changed by less than a quarter over these windows. Then step ``resume_at`` is
    next. A chain that is through with its warm-up stays where it is: its further steps have the
    statistics of its last one, and cost no gradient; where chains advance side by side (GPU,
    groups), gradients are computed along with the others', and not counted.

    Parameters
    ----------
    rules : Warmup
    num_steps : int
        Its most steps.
    resume_at : int
        The step at which it begins to do what a settled chain needs too.
    no_info : callable
        ``no_info(position) -> Info`` before the first step.

    Returns
    -------
    Warmup
    """
    window = num_steps // WINDOWS
    if window < SHORTEST_WINDOW:
        return rules

    def init(position: jax.Array) -> Settling:
        zero, nought = jnp.zeros((), position.dtype), jnp.zeros((), jnp.int32)
        pair = jnp.zeros(2, position.dtype)
        known = zero, zero, zero, pair, pair, nought
        return Settling(rules.init(position), nought, *known, no_info(position))

    def end_window(a: Settling, step_size: jax.Array) -> Settling:
        mean = a.start + a.total * (1.0 / window)
        spread = a.spread * (1.0 / window)
        shifts = jnp.abs(mean - a.means)
        growth = jnp.maximum(step_size, a.step_sizes) / jnp.minimum(step_size, a.step_sizes)
        # Comparisons with NaN are false: such a chain has not settled.
        settled = (
            (a.windows >= 2)
            & jnp.all(shifts < SETTLED_SHIFT * spread)
            & jnp.all(growth < SETTLED_GROWTH)
        )
        return a._replace(
            clock=jnp.where(settled, resume_at, a.clock),
            means=jnp.stack([a.means[1], mean]),
            step_sizes=jnp.stack([a.step_sizes[1], step_size]),
            windows=a.windows + 1,
        )

    def look(a: Settling, info) -> Settling:
        """Take in a step that was step ``clock - 1``."""
        done = a.clock % window
        first = done == 1
        start = jnp.where(first, info.log_density, a.start)
        away = info.log_density - start
        total = jnp.where(first, 0.0, a.total) + away
        off = jnp.abs(info.log_density - a.means[1])
        a = a._replace(start=start, total=total, spread=jnp.where(first, 0.0, a.spread) + off)
        return jax.lax.cond(done == 0, lambda a: end_window(a, info.step_size), lambda a: a, a)

    def step(key, state, a: Settling, t, log_density):
        def go(state, a):
            state, inner, info = rules.step(key, state, a.inner, a.clock, log_density)
            a = a._replace(inner=inner, clock=a.clock + 1, info=info)
            a = jax.lax.cond(a.clock <= resume_at, lambda a: look(a, info), lambda a: a, a)
            return state, a, info

        def rest(state, a):
            return state, a, jax.tree.map(_uncounted, a.info)

        return jax.lax.cond(a.clock < num_steps, go, rest, state, a)

    return Warmup(init, step, lambda a: rules.finish(a.inner))


def _uncounted(value: jax.Array) -> jax.Array:
    """Return a statistic of a step that was not made: what counts something is nought."""
    return value if jnp.issubdtype(value.dtype, jnp.floating) else jnp.zeros_like(value)
