import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats as st

from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import MIN_SCALE, bernoulli, categorical, class_probabilities, gaussian

RNG = np.random.default_rng(0)


def test_predicted_scale_has_all_means_first_then_all_scales():
    likelihood = gaussian(targets=3)
    assert (likelihood.num_outputs, likelihood.task) == (6, "regression")
    outputs, y = RNG.normal(size=(5, 6)), RNG.normal(size=(5, 3))
    found = likelihood.distribution({}, jnp.asarray(outputs, jnp.float32)).log_prob(y)
    sd = np.log1p(np.exp(outputs[:, 3:])) + MIN_SCALE
    expected = st.norm(outputs[:, :3], sd).logpdf(y).sum(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_known_scale():
    likelihood = gaussian(targets=2, scale=0.3)
    assert likelihood.num_outputs == 2
    assert likelihood.init() == {}
    assert likelihood.log_prior({}) == 0
    outputs, y = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2))
    found = likelihood.distribution({}, outputs).log_prob(y)
    np.testing.assert_allclose(found, st.norm(outputs, 0.3).logpdf(y).sum(axis=1), rtol=1e-5)


def test_sampled_scale_is_one_sigma_per_target():
    likelihood = gaussian(targets=2, scale="sampled")
    assert likelihood.num_outputs == 2
    assert likelihood.init()["log_scale"].shape == (2,)
    sigma = np.array([0.2, 3.0])
    outputs, y = RNG.normal(size=(5, 2)), RNG.normal(size=(5, 2))
    found = likelihood.distribution({"log_scale": np.log(sigma)}, outputs).log_prob(y)
    np.testing.assert_allclose(found, st.norm(outputs, sigma).logpdf(y).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("scale_prior", [0.5, 2.0])
def test_the_prior_of_a_sampled_scale_holds_its_jacobian(scale_prior):
    likelihood = gaussian(scale="sampled", scale_prior=scale_prior)

    eta = np.linspace(-15, 5, 801)
    log_prior = jax.vmap(lambda e: likelihood.log_prior({"log_scale": e[None]}))
    values = np.exp(np.asarray(log_prior(jnp.asarray(eta, jnp.float32)), np.float64))
    mass = scipy.integrate.simpson(values, x=eta)
    np.testing.assert_allclose(mass, 1, rtol=1e-3)
    # And it is that of HalfNormal(scale_prior): E[sigma] = scale sqrt(2 / pi).
    mean = scipy.integrate.simpson(values * np.exp(eta), x=eta)
    np.testing.assert_allclose(mean, scale_prior * np.sqrt(2 / np.pi), rtol=1e-3)


def test_the_prior_of_two_sampled_scales_is_a_product():
    likelihood = gaussian(targets=2, scale="sampled")
    eta = jnp.array([-1.0, 0.3])
    expected = sum(st.halfnorm().logpdf(np.exp(e)) + e for e in (-1.0, 0.3))
    np.testing.assert_allclose(likelihood.log_prior({"log_scale": eta}), expected, rtol=1e-5)


def test_categorical():
    likelihood = categorical(4)
    assert (likelihood.num_outputs, likelihood.task) == (4, "classification")
    logits, y = RNG.normal(size=(6, 4)) * 3, np.array([0, 1, 2, 3, 3, 0])
    distribution = likelihood.distribution({}, jnp.asarray(logits, jnp.float32))
    expected = scipy.special.log_softmax(logits, axis=1)
    np.testing.assert_allclose(
        distribution.log_prob(y), expected[np.arange(6), y], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(class_probabilities(distribution), np.exp(expected), rtol=1e-5)


def test_bernoulli():
    likelihood = bernoulli()
    assert (likelihood.num_outputs, likelihood.task) == (1, "classification")
    logits, y = np.array([-2.0, 0.5, 3.0]), np.array([0, 1, 0])
    distribution = likelihood.distribution({}, jnp.asarray(logits[:, None], jnp.float32))
    p = scipy.special.expit(logits)
    np.testing.assert_allclose(distribution.log_prob(y), st.bernoulli(p).logpmf(y), rtol=1e-5)
    np.testing.assert_allclose(
        class_probabilities(distribution), np.stack([1 - p, p], axis=1), rtol=1e-5
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_class_probabilities_of_few_rows_are_not_mistaken(rows):
    for likelihood, classes in ((bernoulli(), 2), (categorical(2), 2), (categorical(3), 3)):
        outputs = jnp.zeros((rows, likelihood.num_outputs))
        found = class_probabilities(likelihood.distribution({}, outputs))
        np.testing.assert_allclose(found, np.full((rows, classes), 1 / classes), rtol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        (gaussian(), [[0.5, s] for s in (-1e4, -100.0, 100.0, 1e6)], np.full((4, 1), 0.4)),
        (bernoulli(), [[s] for s in (-1e6, -200.0, 200.0, 1e6)], np.ones(4, int)),
        (categorical(3), [[s, 0.0, 1.0] for s in (-1e6, -200.0, 200.0, 1e6)], np.zeros(4, int)),
    ],
)
def test_extreme_outputs_stay_finite_in_float32(likelihood, outputs, y):
    """A network sends out numbers like these before warm-up has found its step size."""

    @jax.jit
    def value_and_gradient(outputs):
        def total(outputs):
            values = likelihood.distribution({}, outputs).log_prob(y)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(outputs)

    gradient, values = value_and_gradient(jnp.asarray(outputs, jnp.float32))
    assert gradient.dtype == values.dtype == jnp.float32
    assert np.all(np.isfinite(values))
    assert np.all(np.isfinite(gradient))


def test_a_predicted_scale_has_a_floor():
    variance = gaussian().distribution({}, jnp.array([[0.0, -1e4]])).variance
    np.testing.assert_allclose(variance, MIN_SCALE**2, rtol=1e-5)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("likelihood", [gaussian(), categorical(2), bernoulli()])
def test_a_nan_output_gives_a_nan_density(likelihood, target):
    outputs = jnp.full((1, likelihood.num_outputs), jnp.nan)
    y = jnp.array([[0.1]]) if likelihood.task == "regression" else jnp.array([target])
    distribution = likelihood.distribution({}, outputs)
    assert np.isnan(distribution.log_prob(y)).all()
    if likelihood.task == "classification":
        assert np.isnan(class_probabilities(distribution)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: gaussian(scale="learned"),
            r"likelihood\.scale: found 'learned', expected 'predicted', 'sampled' or a number",
        ),
        (lambda: gaussian(scale=0.0), r"likelihood\.scale: found 0\.0, expected a positive"),
        (lambda: gaussian(scale=float("nan")), r"likelihood\.scale: found nan"),
        (lambda: gaussian(scale=float("inf")), r"likelihood\.scale: found inf"),
        (lambda: gaussian(scale="sampled", scale_prior=-1.0), r"scale_prior: found -1\.0"),
        (lambda: gaussian(targets=0), "found 0 targets, expected at least 1"),
        (lambda: categorical(1), "found 1 classes, expected at least 2"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()
