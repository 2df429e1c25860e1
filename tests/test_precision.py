"""float64 by one switch: nothing is left in float32, and both agree where they should."""

import functools
import json
import re

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zarr
from arviz_stats.base import array_stats

import bnnmcmc
from bnnmcmc import ahead, predictive, trees
from bnnmcmc.ensemble import build_training, start_members
from bnnmcmc.placement import gather, place, replicate, use_precision
from bnnmcmc.run import Run, sample
from bnnmcmc.samplers.kernel import MinibatchKernel, RowDensity, RowTarget
from bnnmcmc.samplers.table import KERNELS
from bnnmcmc.sampling import build_program, sample_density

MINIBATCH = {name for name, build in KERNELS.items() if isinstance(build(), MinibatchKernel)}
PRECISIONS = ("float32", "float64")
LIKELIHOODS = {
    "predicted": bnnmcmc.gaussian(),
    "sampled": bnnmcmc.gaussian(scale="sampled"),
    "categorical": bnnmcmc.categorical(3),
    "bernoulli": bnnmcmc.bernoulli(),
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 2)).astype(np.float32)
Y = (np.sin(2 * X[:, :1]) + 0.2 * RNG.normal(size=(50, 1))).astype(np.float32)
LABELS = (X[:, 0] > 0).astype(np.int32)


def model(name="predicted", hidden=(6,), row_chunk=None):
    likelihood = LIKELIHOODS[name]
    network = bnnmcmc.mlp(2, hidden, likelihood.num_outputs, "tanh")
    posterior = bnnmcmc.Posterior(network, likelihood, bnnmcmc.normal_prior(), row_chunk)
    return posterior, (Y if likelihood.task == "regression" else LABELS)


def single_start(posterior, chains=None):
    """Return positions whose numbers are the same in both precisions."""
    start = posterior.init if chains is None else jax.vmap(posterior.init)
    keys = jax.random.key(3) if chains is None else jax.random.split(jax.random.key(3), chains)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), start(keys))


def as_now(tree):
    """Return the floats of a tree in the precision of the moment."""

    def one(leaf):
        leaf = jnp.asarray(leaf)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.result_type(float)) if floating else leaf

    return jax.tree.map(one, tree)


def in_both(function):
    """Return what a function gives in float32 and in float64, as NumPy arrays."""
    found = []
    for precision in PRECISIONS:
        with jax.enable_x64(precision == "float64"):
            result = jax.tree.map(np.asarray, function())
        floats = {a.dtype.name for a in jax.tree.leaves(result) if a.dtype.kind == "f"}
        assert floats == {precision}
        found.append(result)
    return found


def assert_agree(single, double, rtol, atol=0.0):
    """Check agreement, and that the second is not the first in a wider type."""
    pairs = list(zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True))
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    assert any(np.any(a != b) for a, b in pairs)


@pytest.mark.parametrize("row_chunk", [None, 16])
@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_log_density_and_gradient(name, row_chunk):
    posterior, y = model(name, row_chunk=row_chunk)
    start = single_start(posterior)

    def both():
        rows = posterior.arrays(X, y)
        return jax.jit(jax.value_and_grad(posterior.log_density))(as_now(start), *rows)

    single, double = in_both(both)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(double[1]))
    assert_agree(single, double, rtol=3e-5, atol=3e-6 * largest)


def test_float64_has_the_digits_of_a_float64():
    posterior, _ = model()
    start = single_start(posterior)
    layers = jax.tree.map(np.float64, start)["network"]
    h = np.tanh(X.astype(float) @ layers["layer0"]["weight"] + layers["layer0"]["bias"])
    mean, raw = (h @ layers["layer1"]["weight"] + layers["layer1"]["bias"]).T
    sd = np.log1p(np.exp(raw)) + 1e-4
    weights = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(layers)])
    expected = -0.5 * np.sum(np.square((Y[:, 0].astype(float) - mean) / sd)) - np.log(sd).sum()
    expected -= 0.5 * np.sum(weights**2) + 0.5 * (len(weights) + 50) * np.log(2 * np.pi)
    with jax.enable_x64(True):
        found = posterior.log_density(as_now(start), *posterior.arrays(X, Y))
    assert float(found) == pytest.approx(expected, rel=1e-13)


def single_precision_lines(traced):
    return [line for line in str(traced.jaxpr).splitlines() if re.search(r"\bf32\b", line)]


def density_of(posterior):
    return RowDensity(posterior.log_prior, posterior.log_likelihood)


def options_of(name):
    """Batches of no more rows than there are."""
    return {"batch_size": 10} if name in MINIBATCH else {}


@pytest.mark.parametrize("mode", ["map", "vmap"])
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_no_sampler_computes_in_float32_when_told_float64(name, mode):
    posterior, y = model()
    with jax.enable_x64(True):
        of, placement = trees.layout(posterior.init(jax.random.key(0))), place(2, mode=mode)
        rows = replicate(posterior.arrays(X, y), placement)
        program = build_program(
            density_of(posterior),
            KERNELS[name](**options_of(name)),
            of,
            placement,
            warmup=20,
            draws=5,
            thin=1,
        )
        _, functions = ahead.trace(program, rows)
        assert {"start", "warm", "finish", "draw"} <= set(functions)
        assert [single_precision_lines(f) for f in functions.values()] == [[]] * len(functions)
    # In float32 such lines are found: the check can fail.
    start = jax.jit(posterior.log_density).trace(single_start(posterior), *posterior.arrays(X, y))
    assert single_precision_lines(start)


def training_of(posterior, batch_size=None):
    return build_training(
        posterior,
        optax.adamw(5e-3),
        place(2),
        rows=40,
        validation_rows=10,
        batch_size=batch_size,
        max_epochs=3,
        patience=3,
    )


def test_no_training_in_float32_when_told_float64():
    posterior, _ = model()
    with jax.enable_x64(True):
        training = training_of(posterior, batch_size=8)
        data = replicate(
            (*posterior.arrays(X[:40], Y[:40]), *posterior.arrays(X[40:], Y[40:])), place(2)
        )
        members = start_members(training, 0)
        key = jax.random.key(0)
        assert single_precision_lines(training.advance.trace(members, key, np.int32(1), data)) == []


def test_the_ensembles_first_step():
    posterior, _ = model()
    start = single_start(posterior, chains=2)

    def first_step():
        training = training_of(posterior)
        placement = training.placement
        data = replicate(
            (*posterior.arrays(X[:40], Y[:40]), *posterior.arrays(X[40:], Y[40:])), placement
        )
        index, member = start_members(training, 0)
        # Copies, for both are given away.
        member = member._replace(position=as_now(start), best=as_now(start))
        members, history = training.advance((index, member), jax.random.key(0), np.int32(1), data)
        return gather(members[1].position, placement), gather(history, placement)[:, 0]

    single, double = in_both(first_step)
    assert_agree(single, double, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), double[0], start)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_the_predictive_of_the_same_draws(name):
    """With one posterior, whose programs are remembered from the other precision."""
    posterior, y = model(name)
    few = np.float32(0.5) * RNG.normal(size=(2, 40, 1)).astype(np.float32)
    draws = jax.tree.map(
        lambda leaf: leaf[:, None] + few.reshape(2, 40, *[1] * (leaf.ndim - 1)),
        single_start(posterior, chains=2),
    )
    found = []
    for precision in PRECISIONS:
        with jax.enable_x64(precision == "float64"):
            pooled = predictive.pool(posterior, predictive.draws_in_memory(as_now(draws)), X, y)
        if pooled.samples is not None:
            assert pooled.samples.dtype == precision
        names = ("log_density", "mean", "variance", "epistemic", "probabilities")
        found.append({n: v for n in names if (v := getattr(pooled, n)) is not None})
    assert_agree(*found, rtol=1e-4, atol=1e-5)
    lppd = [values["log_density"].mean() for values in found]
    assert lppd[0] == pytest.approx(lppd[1], abs=1e-5)


def same_numbers(monkeypatch):
    """Let random numbers be those of float32 in either precision."""

    def floats(draw):
        def of_either(key, shape=(), dtype=None, *arguments, **options):
            wanted = jnp.result_type(float) if dtype is None else dtype
            return draw(key, shape, jnp.float32, *arguments, **options).astype(wanted)

        return of_either

    for name in ("normal", "uniform"):
        monkeypatch.setattr(jax.random, name, floats(getattr(jax.random, name)))
    # These two took the function by its name.
    for module in (blackjax.util, blackjax.mcmc.integrators):
        monkeypatch.setattr(module, "normal", jax.random.normal)
    randint, uniform = jax.random.randint, jax.random.uniform
    monkeypatch.setattr(
        jax.random,
        "randint",
        lambda key, shape, low, high, dtype=None: randint(key, shape, low, high, jnp.int32),
    )
    monkeypatch.setattr(
        jax.random,
        "bernoulli",
        lambda key, p=0.5, shape=None: uniform(key, shape or jnp.shape(p)) < p,
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n not in ("mclmc", "nuts") else [])
        for n in sorted(KERNELS)
    ],
)
def test_short_trajectories_from_one_start(name, monkeypatch):
    same_numbers(monkeypatch)
    posterior, y = model()
    start = single_start(posterior)
    options = {"max_depth": 3} if name == "nuts" else options_of(name)
    kernel = KERNELS[name](initial_step_size=0.02, **options)
    rules = kernel.warmup(0)

    def steps():
        rows, unravel = posterior.arrays(X, y), trees.unraveler(start)
        flat = trees.flatten_stacked(as_now(start), leading=0)

        def density(position):
            return posterior.log_density(unravel(position), *rows)

        def estimate(position, batch):
            few = (each[batch] for each in rows)
            likelihood = posterior.log_likelihood(unravel(position), *few)
            return posterior.log_prior(unravel(position)) + len(X) / len(batch) * likelihood

        if name in MINIBATCH:
            whole, take_step = RowTarget(len(X), density, estimate), kernel.sampling(0)
        else:
            whole = density

            def take_step(key, state, params, t, density):
                return kernel.step(key, state, params, density)

        params = rules.finish(rules.init(flat))
        state = kernel.init(jax.random.key(1), flat, whole)
        keys = jax.random.split(jax.random.key(2), 5)
        step = jax.jit(lambda key, state, t: take_step(key, state, params, t, whole))
        path = [step(keys[0], state, 0)]
        for t, key in enumerate(keys[1:], 1):
            path.append(step(key, path[-1][0], t))
        return [(state.position, info.log_density) for state, info in path]

    single, double = in_both(steps)
    assert_agree(single, double, rtol=1e-3, atol=1e-4)
    assert np.abs(double[-1][0] - double[0][0]).max() > 0.01


def test_draws_statistics_and_parameters_in_memory_are_float64():
    posterior, y = model()
    start = single_start(posterior, chains=2)
    with jax.enable_x64(True):
        run = sample(posterior, as_now(start), X, y, kernel="nuts", warmup=20, draws=5)
        tree = run.to_arviz()
        assert run.predict(X).samples.dtype == np.float64
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.load_draws())} == {"float64"}
    assert {v.dtype.name for v in run.stats.values() if v.dtype.kind == "f"} == {"float64"}
    assert tree["posterior"]["network.layer0.weight"].dtype == np.float64


def test_a_network_that_makes_float32_is_taken_to_the_precision_of_the_run():
    network = bnnmcmc.Network(
        lambda key: {"w": jax.random.normal(key, (2, 2), jnp.float32)}, lambda p, x: x @ p["w"]
    )
    posterior = bnnmcmc.Posterior(network, bnnmcmc.gaussian(), bnnmcmc.normal_prior())
    with jax.enable_x64(True):
        ensemble = bnnmcmc.fit_ensemble(posterior, X, Y, members=1, max_epochs=2)
    assert ensemble.positions["network"]["w"].dtype == np.float64


@functools.cache
def sampled_in(precision, factor=1.0):
    """Return per draw (chain, draw, row): mean, and density of the target, of a linear model."""
    posterior, y = model("sampled", hidden=())

    def density(position, x, y):
        return factor * posterior.log_density(position, x, y)

    with jax.enable_x64(precision == "float64"):
        samples = sample_density(
            density,
            as_now(single_start(posterior, chains=4)),
            kernel="nuts",
            warmup=500,
            draws=1000,
            seed=5 if precision == "float64" else 4,
            data=posterior.arrays(X[:40], y[:40]),
        )
        draws = predictive.draws_in_memory(samples.draws)
        found = predictive.per_draw(posterior, draws, X[40:], y[40:])
        lppd = predictive.pool(posterior, draws, X[40:], y[40:]).log_density.mean()
    return found["mean"][..., 0], np.exp(found["log_density"].astype(np.float64)), lppd


def disagreements(first, second):
    """Compare two runs' predictions, spreads and scores by their Monte Carlo errors."""
    wrong, score_error = [], np.zeros(2)
    for row in range(10):
        pairs = {
            "mean": [run[0][..., row] for run in (first, second)],
            "density": [run[1][..., row] for run in (first, second)],
        }
        centre = pairs["mean"][1].mean()
        pairs["square"] = [np.square(x - centre) for x in pairs["mean"]]
        for name, values in pairs.items():
            values = [np.asarray(x, np.float64) for x in values]
            ess = [array_stats.ess(x, chain_axis=0, draw_axis=1, method="mean") for x in values]
            assert min(ess) > 400, (name, row, ess)
            errors = [array_stats.mcse(x, chain_axis=0, draw_axis=1, method="mean") for x in values]
            z = (values[0].mean() - values[1].mean()) / np.hypot(*errors)
            if not abs(z) < 4.5:
                wrong.append(f"{name} of row {row}: z = {z:.1f}")
            if name == "density":
                # The error of a mean of logarithms, as if all rows erred alike.
                score_error += [e / x.mean() / 10 for e, x in zip(errors, values, strict=True)]
    assert np.hypot(*score_error) < 0.02
    if not abs(first[2] - second[2]) < 4.5 * np.hypot(*score_error):
        wrong.append(f"lppd: {first[2]} is not {second[2]}")
    return wrong


@pytest.mark.slow
def test_pooled_scores_agree_within_monte_carlo_error():
    assert disagreements(sampled_in("float32"), sampled_in("float64")) == []


@pytest.mark.slow
def test_another_posterior_does_not_agree():
    wrong = disagreements(sampled_in("float32"), sampled_in("float64", factor=1.3))
    assert any("square" in text for text in wrong)


@pytest.fixture
def double():
    """Leave JAX's precision as it was."""
    yield
    use_precision("float32")


@pytest.mark.slow
def test_all_stages_by_one_switch(tiny, here, double):
    """Training, every block stored, resumption, prediction, and the file for ArviZ."""
    settings = ["--quiet", "--set", "run.precision=float64", "run.arviz=netcdf"]
    settings += ["sampler.kernel=nuts", "sampler.max_depth=4", "sampler.warmup=30"]
    settings += ["ensemble.max_epochs=5"]
    for name, draws in (("whole", 12), ("part", 5)):
        code, _, err = here(
            "run", "tiny.toml", "--out", name, *settings, f"sampler.draws={draws}", cwd=tiny
        )
        assert code == 0, err
    code, _, err = here("resume", "part", "--draws", "7", "--quiet", cwd=tiny)
    assert code == 0, err
    for kind in ("draws", "stats"):
        whole, part = (zarr.open_group(tiny / name / kind, mode="r") for name in ("whole", "part"))
        assert set(whole) == set(part)
        for name in whole:
            np.testing.assert_array_equal(whole[name][:], part[name][:])
            assert whole[name].dtype in (np.float64, np.int32)
    run = Run.open(tiny / "whole")
    leaves = jax.tree.leaves((run.load_draws(), run.members))
    assert {np.asarray(leaf).dtype.name for leaf in leaves} == {"float64"}
    metrics = json.loads((tiny / "whole" / "metrics.json").read_text())
    assert run.score() == pytest.approx(metrics["test_target_units"]["posterior"], rel=1e-12)
    code, out, err = here("predict", "whole", "table.csv", cwd=tiny)
    assert code == 0, err
    assert len(out.splitlines()) == 61
    use_precision("float32")
    with pytest.raises(bnnmcmc.InputError, match=r"begin with bnnmcmc\.use_precision\(\"float64\""):
        Run.open(tiny / "whole")
