"""Data sets that a model says could have been observed: from its prior, and from its posterior."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.keys import stage_key
from bnnmcmc.predictive import BATCH, Draws, Pooled, data_sets, thinned_to

# What runs once, for milliseconds, is not worth a second of compiling.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
# Data sets of each kind at the most, and calls for those of the prior.
SETS, MAX_CALLS = 1000, 20
# Numbers in the positions drawn from a prior, unless that were less than LEAST_SETS of them.
MAX_SIZE, LEAST_SETS = 20_000_000, 32


def prior_draws(
    posterior,
    count: int,
    *,
    seed: int = 0,
    sampled: Sequence[bool] | None = None,
    around: Draws | None = None,
) -> Draws:
    r"""Draw positions from the prior.

    .. math:: \theta \sim p(\theta), \quad \phi \sim p(\phi)

    A position depends on the seed and its number alone.

    Parameters
    ----------
    posterior : Posterior
    count : int
    seed : int
    sampled : sequence of bool, optional
        Which leaves are sampled, all if not given; the others are as in the draws ``around``.
    around : Draws, optional

    Returns
    -------
    Draws
        One chain of ``count`` draws (fewer, if there are fewer draws ``around``), without the
        prior's own parameters: "network" is what the network computes with.

    Raises
    ------
    InputError
        A prior that is known by its log-density alone, so that it cannot be drawn from.
    """
    prior, likelihood = posterior.prior, posterior.likelihood
    if prior.sample is None:
        raise InputError("prior: it is known by its log-density alone, and may have no integral")
    if likelihood.sample is None and jax.tree.leaves(likelihood.init()):
        raise InputError(
            "likelihood: the prior of its own parameters is known by its log-density alone"
        )
    if sampled is not None and (prior.hierarchy is not None or around is None):
        raise InputError(
            "prior: with scales of its own, and some parameters that are not sampled, what it says "
            "of the others is not known"
        )
    of = trees.layout(jax.eval_shape(posterior.init, jax.random.key(0)))
    numbers = np.arange(count, dtype=np.uint32)
    flat = np.asarray(_sampler(posterior)(stage_key(seed, "prior-draws"), numbers))
    if sampled is not None:
        assert around is not None
        whole = thinned_to(around, count)
        fixed = np.concatenate([block.reshape(-1, of.size) for block in whole.blocks()])
        flat = flat[: len(fixed)]
        others = trees.part(fixed[: len(flat)], of, [not use for use in sampled])
        flat = trees.join(trees.part(flat, of, sampled), others, of, sampled)
    return Draws(of, 1, len(flat), lambda: [flat[None]])


@functools.lru_cache(maxsize=16)
def _sampler(posterior) -> Any:
    """Compile the draw of flat positions from the prior: (key, numbers) -> (count, size)."""
    shapes = jax.eval_shape(posterior.init, jax.random.key(0))["network"]

    def one(key, number):
        network, own = jax.random.split(jax.random.fold_in(key, number))
        likelihood = posterior.likelihood
        position = {
            "likelihood": likelihood.init()
            if likelihood.sample is None
            else likelihood.sample(own),
            "network": posterior.prior.sample(
                network, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            ),
        }
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(position)])

    return jax.jit(jax.vmap(one, in_axes=(None, 0)), compiler_options=COMPILER_OPTIONS)


def from_prior(run, draws: Draws, x, y) -> np.ndarray:
    """Return data sets drawn from a run's prior (see `data_sets`), at most `SETS`.

    Parameters
    ----------
    run : Run
    draws : Draws
        Those that `pool` was called with.
    x, y : arrays
        Rows, and their targets, as the network sees them.

    Raises
    ------
    InputError
        As `prior_draws`.
    """
    most = max(LEAST_SETS, MAX_SIZE // draws.layout.size)
    count = min(SETS, MAX_CALLS * min(BATCH, draws.chains * draws.draws), most)
    drawn = prior_draws(run.posterior, count, seed=run.seed, sampled=run.sampled, around=draws)
    return data_sets(run.posterior, drawn, x, y, seed=run.seed, like=draws)


def from_posterior(run, draws: Draws, x, y, pooled: Pooled | None = None) -> np.ndarray:
    """Return data sets drawn from a run's posterior (see `data_sets`), at most `SETS` or so.

    Parameters
    ----------
    run : Run
    draws : Draws
        Those that are pooled.
    x, y : arrays
        Rows, and their targets, as the network sees them.
    pooled : Pooled, optional
        Of these rows: its samples are used, if it has any, and nothing is computed again.
    """
    found = np.zeros((0, *np.shape(y)))
    if pooled is not None and pooled.samples is not None:
        found = pooled.samples
    # Few sets cannot show what is rare: each draw then makes several of them.
    some, repeat = thinned_to(draws, 2 * SETS), 0
    while len(found) < SETS and repeat < MAX_CALLS:
        more = data_sets(run.posterior, some, x, y, seed=run.seed, repeat=repeat, like=draws)
        found = np.concatenate([found, more])
        repeat += 1
    if len(found) <= SETS:
        return found
    # Not every so many: that might meet a few chains only.
    chosen = np.random.default_rng(run.seed).choice(len(found), SETS, replace=False)
    return found[np.sort(chosen)]
