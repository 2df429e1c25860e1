"""Simulation-based calibration of the kernels on a small network, in function space.

Parameters from the prior, data from the parameters, draws given the data: where the sampler is
right, the rank of the truth among the draws is uniform (Talts, Betancourt, Simpson, Vehtari and
Gelman 2018, 1804.06788). Weights of a network can be permuted and their signs turned without any
change of the function, so ranks are of what the function does: its values at three rows, the
log-likelihood of the data, and the log prior density, which these symmetries leave alone.

All data sets are sampled at once, one chain each, with `sample_density`: the targets y are a leaf
of the position that stays where the chain starts (``leaves``), whose rows are numbered, for
minibatch kernels to take some of. Chains start at draws of the prior
that have nothing to do with the truth, so warm-up and mixing are tested with the kernel: from the
truth itself a chain would be right by construction, were it never to move.

Draws are kept so far apart that they are nearly independent; in one chain they are not exchangeable
with the truth otherwise, and ranks gather at the ends.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_sampler_accuracy import wrong_sign

from bnnmcmc import (
    Kernel,
    MinibatchKernel,
    Posterior,
    RowDensity,
    gaussian,
    hmc,
    mams,
    mclmc,
    mlp,
    normal_prior,
    nuts,
    place,
    sample_density,
    sghmc,
    sgld,
    smile,
)
from bnnmcmc.samplers import mams as mams_module
from bnnmcmc.samplers import nuts as nuts_module

ROWS, NOISE = 20, 0.5
DRAWS, BINS = 99, 20
X = np.linspace(-2.0, 2.0, ROWS, dtype=np.float32)[:, None]
PLACES = np.array([[-1.5], [0.3], [3.0]], np.float32)
POSTERIOR = Posterior(mlp(1, [4], 1, activation="tanh"), gaussian(scale=NOISE), normal_prior())
QUANTITIES = ("f(-1.5)", "f(0.3)", "f(3)", "log-likelihood", "log prior")
# One test in a thousand of a right sampler would fail; each looks at all quantities.
SMALLEST_P = 1e-3


class Setting(NamedTuple):
    """A kernel and how long it runs; ``bias``: by how much ranks may be off, 0 if it is exact.

    The bias is the largest gap between the ranks' distribution function and the uniform one.
    """

    kernel: Kernel | MinibatchKernel
    warmup: int
    thin: int
    bias: float = 0.0


# A kernel is added here.
SETTINGS = {
    "nuts": Setting(nuts(), 500, 5),
    "hmc": Setting(hmc(num_leapfrog=15), 500, 10),
    "mams": Setting(mams(), 1500, 20),
    "mclmc": Setting(mclmc(energy_variance_end=1e-4), 3000, 400, bias=0.01),
    "mclmc, defaults": Setting(mclmc(), 3000, 100, bias=0.1),
    # On batches of half of the rows.
    "sgld": Setting(sgld(10, 1e-2, 1e-2), 2000, 200, bias=0.07),
    "sghmc": Setting(sghmc(10, 0.03, 0.03, friction=5.0), 2000, 100, bias=0.07),
    "smile": Setting(smile(10, anchor=5, energy_variance_end=1e-3), 3000, 200, bias=0.06),
    "smile, no anchors": Setting(
        smile(10, anchor=0, energy_variance_end=1e-3), 3000, 200, bias=0.23
    ),
}


def log_prior(position):
    return POSTERIOR.log_prior({"network": position["network"], "likelihood": {}})


def log_likelihood(position, x, numbers):
    weights = {"network": position["network"], "likelihood": {}}
    return POSTERIOR.log_likelihood(weights, x, position["y"][numbers])


def from_prior(key, count):
    """Return networks whose weights are draws of the prior."""
    shapes = jax.vmap(POSTERIOR.network.init)(jax.random.split(key, count))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    return tree.unflatten(
        [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    )


@jax.jit
def looked_at(network, y):
    """Return the `QUANTITIES` of one network, given the data it is held against."""
    position = {"network": network, "likelihood": {}}
    values = POSTERIOR.network.apply(network, PLACES)[:, 0]
    likelihood = POSTERIOR.log_likelihood(position, X, y)
    return jnp.append(values, jnp.stack([likelihood, POSTERIOR.log_prior(position)]))


def ranks_of(setting: Setting, sets: int, seed: int, kernel: Kernel | None = None) -> np.ndarray:
    """Return the rank, 0 to 99, of each true quantity among the draws, (data set, quantity)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    truth = from_prior(keys[0], sets)
    functions = jax.vmap(lambda n: POSTERIOR.network.apply(n, X))(truth)
    y = functions + NOISE * jax.random.normal(keys[1], functions.shape)
    samples = sample_density(
        RowDensity(log_prior, log_likelihood),
        {"network": from_prior(keys[2], sets), "y": y},
        kernel=kernel or setting.kernel,
        warmup=setting.warmup,
        draws=DRAWS,
        thin=setting.thin,
        seed=seed,
        data=(X, np.arange(ROWS)),
        leaves=["network"],
        placement=place(sets, mode="map"),
    )
    of_truth = jax.vmap(looked_at)(truth, y)
    of_draws = jax.vmap(jax.vmap(looked_at, (0, None)))(samples.draws["network"], y)
    return np.sum(np.asarray(of_draws) < np.asarray(of_truth)[:, None], axis=1)


def p_value(ranks: np.ndarray) -> float:
    """Return the p-value of uniform ranks: chi-square, of all quantities together (Bonferroni)."""
    counts = [np.bincount(r * BINS // (DRAWS + 1), minlength=BINS) for r in ranks.T]
    return min(1.0, len(counts) * min(stats.chisquare(c).pvalue for c in counts))


def gaps(ranks: np.ndarray) -> np.ndarray:
    """Return the largest gap between the ranks' distribution function and the uniform one."""
    edges = np.arange(1, DRAWS + 1)
    below = (ranks[:, None] < edges[:, None]).mean(axis=0)
    return np.abs(below - edges[:, None] / (DRAWS + 1)).max(axis=0)


def report(name: str, ranks: np.ndarray) -> None:
    """Print one row of a table (``pytest -s``)."""
    each = ", ".join(f"{q} {gap:.3f}" for q, gap in zip(QUANTITIES, gaps(ranks), strict=True))
    print(f"\n{name:16s} {len(ranks)} data sets, p = {p_value(ranks):.2g}, gaps: {each}")


EXACT = [name for name, setting in SETTINGS.items() if not setting.bias]
BIASED = [name for name, setting in SETTINGS.items() if setting.bias]


def test_ranks_are_uniform_quickly():
    assert p_value(ranks_of(SETTINGS["hmc"], sets=200, seed=1)) > SMALLEST_P


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_ranks_are_uniform(name):
    ranks = ranks_of(SETTINGS[name], sets=1000, seed=2)
    report(name, ranks)
    assert p_value(ranks) > SMALLEST_P


@pytest.mark.slow
@pytest.mark.parametrize("name", BIASED)
def test_ranks_are_as_far_off_as_stated(name):
    """A gap is held to the stated one and, beside it, to what chance makes of right ranks."""
    ranks = ranks_of(SETTINGS[name], sets=1000, seed=2)
    report(name, ranks)
    chance = stats.kstwo.ppf(1 - SMALLEST_P / len(QUANTITIES), len(ranks))
    assert np.all(gaps(ranks) < SETTINGS[name].bias + chance)


# ------------------------------------------------------------------------------------ broken twins


def broken(kernel: Kernel, module, name: str, value) -> Kernel:
    """Put another function into a kernel's module, for its steps and not for its warm-up."""

    def step(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, value)
            return kernel.step(*arguments)

    return kernel._replace(step=step, trajectories=None, for_matrices=None)


def inverse_join(whole, new, ends, log_uniform, metric):
    turned = log_uniform + 2 * (new.log_weight - whole.log_weight)
    return JOIN(whole, new, ends, turned, metric)


JOIN = nuts_module._join
# With a low acceptance rate, so that there is much to accept wrongly.
LOW = {"nuts": nuts(target_acceptance=0.5), "mams": mams(target_acceptance=0.5)}
BROKEN = {
    "hmc, wrong sign": ("hmc", wrong_sign(SETTINGS["hmc"].kernel), 1000),
    "nuts, inverse ratio": (
        "nuts",
        broken(LOW["nuts"], nuts_module, "_join", inverse_join),
        1000,
    ),
    "mams, accepts everything": (
        "mams",
        broken(LOW["mams"], mams_module, "_acceptance_rate", jnp.ones_like),
        200,
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if sets > 200 else [])
        for name, (_, _, sets) in BROKEN.items()
    ],
)
def test_ranks_of_a_broken_kernel_are_not_uniform(name):
    of, kernel, sets = BROKEN[name]
    ranks = ranks_of(SETTINGS[of]._replace(kernel=kernel), sets, seed=2)
    report(name, ranks)
    assert p_value(ranks) < SMALLEST_P


@pytest.mark.slow
@pytest.mark.parametrize("name", LOW)
def test_ranks_at_a_low_acceptance_rate_are_uniform(name):
    ranks = ranks_of(SETTINGS[name]._replace(kernel=LOW[name]), sets=1000, seed=2)
    assert p_value(ranks) > SMALLEST_P


def test_ranks_of_a_chain_that_stays_where_it_starts_are_not_uniform():
    """So it is the sampler that makes them uniform, and not the start."""
    short = SETTINGS["hmc"]._replace(warmup=0, thin=1)
    assert p_value(ranks_of(short, sets=200, seed=2)) < SMALLEST_P


@pytest.mark.slow
def test_ranks_on_batches_that_count_too_little_are_further_off_than_stated(monkeypatch):
    """The log-likelihood of a batch of half of the rows, times one instead of two."""
    monkeypatch.setattr("bnnmcmc.sampling.check_rows", lambda kernel, data: ROWS // 2)
    ranks = ranks_of(SETTINGS["sgld"], sets=200, seed=2)
    report("sgld, half", ranks)
    chance = stats.kstwo.ppf(1 - SMALLEST_P / len(QUANTITIES), len(ranks))
    assert np.any(gaps(ranks) > SETTINGS["sgld"].bias + chance)
