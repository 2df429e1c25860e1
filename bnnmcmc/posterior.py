"""The log-density of a Bayesian neural network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bnnmcmc import trees
from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import Likelihood, check_support
from bnnmcmc.models.network import Network
from bnnmcmc.priors import Prior


@dataclass(frozen=True, eq=False)  # compiled functions know it by itself, whatever is in it
class Posterior:
    r"""A network, a likelihood and a prior: what is sampled.

    .. math:: \log p(\theta, \phi \mid x, y) = \log p(\theta) + \log p(\phi)
              + \sum_i \log p(y_i \mid f_\theta(x_i), \phi) + \text{const}

    A position is ``{"network": params, "likelihood": params}``; the second part is empty for a
    likelihood without parameters of its own. Data are arguments, never part of the object.

    A prior with parameters of its own (`priors.hierarchical`) adds a third part, "prior", and
    "network" is then the raw parameters, which it scales. A position without that part holds the
    network's parameters as they are: so do the members of an ensemble, and `start` takes them to
    where their chains begin.

    Parameters
    ----------
    network : Network
    likelihood : Likelihood
    prior : Prior
        Over the network's parameters.
    row_chunk : int, optional
        The log-likelihood goes through so many rows at a time, all at once if not given: the
        memory of a gradient is then one chunk's. Value and gradient are the same to rounding.
    """

    network: Network
    likelihood: Likelihood
    prior: Prior
    row_chunk: int | None = None

    def __post_init__(self):
        if self.row_chunk is not None and self.row_chunk < 1:
            raise InputError(f"row_chunk: found {self.row_chunk}, expected at least 1, or None")

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
        if not isinstance(y, jax.core.Tracer):
            check_support(self.likelihood, y)
        y = jnp.asarray(y, dtype if self.likelihood.task == "regression" else jnp.int32)
        check_outputs(self, x, y)
        return x, y

    def init(self, key: jax.Array) -> Any:
        """Return a member's first position: the network's initialisation, in JAX's precision."""

        def in_precision(leaf):
            # What is no floating-point number stays as it is, for `check_outputs` to refuse.
            floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
            return jnp.asarray(leaf, jnp.result_type(float)) if floating else leaf

        position = {"likelihood": self.likelihood.init(), "network": self.network.init(key)}
        return jax.tree.map(in_precision, position)

    def start(self, member: Any) -> Any:
        """Return the position at which a chain begins that shall begin at a member's parameters.

        Both are the same function of x. Only a prior with parameters of its own makes a difference.
        """
        if self.prior.hierarchy is None or "prior" in member:
            return member
        raw, own = self.prior.hierarchy.start(member["network"])
        return {**member, "network": raw, "prior": own}

    def network_params(self, position: Any) -> Any:
        """Return the parameters that the network computes with."""
        if self.prior.hierarchy is None or "prior" not in position:
            return position["network"]
        return self.prior.hierarchy.network(position["network"], position["prior"])

    def distribution(self, position: Any, x: jax.Array):
        """Return the predictive distribution of one position for rows ``x`` (rows, features)."""
        outputs = self.network.apply(self.network_params(position), x)
        return self.likelihood.distribution(position["likelihood"], outputs)

    def log_prior(self, position: Any) -> jax.Array:
        """Return the log prior density (scalar) of a chain's position (see `start`)."""
        own = () if self.prior.hierarchy is None else (position["prior"],)
        of_network = self.prior.log_density(position["network"], *own)
        return of_network + self.likelihood.log_prior(position["likelihood"])

    def pointwise_log_likelihood(self, position: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return the log-likelihood of every row, ``(rows,)``."""
        return self.distribution(position, x).log_prob(y)

    def log_likelihood(
        self, position: Any, x: jax.Array, y: jax.Array, weights: jax.Array | None = None
    ) -> jax.Array:
        r"""Return the log-likelihood summed over rows (scalar).

        .. math:: \sum_i w_i \log p(y_i \mid f_\theta(x_i), \phi)

        A row of weight 2 counts as two equal rows, one of weight 0 as none. Weights are not
        normalised: their sum is the number of observations that the rows stand for.

        Parameters
        ----------
        position : pytree
        x : array (rows, features)
        y : array (rows, targets) or (rows,)
        weights : array (rows,), optional
            All 1 if not given.
        """

        def of_rows(position, x, y, *weights):
            each = self.pointwise_log_likelihood(position, x, y)
            return (weights[0] * each if weights else each).sum()

        rows = (x, y) if weights is None else (x, y, weights)
        if self.row_chunk is None or x.shape[0] <= self.row_chunk:
            return of_rows(position, *rows)
        return sum_over_rows(of_rows, self.row_chunk)(position, *rows)

    def log_density(
        self, position: Any, x: jax.Array, y: jax.Array, weights: jax.Array | None = None
    ) -> jax.Array:
        """Return the unnormalised log posterior density (scalar)."""
        return self.log_prior(position) + self.log_likelihood(position, x, y, weights)


def sum_over_rows(of_rows: Callable[..., jax.Array], chunk: int) -> Callable[..., jax.Array]:
    r"""Take a sum over rows a chunk at a time, and its gradient with it.

    .. math:: f(\theta, x, y) = \sum_k f(\theta, x_k, y_k), \quad
              \nabla_\theta f = \sum_k \nabla_\theta f(\theta, x_k, y_k)

    with :math:`x_k` the k-th chunk of rows; the last one holds what is left. A chunk's gradient
    is taken as soon as its value is, so its activations are gone before the next chunk's are made,
    and nothing is computed twice.

    Parameters
    ----------
    of_rows : callable
        ``of_rows(position, *rows) -> scalar``, a sum over the rows of arrays such as x and y.
    chunk : int
        Rows in a chunk, at most as many as there are.

    Returns
    -------
    callable
        ``f(position, *rows)``; reverse-mode differentiable in the position (and a gradient once
        more in either mode), constant in the rows.
    """

    def over_chunks(function, position, *rows):
        whole = rows[0].shape[0] // chunk
        rest = [a[whole * chunk :] for a in rows]
        chunks = [a[: whole * chunk].reshape(whole, chunk, *a.shape[1:]) for a in rows]
        shapes = jax.eval_shape(function, position, *(a[0] for a in chunks))
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        if len(rest[0]):
            start = function(position, *rest)

        def add(total, some):
            return jax.tree.map(jnp.add, total, function(position, *some)), None

        return jax.lax.scan(add, start, tuple(chunks))[0]

    @jax.custom_vjp
    def total(position, *rows):
        return over_chunks(of_rows, position, *rows)

    def forward(position, *rows):
        value, gradient = over_chunks(jax.value_and_grad(of_rows), position, *rows)
        return value, (gradient, (None,) * len(rows))

    def backward(kept, cotangent):
        gradient, constant = kept
        return jax.tree.map(lambda leaf: cotangent * leaf, gradient), *constant

    total.defvjp(forward, backward)
    return total


def position_shapes(posterior: Posterior) -> Any:
    """Return the shapes and types of a chain's position, without computing one."""
    return jax.eval_shape(lambda key: posterior.start(posterior.init(key)), jax.random.key(0))


def chain_starts(posterior: Posterior, members: Any) -> Any:
    """Return where the chains of members (member, *leaf) begin (see `Posterior.start`)."""
    if posterior.prior.hierarchy is None or "prior" in members:
        return members
    return jax.jit(jax.vmap(posterior.start))(members)


def activation_bytes(posterior: Posterior, x, y) -> int:
    """Return what a gradient of the log-likelihood keeps from its forward pass, in bytes.

    The residuals of reverse-mode differentiation, for all rows at once and one chain, whatever the
    network; nothing is computed. Data, and what the position itself holds, are left out.

    Parameters
    ----------
    posterior : Posterior
    x, y : arrays, or shapes with types
        The rows that will be sampled on.
    """

    def residuals(position, x, y):
        def value(position):
            return posterior.pointwise_log_likelihood(position, x, y).sum()

        return jax.vjp(value, position)[1]

    position = position_shapes(posterior)

    def kept(rows: int) -> list[Any]:
        some = [jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype) for a in (x, y)]
        return jax.tree.leaves(jax.eval_shape(residuals, position, *some))

    rows = x.shape[0]
    table = {(rows, *x.shape[1:]), (*x.shape[1:], rows)}
    return sum(
        leaf.size * leaf.dtype.itemsize
        for leaf, longer in zip(kept(rows), kept(2 * rows), strict=True)
        if leaf.shape != longer.shape and leaf.shape not in table
    )


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
        the log-density is not one value per row, or the prior's is no scalar with a gradient.
    """
    if jnp.ndim(x) != 2:
        raise InputError(f"x: found shape {jnp.shape(x)}, expected (rows, features)")
    position = jax.eval_shape(posterior.init, jax.random.key(0))
    for name, leaf in zip(trees.leaf_names(position), jax.tree.leaves(position), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(
                f"the parameter {name} has type {leaf.dtype}, expected floating-point numbers"
            )
    check_prior(posterior)
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


def check_prior(posterior: Posterior) -> None:
    """Check, without computing anything, that the prior's log-density is a scalar with a gradient.

    Raises
    ------
    InputError
        It fails, is not one floating-point number, or has no gradient.
    """

    def shapes(what: str, function: Callable[..., Any]):
        try:
            return jax.eval_shape(function, position_shapes(posterior))
        except InputError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise InputError(
                f"prior.log_density: {what} failed: {type(error).__name__}: {error}"
            ) from error

    def of_prior(position):
        own = () if posterior.prior.hierarchy is None else (position["prior"],)
        return posterior.prior.log_density(position["network"], *own)

    found = shapes("the function", of_prior)
    shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", jnp.bool_)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        what = type(found).__name__ if shape is None else f"shape {shape} and type {dtype}"
        raise InputError(
            f"prior.log_density: the function returned {what} for the parameters of one network, "
            "expected one floating-point number, such as the sum of a density's logarithms"
        )
    shapes("its gradient", jax.grad(of_prior))


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

    names = ("log prior", "log-likelihood", "gradient of the log-density")
    for name, values in zip(names, _parts(posterior, positions, x, y), strict=True):
        _refuse(~jnp.isfinite(values), label, f"the {name} is not finite")


@partial(jax.jit, static_argnums=0)
def _parts(posterior: Posterior, positions: Any, x, y):
    """Return log prior, log-likelihood and the gradient's largeness at every position."""

    def one(position):
        gradient = jax.grad(posterior.log_density)(position, x, y)
        largest = jnp.stack([jnp.abs(g).sum() for g in jax.tree.leaves(gradient)]).sum()
        return posterior.log_prior(position), posterior.log_likelihood(position, x, y), largest

    return jax.lax.map(one, positions)


def _refuse(bad: jax.Array, label: str, what: str) -> None:
    chains = [int(i) for i in jnp.flatnonzero(bad)]
    if chains:
        more = f" (and {len(chains) - 1} more)" if len(chains) > 1 else ""
        raise InputError(
            f"{label} {chains[0]}{more}: at the start position {what}. Check the scales of prior "
            "and likelihood, lower ensemble.learning_rate, or try another run.seed"
        )
