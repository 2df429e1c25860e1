"""The log-density of a Bayesian neural network."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import Likelihood
from bnnmcmc.models.network import Network
from bnnmcmc.priors import Prior


@dataclass(frozen=True)
class Posterior:
    r"""A network, a likelihood and a prior: what is sampled.

    .. math:: \log p(\theta, \phi \mid x, y) = \log p(\theta) + \log p(\phi)
              + \sum_i \log p(y_i \mid f_\theta(x_i), \phi) + \text{const}

    A position is ``{"network": params, "likelihood": params}``; the second part is empty for a
    likelihood without parameters of its own. Data are arguments, never part of the object.

    Parameters
    ----------
    network : Network
    likelihood : Likelihood
    prior : Prior
        Over the network's parameters.
    """

    network: Network
    likelihood: Likelihood
    prior: Prior

    def arrays(self, x, y) -> tuple[jax.Array, jax.Array]:
        """Return rows as this model computes with them: in JAX's precision, classes as integers.

        Parameters
        ----------
        x : array (rows, features)
        y : array (rows, targets), or (rows,) class indices

        Returns
        -------
        tuple of two jax.Array

        Raises
        ------
        InputError
            They do not fit the model (see `check_outputs`).
        """
        dtype = jnp.result_type(float)
        x = jnp.asarray(x, dtype)
        y = jnp.asarray(y, dtype if self.likelihood.task == "regression" else jnp.int32)
        check_outputs(self, x, y)
        return x, y

    def init(self, key: jax.Array) -> Any:
        """Return a start position: the network's own initialisation."""
        return {"likelihood": self.likelihood.init(), "network": self.network.init(key)}

    def distribution(self, position: Any, x: jax.Array):
        """Return the predictive distribution of one position for rows ``x`` (rows, features)."""
        outputs = self.network.apply(position["network"], x)
        return self.likelihood.distribution(position["likelihood"], outputs)

    def log_prior(self, position: Any) -> jax.Array:
        """Return the log prior density (scalar) of a position."""
        return self.prior.log_density(position["network"]) + self.likelihood.log_prior(
            position["likelihood"]
        )

    def pointwise_log_likelihood(self, position: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the log-likelihood of every row, ``(rows,)``."""
        return self.distribution(position, x).log_prob(y)

    def log_likelihood(self, position: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the log-likelihood summed over rows (scalar)."""
        return self.pointwise_log_likelihood(position, x, y).sum()

    def log_density(self, position: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the unnormalised log posterior density (scalar)."""
        return self.log_prior(position) + self.log_likelihood(position, x, y)


def check_outputs(posterior: Posterior, x, y) -> None:
    """Check, without computing anything, that network, likelihood and data fit together.

    Parameters
    ----------
    posterior : Posterior
    x : array (rows, features)
    y : array (rows, targets) or (rows,)

    Raises
    ------
    InputError
        ``x`` is no table, a parameter is not of floating point, the network cannot be applied or
        its outputs do not have the shape the likelihood needs, ``y`` is not one target per row,
        or the log-density is not one value per row.
    """
    if jnp.ndim(x) != 2:
        raise InputError(f"x: found shape {jnp.shape(x)}, expected (rows, features)")
    position = jax.eval_shape(posterior.init, jax.random.key(0))
    for name, leaf in zip(trees.leaf_names(position), jax.tree.leaves(position), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"the parameter {name} has type {leaf.dtype}, expected floating-point numbers"
            )
    rows = x.shape[0]
    try:
        outputs = jax.eval_shape(posterior.network.apply, position["network"], x)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the network cannot be applied to {x.shape[1]} features: {error}"
        ) from error
    expected = (rows, posterior.likelihood.num_outputs)
    found = getattr(outputs, "shape", None)
    if found != expected:
        what = f"shape {found}" if found is not None else f"type {type(outputs).__name__}"
        raise InputError(
            f"the network's outputs have {what} for {rows} rows, but the likelihood needs an array "
            f"of shape {expected}: give the network {expected[1]} outputs"
        )
    # Broadcasting would turn y of shape (rows,) into a density of the right shape and wrong value.
    targets = _target_shape(posterior, position, x)
    if jnp.shape(y) != targets:
        hint = "; use y[:, None]" if targets == (*jnp.shape(y), 1) else ""
        raise InputError(
            f"y: found shape {jnp.shape(y)}, but the likelihood needs {targets} for {rows} "
            f"rows{hint}"
        )
    density = jax.eval_shape(posterior.pointwise_log_likelihood, position, x, y)
    if tuple(density.shape) != (rows,):
        raise InputError(
            f"the likelihood gives log-densities of shape {tuple(density.shape)} for targets of "
            f"shape {tuple(y.shape)}, expected one per row, ({rows},)"
        )


def _target_shape(posterior: Posterior, position: Any, x) -> tuple[int, ...]:
    shapes = []

    def trace(position, x):
        distribution = posterior.distribution(position, x)
        shapes.append(tuple(distribution.batch_shape) + tuple(distribution.event_shape))
        return jnp.zeros(())

    jax.eval_shape(trace, position, x)
    return shapes[0]


def check_finite(posterior: Posterior, positions: Any, x, y, label: str = "chain") -> None:
    """Check that prior, likelihood and gradient are finite at every start position.

    Parameters
    ----------
    posterior : Posterior
    positions : pytree
        Positions stacked on the leading axis, (chain, *leaf).
    x, y : arrays
        The data that will be sampled on.
    label : str
        What an entry of the leading axis is called in messages.

    Raises
    ------
    InputError
        Names the first chain at fault, and whether a parameter, prior, likelihood or gradient is
        not finite.
    """
    for name, leaf in zip(trees.leaf_names(positions), jax.tree.leaves(positions), strict=True):
        finite = jnp.isfinite(jnp.asarray(leaf).reshape(len(leaf), -1)).all(axis=1)
        _refuse(~finite, label, f"{name} holds a NaN or an infinity")

    @jax.jit
    def parts(positions, x, y):
        def one(position):
            gradient = jax.grad(posterior.log_density)(position, x, y)
            largest = jnp.stack([jnp.abs(g).sum() for g in jax.tree.leaves(gradient)]).sum()
            return (
                posterior.log_prior(position),
                posterior.log_likelihood(position, x, y),
                largest,
            )

        return jax.lax.map(one, positions)

    names = ("log prior", "log-likelihood", "gradient of the log-density")
    for name, values in zip(names, parts(positions, x, y), strict=True):
        _refuse(~jnp.isfinite(values), label, f"the {name} is not finite")


def _refuse(bad: jax.Array, label: str, what: str) -> None:
    chains = [int(i) for i in jnp.flatnonzero(bad)]
    if chains:
        more = f" (and {len(chains) - 1} more)" if len(chains) > 1 else ""
        raise InputError(
            f"{label} {chains[0]}{more}: at the start position {what}. Check the scales of prior "
            "and likelihood, lower ensemble.learning_rate, or try another run.seed"
        )
