"""Posteriors whose means, variances and quantiles are known, and how draws are held against them.

`TARGETS` is the one table: add a density here and every kernel is tested on it. What is known comes
from algebra or quadrature, and of logistic regression from a long run of a sampler of another kind
that shares no code with the kernels.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, stats
from scipy.special import expit, logsumexp, polygamma
from sklearn.datasets import load_breast_cancer, load_diabetes

from bnnmcmc.convergence import mean_ess, split_in_halves
from bnnmcmc.likelihoods import gaussian as gaussian_likelihood
from bnnmcmc.models.mlp import mlp
from bnnmcmc.posterior import Posterior
from bnnmcmc.priors import normal

MIN_ESS = 400
ERRORS = 4.0
PROBABILITIES = np.array([0.05, 0.25, 0.5, 0.75, 0.95])


class Target(NamedTuple):
    """A posterior and what is known of it.

    Parameters
    ----------
    log_density : callable
        ``log_density(position, *data)``.
    starts : callable
        ``starts(key, chains)``: start positions, overdispersed, not draws of the target.
    view : callable
        Draws, leaves (chain, draw, ...), to the quantities looked at, (chain, draw, quantity).
    mean, variance : array (quantity,)
    quantiles : array (probability, quantity)
        At `PROBABILITIES`.
    data : tuple of arrays
    reference_ess : float
        Effective draws of the run that these come from; infinite where they are exact.
    """

    log_density: Callable[..., jax.Array]
    starts: Callable[[jax.Array, int], Any]
    view: Callable[[Any], np.ndarray]
    mean: np.ndarray
    variance: np.ndarray
    quantiles: np.ndarray
    data: tuple = ()
    reference_ess: float = np.inf


class Comparison(NamedTuple):
    """Every expectation beside the truth, in the order of `expectations`.

    Parameters
    ----------
    names : list of str
    ess, error, mcse : array (expectation,)
        Effective draws; found less true; Monte Carlo standard error of this difference.
    scale : array (expectation,)
        What an error is relative to: the standard deviation for a mean, the variance for a
        variance, 1 for a probability.
    """

    names: list[str]
    ess: np.ndarray
    error: np.ndarray
    mcse: np.ndarray
    scale: np.ndarray

    @property
    def z(self) -> np.ndarray:
        return self.error / self.mcse


class Bias(NamedTuple):
    """What an unadjusted kernel may be off by, relative to `Comparison.scale`."""

    mean: float = 0.0
    variance: float = 0.0
    probability: float = 0.0

    def of(self, names: list[str]) -> np.ndarray:
        kinds = {"mean": self.mean, "variance": self.variance, "below": self.probability}
        return np.array([kinds[name.split()[0]] for name in names])


def expectations(target: Target, x: np.ndarray):
    """Yield (kind, values (chain, draw, quantity), truth, variance if known, scale).

    Quantiles are held to their probabilities: the share of draws below the true quantile.
    """
    yield "mean", x, target.mean, None, np.sqrt(target.variance)
    yield "variance", np.square(x - target.mean), target.variance, None, target.variance
    for p, quantile in zip(PROBABILITIES, target.quantiles, strict=True):
        ones = np.ones(x.shape[-1])
        yield f"below {p:.0%} quantile", x <= quantile, p * ones, p * (1 - p) * ones, ones


def compare(draws: Any, target: Target) -> Comparison:
    """Return every expectation of some draws beside the truth."""
    x = np.asarray(target.view(draws), np.float64)
    names, parts = [], []
    for kind, values, truth, variance, scale in expectations(target, x):
        # (quantity, chain, draw), in halves: a chain that still travels has few effective draws.
        values = np.moveaxis(np.asarray(values, np.float64), -1, 0)
        ess = mean_ess(split_in_halves(values))
        if variance is None:
            variance = values.var(axis=(1, 2))
        mcse = np.sqrt(variance * (1 / ess + 1 / target.reference_ess))
        names += [f"{kind} of {i}" for i in range(len(truth))]
        parts.append((ess, values.mean(axis=(1, 2)) - truth, mcse, scale))
    return Comparison(names, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def check(draws: Any, target: Target, bias: Bias | None = None) -> Comparison:
    """Raise AssertionError unless draws agree with a target, and say where they do not.

    Every expectation has at least 400 effective draws, and then lies within 4 of its Monte Carlo
    standard errors of the truth (beside the bias that is stated for the kernel, if any).
    """
    for leaf in jax.tree.leaves(draws):
        assert np.all(np.isfinite(leaf)), "not finite"
    found = compare(draws, target)
    allowed = ERRORS * found.mcse + (bias or Bias()).of(found.names) * found.scale
    few = [
        f"ess {ess:.0f}: {name}"
        for name, ess in zip(found.names, found.ess, strict=True)
        if not ess >= MIN_ESS
    ]
    assert not few, "; ".join(few)
    wrong = [
        f"{found.names[i]}: off by {found.error[i]:.3g} (z = {found.z[i]:.1f})"
        for i in range(len(found.names))
        if not abs(found.error[i]) < allowed[i]
    ]
    assert not wrong, "; ".join(wrong)
    return found


def normal_starts(size: int, centre: float = 0.0, scale: float = 1.0):
    return lambda key, chains: centre + scale * jax.random.normal(key, (chains, size))


def as_they_are(draws: np.ndarray) -> np.ndarray:
    return draws


def solve(cdf: Callable[[float], float], low: float = -1e4, high: float = 1e4) -> np.ndarray:
    """Return the quantiles of a distribution function at `PROBABILITIES`."""
    return np.array(
        [optimize.brentq(lambda q, p=p: cdf(q) - p, low, high, xtol=1e-10) for p in PROBABILITIES]
    )


def normal_target(log_density, starts, view, mean, variance, data=()) -> Target:
    quantiles = stats.norm.ppf(PROBABILITIES[:, None], mean, np.sqrt(variance))
    return Target(log_density, starts, view, mean, variance, quantiles, data)


# ------------------------------------------------------------------------------------ the densities


def correlated_gaussian(size: int = 100, condition: float = 1e4) -> Target:
    """Variances from 1/100 to 100 on axes turned at random: no help from a diagonal metric."""
    axes = stats.ortho_group.rvs(size, random_state=np.random.default_rng(0))
    variances = np.geomspace(condition**-0.5, condition**0.5, size)
    location = np.linspace(-3.0, 3.0, size)
    whiten = np.asarray(axes / np.sqrt(variances), np.float32)
    centre = location.astype(np.float32)

    def log_density(x):
        return -0.5 * jnp.sum(jnp.square((x - centre) @ whiten))

    # Coordinates, and beside them the widest and the narrowest axis.
    ends = axes[:, [0, -1]]

    def view(draws):
        return np.concatenate([draws, draws.astype(np.float64) @ ends], axis=-1)

    covariance = (axes * variances) @ axes.T
    return normal_target(
        log_density,
        normal_starts(size),
        view,
        np.concatenate([location, location @ ends]),
        np.concatenate([np.diag(covariance), variances[[0, -1]]]),
    )


def small_gaussian() -> Target:
    """Scales 0.1, 1 and 3, correlations of 0.9: axes of the ellipsoid in a ratio of 100."""
    scales = np.array([0.1, 1.0, 3.0])
    correlation = 0.9 ** np.abs(np.subtract.outer(range(3), range(3)))
    location, covariance = np.array([1.0, -2.0, 0.5]), np.outer(scales, scales) * correlation
    precision = np.linalg.inv(covariance).astype(np.float32)

    def log_density(x):
        r = x - location.astype(np.float32)
        return -0.5 * r @ precision @ r

    return normal_target(log_density, normal_starts(3), as_they_are, location, np.diag(covariance))


def independent_gaussian(scales: np.ndarray) -> Target:
    def log_density(x):
        return -0.5 * jnp.sum(jnp.square(x / scales.astype(np.float32)))

    size = len(scales)
    return normal_target(log_density, normal_starts(size), as_they_are, np.zeros(size), scales**2)


FUNNEL_SCALE = 3.0


def centred_funnel(v, x):
    """Neal's funnel: v from N(0, 9) and each x from N(0, e^v)."""
    return -0.5 * ((v / FUNNEL_SCALE) ** 2 + jnp.sum(x**2) * jnp.exp(-v) + x.shape[0] * v)


def funnel(size: int = 10, jacobian: bool = True) -> Target:
    """Neal's funnel, non-centred: v = 3 z_0 and x = e^(v/2) z, with the transform's determinant.

    x has moments that no run can estimate (E[x^4] = 3 e^18), so asinh(x) is looked at.
    """

    def log_density(z):
        v = FUNNEL_SCALE * z[0]
        log_determinant = jnp.log(FUNNEL_SCALE) + 0.5 * (size - 1) * v
        return centred_funnel(v, jnp.exp(0.5 * v) * z[1:]) + jacobian * log_determinant

    def view(draws):
        v = FUNNEL_SCALE * draws[..., :1].astype(np.float64)
        return np.concatenate([v, np.arcsinh(np.exp(0.5 * v) * draws[..., 1:])], axis=-1)

    # Over v by a fine grid, and over z by another.
    grid = np.linspace(-9, 9, 2001)
    weight = stats.norm.pdf(grid) / stats.norm.pdf(grid).sum()
    scale = np.exp(0.5 * FUNNEL_SCALE * grid)
    second = weight @ np.arcsinh(np.outer(scale, grid)) ** 2 @ weight
    quantiles = np.arcsinh(solve(lambda q: weight @ stats.norm.cdf(q / scale)))
    own = FUNNEL_SCALE * stats.norm.ppf(PROBABILITIES)
    others = size - 1
    return Target(
        log_density,
        normal_starts(size, scale=2.0),
        view,
        np.zeros(size),
        np.array([FUNNEL_SCALE**2] + [second] * others),
        np.column_stack([own] + [quantiles] * others),
    )


def banana() -> Target:
    """x0 from N(0, 1) and x1 from N((x0^2 - 1) / 4, 1 / 4)."""

    def log_density(x):
        return -0.5 * x[0] ** 2 - 2.0 * (x[1] - 0.25 * (x[0] ** 2 - 1.0)) ** 2

    grid = np.linspace(-9, 9, 4001)
    weight = stats.norm.pdf(grid) / stats.norm.pdf(grid).sum()
    bent = solve(lambda q: weight @ stats.norm.cdf(q, 0.25 * (grid**2 - 1), 0.5))
    quantiles = np.column_stack([stats.norm.ppf(PROBABILITIES), bent])
    moments = np.zeros(2), np.array([1.0, 0.375])
    return Target(log_density, normal_starts(2), as_they_are, *moments, quantiles)


def skewed(factor: float = 1.0) -> Target:
    """Logarithms of gamma variables: skewed, with one exponential and one double-exponential tail.

    The first is a (mirrored) Gumbel variable. Signs that cancel in a symmetric density do not here.
    """
    shapes = np.array([1.0, 2.0, 5.0])

    def log_density(x):
        return factor * jnp.sum(shapes.astype(np.float32) * x - jnp.exp(x))

    return Target(
        log_density,
        normal_starts(3),
        as_they_are,
        polygamma(0, shapes),
        polygamma(1, shapes),
        stats.loggamma.ppf(PROBABILITIES[:, None], shapes),
    )


def two_modes(centre: tuple[float, float] = (2.0, 1.0), share: float = 0.7) -> Target:
    """Unit normals at the centre and opposite, 4.5 scales apart; chains start in both."""
    centre, shares = np.array(centre), np.array([1 - share, share])

    def log_density(x):
        centres = jnp.asarray(np.stack([-centre, centre]), jnp.float32)
        logits = jnp.log(jnp.asarray(shares, jnp.float32))
        return jax.nn.logsumexp(logits - 0.5 * jnp.sum(jnp.square(x - centres), axis=1))

    def starts(key, chains):
        side = np.where(np.arange(chains) % 2 == 0, 1.0, -1.0)[:, None]
        return side * centre + 0.3 * jax.random.normal(key, (chains, len(centre)))

    mean = (2 * share - 1) * centre
    quantiles = [solve(lambda q, c=c: shares @ stats.norm.cdf(q, [-c, c])) for c in centre]
    moments = mean, 1 + centre**2 - mean**2
    return Target(log_density, starts, as_they_are, *moments, np.column_stack(quantiles))


EFFECTS = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
EFFECT_ERRORS = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
SCHOOLS_SCALE = 5.0


def eight_schools(jacobian: bool = True) -> Target:
    """Rubin's eight schools, non-centred: mu ~ N(0, 25), tau half-Cauchy(5), theta = mu + tau z.

    Given tau everything is normal, so one quadrature over log tau gives the posterior.
    """

    def log_density(position, effects, errors):
        mu, log_tau, z = position["mu"], position["log_tau"], position["z"]
        tau = jnp.exp(log_tau)
        theta = mu + tau * z
        return (
            -0.5 * (mu / SCHOOLS_SCALE) ** 2
            - jnp.log1p((tau / SCHOOLS_SCALE) ** 2)
            + jacobian * log_tau
            - 0.5 * jnp.sum(z**2)
            - 0.5 * jnp.sum(((effects - theta) / errors) ** 2)
        )

    def starts(key, chains):
        keys = jax.random.split(key, 3)
        return {
            "mu": SCHOOLS_SCALE * jax.random.normal(keys[0], (chains,)),
            "log_tau": 1.0 + jax.random.normal(keys[1], (chains,)),
            "z": jax.random.normal(keys[2], (chains, 8)),
        }

    def view(draws):
        mu, log_tau, z = (np.asarray(draws[name], np.float64) for name in ("mu", "log_tau", "z"))
        theta = mu[..., None] + np.exp(log_tau)[..., None] * z
        return np.concatenate([mu[..., None], log_tau[..., None], theta], axis=-1)

    log_tau = np.linspace(-25.0, 9.0, 20001)
    tau2 = np.exp(2 * log_tau)[:, None]
    precisions = 1 / (EFFECT_ERRORS**2 + tau2)
    mu_variance = 1 / (precisions.sum(1) + SCHOOLS_SCALE**-2)
    mu_mean = mu_variance * (precisions @ EFFECTS)
    log_weight = (
        log_tau
        - np.log1p(tau2[:, 0] / SCHOOLS_SCALE**2)
        + 0.5 * (np.log(precisions).sum(1) + np.log(mu_variance))
        - 0.5 * (precisions @ EFFECTS**2 - mu_mean**2 / mu_variance)
    )
    weight = np.exp(log_weight - logsumexp(log_weight))
    share = tau2 * precisions
    theta_mean = share * EFFECTS + (1 - share) * mu_mean[:, None]
    theta_variance = share * EFFECT_ERRORS**2 + (1 - share) ** 2 * mu_variance[:, None]
    means = np.column_stack([mu_mean, log_tau, theta_mean])
    variances = np.column_stack([mu_variance, np.zeros_like(log_tau), theta_variance])
    mean = weight @ means
    variance = weight @ (variances + (means - mean) ** 2)
    below = np.cumsum(weight) - 0.5 * weight
    quantiles = [
        np.interp(PROBABILITIES, below, log_tau)
        if i == 1
        else solve(lambda q, m=m, s=s: weight @ stats.norm.cdf(q, m, s))
        for i, (m, s) in enumerate(zip(means.T, np.sqrt(variances.T), strict=True))
    ]
    return Target(
        log_density,
        starts,
        view,
        mean,
        variance,
        np.column_stack(quantiles),
        data=(EFFECTS.astype(np.float32), EFFECT_ERRORS.astype(np.float32)),
    )


REFERENCE = Path(__file__).with_name("logistic_reference.json")


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Return rows (569, 11) of ones and ten strongly correlated scaled features, and labels."""
    x, y = load_breast_cancer(return_X_y=True)
    x = x[:, :10]
    return np.column_stack([np.ones(len(x)), (x - x.mean(0)) / x.std(0)]), y


def logistic_regression() -> Target:
    """Breast cancer; intercept and weights from N(0, 1). Known from a long run: `reference_run`."""
    x, y = breast_cancer()

    def log_density(weights, x, y):
        logits = x @ weights
        return jnp.sum(y * logits - jax.nn.softplus(logits)) - 0.5 * jnp.sum(weights**2)

    known = {name: np.array(value) for name, value in json.loads(REFERENCE.read_text()).items()}
    return Target(
        log_density,
        normal_starts(x.shape[1]),
        as_they_are,
        known["mean"],
        known["variance"],
        known["quantiles"],
        data=(x.astype(np.float32), y.astype(np.float32)),
        reference_ess=float(known["ess"]),
    )


def reference_run() -> dict[str, Any]:
    """Return mean, variance, quantiles and smallest ESS of the posterior of `logistic_regression`.

    ``python tests/targets.py`` writes them to `REFERENCE`; it takes half a minute.
    """
    x, y = breast_cancer()
    signed = (1 - 2 * y)[:, None] * x

    def log_density(weights):  # (..., 11)
        return -np.log1p(np.exp(weights @ signed.T)).sum(-1) - 0.5 * (weights**2).sum(-1)

    mode = np.zeros(x.shape[1])
    for _ in range(20):  # Newton
        p = expit(x @ mode)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(mode))
        mode = mode + np.linalg.solve(hessian, x.T @ (y - p) - mode)
    draws = independence_sampler(log_density, mode, np.linalg.inv(hessian))
    flat = draws.reshape(-1, draws.shape[-1])
    return {
        "mean": flat.mean(0).tolist(),
        "variance": flat.var(0).tolist(),
        "quantiles": np.quantile(flat, PROBABILITIES, axis=0).tolist(),
        "ess": float(mean_ess(np.moveaxis(draws, -1, 0)).min()),
    }


def independence_sampler(log_density, mode, covariance, chains=200, draws=2000, df=10.0):
    """Return a long run of independence Metropolis with Student-t proposals, (chain, draw, size).

    In NumPy and float64. The first tenth is left out; a chain starts at its first proposal.
    """
    proposal = stats.multivariate_t(mode, covariance, df=df, seed=np.random.default_rng(0))
    proposed = proposal.rvs((draws, chains))
    log_weight = np.concatenate(
        [log_density(block) - proposal.logpdf(block) for block in np.array_split(proposed, 50)]
    )
    log_uniform = np.log(np.random.default_rng(1).uniform(size=log_weight.shape))
    kept, at = np.zeros((draws, chains), int), np.zeros(chains, int)
    every = np.arange(chains)
    for t in range(draws):
        accept = log_uniform[t] < log_weight[t] - log_weight[at, every]
        at = np.where(accept, t, at)
        kept[t] = at
    return np.moveaxis(proposed[kept[draws // 10 :], every], 0, 1)


LINEAR_NOISE, LINEAR_PRIOR = 0.7, 1.5


def linear_gaussian() -> Target:
    """A network without a hidden layer, known noise and a normal prior, on five features."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x[:, [0, 2, 3, 6, 8]], (y - y.mean()) / y.std()
    x = x / x.std(0)
    likelihood = gaussian_likelihood(scale=LINEAR_NOISE)
    posterior = Posterior(mlp(5, [], 1), likelihood, normal(LINEAR_PRIOR))
    rows = np.column_stack([np.ones(len(x)), x])
    covariance = np.linalg.inv(
        rows.T @ rows / LINEAR_NOISE**2 + np.eye(rows.shape[1]) / LINEAR_PRIOR**2
    )

    def view(draws):
        layer = draws["network"]["layer0"]
        return np.concatenate([layer["bias"], layer["weight"][..., 0]], axis=-1)

    return normal_target(
        posterior.log_density,
        lambda key, chains: jax.vmap(posterior.init)(jax.random.split(key, chains)),
        view,
        covariance @ rows.T @ y / LINEAR_NOISE**2,
        np.diag(covariance),
        data=(x.astype(np.float32), y[:, None].astype(np.float32)),
    )


TARGETS: dict[str, Callable[[], Target]] = {
    name: functools.cache(build)
    for name, build in {
        "gaussian": small_gaussian,
        "gaussian-100": correlated_gaussian,
        "funnel": funnel,
        "banana": banana,
        "skewed": skewed,
        "logistic": logistic_regression,
        "schools": eight_schools,
        "two-modes": two_modes,
        "linear": linear_gaussian,
    }.items()
}


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps(reference_run(), indent=1) + "\n")
