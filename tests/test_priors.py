import jax
import numpy as np
import pytest
import scipy.stats as st

from bnnmcmc.errors import InputError
from bnnmcmc.models.mlp import mlp
from bnnmcmc.priors import LeafPrior, independent, is_bias, normal

PARAMS = jax.tree.map(
    lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
    mlp(6, [5, 4], 2).init(jax.random.key(0)),
)


def total(distribution_of):
    """Sum log-densities; ``distribution_of(layer, part, fan_in)`` is a frozen scipy one."""
    return sum(
        distribution_of(layer, part, len(parts["weight"])).logpdf(values).sum()
        for layer, parts in PARAMS.items()
        for part, values in parts.items()
    )


@pytest.mark.parametrize(
    ("leaf", "frozen"),
    [
        (LeafPrior("normal", 0.7), st.norm(0, 0.7)),
        (LeafPrior("laplace", 0.7), st.laplace(0, 0.7)),
        (LeafPrior("student_t", 0.7, df=4.0), st.t(4.0, 0, 0.7)),
        (LeafPrior("student_t", 0.7), st.t(3.0, 0, 0.7)),
    ],
)
def test_families_agree_with_scipy(leaf, frozen):
    np.testing.assert_allclose(
        independent(leaf).log_density(PARAMS), total(lambda *_: frozen), rtol=1e-5
    )


def test_the_default_is_standard_normal():
    expected = total(lambda *_: st.norm())
    np.testing.assert_allclose(independent().log_density(PARAMS), expected, rtol=1e-5)
    np.testing.assert_allclose(normal().log_density(PARAMS), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "prior", [normal(2.0, fan_in=True), independent(LeafPrior("normal", 2.0, True))]
)
def test_fan_in_scales_weights_only(prior):
    def frozen(_, part, fan_in):
        return st.norm(0, 2 / np.sqrt(fan_in) if part == "weight" else 2)

    np.testing.assert_allclose(prior.log_density(PARAMS), total(frozen), rtol=1e-5)


def test_fan_in_of_a_convolution_counts_the_whole_window():
    kernel = {"conv": {"weight": np.full((3, 3, 4, 8), 0.1, np.float32)}}
    expected = st.norm(0, 1 / 6).logpdf(0.1) * 3 * 3 * 4 * 8
    np.testing.assert_allclose(normal(fan_in=True).log_density(kernel), expected, rtol=1e-5)


def test_biases_and_layers_apart():
    prior = independent(
        LeafPrior("normal", 0.5),
        LeafPrior("laplace", 0.2),
        {
            "layer0": {"weight": LeafPrior("student_t", 2.0, True, 5.0)},
            "layer2": {"weight": LeafPrior("laplace", 3.0), "bias": LeafPrior("normal", 4.0)},
        },
    )
    frozen = {
        ("layer0", "weight"): st.t(5.0, 0, 2 / np.sqrt(6)),
        ("layer0", "bias"): st.laplace(0, 0.2),
        ("layer1", "weight"): st.norm(0, 0.5),
        ("layer1", "bias"): st.laplace(0, 0.2),
        ("layer2", "weight"): st.laplace(0, 3),
        ("layer2", "bias"): st.norm(0, 4),
    }
    expected = total(lambda layer, part, _: frozen[layer, part])
    np.testing.assert_allclose(prior.log_density(PARAMS), expected, rtol=1e-5)


def test_every_option_changes_the_density():
    t = LeafPrior("student_t", 1.0)
    priors = [
        independent(),
        independent(LeafPrior(scale=2.0)),
        independent(LeafPrior(fan_in=True)),
        independent(LeafPrior("laplace")),
        independent(t),
        independent(t._replace(df=4.0)),
        independent(bias=LeafPrior(scale=2.0)),
        independent(layers={"layer1": {"weight": LeafPrior(scale=2.0)}}),
        independent(layers={"layer1": {"bias": LeafPrior(scale=2.0)}}),
    ]
    densities = [float(prior.log_density(PARAMS)) for prior in priors]
    assert len(np.unique(np.round(densities, 3))) == len(priors), densities


def test_a_nan_stays_a_nan():
    broken = {**PARAMS, "layer1": {**PARAMS["layer1"], "bias": np.full(4, np.nan, np.float32)}}
    assert np.isnan(normal().log_density(broken))


@pytest.mark.parametrize(
    ("leaf", "sd"),
    [
        (LeafPrior("normal", 0.5), 0.5),
        (LeafPrior("normal", 0.5, True), 0.05),
        (LeafPrior("laplace", 0.5), 0.5 * np.sqrt(2)),
        (LeafPrior("student_t", 0.5, df=10.0), 0.5 * np.sqrt(10 / 8)),
    ],
)
def test_sample_has_the_right_scale_and_structure(leaf, sd):
    params = {"layer0": {"bias": np.zeros(3000), "weight": np.zeros((100, 100))}}
    drawn = jax.tree.map(np.asarray, independent(leaf).sample(jax.random.key(0), params))
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, params)
    np.testing.assert_allclose(np.std(drawn["layer0"]["weight"]), sd, rtol=0.05)
    bias_sd = sd * 10 if leaf.fan_in else sd
    np.testing.assert_allclose(np.std(drawn["layer0"]["bias"]), bias_sd, rtol=0.06)
    # Leaves have streams of their own.
    parts = drawn["layer0"]["bias"][:100] / bias_sd, drawn["layer0"]["weight"][0] / sd
    assert abs(np.corrcoef(*parts)[0, 1]) < 0.5


def test_what_counts_as_a_bias():
    assert is_bias("layer0.bias", (4,))
    assert is_bias("attention.bias", (2, 4))
    assert is_bias("norm.scale", (4,))
    assert not is_bias("layer0.weight", (3, 4))
    assert not is_bias("bias.weight", (3, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: independent(LeafPrior("cauchy")),
            r"prior\.family: found 'cauchy', expected one of normal, laplace, student_t",
        ),
        (lambda: independent(LeafPrior(scale=0.0)), r"prior\.scale: found 0\.0, expected a posit"),
        (lambda: normal(float("nan")), r"prior\.scale: found nan"),
        (lambda: independent(bias=LeafPrior(scale=-1.0)), r"prior\.bias\.scale: found -1\.0"),
        (lambda: independent(LeafPrior("student_t", df=0.0)), r"prior\.df: found 0\.0"),
        (
            lambda: independent(layers={"layer0": {"weight": LeafPrior("gauss")}}),
            r"prior\.layers\.layer0\.weight\.family: found 'gauss', expected one of",
        ),
        (
            lambda: independent(layers={"layer0": {"weights": LeafPrior()}}),
            r"prior\.layers\.layer0\.weights: found 'weights', expected weight or bias",
        ),
        (lambda: independent(bias=LeafPrior(fan_in=True)), r"prior\.bias\.fan_in: a bias has no"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("use", ["log_density", "sample"])
def test_an_unknown_layer_is_named_with_those_there_are(use):
    prior = independent(layers={"layer7": {"weight": LeafPrior()}})
    arguments = (PARAMS,) if use == "log_density" else (jax.random.key(0), PARAMS)
    with pytest.raises(
        InputError,
        match=r"prior\.layers\.layer7: the network has no such layer; "
        r"its layers are layer0, layer1, layer2",
    ):
        getattr(prior, use)(*arguments)
