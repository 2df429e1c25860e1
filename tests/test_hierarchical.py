"""Priors with sampled scales, the horseshoe over inputs, and a log-density of the user's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats as st
import zarr
from moments import failures
from scipy.integrate import quad
from scipy.special import polygamma

import bnnmcmc
from bnnmcmc import priors, store
from bnnmcmc.build import make_prior
from bnnmcmc.config import parse
from bnnmcmc.errors import InputError
from bnnmcmc.priors import Horseshoe, LeafPrior, hierarchical
from bnnmcmc.run import Run
from bnnmcmc.samplers.nuts import nuts
from bnnmcmc.sampling import sample_density
from bnnmcmc.store import read_manifest

NETWORK = bnnmcmc.mlp(3, [4], 2, "tanh")
MEMBER = {"likelihood": {}, "network": NETWORK.init(jax.random.key(0))}
FROZEN = {"half_normal": st.halfnorm, "half_cauchy": st.halfcauchy}
ALL = {
    "layers": hierarchical(),
    "cauchy": hierarchical(LeafPrior(scale=0.3, fan_in=True), scales="half_cauchy"),
    "laplace": hierarchical(LeafPrior("laplace"), LeafPrior(scale=0.5)),
    "regularised": hierarchical(scales=None, inputs=Horseshoe()),
    "both": hierarchical(inputs=Horseshoe(0.1, None)),
    "apart": hierarchical(
        LeafPrior("student_t"), layers={"layer1": {"weight": LeafPrior()}}, inputs=Horseshoe()
    ),
}
each = pytest.mark.parametrize("name", sorted(ALL))


def posterior_with(prior, network=NETWORK):
    return bnnmcmc.Posterior(network, bnnmcmc.gaussian(), prior)


def leaves64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_the_density_of_layers_is_that_of_scipy():
    raw = leaves64(MEMBER["network"])
    own = {"layer0": {"log_scale": 0.3}, "layer1": {"log_scale": -1.2}}
    for scales, frozen in FROZEN.items():
        prior = hierarchical(LeafPrior("laplace", 0.7, True), scales=scales)
        expected = sum(st.laplace.logpdf(leaf).sum() for leaf in jax.tree.leaves(raw))
        for values in own.values():
            eta = values["log_scale"]
            expected += frozen(scale=0.7).logpdf(np.exp(eta)) + eta
        assert float(prior.log_density(raw, own)) == pytest.approx(expected, rel=1e-5)
        # What the network computes with: weights over the root of the fan-in, biases not.
        params = prior.hierarchy.network(raw, own)
        weight = raw["layer1"]["weight"] * np.exp(-1.2) / 2
        np.testing.assert_allclose(params["layer1"]["weight"], weight, rtol=1e-6)
        bias = raw["layer0"]["bias"] * np.exp(0.3)
        np.testing.assert_allclose(params["layer0"]["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("slab", [0.5, None])
def test_the_density_of_a_horseshoe_is_that_of_scipy(slab):
    prior = hierarchical(LeafPrior(scale=0.7), scales=None, inputs=Horseshoe(0.2, slab))
    raw, local, glob = leaves64(MEMBER["network"]), np.array([-2.0, 0.1, 3.0]), -0.5
    own = {"inputs": {"log_global": glob, "log_local": local}}
    expected = st.norm.logpdf(raw["layer0"]["weight"]).sum()
    for layer, part in (("layer0", "bias"), ("layer1", "bias"), ("layer1", "weight")):
        expected += st.norm(scale=0.7).logpdf(raw[layer][part]).sum()
    expected += st.halfcauchy(scale=0.2).logpdf(np.exp(glob)) + glob
    expected += (st.halfcauchy.logpdf(np.exp(local)) + local).sum()
    assert float(prior.log_density(raw, own)) == pytest.approx(expected, rel=1e-5)
    squares = np.exp(2 * local)
    if slab is not None:
        squares = slab**2 * squares / (slab**2 + np.exp(2 * glob) * squares)
    scales = np.exp(glob) * np.sqrt(squares)
    np.testing.assert_allclose(prior.hierarchy.input_scales(own), scales, rtol=1e-5)
    params = prior.hierarchy.network(raw, own)
    weight = raw["layer0"]["weight"] * scales[:, None]
    np.testing.assert_allclose(params["layer0"]["weight"], weight, rtol=1e-5)
    np.testing.assert_array_equal(params["layer1"]["weight"], np.float32(raw["layer1"]["weight"]))
    # Scales far out of a float32's range do not become NaN.
    extreme = {"inputs": {"log_global": 60.0, "log_local": np.array([60.0, -300.0, 0.0])}}
    if slab is not None:
        np.testing.assert_allclose(prior.hierarchy.input_scales(extreme), [0.5, 0, 0.5], atol=1e-6)


@pytest.mark.parametrize("scales", sorted(FROZEN))
def test_the_density_of_a_log_scale_integrates_to_one(scales):
    prior = hierarchical(LeafPrior(scale=0.4), scales=scales)
    raw = {"a": {"bias": jnp.zeros(1)}}

    def density(eta):
        return np.exp(float(prior.log_density(raw, {"a": {"log_scale": jnp.asarray(eta)}})))

    total, _ = quad(density, -14, 12, limit=60, epsabs=1e-4, epsrel=1e-4)
    assert total == pytest.approx(st.norm.pdf(0), rel=2e-3)


@each
def test_a_chain_begins_with_the_functions_of_its_member(name):
    posterior = posterior_with(ALL[name])
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    large = jax.tree.map(lambda leaf: 30 * leaf, MEMBER)  # beyond the slab
    nothing = jax.tree.map(jnp.zeros_like, MEMBER["network"]["layer0"])
    half = {**MEMBER["network"], "layer0": nothing}
    for member in (MEMBER, large, {**MEMBER, "network": half}):
        start = posterior.start(member)
        assert set(start) == {"likelihood", "network", "prior"}
        assert jax.tree.structure(start["network"]) == jax.tree.structure(member["network"])
        for a, b in zip(
            jax.tree.leaves(posterior.network_params(start)),
            jax.tree.leaves(member["network"]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5)
        there, here = (posterior.distribution(p, x) for p in (start, member))
        np.testing.assert_allclose(there.mean, here.mean, rtol=1e-4, atol=1e-5)
        assert posterior.start(start) is start
        gradient = jax.grad(posterior.log_prior)(start)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # In the middle of what the prior expects: raw parameters of size one, or at their own size.
    scaled = posterior.start(MEMBER)["network"]["layer0"]["weight"]
    assert np.sqrt(np.mean(np.square(scaled))) == pytest.approx(1, rel=0.3)


def test_an_ordinary_prior_changes_no_position():
    posterior = posterior_with(bnnmcmc.normal_prior())
    assert posterior.start(MEMBER) is MEMBER
    assert set(posterior.init(jax.random.key(0))) == {"likelihood", "network"}


# Mean and variance of the logarithm of a half-normal and of a half-Cauchy variable of scale 1.
LOGS = {
    "half_normal": (0.5 * (polygamma(0, 0.5) + np.log(2)), polygamma(1, 0.5) / 4),
    "half_cauchy": (0.0, np.pi**2 / 4),
}


def prior_failures(scales, jacobian=1.0):
    """Sample the prior alone and check the scales' logarithms, and a weight's square."""
    sigma = 0.4
    prior = hierarchical(LeafPrior(scale=sigma), scales=scales, inputs=Horseshoe(0.3, leaf="a.w"))
    params = {"a": {"bias": jnp.zeros(2), "w": jnp.ones((2, 1))}}
    raw, own = prior.hierarchy.start(params)

    def density(position):
        own = position["own"]
        change = sum(leaf.sum() for leaf in jax.tree.leaves(own))
        return prior.log_density(position["raw"], own) + (jacobian - 1) * change

    starts = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), {"raw": raw, "own": own})
    draws = sample_density(
        density, starts, kernel=nuts(max_depth=6), warmup=500, draws=2000, seed=1
    ).draws
    logs = [
        draws["own"]["a"]["log_scale"],
        draws["own"]["inputs"]["log_global"],
        draws["own"]["inputs"]["log_local"][..., 0],
    ]
    mean, variance = np.array([LOGS[scales], LOGS["half_cauchy"], LOGS["half_cauchy"]]).T
    mean = mean + np.log([sigma, 0.3, 1.0])
    found = failures(np.stack(logs, axis=-1), mean, variance + mean**2)
    if scales == "half_normal":
        both = jax.vmap(jax.vmap(prior.hierarchy.network))(draws["raw"], draws["own"])
        bias = np.asarray(both["a"]["bias"])
        found += failures(bias, np.zeros(2), np.full(2, sigma**2))
    return found


@pytest.mark.parametrize("scales", sorted(FROZEN))
def test_prior_draws_have_the_marginals_of_the_scales(scales):
    assert prior_failures(scales) == []


def test_without_half_of_the_jacobian_they_have_not():
    """Without all of it the density has no integral, and there is nothing to sample."""
    found = prior_failures("half_normal", jacobian=0.5)
    assert any("z =" in text for text in found)


@pytest.mark.parametrize("name", ["layers", "cauchy", "laplace", "regularised", "both"])
def test_samples_have_the_quantiles_of_the_prior(name):
    """Of products of scales and raw parameters, against draws by SciPy, for one weight."""
    drawn = jax.vmap(lambda key: ALL[name].sample(key, MEMBER["network"]))(
        jax.random.split(jax.random.key(5), 4000)
    )
    rng = np.random.default_rng(0)
    z, cauchy = rng.normal(size=4000), st.halfcauchy.rvs(size=(2, 4000), random_state=rng)
    normal = np.abs(rng.normal(size=4000))
    squares = cauchy[0] ** 2
    expected = {
        "layers": normal * z,
        "cauchy": 0.3 * cauchy[0] * z / np.sqrt(3),
        "laplace": normal * rng.laplace(size=4000),
        "regularised": cauchy[1] * np.sqrt(4 * squares / (4 + cauchy[1] ** 2 * squares)) * z,
        "both": 0.1 * cauchy[1] * cauchy[0] * z,
    }
    weight = np.asarray(drawn["layer0"]["weight"])[:, 1, 2]
    assert st.ks_2samp(weight, expected[name]).pvalue > 1e-3


def test_a_nan_stays_a_nan():
    raw, own = ALL["both"].hierarchy.start(MEMBER["network"])
    assert np.isfinite(ALL["both"].log_density(raw, own))
    broken = {**own, "inputs": {**own["inputs"], "log_global": jnp.nan}}
    assert np.isnan(ALL["both"].log_density(raw, broken))


def test_the_horseshoe_shrinks_what_is_of_no_use():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 10))
    y = (np.tanh(1.5 * x[:, :1]) - x[:, 3:4] + 0.2 * rng.normal(size=(150, 1))).astype(np.float32)
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(10, [4], 1, "tanh"),
        bnnmcmc.gaussian(scale=0.2),
        hierarchical(scales=None, inputs=Horseshoe(0.3)),
    )
    ensemble = bnnmcmc.fit_ensemble(posterior, x, y, members=2, max_epochs=100)
    assert set(ensemble.positions) == {"likelihood", "network"}
    run = bnnmcmc.sample(
        posterior, ensemble.positions, x, y, kernel=nuts(max_depth=6), warmup=300, draws=200
    )
    scales = {name: np.median(values) for name, values in run.input_scales().items()}
    assert list(scales) == [f"x{i}" for i in range(1, 11)]
    relevant = min(scales.pop("x1"), scales.pop("x4"))
    assert max(scales.values()) < relevant / 2, (relevant, scales)
    # Weights as the network uses them: shrunk too.
    used = jax.vmap(jax.vmap(posterior.network_params))(run.load_draws())["layer0"]["weight"]
    size = np.sqrt(np.square(used).mean(axis=(0, 1, 3)))
    assert np.delete(size, [0, 3]).max() < 0.5 * size[[0, 3]].min()
    assert run.score(x, y)["rmse"] < 0.3


SECTION = """
[prior]
hierarchical = true
inputs = "regularised_horseshoe"
global_scale = 0.5
"""


@pytest.mark.slow
def test_a_whole_run(tiny, here):
    text = (tiny / "tiny.toml").read_text()
    (tiny / "h.toml").write_text(text + SECTION)
    settings = ["--quiet", "--set", "sampler.draws=18", "run.arviz=netcdf"]
    code, _, err = here("run", "h.toml", "--out", "whole", *settings, cwd=tiny)
    assert code == 0, err
    code, _, err = here("resume", "whole", "--draws", "12", "--quiet", cwd=tiny)
    assert code == 0, err
    run = Run.open(tiny / "whole")
    assert set(run.draws.layout.names) >= {
        "prior.inputs.log_global",
        "prior.inputs.log_local",
        "prior.layer0.log_scale",
        "prior.layer1.log_scale",
    }
    assert read_manifest(tiny / "whole")["parameters"] == run.draws.layout.size == 44 + 7
    log_local = zarr.open_group(tiny / "whole" / "draws", mode="r")["prior.inputs.log_local"]
    assert log_local.shape == (3, 30, 4)
    assert np.ptp(log_local[:], axis=1).min() > 0
    assert set(run.members) == {"likelihood", "network"}
    scales = run.input_scales()
    assert list(scales) == list(run.encoding.feature_names)
    thin = run.input_scales(every=3)
    for name, values in scales.items():
        np.testing.assert_array_equal(thin[name], values[:, ::3])
    stored = store.read_arrays(run.folder / "inputs.npz")
    assert list(stored["names"]) == list(scales)
    median = [np.median(values) for values in scales.values()]
    np.testing.assert_allclose(stored["quantiles"][list(stored["levels"]).index(0.5)], median)
    metrics = json.loads((tiny / "whole" / "metrics.json").read_text())
    assert run.score() == pytest.approx(metrics["test_target_units"]["posterior"], rel=1e-5)
    assert metrics["test"]["ensemble"]["rmse"] < 0.8
    one = jax.tree.map(lambda leaf: jnp.asarray(leaf[1, 7]), run.load_draws())
    density = run.posterior.log_density(one, *run.posterior.arrays(run.x, run.y))
    assert run.stats["log_density"][1, 7] == pytest.approx(float(density), rel=1e-3)


def test_no_input_scales_without_a_horseshoe(finished):
    with pytest.raises(InputError, match=r"input_scales: the prior has none; use \[prior\]"):
        Run.open(finished / "run").input_scales()


def prior_of(**section):
    return make_prior(parse({"data": {"path": "t.csv"}, "prior": section}, "e.toml"))


def test_every_option_of_a_config_changes_the_density():
    sections = [
        {},
        {"hierarchical": True},
        {"hierarchical": True, "scales": "half_cauchy"},
        {"hierarchical": True, "scale": 2.0},
        {"hierarchical": True, "fan_in": True},
        {"hierarchical": True, "family": "laplace"},
        {"hierarchical": True, "family": "student_t"},
        {"hierarchical": True, "family": "student_t", "df": 7.0},
        {"hierarchical": True, "bias": {"scale": 0.5}},
        {"hierarchical": True, "layers": {"layer1": {"weight": {"scale": 0.5}}}},
        {"inputs": "horseshoe"},
        {"inputs": "regularised_horseshoe"},
        {"inputs": "horseshoe", "global_scale": 0.1},
        {"inputs": "regularised_horseshoe", "slab_scale": 0.7},
        {"inputs": "horseshoe", "input_leaf": "layer1.weight"},
        {"inputs": "horseshoe", "hierarchical": True},
    ]
    posteriors = [posterior_with(prior_of(**section)) for section in sections]
    found = [float(p.log_prior(p.start(MEMBER))) for p in posteriors]
    assert len(np.unique(np.round(found, 4))) == len(sections), found


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"scales": "half_cauchy"}, "prior.scales: needs hierarchical = true; remove it"),
        ({"global_scale": 0.5}, 'prior.global_scale: needs inputs = "horseshoe" or "regular'),
        ({"slab_scale": 0.5}, 'prior.slab_scale: needs inputs = "horseshoe" or "regularised'),
        ({"input_leaf": "a"}, 'prior.input_leaf: needs inputs = "horseshoe"'),
        (
            {"inputs": "horseshoe", "slab_scale": 0.5},
            'prior.slab_scale: needs inputs = "regularised_horseshoe"; remove it',
        ),
        ({"inputs": "horsehoe"}, "prior.inputs: found 'horsehoe', but it should be 'regularised"),
        ({"hierarchical": 1}, "prior.hierarchical: found 1, but it should be a valid boolean"),
        ({"hierarchical": True, "scales": "flat"}, "prior.scales: found 'flat', but it should"),
        ({"inputs": "horseshoe", "global_scale": 0.0}, "prior.global_scale: found 0.0, but it"),
        (
            {"log_density": "a:b", "scale": 2.0, "hierarchical": True},
            "prior.log_density: replaces the whole prior, so remove scale, hierarchical",
        ),
    ],
)
def test_mistakes_in_a_config(section, line):
    with pytest.raises(InputError, match="1 mistake") as caught:
        prior_of(**section)
    assert str(caught.value).splitlines()[1].strip().startswith(line)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hierarchical(scales=None), r"neither scales of layers nor of inputs are sampled"),
        (lambda: hierarchical(scales="flat"), r"prior\.scales: found 'flat', expected one of half"),
        (lambda: hierarchical(LeafPrior(scale=-1.0)), r"prior\.scale: found -1\.0"),
        (lambda: hierarchical(inputs=Horseshoe(0.0)), r"prior\.global_scale: found 0\.0"),
        (lambda: hierarchical(inputs=Horseshoe(slab_scale=-1.0)), r"prior\.slab_scale: found -1"),
        (
            lambda: posterior_with(hierarchical(inputs=Horseshoe(leaf="w"))).start(MEMBER),
            r"prior\.input_leaf: the network has no leaf 'w' of weights \(features, \.\.\.\); it "
            r"has layer0\.weight, layer1\.weight",
        ),
    ],
)
def test_mistakes_in_python(make, message):
    with pytest.raises(InputError, match=message):
        make()


OWN = """
import jax
import jax.numpy as jnp
import numpy as np

def terms(params):
    return [(-0.5 * w**2 - 0.5 * jnp.log(2 * jnp.pi)).sum() for w in jax.tree.leaves(params)]

def standard_normal(params):
    return sum(terms(params))

def vector(params):
    return jnp.stack(terms(params))

def listed(params):
    return terms(params)

def whole(params):
    return jnp.round(sum(terms(params))).astype(int)

def on_the_host(params):
    return -0.5 * sum(np.sum(np.asarray(w) ** 2) for w in jax.tree.leaves(params))

def fails(params):
    return params["layer9"]

def without_a_gradient(params):
    return jax.lax.while_loop(lambda v: v < 0, lambda v: v + 1.0, sum(terms(params)))

def not_finite(params):
    return jnp.log(-sum((w**2).sum() for w in jax.tree.leaves(params)))

def no_number_for_a_gradient(params):
    return standard_normal(params) + jnp.sqrt(0.0 * params["layer0"]["bias"]).sum()

NUMBER = 3.0
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    from conftest import write_tiny

    folder = write_tiny(tmp_path_factory.mktemp("own-prior"))
    (folder / "own_priors.py").write_text(OWN)
    return folder


@pytest.mark.slow
def test_a_log_density_of_the_users_own_runs(own, here):
    found = {}
    by_name = "prior.log_density=own_priors:standard_normal"
    for name, setting in (("a", by_name), ("b", "run.seed=0")):
        settings = ["--quiet", "--set", setting, "sampler.draws=5"]
        code, _, err = here("run", "tiny.toml", "--out", name, *settings, cwd=own)
        assert code == 0, err
        found[name] = Run.open(own / name)
    # The same density, so for some steps the same chain.
    first = [run.warmup_stats["log_density"][:, 0] for run in found.values()]
    np.testing.assert_allclose(*first, rtol=1e-3)
    assert np.isfinite(found["a"].score()["lppd"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "prior.log_density: the module 'own_priors' has no 'absent'"),
        ("NUMBER", "prior.log_density: own_priors:NUMBER is a float, expected a function of the"),
        ("vector", "the function returned shape (4,) and type float32 for the parameters of one n"),
        ("listed", "the function returned list for the parameters of one network, expected one"),
        ("whole", "the function returned shape () and type int32"),
        ("on_the_host", "prior.log_density: the function failed: TracerArrayConversionError"),
        ("fails", "prior.log_density: the function failed: KeyError: 'layer9'"),
        ("without_a_gradient", "prior.log_density: its gradient failed: ValueError: Reverse-mode"),
        ("not_finite", "member 0 (and 2 more): at the start position the log prior is not finite"),
        ("no_number_for_a_gradient", "the gradient of the log-density is not finite"),
    ],
)
def test_one_that_cannot_be_used_is_refused_before_any_work(own, here, name, message):
    setting = f"prior.log_density=own_priors:{name}"
    code, _, err = here("run", "tiny.toml", "--out", "r", "--quiet", "--set", setting, cwd=own)
    assert code == 2
    assert message in err
    assert not (own / "r").exists()


def test_as_a_value_in_python():
    prior = priors.Prior(lambda params: -sum(jnp.abs(w).sum() for w in jax.tree.leaves(params)))
    x, y = np.ones((8, 3)), np.ones((8, 1))
    run = bnnmcmc.sample(
        posterior_with(prior),
        jax.tree.map(lambda leaf: leaf[None], MEMBER),
        x,
        y,
        kernel="hmc",
        warmup=20,
        draws=5,
    )
    assert np.isfinite(run.stats["log_density"]).all()
    wrong = posterior_with(priors.Prior(lambda params: params["layer0"]["bias"]))
    with pytest.raises(InputError, match=r"prior\.log_density: the function returned shape \(4,\)"):
        bnnmcmc.fit_ensemble(wrong, x, y, members=1)
