import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats as st

from bnnmcmc.errors import InputError
from bnnmcmc.likelihoods import (
    MIN_SCALE,
    bernoulli,
    beta,
    categorical,
    check_support,
    class_probabilities,
    cumulative,
    gaussian,
    gaussian_mixture,
    laplace,
    marginals,
    negative_binomial,
    poisson,
    student_t,
    zero_inflated_poisson,
)

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


COUNTS = np.array([[0.0], [1.0], [2.0], [5.0], [13.0], [0.0]])
OUTPUTS = np.random.default_rng(4).normal(size=(6, 9)).astype(np.float32)


def softplus(raw):
    return np.logaddexp(0, raw) + MIN_SCALE


def zero_inflated(o):
    counts, gate = st.poisson(2 * np.exp(o[:, :1])), scipy.special.expit(o[:, 1:2])
    log = np.log((1 - gate) * counts.pmf(COUNTS) + gate * (COUNTS == 0))
    return log, gate + (1 - gate) * counts.cdf(COUNTS), (1 - gate) * counts.mean()


def frozen(make, discrete=False):
    def reference(o):
        found = make(o)
        y = COUNTS if discrete else Y
        log = found.logpmf(y) if discrete else found.logpdf(y)
        return log, found.cdf(y), found.mean()

    return reference


Y = np.array([[0.1], [0.2], [0.5], [0.6], [0.9], [0.3]])


def mixture_of_three(o):
    share = scipy.special.softmax(o[:, :3], axis=1)
    normal = st.norm(o[:, 3:6] + np.array([-1, 0, 1]), softplus(o[:, 6:9]))
    density, below = normal.pdf(Y), normal.cdf(Y)
    each = [np.log((share * density).sum(1, keepdims=True)), (share * below).sum(1, keepdims=True)]
    return *each, (share * normal.mean()).sum(1, keepdims=True)


def beta_of(o, r):
    mean = scipy.special.expit(o[:, :1] + scipy.special.logit(0.2))
    return st.beta(mean * r, (1 - mean) * r)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "reference"),
    [
        (laplace(), 2, frozen(lambda o: st.laplace(o[:, :1], softplus(o[:, 1:2])))),
        (student_t(df=3.5), 2, frozen(lambda o: st.t(3.5, o[:, :1], softplus(o[:, 1:2])))),
        (student_t(scale=0.7), 1, frozen(lambda o: st.t(4.0, o[:, :1], 0.7))),
        (poisson(level=3.0), 1, frozen(lambda o: st.poisson(3 * np.exp(o[:, :1])), True)),
        (zero_inflated_poisson(level=2.0), 2, zero_inflated),
        (
            negative_binomial(level=2.0),
            2,
            frozen(
                lambda o: st.nbinom(np.exp(o[:, 1:2]), 1 / (1 + 2 * np.exp(o[:, :1] - o[:, 1:2]))),
                True,
            ),
        ),
        (beta(level=0.2), 2, frozen(lambda o: beta_of(o, np.exp(o[:, 1:2])))),
        (beta(level=0.2, concentration=7.0), 1, frozen(lambda o: beta_of(o, 7.0))),
        (gaussian_mixture(), 9, mixture_of_three),
    ],
)
def test_densities_distribution_functions_and_means(likelihood, outputs, reference):
    assert (likelihood.num_outputs, likelihood.task) == (outputs, "regression")
    log, below, mean = reference(OUTPUTS[:, :outputs].astype(float))
    y = jnp.asarray(COUNTS if likelihood.support == "count" else Y, jnp.float32)
    found = likelihood.distribution(likelihood.init(), jnp.asarray(OUTPUTS[:, :outputs]))
    np.testing.assert_allclose(found.log_prob(y), log[:, 0], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(cumulative(marginals(found), y), below, rtol=1e-4, atol=2e-6)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-6)
    samples = found.sample(jax.random.key(0), (4000,))
    error = np.sqrt(np.asarray(found.variance) / 4000)
    assert np.all(np.abs(samples.mean(axis=0) - mean) < 5 * error)
    if likelihood.support == "count":
        assert np.all(cumulative(marginals(found), y * 0 - 1) == 0)


@pytest.mark.parametrize(
    "likelihood", [student_t(df="sampled"), negative_binomial(concentration="sampled")]
)
def test_sampled_parameters_have_a_prior_that_is_a_density(likelihood):
    (name,) = likelihood.init()
    eta = np.linspace(-25, 12, 4001)
    if name == "log_df":
        likelihood = student_t(scale=1.0, df="sampled")
    log_prior = jax.vmap(lambda e: likelihood.log_prior({name: e[None]}))
    values = np.exp(np.asarray(log_prior(jnp.asarray(eta, jnp.float32)), np.float64))
    np.testing.assert_allclose(scipy.integrate.simpson(values, x=eta), 1, rtol=1e-3)


def test_a_sampled_scale_and_sampled_degrees_of_freedom():
    likelihood = student_t(targets=2, scale="sampled", df="sampled")
    assert set(likelihood.init()) == {"log_scale", "log_df"}
    params = {"log_scale": np.log([0.5, 2.0]), "log_df": np.log([1.0, 6.0])}
    found = likelihood.distribution(params, OUTPUTS[:, :2]).log_prob(OUTPUTS[:, 2:4])
    expected = st.t([3.0, 8.0], OUTPUTS[:, :2], [0.5, 2.0]).logpdf(OUTPUTS[:, 2:4]).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    both = likelihood.log_prior(params)
    scale = gaussian(2, scale="sampled").log_prior(params)
    freedom = student_t(2, scale=1.0, df="sampled").log_prior(params)
    np.testing.assert_allclose(both, scale + freedom, rtol=1e-5)


OTHERS = [
    student_t(),
    student_t(df="sampled"),
    laplace(),
    poisson(),
    zero_inflated_poisson(),
    negative_binomial(),
    beta(),
    gaussian_mixture(),
]


@pytest.mark.parametrize("likelihood", OTHERS)
def test_whatever_a_network_puts_out_densities_and_gradients_are_finite(likelihood):
    rows = np.array([-1e6, -100.0, -5.0, 5.0, 100.0, 1e6], np.float32)
    outputs = jnp.asarray(np.repeat(rows[:, None], likelihood.num_outputs, axis=1))
    for y in (0.0, 3.0) if likelihood.support == "count" else (0.01, 0.5):

        def total(outputs, y=y):
            found = likelihood.distribution(likelihood.init(), outputs)
            return found.log_prob(jnp.full((6, 1), y)).sum()

        value, gradient = jax.value_and_grad(total)(outputs)
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))
    found = likelihood.distribution(likelihood.init(), outputs * jnp.nan)
    assert np.isnan(found.log_prob(jnp.full((6, 1), 0.0 if y == 3.0 else 0.5))).all()
    assert np.isnan(found.mean).all()
    assert np.isnan(cumulative(marginals(found), jnp.full((6, 1), 1.0))).all()


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (poisson(), [[1.0], [-2.0], [0.5]], r"found -2\.0 in row 1 \(and 1 more such\).*from 0"),
        (negative_binomial(), [[1.0], [0.5]], r"found 0\.5 in row 1"),
        (beta(), [[0.5], [1.0]], r"found 1\.0 in row 1 .*between 0 and 1, without these"),
        (beta(), [[1 - 1e-9]], r"row 0"),
    ],
)
def test_targets_that_a_likelihood_cannot_have(likelihood, y, message):
    with pytest.raises(InputError, match=message):
        check_support(likelihood, np.array(y))
    check_support(gaussian(), np.array(y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: student_t(df=2.0), r"likelihood\.df: found 2\.0, expected 'sampled' or a number"),
        (lambda: student_t(df="any"), r"likelihood\.df: found 'any'"),
        (lambda: poisson(level=0.0), r"likelihood\.level: found 0\.0, expected more than 0"),
        (lambda: beta(level=1.0), r"likelihood\.level: found 1\.0, expected between 0 and 1"),
        (lambda: beta(concentration=-1.0), r"likelihood\.concentration: found -1\.0"),
        (lambda: gaussian_mixture(components=1), r"components: found 1, expected at least 2"),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(InputError, match=message):
        make()
