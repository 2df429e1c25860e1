"""Known posteriors, through the function users call.

A run agrees if every expectation has enough effective draws and lies within 4.5 of its own
Monte Carlo standard errors of the truth. Broken kernels have to fail the same check.

MCLMC has no accept-reject step, so its draws are biased. The runs here ask for an energy
variance per dimension of 1e-4, at which the bias is below their Monte Carlo error.
"""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_stats.base import array_stats
from scipy.special import polygamma

from bnnmcmc.samplers.hmc import HMCInfo, hmc
from bnnmcmc.samplers.mams import mams
from bnnmcmc.samplers.mclmc import INTEGRATORS, mclmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import sample_density

MIN_ESS = 300
ERRORS = 4.5
CHAINS = 4


def failures(draws, mean, second):
    """Return what is wrong with draws (chain, draw, size), given E[x] and E[x^2]."""
    found = []
    for moment, values, truth in (
        ("mean", draws, mean),
        ("second moment", np.square(draws), second),
    ):
        for i, expected in enumerate(truth):
            x = values[..., i].astype(np.float64)
            if not np.all(np.isfinite(x)):
                found.append(f"not finite: {moment} of {i}")
                continue
            ess = array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean")
            if not ess > MIN_ESS:
                found.append(f"ess {ess:.0f}: {moment} of {i}")
                continue
            error = array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean")
            z = (x.mean() - expected) / error
            if not abs(z) < ERRORS:
                found.append(f"{moment} of {i}: {x.mean():.4g} is not {expected:.4g} (z = {z:.1f})")
    return found


# Scales 0.1, 1 and 3 and correlations of 0.9: a ratio of 100 between the axes of the ellipsoid.
SCALES = np.array([0.1, 1.0, 3.0])
COVARIANCE = np.outer(SCALES, SCALES) * (0.9 ** np.abs(np.subtract.outer(range(3), range(3))))
LOCATION = np.array([1.0, -2.0, 0.5])
PRECISION = jnp.asarray(np.linalg.inv(COVARIANCE), jnp.float32)


def gaussian(x):
    r = x - LOCATION.astype(np.float32)
    return -0.5 * r @ PRECISION @ r


SHAPES = np.array([1.0, 2.0, 5.0])


def log_gamma(x):
    """Logarithms of gamma variables: skewed, with one exponential and one double-exponential tail.

    The first is a (mirrored) Gumbel variable.
    """
    return jnp.sum(SHAPES.astype(np.float32) * x - jnp.exp(x))


CENTRE = np.array([1.5, 0.5])


def mixture(x):
    """Weights 0.3 and 0.7 at minus and plus the centre, unit scales: two modes, well connected."""
    logits = jnp.log(jnp.array([0.3, 0.7]))
    centres = jnp.stack([-CENTRE, CENTRE]).astype(jnp.float32)
    return jax.nn.logsumexp(logits - 0.5 * jnp.sum(jnp.square(x - centres), axis=1))


def banana(x):
    """x0 from N(0, 1) and x1 from N((x0^2 - 1) / 4, 1 / 4)."""
    return -0.5 * x[0] ** 2 - 2.0 * (x[1] - 0.25 * (x[0] ** 2 - 1.0)) ** 2


log_gamma_mean = polygamma(0, SHAPES)
TARGETS = {
    "gaussian": (gaussian, LOCATION, np.diag(COVARIANCE) + LOCATION**2),
    "log-gamma": (log_gamma, log_gamma_mean, polygamma(1, SHAPES) + log_gamma_mean**2),
    "mixture": (mixture, 0.4 * CENTRE, 1.0 + CENTRE**2),
    "banana": (banana, np.zeros(2), np.array([1.0, 0.375])),
}
# Kernel, warm-up steps, kept draws, steps per draw.
RUNS = {
    "mclmc": (mclmc(energy_variance_end=1e-4), 4000, 3000, 80),
    "mams": (mams(), 2000, 3000, 1),
    "nuts": (nuts(), 1000, 2000, 1),
    "hmc": (hmc(num_leapfrog=10), 1000, 2000, 1),
}


def run(target, kernel, warmup, draws, thin, density=None, seed=1):
    """Return the failures of one run."""
    log_density, mean, second = TARGETS[target]
    starts = jax.random.normal(jax.random.key(seed), (CHAINS, len(mean)))
    samples = sample_density(
        density or log_density,
        starts,
        kernel=kernel,
        warmup=warmup,
        draws=draws,
        thin=thin,
        seed=seed,
    )
    assert samples.draws.shape == (CHAINS, draws, len(mean))
    return failures(samples.draws, mean, second)


# Every pair is run; those that add least to the others only with the slow tests.
SLOW = {
    ("mclmc", "banana"),
    ("hmc", "banana"),
    ("nuts", "log-gamma"),
    ("hmc", "mixture"),
    ("mams", "mixture"),
    ("mams", "banana"),
}
PAIRS = [
    pytest.param(kernel, target, marks=[pytest.mark.slow] if (kernel, target) in SLOW else [])
    for kernel in RUNS
    for target in TARGETS
]


@pytest.mark.parametrize(("kernel", "target"), PAIRS)
def test_moments(kernel, target):
    assert run(target, *RUNS[kernel]) == []


def flipped(density):
    """Keep the density's value and turn its gradient round."""
    return lambda x: 2 * jax.lax.stop_gradient(density(x)) - density(x)


@pytest.mark.parametrize("kernel", ["mclmc", "hmc"])
def test_a_gradient_of_the_wrong_sign_fails(kernel):
    assert run("mixture", *RUNS[kernel], density=flipped(mixture))


@pytest.mark.parametrize("kernel", ["nuts"])
def test_a_density_off_by_a_factor_fails_by_its_moments(kernel):
    found = run("log-gamma", *RUNS[kernel], density=lambda x: 1.3 * log_gamma(x))
    assert any("moment" in f and "z =" in f for f in found)


def plain_hmc(always_accept):
    """Ten leapfrogs of step size 1.2 (stable below 2 on a unit scale), without a warm-up."""
    transition = blackjax.hmc.build_kernel()

    def step(key, state, params, log_density):
        new, info = transition(key, state, log_density, *params, 10)
        if always_accept:
            end = info.proposal
            new = new._replace(
                position=end.position,
                logdensity=end.logdensity,
                logdensity_grad=end.logdensity_grad,
            )
        return new, HMCInfo(
            new.logdensity,
            info.energy,
            info.acceptance_rate,
            info.is_divergent,
            jnp.asarray(10),
            params.step_size,
        )

    return hmc(num_leapfrog=10, jitter=0.0, initial_step_size=1.2)._replace(step=step)


def test_hmc_that_accepts_everything_fails_by_its_second_moments():
    """And the same kernel with its accept-reject step passes: nothing else is wrong with it."""
    assert run("mixture", plain_hmc(always_accept=False), 0, 3000, 1) == []
    found = run("mixture", plain_hmc(always_accept=True), 0, 3000, 1)
    assert any(f.startswith("second moment") for f in found)


def test_mams_without_the_change_of_kinetic_energy_fails(monkeypatch):
    """The dynamics change the density of directions, which acceptance has to make up for."""
    rule, gradients = INTEGRATORS["leapfrog"]

    def without(log_density, inverse_mass_matrix):
        move = rule(log_density, inverse_mass_matrix)
        return lambda state, step_size: (move(state, step_size)[0], jnp.zeros(()))

    monkeypatch.setitem(INTEGRATORS, "leapfrog", (without, gradients))
    found = run("mixture", mams(), *RUNS["mams"][1:])
    assert any("z =" in f for f in found)


def test_too_few_effective_draws_fail():
    kernel = nuts(max_depth=1, initial_step_size=0.01)
    assert any(f.startswith("ess") for f in run("mixture", kernel, 0, 500, 1))


def test_mclmc_with_a_large_energy_variance_is_biased():
    """The knob that sets the bias: 1e-4 passes `test_moments`, 2 does not."""
    hot = mclmc(energy_variance_start=5.0, energy_variance_end=2.0)
    found = run("log-gamma", hot, 4000, 3000, 80)
    assert any("z =" in f for f in found)
