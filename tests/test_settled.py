"""A warm-up that ends early: when it does, when it does not, and what the chain does then."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moments import failures

from bnnmcmc import mclmc, sample_density
from bnnmcmc.errors import InputError
from bnnmcmc.placement import place
from bnnmcmc.samplers.kernel import Warmup
from bnnmcmc.samplers.settled import until_settled

STEPS, RESUME = 2000, 1600  # windows of 100 steps


class Info(NamedTuple):
    log_density: jax.Array
    step_size: jax.Array
    gradients: jax.Array


def scripted(log_density, step_size):
    """Return a warm-up with these statistics at its step t; its state counts the steps."""

    def step(key, state, adaptation, t, density):
        one = jnp.asarray(1, jnp.int32)
        return state + 1, t, Info(log_density(key, t), step_size(t), one)

    return Warmup(lambda position: jnp.zeros((), jnp.int32), step, lambda adaptation: adaptation)


def run(log_density, step_size=lambda t: jnp.float32(0.1), steps=STEPS, resume_at=RESUME):
    nothing = Info(jnp.float32(0), jnp.float32(0), jnp.int32(0))
    rules = scripted(log_density, step_size)
    rules = until_settled(rules, steps, resume_at, lambda position: nothing)

    def one(carry, t):
        key = jax.random.fold_in(jax.random.key(0), t)
        state, adaptation, info = rules.step(key, *carry, t, None)
        return (state, adaptation), info

    start = jnp.zeros((), jnp.int32), rules.init(jnp.zeros(3))
    (made, adaptation), info = jax.jit(lambda: jax.lax.scan(one, start, jnp.arange(steps)))()
    assert int(rules.finish(adaptation)) == steps - 1  # the last phases were not left out
    assert int(info.gradients.sum()) == int(made)
    return int(made), info


def noise(key, t):
    return 50.0 + 3.0 * jax.random.normal(key)


def test_a_settled_chain_skips_to_the_last_phases():
    made, info = run(noise)
    assert made == 3 * 100 + STEPS - RESUME  # after the third window, the first with two before it
    # Then it rests, and its statistics are those of its last step.
    assert np.all(np.asarray(info.gradients)[made:] == 0)
    assert np.all(np.asarray(info.log_density)[made:] == np.asarray(info.log_density)[made - 1])


@pytest.mark.parametrize(
    ("log_density", "step_size"),
    [
        # A standard deviation per window.
        (lambda key, t: noise(key, t) + 3.0 * t / 100, lambda t: jnp.float32(0.1)),
        (lambda key, t: jnp.float32(t), lambda t: jnp.float32(0.1)),
        (lambda key, t: jnp.float32(jnp.nan), lambda t: jnp.float32(0.1)),
        (noise, lambda t: 0.1 * jnp.exp(t / 250)),
    ],
    ids=["drift", "no noise", "not finite", "step size"],
)
def test_an_unsettled_chain_runs_its_length(log_density, step_size):
    assert run(log_density, step_size)[0] == STEPS


def test_a_chain_settles_once_its_drift_ends():
    made, _ = run(lambda key, t: noise(key, t) + 3.0 * jnp.minimum(t, 700) / 100)
    assert 800 < made - (STEPS - RESUME) <= 1200


def test_short_warm_ups_run_their_length():
    assert run(noise, steps=999, resume_at=800)[0] == 999


def normal(position):
    return -0.5 * jnp.sum(jnp.square(position / jnp.arange(1, 11)))


def samples(mode=None, **options):
    starts = jnp.asarray(np.random.default_rng(0).normal(size=(4, 10)), jnp.float32) * 0.01
    starts = starts.at[3].multiply(1e5)  # far away
    kernel = mclmc(energy_variance_end=1e-4, **options)
    return sample_density(
        normal,
        starts,
        kernel=kernel,
        warmup=4000,
        draws=1000,
        thin=10,
        placement=place(4, mode=mode),
    )


def test_mclmc_settles_and_its_draws_are_right():
    settled = samples(settle=True)
    spent = settled.warmup_stats["gradients"].sum(axis=1)
    assert np.all(spent < 3600)
    assert np.all(spent >= 3 * 200 + 800)
    assert np.all(samples().warmup_stats["gradients"].sum(axis=1) == 4000)
    assert failures(settled.draws, np.zeros(10), np.arange(1.0, 11) ** 2) == []


@pytest.mark.parametrize("mode", ["map", "vmap"])
def test_a_chain_rests_alone_and_beside_others_that_go_on(mode):
    stats = samples(mode, settle=True).warmup_stats
    going = stats["gradients"] > 0
    assert len(np.unique(going.sum(axis=1))) > 1  # they end at different steps
    for chain in range(4):
        last = np.flatnonzero(going[chain])[-1]
        assert np.all(going[chain, :last])
        assert len(np.unique(stats["log_density"][chain, last:])) == 1


def test_published_tuning_does_not_settle():
    with pytest.raises(InputError, match=r'sampler\.settle: found true with tuning = "mile"'):
        mclmc(tuning="mile", settle=True)
