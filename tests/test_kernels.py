"""One table of kernels, one contract; then what each kernel's options and tuning do."""

import functools
import inspect

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.diagnostics import effective_sample_size

from bnnmcmc.errors import InputError
from bnnmcmc.samplers.hmc import hmc
from bnnmcmc.samplers.kernel import REDUCTIONS, Kernel, MinibatchKernel, RowTarget
from bnnmcmc.samplers.kronecker import Matrix
from bnnmcmc.samplers.mclmc import mclmc
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.samplers.table import KERNELS, kernel_named

VARIANCES = np.array([0.25, 1.0, 4.0], np.float32)
WARMUP, STEPS = 150, 20
each_kernel = pytest.mark.parametrize("name", sorted(KERNELS))


def gaussian(x):
    return -0.5 * jnp.sum(jnp.square(x) / VARIANCES.astype(x.dtype))


def hole(x):
    """Not a number beyond 0.5 in the first coordinate."""
    return jnp.where(x[0] > 0.5, jnp.nan, gaussian(x))


# Of each row, a slope; over all rows they cancel. On a curve, so that anchors leave some of it.
SLOPES = np.random.default_rng(0).normal(size=1000).astype(np.float32)
SLOPES -= SLOPES.mean()


def seen_by(kernel, density):
    """Return the target as a kernel takes it: to a minibatch kernel it seems tilted."""
    if isinstance(kernel, Kernel):
        return density

    def estimate(x, batch):
        return density(x) + jnp.asarray(SLOPES, x.dtype)[batch].mean() * jnp.sum(jnp.sin(x))

    return RowTarget(len(SLOPES), density, estimate)


def step_of(kernel, warmup):
    if isinstance(kernel, MinibatchKernel):
        return kernel.sampling(warmup)
    return lambda key, state, params, t, density: kernel.step(key, state, params, density)


def chain(kernel: Kernel | MinibatchKernel, density=gaussian, warmup=WARMUP, steps=STEPS):
    """Return the function that runs one chain and keeps everything."""
    rules, step = kernel.warmup(warmup), step_of(kernel, warmup)
    density = seen_by(kernel, density)

    def run(key, position):
        start = kernel.init(jax.random.fold_in(key, 0), position, density)
        warm_key, draw_key = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)

        def warm(carry, t):
            state, adaptation, info = rules.step(
                jax.random.fold_in(warm_key, t), *carry, t, density
            )
            return (state, adaptation), (state, info, rules.finish(adaptation))

        (state, adaptation), warming = jax.lax.scan(
            warm, (start, rules.init(position)), jnp.arange(warmup)
        )
        params = rules.finish(adaptation)

        def draw(state, t):
            state, info = step(jax.random.fold_in(draw_key, t), state, params, t, density)
            return state, (state, info)

        _, drawing = jax.lax.scan(draw, state, jnp.arange(steps))
        return start, warming, params, drawing

    return run


@pytest.fixture(scope="module", params=sorted(KERNELS))
def compiled(request):
    kernel = KERNELS[request.param]()
    return kernel, jax.jit(chain(kernel))


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(leaves_of(a), leaves_of(b), strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_contract(compiled, dtype):
    kernel, run = compiled
    assert kernel.name in KERNELS
    with jax.enable_x64(dtype == "float64"):
        position = jnp.full(3, 0.5, dtype)
        start, (warm_states, _, warm_params), params, (states, infos) = run(
            jax.random.key(3), position
        )
        for state, lead in ((start, ()), (warm_states, (WARMUP,)), (states, (STEPS,))):
            assert {"position", "logdensity"} <= set(state._fields)
            assert state.position.shape == (*lead, 3)
            assert state.logdensity.shape == lead
        assert jax.tree.structure(start) == jax.tree.structure(states)
        floats = [a for a in leaves_of((start, states, params)) if a.dtype.kind == "f"]
        assert floats
        assert {a.dtype.name for a in floats} == {dtype}
        for before, after in zip(leaves_of(start), leaves_of(states), strict=True):
            assert (before.shape, before.dtype) == (after.shape[1:], after.dtype)

        assert set(infos._fields) <= set(REDUCTIONS)
        assert {"log_density", "diverging", "gradients", "step_size"} <= set(infos._fields)
        assert all(np.shape(values) == (STEPS,) for values in infos)
        exactly = jax.vmap(gaussian)(states.position)
        if isinstance(kernel, Kernel):
            np.testing.assert_allclose(infos.log_density, exactly, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(infos.log_density, states.logdensity)
            assert np.all(np.abs(infos.log_density - exactly) < 1)
            assert np.all(np.asarray(infos.rows) >= kernel.batch_size)
        if kernel.gradients_per_step is not None:
            assert np.all(np.asarray(infos.gradients) == kernel.gradients_per_step)

        # The warm-up may end after any step; what it knows then is usable.
        for values in leaves_of(warm_params):
            assert np.all(np.isfinite(values))
            assert np.all(values > 0)
        assert same(jax.tree.map(lambda a: a[-1], warm_params), params)

        # It moved, and draws depend on the key alone.
        assert len(np.unique(np.asarray(states.position)[:, 0])) > STEPS / 2
        assert same(run(jax.random.key(3), position)[3], (states, infos))
        assert not same(run(jax.random.key(4), position)[3], (states, infos))


@each_kernel
def test_vmap_and_map_agree(name):
    run = chain(KERNELS[name](), warmup=0, steps=4)
    keys = jax.random.split(jax.random.key(0), 3)
    positions = jax.random.normal(jax.random.key(1), (3, 3))
    together = jax.jit(jax.vmap(run))(keys, positions)
    in_turn = jax.jit(lambda k, p: jax.lax.map(lambda one: run(*one), (k, p)))(keys, positions)
    for a, b in zip(leaves_of(together), leaves_of(in_turn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@each_kernel
def test_a_density_that_is_not_a_number_is_never_entered(name):
    # Kernels that do not tune their steps need large ones to come that far.
    large = {"step_size": 0.1, "initial_step_size": 0.1} if name in ("sgld", "sghmc") else {}
    run = jax.jit(chain(KERNELS[name](**large), hole, steps=300))
    _, (warm_states, warm_infos, _), params, (states, infos) = run(
        jax.random.key(5), jnp.array([0.4, 0.0, 0.0])
    )
    assert np.isfinite(leaves_of(params)[0]).all()
    for state in (warm_states, states):
        assert np.all(np.isfinite(state.position))
        assert np.all(np.isfinite(state.logdensity))
        assert np.asarray(state.position)[:, 0].max() <= 0.5
    for values in leaves_of((warm_infos, infos)):
        assert np.all(np.isfinite(values))
    assert np.sum(warm_infos.diverging) + np.sum(infos.diverging) > 0  # it was met
    assert len(np.unique(np.asarray(states.position)[:, 1])) > 50  # and did not end the walk


@pytest.mark.parametrize("name", ["hmc", "nuts"])
def test_the_energy_is_that_of_the_state_kept(name):
    """With a hopeless step size every proposal is turned down and the energy stays finite."""
    kernel = KERNELS[name](initial_step_size=1e6)
    _, _, _, (states, infos) = jax.jit(chain(kernel, warmup=0))(jax.random.key(0), jnp.ones(3))
    assert np.all(np.asarray(states.position) == 1.0)
    assert np.all(np.asarray(infos.acceptance_rate) == 0.0)
    kinetic = np.asarray(infos.energy) + np.asarray(infos.log_density)
    assert np.all((kinetic > 0) & (kinetic < 20))  # half a chi-square with 3 degrees of freedom


OUT_OF_RANGE = [
    ("mclmc", "integrator", "euler"),
    ("mclmc", "energy_variance_start", 0.0),
    ("mclmc", "energy_variance_end", -1.0),
    ("mclmc", "initial_step_size", float("nan")),
    ("mclmc", "tuning", "best"),
    ("mclmc", "metric", "round"),
    ("mclmc", "damping", 0.0),
    ("mams", "integrator", "euler"),
    ("mams", "jitter", 1.0),
    ("mams", "max_steps", 0),
    ("mams", "target_acceptance", 1.0),
    ("mams", "energy_variance_start", 0.0),
    ("mams", "energy_variance_end", -1.0),
    ("mams", "initial_step_size", 0.0),
    ("mams", "metric", "auto"),
    ("mams", "damping", -1.0),
    ("nuts", "max_depth", 0),
    ("nuts", "max_depth", 21),
    ("nuts", "target_acceptance", 1.0),
    ("nuts", "initial_step_size", 0.0),
    ("nuts", "metric", "round"),
    ("nuts", "max_rank", 0),
    ("nuts", "cutoff", 0.5),
    ("nuts", "adaptation", "none"),
    ("hmc", "metric", "round"),
    ("hmc", "max_rank", 0),
    ("hmc", "cutoff", float("nan")),
    ("hmc", "num_leapfrog", 0),
    ("hmc", "jitter", 1.0),
    ("hmc", "jitter", -0.1),
    ("hmc", "target_acceptance", 0.0),
    ("hmc", "initial_step_size", -1.0),
    *((name, "batch_size", 0) for name in ("sgld", "sghmc", "smile")),
    *((name, "anchor", -1) for name in ("sgld", "sghmc", "smile")),
    *((name, "damping", 0.0) for name in ("sgld", "sghmc", "smile")),
    *((name, "step_size", 0.0) for name in ("sgld", "sghmc")),
    *((name, "initial_step_size", 1e-4) for name in ("sgld", "sghmc")),
    *((name, "schedule", "linear") for name in ("sgld", "sghmc")),
    *((name, "cycle", 10) for name in ("sgld", "sghmc")),
    ("sghmc", "friction", 100.0),
    ("smile", "energy_variance_start", 0.0),
    ("smile", "energy_variance_end", -1.0),
    ("smile", "initial_step_size", 0.0),
]


@pytest.mark.parametrize(("name", "option", "value"), OUT_OF_RANGE)
def test_options_out_of_range(name, option, value):
    with pytest.raises(InputError, match=rf"sampler\.{option}: found .*, expected"):
        KERNELS[name](**{option: value})


OTHER = [
    ("mclmc", "integrator", "minimal_norm"),
    ("mclmc", "energy_variance_start", 1.0),
    ("mclmc", "energy_variance_end", 0.4),
    ("mclmc", "initial_step_size", 0.1),
    ("mclmc", "tuning", "mile"),
    ("mclmc", "metric", "identity"),
    ("mclmc", "damping", 1.0),
    ("mclmc", "settle", True),
    ("mams", "integrator", "minimal_norm"),
    ("mams", "jitter", 0.0),
    ("mams", "max_steps", 1),
    ("mams", "target_acceptance", 0.6),
    ("mams", "energy_variance_start", 1.0),
    ("mams", "energy_variance_end", 0.5),
    ("mams", "initial_step_size", 0.1),
    ("mams", "metric", "identity"),
    ("mams", "damping", 1.0),
    ("nuts", "max_depth", 1),
    ("nuts", "target_acceptance", 0.6),
    ("nuts", "initial_step_size", 0.1),
    ("nuts", "metric", "low_rank"),
    ("nuts", "metric", "dense"),
    ("nuts", "max_rank", 1),
    ("nuts", "cutoff", 100.0),
    ("nuts", "adaptation", "network"),
    ("hmc", "metric", "low_rank"),
    ("hmc", "metric", "dense"),
    ("hmc", "max_rank", 1),
    ("hmc", "cutoff", 100.0),
    ("hmc", "num_leapfrog", 3),
    ("hmc", "jitter", 0.0),
    ("hmc", "target_acceptance", 0.6),
    ("hmc", "initial_step_size", 0.1),
    *((name, "batch_size", 100) for name in ("sgld", "sghmc", "smile")),
    *((name, "anchor", 5) for name in ("sgld", "sghmc", "smile")),
    *((name, "precondition", False) for name in ("sgld", "sghmc", "smile")),
    *((name, "damping", 2.0) for name in ("sgld", "sghmc", "smile")),
    *((name, "step_size", 2e-3) for name in ("sgld", "sghmc")),
    *((name, "initial_step_size", 0.05) for name in ("sgld", "sghmc")),
    *((name, "schedule", "polynomial") for name in ("sgld", "sghmc")),
    *((name, "cycle", 20) for name in ("sgld", "sghmc")),
    ("sghmc", "friction", 5.0),
    ("smile", "energy_variance_start", 1.0),
    ("smile", "energy_variance_end", 0.05),
    ("smile", "initial_step_size", 0.1),
]
# What an option needs beside it; and switches, which have no range.
BESIDE = {"cycle": {"schedule": "cyclic", "cycle": 50}}
SWITCHES = {"precondition", "settle"}
# Only a warm-up of a thousand steps and more may end early.
LONG = {"settle": 2000}


# An option of one kind of metric, on a density whose coordinates depend on each other.
LOW_RANK_ONLY = ("max_rank", "cutoff")


def leaning(x):
    return gaussian(x) - 3.0 * jnp.square(x[0] + x[1] - x[2])


@functools.cache
def draws_with(name, warmup=200, **options):
    kernel = KERNELS[name](**options)
    if isinstance(kernel, Kernel) and kernel.for_matrices is not None:
        kernel = kernel.for_matrices((Matrix(0, 3, 1),))
    # Of MAMS, 160 steps of 200 have no trajectories; after 100 of them a metric is found.
    run = jax.jit(chain(kernel, leaning, warmup=warmup))
    return np.asarray(run(jax.random.key(2), jnp.full(3, 0.5))[3][0].position)


# Each compiles two kernels; most options of these are those of another one too.
SLOW = ("mams", "hmc", "sgld", "sghmc", "smile")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [pytest.param(*o, marks=pytest.mark.slow if o[0] in SLOW else []) for o in OTHER],
)
def test_every_option_changes_the_draws(name, option, value):
    base = BESIDE.get(option, {}) | ({"metric": "low_rank"} if option in LOW_RANK_ONLY else {})
    warmup = LONG.get(option, 200)
    changed = draws_with(name, warmup, **base | {option: value})
    assert not np.any(draws_with(name, warmup, **base)[1:] == changed[1:])


def test_every_option_has_a_range_and_another_value():
    options = {(n, o) for n, build in KERNELS.items() for o in inspect.signature(build).parameters}
    ranges = {(n, o) for n, o, _ in OUT_OF_RANGE}
    assert options == {(n, o) for n, o, _ in OTHER}
    assert {(n, o) for n, o in options if o not in SWITCHES} == ranges


def test_kernels_by_name():
    assert kernel_named("nuts").name == "nuts"
    made = hmc(num_leapfrog=3)
    assert kernel_named(made) is made
    with pytest.raises(
        InputError, match="kernel: found 'gibbs', expected one of mclmc, mams, nuts, hmc, sgld, sg"
    ):
        kernel_named("gibbs")


def test_mclmc_refuses_a_single_parameter():
    with pytest.raises(InputError, match="at least 2 parameters"):
        mclmc().init(jax.random.key(0), jnp.zeros(1), lambda x: -jnp.sum(x**2))


def round_gaussian(x):
    return -0.5 * jnp.sum(jnp.square(x))


def statistics(kernel, warmup=0, steps=200, seed=0, density=gaussian, size=3):
    """Return params, sampling info and warm-up info of one chain."""
    run = jax.jit(chain(kernel, density, warmup=warmup, steps=steps))
    _, (_, warm, _), params, (_, infos) = run(jax.random.key(seed), jnp.full(size, 0.5))
    return params, jax.tree.map(np.asarray, infos), warm


@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"sgld", "sghmc"}))
def test_initial_step_size(name):
    params, infos, _ = statistics(KERNELS[name](initial_step_size=0.125), steps=2)
    assert float(params.step_size) == 0.125
    assert infos.step_size[0] == 0.125


def test_hmc_length_and_jitter():
    _, fixed, _ = statistics(hmc(num_leapfrog=7, jitter=0.0))
    assert set(fixed.gradients) == {7}
    assert hmc(num_leapfrog=7, jitter=0.0).gradients_per_step == 7
    _, jittered, _ = statistics(hmc(num_leapfrog=7, jitter=0.3))
    assert set(jittered.gradients) == {5, 6, 7, 8, 9}
    assert hmc(num_leapfrog=7, jitter=0.3).gradients_per_step is None
    _, single, _ = statistics(hmc(num_leapfrog=1, jitter=0.9), steps=20)
    assert set(single.gradients) == {1}


def test_nuts_depth():
    _, shallow, _ = statistics(nuts(max_depth=2, initial_step_size=0.05), steps=50)
    assert shallow.tree_depth.max() == 2
    assert shallow.gradients.max() == 3
    _, deep, _ = statistics(nuts(max_depth=8, initial_step_size=0.05), steps=50)
    assert deep.tree_depth.max() > 4
    assert np.all(deep.gradients <= 2.0**deep.tree_depth - 1)


@pytest.mark.parametrize("build", [hmc, nuts])
def test_target_acceptance(build):
    _, low, _ = statistics(build(target_acceptance=0.6), warmup=500, steps=500)
    _, high, _ = statistics(build(target_acceptance=0.95), warmup=500, steps=500)
    assert low.acceptance_rate.mean() < high.acceptance_rate.mean() - 0.05
    assert low.step_size[0] > 1.2 * high.step_size[0]


def test_window_adaptation_finds_what_blackjax_finds():
    """Not the same keys, so over 16 chains: their mean log step sizes have errors of 0.02."""
    keys = jax.random.split(jax.random.key(0), 16)
    run = chain(hmc(num_leapfrog=10, jitter=0.0), warmup=1000, steps=1)
    ours = jax.jit(jax.vmap(lambda key: run(key, jnp.full(3, 0.5))[2]))(keys)
    reference = blackjax.window_adaptation(
        blackjax.hmc, gaussian, initial_step_size=0.01, num_integration_steps=10
    )
    theirs = jax.jit(jax.vmap(lambda k: reference.run(k, jnp.full(3, 0.5), 1000)[0].parameters))(
        keys
    )
    gap = np.log(ours.step_size).mean() - np.log(theirs["step_size"]).mean()
    assert abs(gap) < 0.1
    np.testing.assert_allclose(ours.inverse_mass_matrix.mean(0), VARIANCES, rtol=0.15)
    np.testing.assert_allclose(theirs["inverse_mass_matrix"].mean(0), VARIANCES, rtol=0.15)


def test_window_adaptation_is_stans_schedule():
    """The metric changes at the ends of the windows of 25, 50, ..., and nowhere else."""
    run = jax.jit(chain(hmc(num_leapfrog=3), warmup=300, steps=1))
    _, (_, _, params), _, _ = run(jax.random.key(0), jnp.full(3, 0.5))
    metric = np.asarray(params.inverse_mass_matrix)
    changes = np.flatnonzero(np.any(metric[1:] != metric[:-1], axis=1)) + 1
    # 75 fast steps; windows of 25, 50 and 100; 50 fast steps.
    np.testing.assert_array_equal(changes, [99, 149, 249])


def test_mclmc_integrators_cost_what_they_say():
    for integrator, gradients in (("leapfrog", 1), ("minimal_norm", 2)):
        counted = []

        def counting(x, counted=counted):
            counted.append(1)
            return gaussian(x)

        kernel = mclmc(integrator)
        state = kernel.init(jax.random.key(0), jnp.ones(3), gaussian)
        params = kernel.warmup(0).finish(kernel.warmup(0).init(jnp.ones(3)))
        _, info = kernel.step(jax.random.key(1), state, params, counting)
        assert kernel.gradients_per_step == int(info.gradients) == gradients == len(counted)


@functools.cache
def in_many_dimensions(start, end):
    """Return one MCLMC chain; the tuning's weights were made for near-normal energy errors."""
    kernel = mclmc(energy_variance_start=start, energy_variance_end=end)
    run = jax.jit(chain(kernel, round_gaussian, warmup=2000, steps=2000))
    return run(jax.random.key(0), jnp.full(100, 0.5))


@pytest.mark.parametrize("end", [pytest.param(0.5, marks=pytest.mark.slow), 0.02])
def test_mclmc_reaches_the_wanted_energy_variance(end):
    kernel = mclmc(energy_variance_start=5.0, energy_variance_end=end)
    run = jax.vmap(chain(kernel, round_gaussian, warmup=2000, steps=1000), in_axes=(0, None))
    _, _, _, (_, infos) = jax.jit(run)(jax.random.split(jax.random.key(0), 16), jnp.full(100, 0.5))
    each = infos.energy_error_squared.mean(axis=1)
    assert end / 1.5 < np.median(each) < end * 1.5
    assert end / 3 < each.min()
    assert each.max() < 3 * end  # in no chain is the step far too long


def first_steps(kernel, density, settled, count=2000):
    """Return where one step leads, from one place in many directions, and its statistics."""
    start = kernel.init(jax.random.key(0), jnp.zeros(3), density)
    params = kernel.warmup(0).finish(kernel.warmup(0).init(jnp.zeros(3)))

    def one(key):
        noise = jax.random.normal(jax.random.fold_in(key, 1), (3,))
        state = start._replace(momentum=noise / jnp.linalg.norm(noise))
        return kernel.step(key, state, params, density, settled)

    states, infos = jax.vmap(one)(jax.random.split(jax.random.key(1), count))
    return np.asarray(states.position), jax.tree.map(np.asarray, infos)


def test_one_mclmc_step_in_ten_is_a_quarter_as_long_after_the_warm_up():
    kernel = mclmc(initial_step_size=0.1)
    lengths = {
        # Nothing pulls: a step is as long as its size.
        settled: np.linalg.norm(first_steps(kernel, lambda x: 0.0 * x[0], settled)[0], axis=1)
        for settled in (False, True)
    }
    np.testing.assert_allclose(lengths[False], 0.1, rtol=1e-4)
    short = lengths[True] < 0.05
    np.testing.assert_allclose(lengths[True], np.where(short, 0.025, 0.1), rtol=1e-4)
    assert 0.08 < short.mean() < 0.12


def test_mclmc_takes_back_large_errors_after_the_warm_up_only():
    def narrow(x):
        return -0.5 * jnp.sum(jnp.square(x / jnp.asarray([0.01, 1.0, 1.0], x.dtype)))

    for settled, limit in ((True, 10.0), (False, 1000.0)):
        positions, infos = first_steps(mclmc(initial_step_size=0.5), narrow, settled)
        back = infos.acceptance_rate == 0
        np.testing.assert_array_equal(np.all(positions == 0, axis=1), back)
        errors = np.sqrt(3 * infos.energy_error_squared)
        assert errors.max() <= limit
        assert np.all(errors[back] == 0)
        # Some of the largest that are allowed are there, and more that are not.
        assert errors.max() > limit / 10
        assert back.mean() > 0.01
        # Only what is beyond the warm-up's limit diverges.
        assert np.array_equal(infos.diverging, back) == (not settled)


def cliff(position):
    """Return a density that falls steeply, but finitely, beyond a distance of 8."""
    distance = jnp.sqrt(jnp.sum(position**2))
    return round_gaussian(position) - 1e6 * jnp.maximum(distance - 8.0, 0.0) ** 2


def test_mclmc_takes_back_a_step_that_falls_off_a_cliff():
    # Hot enough to try: from down there, only tiny steps would ever be stable again.
    kernel = mclmc(energy_variance_start=50.0, energy_variance_end=0.1)
    run = jax.jit(chain(kernel, cliff, warmup=2000, steps=500))
    _, (_, warm, _), _, (states, infos) = run(jax.random.key(3), jnp.full(20, 0.5))
    assert warm.diverging.sum() > 0
    assert np.isfinite(warm.energy_error_squared).all()
    assert infos.log_density.min() > -1000
    assert np.sqrt(np.square(states.position).sum(axis=1)).max() < 9
    assert infos.step_size[-1] > 1e-3


def test_mclmc_starts_hot():
    hot, cold = (in_many_dimensions(start, 0.02)[1][1] for start in (5.0, 0.02))
    early = slice(500, 1000)
    assert np.mean(hot.energy_error_squared[early]) > 10 * np.mean(cold.energy_error_squared[early])


def test_mclmc_cut_short_hands_over_a_step_size_for_the_final_energy_variance():
    _, (_, infos, params), _, _ = in_many_dimensions(5.0, 0.02)
    early, full = np.asarray(params.step_size)[[500, -1]]
    assert 0.7 < early / full < 1.4
    assert infos.step_size[500] > 1.5 * full  # what it was using


@pytest.mark.parametrize("tuning", ["mile", "averaged"])
def test_tuning_follows_its_rules(tuning):
    """Replay the warm-up in NumPy from its energy errors and positions alone."""
    n, start, end, first, d = 2000, 5.0, 0.05, 0.005, 3
    published = tuning == "mile"
    kernel = mclmc("leapfrog", start, end, first, tuning)
    _, (states, infos, _), params, _ = jax.jit(chain(kernel, warmup=n, steps=1))(
        jax.random.key(2), jnp.full(d, 0.5)
    )
    infos = jax.tree.map(lambda a: np.asarray(a, np.float64), infos)
    positions = np.asarray(states.position, np.float64)
    assert not infos.diverging.any()

    tune, moments = 1600, 1800  # ends of the first and second phase
    # The published schedule has two more steps than there are.
    wanted = np.linspace(start, end, moments + 2)[:moments]
    if not published:
        wanted = np.linspace(start, end, moments)
    scale = np.ones(moments) if published else wanted
    xi = infos.energy_error_squared[:moments] / wanted + 1e-8
    weight = np.exp(-((np.log(xi) / 9.0) ** 2) / 2)
    epsilon, error, total = [first], 0.0, 0.0
    for t in range(moments):
        if not published and total == 0 and xi[t] < 1e-6:
            epsilon.append(2 * epsilon[t])
            continue
        reach = 100 if published else max(100, t / 10)
        memory = (reach - 1) / (reach + 1)
        error = memory * error + weight[t] * xi[t] * scale[t] / epsilon[t] ** 6
        total = memory * total + weight[t]
        epsilon.append((scale[t] * total / error) ** (1 / 6))
    np.testing.assert_allclose(infos.step_size[:moments], epsilon[:moments], rtol=2e-3)
    np.testing.assert_allclose(infos.step_size[moments:], epsilon[moments], rtol=2e-3)

    np.testing.assert_array_equal(infos.decoherence_length[:moments], 15.0)  # max(sqrt d, 15)
    w = infos.step_size[tune:moments]
    mean = np.average(positions[tune:moments], axis=0, weights=w)
    variance = np.average((positions[tune:moments] - mean) ** 2, axis=0, weights=w)
    np.testing.assert_allclose(
        infos.decoherence_length[moments:], np.sqrt(variance.sum()), rtol=1e-4
    )
    ess = np.asarray(effective_sample_size(positions[None, moments:]))
    length = 0.4 * epsilon[moments] * np.mean((n - moments) / ess)
    np.testing.assert_allclose(params.decoherence_length, length, rtol=5e-3)
    last = epsilon[moments]
    if not published:
        last *= (1 / 0.9) ** (1 / 6)
        last *= min(1, (end / infos.energy_error_squared[moments:].mean()) ** (1 / 12))
    np.testing.assert_allclose(params.step_size, last, rtol=2e-3)


@pytest.mark.parametrize("first", [1e-7, 1e4])
def test_mclmc_step_size_comes_back_from_the_ends_of_float32(first):
    params, _, _ = statistics(mclmc(initial_step_size=first), warmup=1000, steps=1)
    assert 0.6 < float(params.step_size) < 2.4  # from 0.005 it comes to 1.2


def test_mclmc_survives_energy_errors_too_large_to_square():
    def cliff(x):
        return gaussian(x) + jnp.where(x[0] > 0.5, -1e20, 0.0)

    run = jax.jit(chain(mclmc(), cliff))
    _, (states, infos, finished), _, _ = run(jax.random.key(1), jnp.array([0.4, 0.0, 0.0]))
    assert np.any(infos.diverging)  # it was met
    assert np.all(np.isfinite(infos.energy_error_squared))
    assert np.all(np.isfinite(states.position))
    assert np.all(np.isfinite(finished.step_size))
    assert np.all(np.asarray(finished.step_size) > 0)


@pytest.mark.parametrize("warmup", [1, 5, 20])
def test_mclmc_short_warm_ups_leave_the_decoherence_length_alone(warmup):
    params, _, _ = statistics(mclmc(), warmup=warmup, steps=1)
    assert float(params.decoherence_length) == 15.0


def test_mclmc_moments_do_not_lose_digits_far_from_zero():
    def far(x):
        return gaussian(x - 1000.0)

    _, (states, infos, _), _, _ = jax.jit(chain(mclmc(), far, warmup=600, steps=1))(
        jax.random.key(0), jnp.full(3, 1000.0)
    )
    variance = np.asarray(states.position, np.float64)[480:540].var(axis=0)
    np.testing.assert_allclose(infos.decoherence_length[545], np.sqrt(variance.sum()), rtol=0.02)
