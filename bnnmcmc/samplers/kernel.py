"""The kernel protocol: what the block loop needs of a sampler.

A kernel sees a log-density over a flat vector and nothing of the model behind it. It works on
one chain; the block loop advances many. A minibatch kernel sees, besides, the log-density as
estimated from a few of the rows that it is a sum over.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from bnnmcmc.samplers.kronecker import Matrix

LogDensity = Callable[[jax.Array], jax.Array]

# How a statistic of several steps becomes the statistic of one kept draw. Statistics are named
# by what they are, so every kernel's `Info` uses names from this table.
REDUCTIONS = {
    "log_density": "last",
    "energy": "last",
    "step_size": "last",
    "decoherence_length": "last",
    "trajectory_length": "last",
    "acceptance_rate": "mean",
    "energy_error_squared": "mean",
    "tree_depth": "max",
    "diverging": "sum",
    "gradients": "sum",
    "rows": "sum",
}


class Warmup(NamedTuple):
    """The adaptation of one chain, step by step.

    Parameters
    ----------
    init : callable
        ``init(position) -> adaptation``: the adaptation's state before the first step.
    step : callable
        ``step(key, state, adaptation, t, log_density) -> (state, adaptation, Info)``, where
        ``t`` counts from zero.
    finish : callable
        ``finish(adaptation) -> params`` for `Kernel.step`. May be called before the last step:
        the parameters are then the best known so far.
    in_use, adapt : callable, optional
        The two halves of ``step`` around the transition, for kernels with `Trajectories`:
        ``in_use(adaptation) -> params`` and
        ``adapt(adaptation, state, info, t) -> adaptation``.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[..., tuple[Any, Any, Any]]
    finish: Callable[[Any], Any]
    in_use: Callable[[Any], Any] | None = None
    adapt: Callable[..., Any] | None = None


class Trajectories(NamedTuple):
    """The parts of a step that is a trajectory of varying length, one gradient at a time.

    For chains that advance side by side: one that is through with a trajectory can begin the next
    while the others are still on theirs. Everything is about one chain.

    Parameters
    ----------
    scratch : callable
        ``scratch(position) -> scratch``: memory that a trajectory works in. What is in it
        before the first and after the last `advance` is of no consequence.
    randomise : callable
        ``randomise(key, position) -> noise``: the random numbers of a trajectory.
    begin : callable
        ``begin(noise, state, params) -> trajectory``.
    advance : callable
        ``advance(trajectory, scratch, params, log_density) -> (trajectory, scratch)``, at the cost
        of one gradient.
    finished : callable
        ``finished(trajectory) -> bool``; False for one just begun.
    end : callable
        ``end(trajectory, params) -> (State, Info)`` of a finished trajectory.
    """

    scratch: Callable[[jax.Array], Any]
    randomise: Callable[[jax.Array, jax.Array], Any]
    begin: Callable[[Any, Any, Any], Any]
    advance: Callable[[Any, Any, Any, LogDensity], tuple[Any, Any]]
    finished: Callable[[Any], jax.Array]
    end: Callable[[Any, Any], tuple[Any, Any]]


def trajectory_step(parts: Trajectories) -> Callable[..., tuple[Any, Any]]:
    """Return the `Kernel.step` that runs a trajectory from beginning to end."""

    def step(key, state, params, log_density):
        trajectory = parts.begin(parts.randomise(key, state.position), state, params)
        trajectory, _ = jax.lax.while_loop(
            lambda loop: ~parts.finished(loop[0]),
            lambda loop: parts.advance(*loop, params, log_density),
            (trajectory, parts.scratch(state.position)),
        )
        return parts.end(trajectory, params)

    return step


class Kernel(NamedTuple):
    """A sampler.

    Parameters
    ----------
    name : str
    init : callable
        ``init(key, position, log_density) -> State``; a State is a NamedTuple with a field
        ``position`` (size,) and a field ``logdensity`` (scalar).
    warmup : callable
        ``warmup(num_steps) -> Warmup``.
    step : callable
        ``step(key, state, params, log_density) -> (State, Info)``; an Info is a NamedTuple of
        scalars, named by `REDUCTIONS`, with at least ``log_density``.
    exact : bool
        Whether the kernel leaves the target invariant (unadjusted kernels have a bias).
    gradients_per_step : int or None
        Gradient evaluations in one step, None if it varies.
    trajectories : Trajectories, optional
        The parts of ``step``, if it is a trajectory of varying length.
    wanted : mapping
        What the kernel aims at, or cannot exceed, by the name of the statistic: its target
        "acceptance_rate", the greatest "tree_depth", the "energy_error_squared" it is tuned for.
    for_matrices : callable, optional
        ``for_matrices(matrices) -> Kernel``: the kernel for positions that consist of these
        (`kronecker.matrices`), if it can make use of that.
    """

    name: str
    init: Callable[[jax.Array, jax.Array, LogDensity], Any]
    warmup: Callable[[int], Warmup]
    step: Callable[[jax.Array, Any, Any, LogDensity], tuple[Any, Any]]
    exact: bool
    gradients_per_step: int | None
    trajectories: Trajectories | None = None
    wanted: Mapping[str, float] = MappingProxyType({})
    for_matrices: Callable[[tuple[Matrix, ...]], "Kernel"] | None = None


@dataclass(frozen=True, eq=False)
class RowDensity:
    r"""A log-density that is a prior and a sum over rows, for kernels that look at a few of them.

    .. math:: \log p(\theta) = \log p_0(\theta) + \sum_{i=1}^N \ell(\theta, x_i)

    It is a log-density like any other, ``density(position, *data)``, too.

    Parameters
    ----------
    log_prior : callable
        ``log_prior(position) -> scalar``.
    log_likelihood : callable
        ``log_likelihood(position, *rows) -> scalar``, summed over the rows it is given: arrays
        with the rows on their leading axes.
    """

    log_prior: Callable[..., jax.Array]
    log_likelihood: Callable[..., jax.Array]

    def __call__(self, position: Any, *data: jax.Array) -> jax.Array:
        """Return the log-density (scalar) over all rows of ``data``."""
        return self.log_prior(position) + self.log_likelihood(position, *data)


class RowTarget(NamedTuple):
    r"""What a minibatch kernel sees: a log-density over a flat vector, whole and estimated.

    Parameters
    ----------
    rows : int
        N, the number of rows.
    log_density : callable
        ``log_density(position) -> scalar``, over all rows.
    estimate : callable
        ``estimate(position, batch) -> scalar``: the prior, and N / B times the log-likelihood of
        the rows whose numbers are in ``batch`` (B,).
    """

    rows: int
    log_density: LogDensity
    estimate: Callable[[jax.Array, jax.Array], jax.Array]


class MinibatchKernel(NamedTuple):
    """A sampler that looks at a batch of rows in each step. None leaves the target invariant.

    Which rows a step looks at follows from its key, so from the seed, the chain and the step.

    Parameters
    ----------
    name : str
    batch_size : int
        Rows in a batch.
    init : callable
        ``init(key, position, target) -> State``, as in `Kernel`, with a `RowTarget`; sees all rows.
    warmup : callable
        ``warmup(num_steps) -> Warmup``, whose ``step`` takes the `RowTarget`.
    sampling : callable
        ``sampling(num_warmup) -> step``, after a warm-up of so many steps; and
        ``step(key, state, params, t, target) -> (State, Info)``, where ``t`` counts from zero.
        ``t`` has no chain axis where chains advance side by side: what only some steps do is left
        out of the others. ``logdensity`` of a State, and ``log_density`` of an Info, are
        estimates; ``rows`` of an Info is the number of rows looked at, each as often as it was.
    gradients_per_step : int or None
        Gradient evaluations in a step of sampling, each of a batch; None if it varies.
    wanted : mapping
        As in `Kernel`.
    """

    name: str
    batch_size: int
    init: Callable[[jax.Array, jax.Array, RowTarget], Any]
    warmup: Callable[[int], Warmup]
    sampling: Callable[[int], Callable[..., tuple[Any, Any]]]
    gradients_per_step: int | None
    wanted: Mapping[str, float] = MappingProxyType({})

    @property
    def exact(self) -> bool:
        """False: gradient noise and the lack of an accept-reject step leave a bias."""
        return False

    @property
    def trajectories(self) -> None:
        """None: its steps are all of one length."""
        return None
