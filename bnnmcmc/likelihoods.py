"""Likelihoods: what a network's outputs mean, on numpyro.distributions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from bnnmcmc.errors import InputError

# numpyro's checks are off throughout: outside jit they turn a NaN, which shall stay one, into an
# error or a warning.

# Keeps a predicted scale off zero in float32; the target has unit variance.
MIN_SCALE = 1e-4
# Bounds of what is exponentiated, far beyond what data ask for: densities and gradients stay
# finite whatever an untrained network puts out.
MAX_LOG_RATE = 20.0
MAX_LOG_CONCENTRATION = 8.0
MAX_LOGIT = 12.0

Support = Literal["real", "count", "unit"]
Scale = Literal["predicted", "sampled"] | float


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
    support : str
        Of a numeric target: ``"real"``, whole numbers from 0 (``"count"``), or between 0 and 1
        (``"unit"``). Only a real target is standardised.
    sample : callable, optional
        ``sample(key) -> params``: one draw of its own parameters from their prior. Needed only to
        draw data sets from the prior, and only if there are such parameters.
    """

    distribution: Callable[[Any, jax.Array], dist.Distribution]
    num_outputs: int
    init: Callable[[], Any]
    log_prior: Callable[[Any], jax.Array]
    task: Literal["regression", "classification"]
    support: Support = "real"
    sample: Callable[[jax.Array], Any] | None = None


def _no_params() -> dict:
    return {}


def _no_prior(params) -> jax.Array:
    return jnp.zeros(())


def _check_count(targets: int) -> None:
    if targets < 1:
        raise InputError(f"likelihood: found {targets} targets, expected at least 1")


def _check_scale(scale: Scale, scale_prior: float, name: str = "scale") -> None:
    if isinstance(scale, str):
        if scale not in ("predicted", "sampled"):
            raise InputError(
                f"likelihood.{name}: found {scale!r}, expected 'predicted', 'sampled' or a number"
            )
    elif not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"likelihood.{name}: found {scale}, expected a positive number")
    if not (scale_prior > 0 and math.isfinite(scale_prior)):
        raise InputError(f"likelihood.scale_prior: found {scale_prior}, expected a positive number")


def _positive(raw: jax.Array) -> jax.Array:
    return jax.nn.softplus(raw) + MIN_SCALE


def _with_spread(
    targets: int,
    spread: Scale,
    scale_prior: float,
    family: Callable[[Any, jax.Array, jax.Array | float], dist.Distribution],
    init: Callable[[], dict] = _no_params,
    log_prior: Callable[[Any], jax.Array] = _no_prior,
    sample: Callable[[jax.Array], Any] = lambda key: {},
    *,
    of_output: Callable[[jax.Array], jax.Array] = _positive,
    of_log_scale: Callable[[jax.Array], jax.Array] = jnp.exp,
    support: Support = "real",
    name: str = "scale",
) -> Likelihood:
    """Build a likelihood with a predicted location, and a spread as `gaussian` says of its scale.

    ``family(params, location, spread)``, with ``init``, ``log_prior`` and ``sample`` of its further
    parameters; ``of_output`` makes a predicted spread of an output, ``of_log_scale`` a sampled one.
    """
    _check_count(targets)
    _check_scale(spread, scale_prior, name)

    if spread == "predicted":

        def predicted(params, outputs):
            # Cut across rows as the networks compute them: outputs.T is what they hold.
            location, raw = (part.T for part in jnp.split(outputs.T, 2))
            return family(params, location, of_output(raw)).to_event(1)

        return Likelihood(predicted, 2 * targets, init, log_prior, "regression", support, sample)

    if spread == "sampled":

        def sampled(params, outputs):
            return family(params, outputs, of_log_scale(params["log_scale"])).to_event(1)

        def both_priors(params):
            eta = params["log_scale"]
            prior = dist.HalfNormal(scale_prior, validate_args=False)
            return (prior.log_prob(jnp.exp(eta)) + eta).sum() + log_prior(params)

        def both_inits():
            return {"log_scale": jnp.full((targets,), jnp.log(0.5)), **init()}

        def both_samples(key):
            own, further = jax.random.split(key)
            half = jnp.abs(scale_prior * jax.random.normal(own, (targets,)))
            return {"log_scale": jnp.log(half), **sample(further)}

        return Likelihood(
            sampled, targets, both_inits, both_priors, "regression", support, both_samples
        )

    def known(params, outputs):
        return family(params, outputs, spread).to_event(1)

    return Likelihood(known, targets, init, log_prior, "regression", support, sample)


def gaussian(targets: int = 1, scale: Scale = "predicted", scale_prior: float = 1.0) -> Likelihood:
    r"""Build a Gaussian likelihood, independent over targets.

    ``scale="predicted"``: :math:`y \sim N(f_1(x), \mathrm{softplus}(f_2(x))^2)`, two outputs per
    target (all means first). ``scale="sampled"``: one sigma per target with a
    HalfNormal(``scale_prior``) prior, sampled as :math:`\eta = \log \sigma`, so that

    .. math:: \log p(\eta) = \log \mathrm{HalfNormal}(e^\eta) + \eta

    A number: sigma is known.

    Parameters
    ----------
    targets : int
        Number of targets; given the network they are independent.
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

    def normal(params, location, scale):
        return dist.Normal(location, scale, validate_args=False)

    return _with_spread(targets, scale, scale_prior, normal)


def laplace(targets: int = 1, scale: Scale = "predicted", scale_prior: float = 1.0) -> Likelihood:
    r"""Build a Laplace likelihood: :math:`p(y) = \frac{1}{2b} e^{-|y - f_1(x)| / b}`.

    For noise with a sharp peak and longer tails than a Gaussian's; f_1 is the median.

    Parameters
    ----------
    targets, scale, scale_prior
        As in `gaussian`; the scale is b, the standard deviation :math:`\sqrt 2 b`.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        As `gaussian`.
    """

    def family(params, location, scale):
        return dist.Laplace(location, scale, validate_args=False)

    return _with_spread(targets, scale, scale_prior, family)


def student_t(
    targets: int = 1,
    scale: Scale = "predicted",
    scale_prior: float = 1.0,
    df: Literal["sampled"] | float = 4.0,
) -> Likelihood:
    r"""Build a Student-t likelihood: a Gaussian that does not mind outliers.

    .. math:: \frac{y - f_1(x)}{s} \sim t_\nu

    ``df="sampled"``: one :math:`\nu = 2 + e^\zeta` per target, with :math:`\nu - 2 \sim
    \mathrm{Gamma}(2, 0.1)`; it is above 2, so that predictions have a variance.

    Parameters
    ----------
    targets, scale, scale_prior
        As in `gaussian`; the scale is s, the standard deviation
        :math:`s \sqrt{\nu / (\nu - 2)}`.
    df : "sampled" or float
        Degrees of freedom, above 2.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        As `gaussian`, or degrees of freedom of 2 or less.

    References
    ----------
    Juarez and Steel (2010), J. Business and Economic Statistics 28 (the prior).
    """
    if df != "sampled" and (isinstance(df, str) or not (df > 2 and math.isfinite(df))):
        raise InputError(
            f"likelihood.df: found {df!r}, expected 'sampled' or a number above 2: with less there "
            "is no variance"
        )

    def family(params, location, scale):
        freedom = 2 + jnp.exp(params["log_df"]) if df == "sampled" else df
        return dist.StudentT(freedom, location, scale, validate_args=False)

    def init():
        return {"log_df": jnp.full((targets,), jnp.log(8.0))}

    def log_prior(params):
        zeta = params["log_df"]
        return (dist.Gamma(2.0, 0.1, validate_args=False).log_prob(jnp.exp(zeta)) + zeta).sum()

    def sample(key):
        return {"log_df": jnp.log(jax.random.gamma(key, 2.0, (targets,)) / 0.1)}

    if df == "sampled":
        return _with_spread(targets, scale, scale_prior, family, init, log_prior, sample)
    return _with_spread(targets, scale, scale_prior, family)


def gaussian_mixture(targets: int = 1, components: int = 3) -> Likelihood:
    r"""Build a mixture density: noise of any shape, skewed or with several peaks.

    .. math:: p(y) = \sum_k \mathrm{softmax}(a(x))_k \, N(y; m_k(x), \mathrm{softplus}(s_k(x))^2)

    The means are the outputs plus numbers evenly spaced from -1 to 1, so that components differ
    where all outputs are alike.

    Parameters
    ----------
    targets : int
    components : int
        K, at least 2; 3 K outputs per target: all a, then all m, then all s, each by target.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        No targets, or fewer than two components.

    References
    ----------
    Bishop (1994), Mixture density networks.
    """
    _check_count(targets)
    if components < 2:
        raise InputError(f"likelihood.components: found {components}, expected at least 2")
    spread = jnp.linspace(-1.0, 1.0, components)

    def distribution(params, outputs):
        parts = (part.T for part in jnp.split(outputs.T, 3))
        logits, means, raw = (part.reshape(-1, targets, components) for part in parts)
        sd = jax.nn.softplus(raw) + MIN_SCALE
        return dist.MixtureSameFamily(
            dist.Categorical(logits=logits, validate_args=False),
            dist.Normal(means + spread, sd, validate_args=False),
            validate_args=False,
        ).to_event(1)

    outputs = 3 * components * targets
    return Likelihood(distribution, outputs, _no_params, _no_prior, "regression")


def _level(targets: int, level: float | Sequence[float], highest: float) -> np.ndarray:
    _check_count(targets)
    found = np.broadcast_to(np.asarray(level, np.float64), (targets,))
    if not np.all((found > 0) & (found < highest)):
        wanted = "more than 0" if math.isinf(highest) else f"between 0 and {highest:g}"
        raise InputError(f"likelihood.level: found {level}, expected {wanted} for each target")
    return found


def _rate(output: jax.Array, level: np.ndarray) -> jax.Array:
    return jnp.asarray(level, output.dtype) * jnp.exp(jnp.clip(output, -MAX_LOG_RATE, MAX_LOG_RATE))


def poisson(targets: int = 1, level: float | Sequence[float] = 1.0) -> Likelihood:
    r"""Build a Poisson likelihood for counts: :math:`y \sim \mathrm{Poisson}(c \, e^{f(x)})`.

    Parameters
    ----------
    targets : int
        One output each.
    level : float or sequence of float
        c, the rate where the network puts out 0: such as the mean of the training counts.

    Returns
    -------
    Likelihood
        The target is not standardised.

    Raises
    ------
    InputError
        No targets, or a level that is not positive.
    """
    at = _level(targets, level, math.inf)

    def distribution(params, outputs):
        return dist.Poisson(_rate(outputs, at), validate_args=False).to_event(1)

    return Likelihood(distribution, targets, _no_params, _no_prior, "regression", "count")


def zero_inflated_poisson(targets: int = 1, level: float | Sequence[float] = 1.0) -> Likelihood:
    r"""Build a likelihood for counts with more zeros than a Poisson's.

    .. math:: y = 0 \text{ with probability } \mathrm{sigmoid}(f_2(x)), \text{ else }
              y \sim \mathrm{Poisson}(c \, e^{f_1(x)})

    Parameters
    ----------
    targets, level
        As in `poisson`; two outputs per target, all f_1 first.

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        As `poisson`.
    """
    at = _level(targets, level, math.inf)

    def distribution(params, outputs):
        rate, gate = (part.T for part in jnp.split(outputs.T, 2))
        counts = dist.Poisson(_rate(rate, at), validate_args=False)
        gate = jnp.clip(gate, -MAX_LOGIT, MAX_LOGIT)
        return dist.ZeroInflatedDistribution(
            counts, gate_logits=gate, validate_args=False
        ).to_event(1)

    return Likelihood(distribution, 2 * targets, _no_params, _no_prior, "regression", "count")


def negative_binomial(
    targets: int = 1,
    concentration: Scale = "predicted",
    level: float | Sequence[float] = 1.0,
    scale_prior: float = 1.0,
) -> Likelihood:
    r"""Build a likelihood for counts that spread wider than a Poisson's.

    .. math:: \mathrm E[y] = \mu = c \, e^{f_1(x)}, \qquad \mathrm{Var}[y] = \mu + \mu^2 / r

    Parameters
    ----------
    targets, level
        As in `poisson`.
    concentration : "predicted", "sampled" or float
        r: :math:`e^{f_2(x)}` (two outputs per target, all f_1 first); one number per target,
        :math:`1 / \sqrt r \sim \mathrm{HalfNormal}` of ``scale_prior``; or known.
    scale_prior : float

    Returns
    -------
    Likelihood

    Raises
    ------
    InputError
        As `poisson`, or a concentration that is not positive.
    """
    at = _level(targets, level, math.inf)

    def family(params, mean, concentration):
        # Its own Gamma is checked whatever validate_args says.
        with numpyro.validation_enabled(False):
            return dist.NegativeBinomial2(_rate(mean, at), concentration, validate_args=False)

    return _with_concentration(targets, concentration, scale_prior, family, "count")


def beta(
    targets: int = 1,
    concentration: Scale = "predicted",
    level: float | Sequence[float] = 0.5,
    scale_prior: float = 1.0,
) -> Likelihood:
    r"""Build a beta likelihood for shares between 0 and 1.

    .. math:: m = \mathrm{sigmoid}(f_1(x) + \mathrm{logit}\, c), \qquad
              y \sim \mathrm{Beta}(m r, (1 - m) r)

    Parameters
    ----------
    targets : int
    concentration : "predicted", "sampled" or float
        r, as in `negative_binomial`.
    level : float or sequence of float
        c, the mean where the network puts out 0.
    scale_prior : float

    Returns
    -------
    Likelihood
        The target is not standardised.

    Raises
    ------
    InputError
        No targets, a level outside (0, 1), or a concentration that is not positive.
    """
    at = _level(targets, level, 1.0)
    offset = np.log(at) - np.log1p(-at)

    def family(params, output, concentration):
        mean = jax.nn.sigmoid(jnp.clip(output + offset, -MAX_LOGIT, MAX_LOGIT))
        with numpyro.validation_enabled(False):
            return dist.BetaProportion(mean, concentration, validate_args=False)

    return _with_concentration(targets, concentration, scale_prior, family, "unit")


def _with_concentration(
    targets: int,
    concentration: Scale,
    scale_prior: float,
    family: Callable[[Any, jax.Array, jax.Array | float], dist.Distribution],
    support: Support,
) -> Likelihood:
    def of_output(raw):
        return jnp.exp(jnp.clip(raw, -MAX_LOG_CONCENTRATION, MAX_LOG_CONCENTRATION))

    return _with_spread(
        targets,
        concentration,
        scale_prior,
        family,
        of_output=of_output,
        of_log_scale=lambda eta: of_output(-2 * eta),  # the scale is 1 / sqrt(r)
        support=support,
        name="concentration",
    )


def check_support(likelihood: Likelihood, y) -> None:
    """Check that targets are such as the likelihood can have produced.

    Parameters
    ----------
    likelihood : Likelihood
    y : array (rows, targets)

    Raises
    ------
    InputError
        Counts that are negative or not whole, or shares outside (0, 1).
    """
    if likelihood.support == "real":
        return
    y = np.asarray(y)
    if likelihood.support == "count":
        wrong, expected = (y < 0) | (y != np.floor(y)), "whole numbers from 0"
    else:
        # As they are computed with: in float32, 1 - 1e-9 is 1.
        single = y.astype(np.float32)
        wrong, expected = (single <= 0) | (single >= 1), "numbers between 0 and 1, without these"
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"y: found {y[where]} in row {where[0]} (and {int(wrong.sum()) - 1} more such), but "
            f"the likelihood is for {expected}; the target must not be scaled, or take another "
            "likelihood"
        )


def marginals(distribution: dist.Distribution) -> dist.Distribution | None:
    """Return the targets' own distributions, batch shape ``(rows, targets)``.

    None for a likelihood of the user's own that is joint over targets.
    """
    if isinstance(distribution, dist.Independent):
        return distribution.base_dist
    return None


def cumulative(marginal: dist.Distribution, y: jax.Array) -> jax.Array:
    r"""Return the cumulative distribution function at ``y``, of the marginal's shape.

    Of counts :math:`P(Y \le y)`, 0 for y < 0.
    """
    if isinstance(marginal, dist.discrete.ZeroInflatedProbs):
        counts = cumulative(marginal.base_dist, y)
        return jnp.where(
            y < 0, jnp.zeros_like(counts), marginal.gate + (1 - marginal.gate) * counts
        )
    if marginal.is_discrete:
        # These functions are not defined below 0.
        found = marginal.cdf(jnp.maximum(jnp.floor(y), 0.0))
        return jnp.where(y < 0, found * 0, found)
    return marginal.cdf(y)


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
