import subprocess
import sys

import numpy as np
import pytest
import scoringrules
from scipy import stats
from scipy.special import logsumexp
from sklearn.metrics import (
    accuracy_score,
    brier_score_loss,
    log_loss,
    mean_absolute_error,
    mean_squared_error,
    roc_auc_score,
)

from bnnmcmc import metrics
from bnnmcmc.errors import InputError
from bnnmcmc.metrics import (
    LEVELS,
    accuracy,
    brier,
    classification_scores,
    coverage,
    crps_samples,
    ece,
    lppd,
    nll_gaussian,
    regression_scores,
    rmse,
)


def regression(rows=30, targets=2, count=9, seed=0):
    rng = np.random.default_rng(seed)
    y, mean = rng.normal(size=(2, rows, targets))
    variance = rng.uniform(0.5, 2.0, (rows, targets))
    samples = mean + np.sqrt(variance) * rng.normal(size=(count, rows, targets))
    return y, mean, variance, samples


def classification(rows=200, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(classes), rows)
    return rng.integers(0, classes, rows), probabilities


def crps_double_sum(y, samples):
    m = len(samples)
    first = np.abs(samples - y).mean(axis=0)
    pairs = np.abs(samples[:, None] - samples[None, :]).sum(axis=(0, 1))
    return (first - pairs / (2 * m * (m - 1))).mean()


def crps_gaussian(y, mean, sd):
    z = (y - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def test_scores_import_without_jax():
    code = "import sys, bnnmcmc.metrics; sys.exit('jax' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_lppd_is_the_mean_over_rows():
    rng = np.random.default_rng(0)
    per_draw = stats.norm.logpdf(rng.normal(size=20), rng.normal(size=(50, 20)), 1.0)
    pooled = logsumexp(per_draw, axis=0) - np.log(50)
    expected = np.log(np.exp(per_draw).mean(axis=0)).mean()
    assert lppd(pooled) == pytest.approx(expected, rel=1e-12)


def test_lppd_of_pooled_class_probabilities_is_the_log_loss():
    y, probabilities = classification()
    scores = classification_scores(y, probabilities, np.log(probabilities[np.arange(len(y)), y]))
    assert scores["lppd"] == pytest.approx(-log_loss(y, probabilities), rel=1e-12)


def test_one_impossible_row_makes_lppd_minus_infinity():
    assert lppd(np.array([0.0, -np.inf])) == -np.inf


def test_gaussian_nll_against_scipy():
    y, mean, variance, _ = regression()
    expected = -stats.norm.logpdf(y, mean, np.sqrt(variance)).sum(axis=1).mean()
    assert nll_gaussian(y, mean, variance) == pytest.approx(expected, rel=1e-12)


def test_gaussian_nll_is_minus_lppd_of_a_gaussian_predictive():
    y, mean, variance, samples = regression()
    log_density = stats.norm.logpdf(y, mean, np.sqrt(variance)).sum(axis=1)
    scores = regression_scores(y, mean, variance, samples, log_density)
    assert scores["nll_gaussian"] == pytest.approx(-scores["lppd"], rel=1e-12)


def test_rmse_against_scikit_learn():
    y, mean, _, _ = regression()
    assert rmse(y, mean) == pytest.approx(np.sqrt(mean_squared_error(y, mean)), rel=1e-12)


@pytest.mark.parametrize("count", [2, 7, 8])
def test_crps_equals_the_double_sum(count):
    y, _, _, samples = regression(count=count)
    assert crps_samples(y, samples) == pytest.approx(crps_double_sum(y, samples), rel=1e-12)


def test_crps_and_coverage_do_not_depend_on_the_chunks(monkeypatch):
    y, _, _, samples = regression(rows=11)
    whole = crps_samples(y, samples), coverage(y, samples, 0.5)
    monkeypatch.setattr(metrics, "CHUNK_BYTES", 8 * samples[:, :2].size)
    assert len(list(metrics._chunks(samples))) == 6
    assert crps_samples(y, samples) == pytest.approx(whole[0], rel=1e-12)
    assert coverage(y, samples, 0.5) == whole[1]


def test_crps_keeps_its_digits_at_a_large_offset():
    y, _, _, samples = regression()
    shifted = crps_samples(y + 2.0**40, samples + 2.0**40)
    assert shifted == pytest.approx(crps_samples(y, samples), rel=1e-3)


def test_crps_of_few_samples_is_unbiased_for_a_gaussian():
    # With 1/m^2 in place of 1/(m (m - 1)), the mean would be off by 0.11 standard deviations.
    rows, sd = 4000, 2.0
    rng = np.random.default_rng(3)
    y = rng.normal(0.0, 3.0, (rows, 1))
    samples = rng.normal(1.0, sd, (5, rows, 1))
    errors = np.array([crps_samples(y[[i]], samples[:, [i]]) for i in range(rows)])
    errors -= crps_gaussian(y[:, 0], 1.0, sd)
    standard_error = errors.std() / np.sqrt(rows)
    assert standard_error < 0.01 * sd
    assert abs(errors.mean()) < 4 * standard_error
    assert crps_samples(y, samples) - crps_gaussian(y, 1.0, sd).mean() == pytest.approx(
        errors.mean(), rel=1e-9
    )


def test_crps_of_a_point_mass_is_the_absolute_error():
    y = np.array([[1.0], [4.0]])
    assert crps_samples(y, np.full((6, 2, 1), 2.0)) == pytest.approx(1.5)


def test_coverage_counts_by_hand():
    samples = np.arange(101.0)[:, None, None] * np.ones((1, 5, 1))  # the quantile of p is 100 p
    y = np.array([[4.9], [5.0], [50.0], [95.0], [95.1]])
    assert coverage(y, samples, 0.9) == pytest.approx(3 / 5)
    assert coverage(y, samples, 0.5) == pytest.approx(1 / 5)


@pytest.mark.parametrize("count", [9, 400])
def test_coverage_of_exchangeable_targets(count):
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(count + 1, 5000, 2))
    for level in (0.5, 0.8, 0.95):
        expected = level * (count - 1) / (count + 1)
        standard_error = np.sqrt(expected * (1 - expected) / 10_000)
        assert abs(coverage(draws[0], draws[1:], level) - expected) < 4 * standard_error


@pytest.mark.parametrize("level", [50, 0.0, 1.0, float("nan")])
def test_a_level_in_percent_is_refused(level):
    y, _, _, samples = regression()
    with pytest.raises(InputError, match=r"level: found .* between 0 and 1"):
        coverage(y, samples, level)


def test_accuracy_against_scikit_learn():
    y, probabilities = classification()
    expected = accuracy_score(y, probabilities.argmax(axis=1))
    assert accuracy(y, probabilities) == pytest.approx(expected)


def test_brier_against_scikit_learn():
    y, probabilities = classification(classes=4)
    assert brier(y, probabilities) == pytest.approx(brier_score_loss(y, probabilities), rel=1e-12)
    y, probabilities = classification(classes=2)
    halved = brier_score_loss(y, probabilities[:, 1])
    whole = brier_score_loss(y, probabilities[:, 1], scale_by_half=False)
    assert brier(y, probabilities) == pytest.approx(2 * halved, rel=1e-12)
    assert brier(y, probabilities) == pytest.approx(whole, rel=1e-12)


def test_brier_is_two_at_worst():
    assert brier([0, 1], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]) == pytest.approx(2.0)


def test_ece_against_a_loop_over_bins():
    y, probabilities = classification(rows=500, classes=3)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    expected = 0.0
    for low in np.arange(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert ece(y, probabilities) == pytest.approx(expected, rel=1e-12)


def test_ece_by_hand():
    # 0.8 is the upper edge of a bin and belongs to it; the two bins do not cancel.
    probabilities = np.array([[0.8, 0.2], [0.75, 0.25], [0.0, 1.0], [0.4, 0.6]])
    y = np.array([0, 1, 1, 1])
    expected = (abs((1 - 0.8) + (0 - 0.75)) + abs(1 - 1.0) + abs(1 - 0.6)) / 4
    assert ece(y, probabilities) == pytest.approx(expected)


def test_a_calibrated_model_has_a_small_ece_and_an_overconfident_one_a_large_one():
    rng = np.random.default_rng(2)
    p = rng.uniform(0, 1, 20_000)
    y = (rng.uniform(size=p.size) < p).astype(int)
    assert ece(y, np.stack([1 - p, p], axis=1)) < 0.02
    sure = (p > 0.5).astype(float)
    assert ece(y, np.stack([1 - sure, sure], axis=1)) == pytest.approx(0.25, abs=0.02)


def test_regression_scores_are_the_single_scores():
    y, mean, variance, samples = regression()
    log_density = np.linspace(-3, 1, len(y))
    scores = regression_scores(y, mean, variance, samples, log_density)
    expected = {
        "lppd": -1.0,
        "nll_gaussian": nll_gaussian(y, mean, variance),
        "rmse": rmse(y, mean),
        "crps": crps_samples(y, samples),
        **{f"coverage_{level}": coverage(y, samples, level / 100) for level in LEVELS},
    }
    assert list(scores) == list(expected)
    assert scores == pytest.approx(expected, rel=1e-12)
    assert len({scores[f"coverage_{level}"] for level in LEVELS}) > 1
    assert all(type(score) is float for score in scores.values())


def test_classification_scores_are_the_single_scores():
    y, probabilities = classification()
    scores = classification_scores(y, probabilities, np.full(len(y), -0.5))
    assert scores == {
        "lppd": -0.5,
        "accuracy": accuracy(y, probabilities),
        "brier": brier(y, probabilities),
        "ece": ece(y, probabilities),
    }
    assert all(type(score) is float for score in scores.values())


def test_float32_inputs_are_summed_in_float64():
    y, mean, variance, samples = (a.astype(np.float32) for a in regression(rows=2000))
    doubles = [a.astype(np.float64) for a in (y, mean, variance, samples)]
    log_density = np.full(2000, 0.1, np.float32)
    scores = regression_scores(y, mean, variance, samples, log_density)
    assert scores == regression_scores(*doubles, log_density.astype(np.float64))


COVERAGES = {f"coverage_{level}" for level in LEVELS}


@pytest.mark.parametrize(
    ("name", "place", "touched"),
    [
        ("y", (3, 1), {"nll_gaussian", "rmse", "crps"} | COVERAGES),
        ("mean", (3, 1), {"nll_gaussian", "rmse"}),
        ("variance", (3, 1), {"nll_gaussian"}),
        ("samples", (4, 3, 1), {"crps"} | COVERAGES),
        ("log_density", 3, {"lppd"}),
    ],
)
def test_one_nan_reaches_every_regression_score_it_touches(name, place, touched):
    y, mean, variance, samples = regression()
    given = {"y": y, "mean": mean, "variance": variance, "samples": samples}
    given["log_density"] = np.zeros(len(y))
    given[name][place] = np.nan
    scores = regression_scores(**given)
    assert {score for score, value in scores.items() if np.isnan(value)} == touched


def test_one_nan_reaches_every_classification_score_it_touches():
    y, probabilities = classification()
    log_density = np.zeros(len(y))
    broken = probabilities.copy()
    broken[5, 2] = np.nan
    scores = classification_scores(y, broken, log_density)
    assert {name for name, value in scores.items() if np.isnan(value)} == {
        "accuracy",
        "brier",
        "ece",
    }
    log_density[7] = np.nan
    scores = classification_scores(y, probabilities, log_density)
    assert {name for name, value in scores.items() if np.isnan(value)} == {"lppd"}


Y, MEAN, VARIANCE, SAMPLES = regression()


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: lppd(np.zeros((3, 1))), r"log_density: found shape \(3, 1\), expected \(rows,\)"),
        (lambda: lppd(np.zeros(0)), "at least one row"),
        (lambda: rmse(Y[:, 0], MEAN[:, 0]), r"y: found shape \(30,\), expected \(rows, targets\)"),
        (lambda: rmse(Y, MEAN[:, :1]), r"mean: found shape \(30, 1\), expected \(30, 2\)"),
        (lambda: rmse(Y[:0], MEAN[:0]), r"y: found shape \(0, 2\)"),
        (lambda: nll_gaussian(Y, MEAN, VARIANCE[:1]), r"variance: found shape \(1, 2\)"),
        (lambda: nll_gaussian(Y, MEAN, 0 * VARIANCE), "variance: found 0.0 in row 0, target 0"),
        (lambda: crps_samples(Y, SAMPLES[:, :1]), r"samples: found shape \(9, 1, 2\)"),
        (lambda: crps_samples(Y, SAMPLES[:1]), "samples: found 1 per row, expected at least 2"),
        (lambda: coverage(Y, SAMPLES[:0], 0.5), "at least one sample"),
        (
            lambda: regression_scores(Y, MEAN, VARIANCE, SAMPLES, np.zeros(29)),
            r"log_density: found shape \(29,\), expected \(30,\)",
        ),
        (lambda: accuracy([0.0, 1.0], np.eye(2)), "y: found float64 .* integer class indices"),
        (lambda: accuracy([[0], [1]], np.eye(2)), r"y: found int64 of shape \(2, 1\)"),
        (lambda: accuracy([True, False], np.eye(2)), "y: found bool"),
        (lambda: accuracy([0, 1, 1], np.eye(2)), r"expected \(3, classes\)"),
        (lambda: accuracy([0, 1], np.ones((2, 1))), "at least 2 classes"),
        (lambda: brier([0, 2], np.eye(2)), "found class 2 in row 1, expected 0 to 1"),
        (lambda: brier([-1, 0], np.eye(2)), "found class -1 in row 0"),
        (lambda: ece([0, 1], [[1.0, 0.0], [2.0, 3.0]]), "in row 1, expected numbers .* logits"),
        (lambda: ece([0, 1], [[1.0, 0.0], [2.0, -1.0]]), "in row 1"),
        (
            lambda: classification_scores([0, 1], np.eye(2), np.zeros(3)),
            r"log_density: found shape \(3,\), expected \(2,\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(score, message):
    with pytest.raises(InputError, match=message):
        score()


# ------------------------------------------------------------------ scores with standard errors


def components(draws=12, rows=7, targets=2, seed=3):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(rows, targets)),
        rng.normal(size=(draws, rows, targets)),
        rng.uniform(0.2, 2, (draws, rows, targets)),
        rng.dirichlet(np.ones(draws)),
    )


def test_crps_of_gaussian_mixtures_against_scoringrules():
    y, means, sds, weights = components()
    for w in (None, weights):
        share = np.full(12, 1 / 12) if w is None else w
        expected = scoringrules.crps_mixnorm(
            y, means, sds, np.broadcast_to(share[:, None, None], means.shape), m_axis=0
        )
        found = metrics.crps_gaussian_mixture(y, means, sds, w)
        np.testing.assert_allclose(found.value, expected.mean(), rtol=1e-10)
        each = expected.mean(axis=1)
        np.testing.assert_allclose(found.error, each.std(ddof=1) / np.sqrt(7), rtol=1e-9)
    one = metrics.crps_gaussian_mixture(y, means[:1], sds[:1])
    np.testing.assert_allclose(one.value, crps_gaussian(y, means[0], sds[0]).mean(), rtol=1e-10)


def test_crps_of_samples_against_scoringrules_and_the_closed_form():
    y, means, sds, _ = components()
    rng = np.random.default_rng(0)
    samples = (means + sds * rng.normal(size=(4000, *means.shape))).reshape(-1, *y.shape)
    fair = scoringrules.crps_ensemble(y, samples[:500], m_axis=0, estimator="fair").mean()
    np.testing.assert_allclose(crps_samples(y, samples[:500]), fair, rtol=1e-8)
    exact = metrics.crps_gaussian_mixture(y, means, sds).value
    assert abs(crps_samples(y, samples) - exact) < 0.01


def test_interval_score_coverage_and_width():
    y, means, sds, _ = components()
    low, high = means[0] - sds[0], means[0] + sds[0]
    expected = scoringrules.interval_score(y, low, high, 0.2)
    found = metrics.interval_score(y, low, high, 0.8)
    np.testing.assert_allclose(found.value, expected.mean(), rtol=1e-12)
    error = expected.mean(axis=1).std(ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(found.error, error, rtol=1e-12)
    inside = (low <= y) & (y <= high)
    assert metrics.interval_coverage(y, low, high).value == inside.mean()
    np.testing.assert_allclose(metrics.interval_width(low, high).value, (high - low).mean())
    low[2, 0] = np.nan
    for score in (
        metrics.interval_score(y, low, high, 0.8),
        metrics.interval_coverage(y, low, high),
        metrics.interval_width(low, high),
    ):
        assert np.isnan(score.value)


def test_mean_absolute_error():
    y, means, _, _ = components()
    expected = mean_absolute_error(y, means[0])
    np.testing.assert_allclose(metrics.mae(y, means[0]).value, expected)


def test_coverage_from_the_distribution_function_is_that_of_exact_intervals():
    rng = np.random.default_rng(2)
    y, mean = rng.normal(size=(2, 400, 1))
    samples = mean + rng.normal(size=(50, 400, 1))
    arguments = (y, mean, np.ones_like(y), samples, stats.norm.logpdf(y, mean)[:, 0])
    upto = stats.norm.cdf(y, mean)
    found = regression_scores(*arguments, upto, upto)
    for level in LEVELS:
        low, high = stats.norm.interval(level / 100, mean)
        assert found[f"coverage_{level}"] == ((low <= y) & (y <= high)).mean()
    # Counts: the interval holds its ends.
    counts = rng.poisson(5, size=(400, 1)).astype(float)
    law = stats.poisson(5)
    found = regression_scores(counts, *arguments[1:], law.cdf(counts), law.cdf(counts - 1))
    for level in LEVELS:
        low, high = law.ppf((1 - level / 100) / 2), law.ppf((1 + level / 100) / 2)
        assert found[f"coverage_{level}"] == ((low <= counts) & (counts <= high)).mean()


@pytest.mark.parametrize("name", ["lppd", "nll_gaussian", "rmse", "crps", "coverage_80"])
def test_standard_errors_of_regression_are_those_over_test_parts(name):
    """The spread of the score over many test parts, as the error of one says."""
    rng = np.random.default_rng(5)
    scores, errors = [], []
    for _ in range(150):
        mean = rng.normal(size=(80, 1))
        y = mean + 1.3 * rng.standard_t(8, size=(80, 1))
        samples = mean + rng.normal(size=(20, 80, 1))
        arguments = (y, mean, np.ones_like(y), samples, stats.norm.logpdf(y, mean)[:, 0])
        scores.append(regression_scores(*arguments)[name])
        errors.append(metrics.regression_errors(*arguments)[name])
    # A standard deviation of 150 values is off by 6 %.
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.25)


@pytest.mark.parametrize("name", ["lppd", "accuracy", "brier", "ece"])
def test_standard_errors_of_classification_are_those_over_test_parts(name):
    rng = np.random.default_rng(6)
    scores, errors = [], []
    for _ in range(100):
        p = rng.beta(2, 1, size=150)
        y = (rng.random(150) < p**2).astype(int)  # far from calibrated: no bias near zero
        both = np.stack([1 - p, p], axis=1)
        arguments = (y, both, np.log(both[np.arange(150), y]))
        scores.append(classification_scores(*arguments)[name])
        errors.append(metrics.classification_errors(*arguments)[name])
    assert np.mean(errors) == pytest.approx(np.std(scores), rel=0.3)


def test_parts_of_the_brier_score_add_up():
    y, probabilities = classification()
    parts = metrics.brier_decomposition(y, probabilities)
    total = parts.reliability.value - parts.resolution.value
    total += parts.uncertainty.value + parts.within.value
    np.testing.assert_allclose(total, brier(y, probabilities), rtol=1e-12)
    assert all(part.error > 0 for part in parts[:3])
    # Probabilities that are the bins' own shares: nothing is hidden, and they are calibrated.
    p = np.repeat([0.25, 0.75], 40)
    y = np.concatenate([np.arange(40) < 10, np.arange(40) < 30]).astype(int)
    parts = metrics.brier_decomposition(y, np.stack([1 - p, p], axis=1), bins=4)
    np.testing.assert_allclose([parts.reliability.value, parts.within.value], 0, atol=1e-12)
    np.testing.assert_allclose(parts.uncertainty.value, 0.5)
    np.testing.assert_allclose(parts.resolution.value, 2 * 0.25**2)


def test_auroc_against_scikit_learn():
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 9, 60) * 1.0, rng.integers(3, 12, 40) * 1.0  # with ties
    found = metrics.auroc(inside, outside)
    labels = np.repeat([0, 1], [60, 40])
    np.testing.assert_allclose(found.value, roc_auc_score(labels, np.append(inside, outside)))
    repeated = [
        metrics.auroc(rng.integers(0, 9, 60) * 1.0, rng.integers(3, 12, 40) * 1.0).value
        for _ in range(300)
    ]
    assert found.error == pytest.approx(np.std(repeated), rel=0.3)
    assert metrics.auroc([0.0, 1.0], [2.0, 3.0]).value == 1
    assert np.isnan(metrics.auroc([0.0, np.nan], [2.0, 3.0]).value)


def test_uniformity_against_scipy():
    rng = np.random.default_rng(1)
    for power in (1.0, 1.3):
        values = rng.random(300) ** power
        found, expected = metrics.pit_uniformity(values), stats.kstest(values, "uniform")
        np.testing.assert_allclose(found.distance, expected.statistic, rtol=1e-10)
        np.testing.assert_allclose(found.p_value, expected.pvalue, atol=0.01)
    with pytest.raises(InputError, match="from 0 to 1"):
        metrics.pit_uniformity([0.5, 1.2])
