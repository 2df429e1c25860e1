"""Likelihoods: what a network's outputs mean, on numpyro.distributions."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from bnnmcmc.errors import InputError

# numpyro's checks are off throughout: outside jit they turn a NaN, which shall stay one, into an
# error or a warning.

# Keeps a predicted scale off zero in float32; the target has unit variance.
MIN_SCALE = 1e-4


class Likelihood(NamedTuple):
    """The distribution of a row's target given the network's outputs for it.

    Parameters
    ----------
    distribution : callable
        ``distribution(params, outputs) -> numpyro Distribution``; outputs are
        ``(rows, num_outputs)``, the batch shape is ``(rows,)``, the event holds the targets.
    num_outputs : int
        How many outputs the network must have.
    init : callable
        ``init() -> params``: start values of the likelihood's own, unconstrained parameters
        (``{}`` if it has none).
    log_prior : callable
        ``log_prior(params) -> scalar``: their prior, Jacobian included.
    task : str
        ``"regression"`` (y is ``(rows, targets)``) or ``"classification"`` (y is ``(rows,)``,
        class indices).
    """

    distribution: Callable[[Any, jax.Array], dist.Distribution]
    num_outputs: int
    init: Callable[[], Any]
    log_prior: Callable[[Any], jax.Array]
    task: Literal["regression", "classification"]


def _no_params() -> dict:
    return {}


def _no_prior(params) -> jax.Array:
    return jnp.zeros(())


def gaussian(
    targets: int = 1,
    scale: Literal["predicted", "sampled"] | float = "predicted",
    scale_prior: float = 1.0,
) -> Likelihood:
    r"""Build a Gaussian likelihood, independent over targets.

    ``scale="predicted"``: :math:`y \sim N(f_1(x), \mathrm{softplus}(f_2(x))^2)`, two outputs per
    target (all means first). ``scale="sampled"``: one sigma per target with a
    HalfNormal(``scale_prior``) prior, sampled as :math:`\eta = \log \sigma`, so that

    .. math:: \log p(\eta) = \log \mathrm{HalfNormal}(e^\eta) + \eta

    A number: sigma is known.

    Parameters
    ----------
    targets : int
        Number of targets.
    scale : "predicted", "sampled" or float
        See above; in units of the scaled target.
    scale_prior : float
        Scale of the HalfNormal prior on a sampled sigma.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        No targets, a scale that is not positive, or an unknown word.
    """
    if targets < 1:
        raise InputError(f"likelihood: found {targets} targets, expected at least 1")
    if isinstance(scale, str):
        if scale not in ("predicted", "sampled"):
            raise InputError(
                f"likelihood.scale: found {scale!r}, expected 'predicted', 'sampled' or a number"
            )
    elif not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"likelihood.scale: found {scale}, expected a positive number")
    if not (scale_prior > 0 and math.isfinite(scale_prior)):
        raise InputError(f"likelihood.scale_prior: found {scale_prior}, expected a positive number")

    if scale == "predicted":

        def predicted(params, outputs):
            # Cut across rows as the networks compute them: outputs.T is what they hold.
            mean, raw = (part.T for part in jnp.split(outputs.T, 2))
            sd = jax.nn.softplus(raw) + MIN_SCALE
            return dist.Normal(mean, sd, validate_args=False).to_event(1)

        return Likelihood(predicted, 2 * targets, _no_params, _no_prior, "regression")

    if scale == "sampled":

        def sampled(params, outputs):
            sd = jnp.exp(params["log_scale"])
            return dist.Normal(outputs, sd, validate_args=False).to_event(1)

        def log_prior(params):
            eta = params["log_scale"]
            prior = dist.HalfNormal(scale_prior, validate_args=False)
            return (prior.log_prob(jnp.exp(eta)) + eta).sum()

        def init():
            return {"log_scale": jnp.full((targets,), jnp.log(0.5))}

        return Likelihood(sampled, targets, init, log_prior, "regression")

    def known(params, outputs):
        return dist.Normal(outputs, scale, validate_args=False).to_event(1)

    return Likelihood(known, targets, _no_params, _no_prior, "regression")


def categorical(classes: int) -> Likelihood:
    r"""Build a categorical likelihood: :math:`p(y=c) = \mathrm{softmax}(f(x))_c`.

    Parameters
    ----------
    classes : int
        Number of classes, one output each.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        Fewer than two classes.
    """
    if classes < 2:
        raise InputError(f"likelihood: found {classes} classes, expected at least 2")
    return Likelihood(
        lambda params, outputs: dist.Categorical(logits=outputs, validate_args=False),
        classes,
        _no_params,
        _no_prior,
        "classification",
    )


def bernoulli() -> Likelihood:
    r"""Build a Bernoulli likelihood for two classes: :math:`p(y=1) = \mathrm{sigmoid}(f(x))`.

    Returns
    -------
    Likelihood
        One output; class 0 and class 1 in the order of the encoded labels.
    """

    def distribution(params, outputs):
        # Not numpyro's Bernoulli: its log_prob takes a NaN logit for a certain hit.
        logits = jnp.stack([jnp.zeros_like(outputs[:, 0]), outputs[:, 0]], axis=-1)
        return dist.Categorical(logits=logits, validate_args=False)

    return Likelihood(
        distribution,
        1,
        _no_params,
        _no_prior,
        "classification",
    )


def class_probabilities(distribution: dist.Distribution) -> jax.Array:
    """Return ``(rows, classes)`` probabilities of a categorical or Bernoulli distribution."""
    probabilities = distribution.probs
    if probabilities.ndim == 1:
        return jnp.stack([1 - probabilities, probabilities], axis=-1)
    return probabilities
