"""Kernels that look at batches of rows: what they estimate, and how far their draws are off.

The posterior of a linear model with known noise is Gaussian. On it, the draws of SGLD and SGHMC
have a covariance that is known too, bias included: the fixed point of a linear recursion.
"""

import json
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arviz_stats.base import array_stats
from conftest import TINY
from scipy.linalg import solve_discrete_lyapunov
from test_resume import assert_equal_runs

from bnnmcmc.build import make_kernel
from bnnmcmc.config import parse
from bnnmcmc.errors import InputError
from bnnmcmc.health import chain_statuses
from bnnmcmc.likelihoods import gaussian
from bnnmcmc.models.mlp import mlp
from bnnmcmc.placement import place, replicate
from bnnmcmc.posterior import Posterior
from bnnmcmc.preflight import gradient_counts
from bnnmcmc.priors import hierarchical
from bnnmcmc.run import sample
from bnnmcmc.samplers.batches import SCHEDULES, draw_batch, first_anchor, landscape, step_sizes
from bnnmcmc.samplers.kernel import RowDensity, RowTarget
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.sghmc import sghmc
from bnnmcmc.samplers.sgld import sgld
from bnnmcmc.samplers.smile import smile
from bnnmcmc.samplers.table import KERNELS
from bnnmcmc.sampling import (
    build_program,
    departed,
    finish_warmup,
    run_blocks,
    sample_density,
    start_chains,
)
from bnnmcmc.targets import Target
from bnnmcmc.trees import flatten_stacked, layout

ROWS, SIZE, BATCH, SIGMA = 600, 3, 60, 1.0
ERRORS, MIN_ESS, CHAINS = 4.5, 400, 4
MINIBATCH = ("sgld", "sghmc", "smile")


def table(rows=ROWS, size=SIZE, scales=(1.0, 1.0, 3.0)):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, size)) * np.resize(scales, size)
    return x, x @ rng.normal(size=size) + SIGMA * rng.normal(size=rows)


X, Y = table()


def log_prior(theta):
    return -0.5 * jnp.sum(jnp.square(theta))


def log_likelihood(theta, x, y):
    return -0.5 * jnp.sum(jnp.square((y - x @ theta) / SIGMA))


LINEAR = RowDensity(log_prior, log_likelihood)


def exact(x=X, y=Y):
    """Return mean and precision of the posterior."""
    precision = x.T @ x / SIGMA**2 + np.eye(x.shape[1])
    return np.linalg.solve(precision, x.T @ y / SIGMA**2), precision


def noise_covariance(batch, deviation, mean):
    """Return the covariance of the gradient's estimate, for draws of this covariance.

    Of parts of equal size m, one row each: the sum of m^2 times the covariance within each part.
    """
    m = ROWS // batch
    assert m * batch == ROWS
    total = np.zeros((SIZE, SIZE))
    for x, y in zip(X.reshape(batch, m, SIZE), Y.reshape(batch, m), strict=True):
        gradients = x * (y - x @ mean)[:, None] / SIGMA**2
        total += m**2 * np.cov(gradients.T, ddof=0)
        # The residuals move with the draw: a gradient of slope x x^T.
        slopes = np.einsum("ni,nj->nij", x, x) / SIGMA**2
        slopes = slopes - slopes.mean(0)
        total += m * np.einsum("nij,jk,nlk->il", slopes, deviation, slopes)
    return total


def stationary(step, batch, scale=1.0, **options):
    """Return the covariance of the draws of SGLD, or of SGHMC if there is a friction."""
    mean, precision = exact()
    eye, covariance = np.eye(SIZE), np.linalg.inv(precision)
    both = np.ones((SIZE, SIZE)) * np.multiply.outer(scale, scale)
    precision = precision * both
    for _ in range(50):
        noise = noise_covariance(batch, covariance, mean) * both
        if "friction" not in options:
            moves, added = eye - step * precision, 2 * step * eye + step**2 * noise
        else:
            friction = options["friction"]
            # First the position, then the momentum by the gradient there.
            moves = np.block(
                [
                    [eye, step * eye],
                    [-step * precision, (1 - step * friction) * eye - step**2 * precision],
                ]
            )
            added = np.zeros((2 * SIZE, 2 * SIZE))
            added[SIZE:, SIZE:] = 2 * friction * step * eye + step**2 * noise
        covariance = solve_discrete_lyapunov(moves, added)[:SIZE, :SIZE] * both
    return covariance


def draw(kernel, warmup=500, draws=5000, thin=4, density=LINEAR, data=(X, Y), seed=0):
    mean, precision = exact(*data)
    scatter = np.random.default_rng(1).normal(size=(CHAINS, len(mean)))
    starts = mean + scatter / np.sqrt(np.diag(precision))
    return sample_density(
        density, starts, kernel=kernel, warmup=warmup, draws=draws, thin=thin, data=data, seed=seed
    )


def failures(draws, mean, covariance):
    """Return what is wrong with draws (chain, draw, size) beyond their Monte Carlo error."""
    found = []
    centred = draws.astype(np.float64) - mean
    for i in range(len(mean)):
        for name, values, truth in (
            ("mean", centred[..., i], 0.0),
            ("variance", np.square(centred[..., i]), covariance[i, i]),
        ):
            ess = array_stats.ess(values, chain_axis=0, draw_axis=1, method="mean")
            if not ess > MIN_ESS:
                found.append(f"ess {ess:.0f}: {name} of {i}")
            error = array_stats.mcse(values, chain_axis=0, draw_axis=1, method="mean")
            z = (values.mean() - truth) / error
            if not abs(z) < ERRORS:
                found.append(f"{name} of {i}: {values.mean():.4g}, not {truth:.4g} (z = {z:.1f})")
    return found


# The largest precision is near 5400, so SGLD is stable below 3.7e-4.
LARGE = 1e-4
CASES = {
    "sgld": (sgld, {"step_size": LARGE}, BATCH),
    "sgld, half the step": (sgld, {"step_size": LARGE / 2}, BATCH),
    "sgld, all rows": (sgld, {"step_size": LARGE}, ROWS),
    "sghmc": (sghmc, {"step_size": 5e-3, "friction": 50.0}, BATCH),
    "sghmc, all rows": (sghmc, {"step_size": 5e-3, "friction": 50.0}, ROWS),
}


def of_case(name, **more):
    make, options, batch = CASES[name]
    constant = {"initial_step_size": options["step_size"], "schedule": "constant"}
    return make(batch_size=batch, precondition=False, **options, **constant, **more)


def theory(name):
    _, options, batch = CASES[name]
    step, *_ = options.values()
    friction = {k: v for k, v in options.items() if k == "friction"}
    return stationary(step, batch, **friction)


SLOW = [pytest.mark.slow]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW if n == "sghmc, all rows" else []) for n in CASES]
)
def test_the_draws_have_the_covariance_that_theory_says(name):
    assert failures(draw(of_case(name)).draws, exact()[0], theory(name)) == []


def test_the_deviation_falls_with_the_step_and_without_noise():
    """As the docstrings state it; `test_the_draws_have...` holds the kernels to these numbers."""
    exactly = np.diag(np.linalg.inv(exact()[1]))
    large, half, full = (
        np.diag(theory(n)) / exactly - 1 for n in ("sgld", "sgld, half the step", "sgld, all rows")
    )
    # In proportion where the step is short; the third direction is near its limit.
    np.testing.assert_allclose((large / half)[:2], 2.0, rtol=0.05)
    assert 2.0 < (large / half)[2] < 2.5
    precision = 1 / exactly
    np.testing.assert_allclose(1 + full, 1 / (1 - LARGE * precision / 2), rtol=0.01)
    noise = np.diag(noise_covariance(BATCH, np.zeros((SIZE, SIZE)), exact()[0]))
    stated = (1 + LARGE * noise / 2) / (1 - LARGE * precision / 2)
    np.testing.assert_allclose(1 + large, stated, rtol=0.1)
    assert np.all(large > 3 * full)


def test_a_wrong_share_of_rows_fails(monkeypatch):
    monkeypatch.setattr("bnnmcmc.sampling.check_rows", lambda kernel, data: ROWS // 2)
    found = failures(draw(of_case("sgld"), draws=3000).draws, exact()[0], theory("sgld"))
    assert any("z =" in f for f in found)


def test_a_gradient_before_its_time_fails(monkeypatch):
    """Position and momentum both from the old ones: the energy grows, and so does the variance."""
    kernel = of_case("sghmc, all rows")
    inner = kernel.sampling(0)

    def late(key, state, params, t, target):
        def estimate(position, batch):
            return target.estimate(position - params.step_size * state.momentum, batch)

        return inner(key, state, params, t, target._replace(estimate=estimate))

    broken = kernel._replace(sampling=lambda num_warmup: late)
    found = failures(draw(broken).draws, exact()[0], theory("sghmc, all rows"))
    assert any(f.startswith("variance") for f in found)


@pytest.mark.parametrize(
    ("make", "options"), [(sgld, {"step_size": 0.05}), (sghmc, {"step_size": 0.3, "friction": 3.0})]
)
def test_scales_are_those_of_the_noise(make, options):
    first = options["step_size"]
    samples = draw(make(batch_size=BATCH, initial_step_size=first, **options), warmup=4000)
    noise = np.diag(noise_covariance(BATCH, np.linalg.inv(exact()[1]), exact()[0]))
    expected = (1 + noise * BATCH / ROWS) ** -0.5
    # A thousand squares, no two chains' the same, and the steps' own share of the differences.
    np.testing.assert_allclose(samples.params.scale, np.tile(expected, (CHAINS, 1)), rtol=0.15)
    scale = samples.params.scale.astype(np.float64).mean(axis=0)
    assert (
        failures(
            samples.draws,
            exact()[0],
            stationary(
                batch=BATCH,
                scale=scale,
                **{
                    "step" if name == "step_size" else name: value
                    for name, value in options.items()
                },
            ),
        )
        == []
    )


@pytest.mark.parametrize("make", [sgld, sghmc])
def test_anchors_do_not_make_the_scales_longer(make):
    """Step sizes are in units of them: with scales of the noise that is left, steps would burst."""
    samples = draw(make(batch_size=BATCH, anchor=10), warmup=2000, draws=10, thin=1)
    noise = np.diag(noise_covariance(BATCH, np.linalg.inv(exact()[1]), exact()[0]))
    expected = (1 + noise * BATCH / ROWS) ** -0.5
    np.testing.assert_allclose(samples.params.scale, np.tile(expected, (CHAINS, 1)), rtol=0.15)


def test_before_the_scales_are_known_the_chain_stays():
    samples = draw(sgld(batch_size=BATCH), warmup=200, draws=10, thin=1)
    still = samples.warmup_stats["step_size"] == 0
    np.testing.assert_array_equal(still.sum(axis=1), 20)
    assert np.all(still[:, :20])


@pytest.mark.parametrize("name", ["sgld", "sghmc"])
def test_anchors_take_the_noise_out(name):
    """Near the mean of a narrow posterior, what is left is what all rows would give."""
    samples = draw(of_case(name, anchor=10))
    assert failures(samples.draws, exact()[0], theory(f"{name}, all rows")) == []
    assert any("variance" in f for f in failures(samples.draws, exact()[0], theory(name)))
    assert set(samples.stats["rows"].ravel()) <= {4 * 2 * BATCH, 4 * 2 * BATCH + ROWS}
    assert samples.stats["rows"].mean() == pytest.approx(4 * (2 * BATCH + ROWS / 10))
    assert samples.stats["gradients"].mean() == pytest.approx(4 * (2 + 1 / 10))


WIDE = table(rows=2000, size=20, scales=(0.3, 1.0, 3.0, 10.0))


def smile_deviation(**options):
    """Return the relative errors of the variances on a posterior with uneven noise."""
    kernel = smile(batch_size=100, initial_step_size=1e-3, **options)
    samples = draw(kernel, warmup=4000, draws=4000, thin=5, data=WIDE)
    mean, precision = exact(*WIDE)
    centred = samples.draws.astype(np.float64) - mean
    z = [
        centred[..., i].mean() / array_stats.mcse(centred[..., i], chain_axis=0, draw_axis=1)
        for i in range(len(mean))
    ]
    assert np.abs(z).max() < ERRORS
    return np.square(centred).mean((0, 1)) / np.diag(np.linalg.inv(precision)) - 1


def test_preconditioning_lowers_the_deviation_of_smile():
    """Unevenly noisy coordinates are hot and the others cold; scaled, all are a little hot."""
    scaled = smile_deviation(anchor=0)
    assert scaled.min() > 0
    assert scaled.max() < 0.4
    plain = smile_deviation(anchor=0, precondition=False)
    assert plain.min() < -0.8
    assert plain.max() > 2


def test_the_deviation_of_smile_falls_with_the_energy_variance():
    assert np.abs(smile_deviation(anchor=20, energy_variance_end=0.05)).max() < 0.2


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 7), (7, 3), (600, 60), (1000, 999)])
def test_a_batch_is_one_row_of_each_part(rows, size):
    keys = jax.random.split(jax.random.key(0), 4000)
    batches = np.asarray(jax.jit(jax.vmap(lambda k: draw_batch(k, rows, size)))(keys))
    assert batches.dtype == np.int32
    low = np.arange(size) * rows // size
    assert np.all((batches >= low) & (batches <= (np.arange(size) + 1) * rows / size))
    counts = np.bincount(batches.ravel(), minlength=rows)
    assert len(counts) == rows
    expected = len(keys) * size / rows
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    if rows == size:
        assert np.all(batches == np.arange(rows))


def test_batches_of_very_many_rows():
    batch = np.asarray(draw_batch(jax.random.key(0), 2**31 - 5000, 4096), np.int64)
    assert np.all(np.diff(batch) >= 0)
    assert batch[0] >= 0
    assert batch[-1] > 2**31 - 2**21


def linear_target():
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def estimate(theta, batch):
        return log_prior(theta) + ROWS / len(batch) * log_likelihood(theta, x[batch], y[batch])

    return RowTarget(ROWS, lambda theta: LINEAR(theta, x, y), estimate)


@pytest.mark.parametrize("every", [0, 5])
def test_a_landscape_is_unbiased(every):
    target, near = linear_target(), jnp.asarray(exact()[0], jnp.float32)
    at, anchor = near + 0.05, first_anchor(near, every, target)

    def see(key):
        seen = landscape(key, at, anchor, jnp.asarray(1), target, BATCH, every)
        return *jax.value_and_grad(seen.log_density)(at), seen.gradients, seen.rows

    keys = jax.random.split(jax.random.key(0), 5000)
    value, gradient, gradients, rows = jax.jit(jax.vmap(see))(keys)
    true_value, true_gradient = jax.value_and_grad(target.log_density)(at)
    found = np.column_stack([value, gradient]).astype(np.float64)
    truth = np.array([true_value, *true_gradient])
    error = found.std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(found.mean(0) - truth) < ERRORS * error)
    assert set(np.asarray(rows)) == {BATCH if every else 0}
    assert set(np.asarray(gradients)) == {1 if every else 0}
    if every:
        plain = jax.vmap(
            lambda key: jax.grad(
                landscape(key, at, None, jnp.asarray(1), target, BATCH, 0).log_density
            )(at)
        )(keys)
        assert np.all(np.std(gradient, axis=0) < 0.3 * np.std(plain, axis=0))


def test_an_anchor_moves_when_it_is_due():
    target, here = linear_target(), jnp.ones(SIZE)
    anchor = first_anchor(jnp.zeros(SIZE), 5, target)
    for t in range(12):
        seen = landscape(jax.random.key(t), here, anchor, jnp.asarray(t), target, BATCH, 5)
        due = t % 5 == 0
        assert np.array_equal(seen.anchor.position, here if due else anchor.position)
        assert (int(seen.gradients), int(seen.rows)) == (1 + due, BATCH + due * ROWS)
        if due:
            value, gradient = jax.value_and_grad(seen.log_density)(here)
            np.testing.assert_allclose(value, target.log_density(here), rtol=1e-5)
            np.testing.assert_allclose(gradient, jax.grad(target.log_density)(here), rtol=1e-3)


def test_schedules():
    at = {
        name: np.array(
            [
                step_sizes(name, 8.0, 1.0, 100, 50 if name == "cyclic" else 0)(jnp.asarray(t))
                for t in range(200)
            ]
        )
        for name in SCHEDULES
    }
    assert np.all(at["constant"] == 1.0)
    cosine = 1 + 7 * (1 + np.cos(np.pi * np.arange(100) / 100)) / 2
    np.testing.assert_allclose(at["cosine"][:100], cosine, rtol=1e-5)
    np.testing.assert_allclose(at["cosine"][100:], 1.0)
    np.testing.assert_allclose(at["polynomial"][[0, 100]], [8.0, 1.0], rtol=1e-5)
    # In the long run as t^(-1/3).
    assert at["polynomial"][199] == pytest.approx(2 ** (-1 / 3), rel=0.01)
    np.testing.assert_allclose(at["cyclic"][:200].reshape(4, 50)[:, [0, -1]], [[8.0, 1.0]] * 4)
    assert np.all(np.diff(at["cyclic"].reshape(4, 50), axis=1) < 0)
    for name in ("cosine", "polynomial"):
        assert step_sizes(name, 8.0, 1.0, 0, 0)(3) == 1.0


def test_the_schedule_is_followed_from_the_warm_up_into_sampling():
    sizes = {"step_size": 1e-6, "initial_step_size": 8e-6, "precondition": False}
    kernel = sgld(batch_size=60, schedule="polynomial", **sizes)
    samples = draw(kernel, warmup=100, draws=100, thin=1)
    steps = np.concatenate([samples.warmup_stats["step_size"], samples.stats["step_size"]], axis=1)
    size_at = step_sizes("polynomial", 8e-6, 1e-6, 100, 0)
    np.testing.assert_allclose(steps, np.array([[size_at(t) for t in range(200)]] * 4), rtol=1e-4)


def small(name):
    options = {"smile": {"initial_step_size": 1e-3}}
    scheduled = {"step_size": 1e-5, "initial_step_size": 1e-5}
    return KERNELS[name](batch_size=BATCH, anchor=7, **options.get(name, scheduled))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOW if n != "smile" else []) for n in MINIBATCH]
)
def test_batches_depend_on_seed_chain_and_step_alone(name):
    """Not on blocks, nor on which chains advance together."""
    starts = np.tile(exact()[0], (3, 1))

    def drawn(max_count, mode):
        data = tuple(jnp.asarray(a) for a in (X, Y))
        placement = place(3, mode=mode)
        program = build_program(
            LINEAR, small(name), layout(starts[0]), placement, warmup=20, draws=30, thin=2
        )
        rows = replicate(data, placement)
        carry, kept = start_chains(program, flatten_stacked(starts), 5, rows), []
        for stage in ("warmup", "sampling"):
            carry = carry if stage == "warmup" else finish_warmup(program, carry)
            for block in run_blocks(program, stage, carry, 5, rows, max_count=max_count):
                carry = block.carry
                kept += [block.draws] if block.draws is not None else []
        assert len(kept) > 1
        return np.concatenate(kept, axis=1)

    whole = drawn(29, "map")
    np.testing.assert_array_equal(whole, drawn(4, "map"))
    assert np.all(np.std(whole[:, 0], axis=0) > 0)
    # Rounding differs, and grows along a chain: in float64 it stays small.
    with jax.enable_x64(True):
        alone, together = drawn(29, "map"), drawn(29, "vmap")
        assert alone.dtype == np.float64
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MINIBATCH)
def test_side_by_side_an_anchor_is_not_computed_in_every_step(name):
    """A choice that depends on the chain would take both branches, all rows in each step."""
    placement = place(4, mode="vmap")
    program = build_program(
        LINEAR, small(name), layout(jnp.zeros(SIZE)), placement, warmup=5, draws=5, thin=1
    )
    data = replicate((jnp.asarray(X), jnp.asarray(Y)), placement)
    carry = start_chains(program, jnp.zeros((4, SIZE)), 0, data)
    key, none = jax.random.key(0), np.int32(0)
    for function, before in ((program.warm, carry), (program.draw, finish_warmup(program, carry))):
        before = departed(program, before)
        assert "cond[" in str(function.trace(before, key, none, none, data).jaxpr)


def test_rows_are_counted():
    samples = draw(
        smile(batch_size=BATCH, anchor=0, initial_step_size=1e-3), warmup=400, draws=10, thin=3
    )
    assert np.all(samples.warmup_stats["rows"] == 2 * 2 * BATCH)  # two batches a step, in records
    assert np.all(samples.stats["rows"] == 3 * BATCH)
    assert np.all(samples.stats["gradients"] == 3)


def test_what_does_not_fit_is_refused():
    starts = jnp.zeros((2, SIZE))
    with pytest.raises(InputError, match=r"sampler\.batch_size: found 601, but there are 600 rows"):
        sample_density(LINEAR, starts, kernel=sgld(batch_size=601), data=(X, Y))
    with pytest.raises(InputError, match="the kernel sgld looks at batches of rows, so it needs"):
        sample_density(lambda p, x, y: LINEAR(p, x, y), starts, kernel="sgld", data=(X, Y))
    with pytest.raises(InputError, match="the same number of rows on all leading axes"):
        sample_density(LINEAR, starts, kernel="sgld", data=(X, Y[:-1]))
    prior = RowDensity(log_prior, lambda theta: jnp.zeros(()))
    with pytest.raises(InputError, match="the same number of rows on all leading axes"):
        sample_density(prior, starts, kernel="sgld")


def test_kernels_that_see_all_rows_take_such_a_density_too():
    samples = sample_density(LINEAR, jnp.zeros((2, SIZE)), kernel=mclmc(), draws=5, data=(X, Y))
    assert samples.draws.shape == (2, 5, SIZE)


def test_scaled_layers_and_a_target_work_on_batches():
    """A position then holds raw parameters and scales, and sampling ends when the target is met."""
    posterior = Posterior(mlp(3, [4], 1), gaussian(scale=0.5), hierarchical())
    members = jax.vmap(posterior.init)(jax.random.split(jax.random.key(0), 2))
    x, y = X[:200].astype(np.float32), Y[:200, None].astype(np.float32)
    kernel = smile(batch_size=20, anchor=10)
    run = sample(
        posterior, members, x, y, kernel=kernel, warmup=500, draws=2000, until=Target(ess=20)
    )
    assert run.checks[-1]["ess"] >= 20
    assert run.draws.draws < 2000
    drawn = run.load_draws()
    assert np.ptp(drawn["prior"]["layer0"]["log_scale"], axis=1).min() > 0
    assert [status.status for status in run.status] == ["ok", "ok"]


def test_advice_names_the_option_that_lowers_the_step_size():
    """The energy error is known in the warm-up alone, so a draw's statistics do not have it."""
    stats = {
        "log_density": np.random.default_rng(0).normal(size=(2, 50)),
        "diverging": np.full((2, 50), 1),
        "step_size": np.full((2, 50), 0.1),
        "rows": np.full((2, 50), 256),
    }
    for more, option in (
        ({}, "sampler.step_size"),
        ({"decoherence_length": np.ones((2, 50))}, "sampler.energy_variance_end"),
    ):
        statuses = chain_statuses(stats | more, np.ones(2, bool), 5)
        assert [status.status for status in statuses] == ["diverging"] * 2
        assert statuses[0].sentence.endswith(f"lower the step size: {option}.")


def of_table(**sampler):
    return parse({"data": {"path": "t.csv"}, "sampler": sampler}, "")


def test_the_cost_is_in_gradients_over_all_rows():
    steps = {"warmup": 100, "draws": 10, "thin": 15, "batch_size": 50}
    plain = of_table(kernel="sgld", **steps)
    assert gradient_counts(plain, 1000) == (250 / 20,) * 2
    anchored = of_table(kernel="sghmc", anchor=40, **steps)
    assert gradient_counts(anchored, 1000) == (2 * 250 / 20 + 3 + 4,) * 2
    # Held to what is counted, the start apart.
    kernel = smile(batch_size=BATCH, anchor=40)
    samples = draw(kernel, warmup=100, draws=10, thin=15)
    counted = samples.stats["rows"].sum() + samples.warmup_stats["rows"].sum()
    config = of_table(kernel="smile", anchor=40, **{**steps, "batch_size": BATCH})
    assert gradient_counts(config, ROWS)[0] == pytest.approx(counted / CHAINS / ROWS)


def own_sgld(batch_size: int = 30, start: float = 1e-5):
    return sgld(batch_size, step_size=start, initial_step_size=start)._replace(name="mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "found batch_size 0, expected a whole number, at least 1"),
        ({"batch_size": 7.0}, "found batch_size 7.0, expected a whole number"),
        ({"sampling": lambda n: None}, "sampling returned a NoneType, expected the function"),
        ({"sampling": lambda n: lambda *a: 1 / 0}, "step failed: ZeroDivisionError"),
        (
            {"sampling": lambda n: lambda key, state, params, t, target: state},
            "step returned a SGLDState, expected",
        ),
        ({"init": lambda key, position, target: position}, "init returned a "),
    ],
)
def test_a_minibatch_kernel_of_ones_own_is_checked(change, message):
    starts = np.tile(exact()[0], (2, 1))
    with pytest.raises(InputError, match=f"kernel 'mine': {message}"):
        sample_density(LINEAR, starts, kernel=own_sgld()._replace(**change), data=(X, Y))


def test_a_minibatch_kernel_of_ones_own_by_name():
    config = of_table(kernel="test_minibatch:own_sgld", options={"batch_size": 50}, warmup=100)
    kernel = make_kernel(config)
    assert (kernel.name, kernel.batch_size) == ("mine", 50)
    assert gradient_counts(config, 1000) == (1100 / 20,) * 2
    starts = np.tile(exact()[0], (2, 1))
    samples = sample_density(LINEAR, starts, kernel=kernel, warmup=10, draws=10, data=(X, Y))
    assert np.all(np.ptp(samples.draws, axis=1) > 0)


SETTINGS = ["sampler.batch_size=16", "sampler.warmup=60", "sampler.thin=3", "sampler.anchor=4"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MINIBATCH)
def test_a_run_with_added_draws_is_the_longer_run(tiny, here, name):
    text = TINY.replace('"mclmc"', f'"{name}"')
    (tiny / "tiny.toml").write_text(text)
    assert tomllib.loads(text)["sampler"]["kernel"] == name
    for folder, draws in (("one", 10), ("two", 20)):
        settings = [*SETTINGS, "prior.hierarchical=true", f"sampler.draws={draws}"]
        code, _, err = here("run", "tiny.toml", "--out", folder, "--set", *settings, cwd=tiny)
        assert code == 0, err
    code, _, err = here("resume", "one", "--draws", "10", cwd=tiny)
    assert code == 0, err
    assert_equal_runs(tiny / "one", tiny / "two")
    chains = json.loads((tiny / "one" / "manifest.json").read_text())["status"]
    assert [chain["status"] for chain in chains] == ["ok"] * 3
    code, out, err = here("check", "tiny.toml", "--set", *SETTINGS, cwd=tiny)
    assert code == 0, err
    assert f"{name} steps per chain" in out + err


def test_a_batch_larger_than_the_table_is_refused_before_any_work(tiny, here):
    (tiny / "tiny.toml").write_text(TINY.replace('"mclmc"', '"sghmc"'))
    code, _, err = here("run", "tiny.toml", "--out", "run", cwd=tiny)
    assert code == 2
    assert "sampler.batch_size: found 256, but there are 48 rows; give at most that" in err
    assert not (tiny / "run").exists()
