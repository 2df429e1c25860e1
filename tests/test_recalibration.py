"""Conformal intervals and temperature: coverage whatever the model, and marked as such."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats as st

from bnnmcmc.errors import InputError
from bnnmcmc.metrics import ece
from bnnmcmc.prediction import Prediction
from bnnmcmc.recalibration import Conformal, Temperature, fit_correction


def overconfident(rows, seed, factor=0.4):
    """Predictions with a spread that is too small, and what was observed."""
    rng = np.random.default_rng(seed)
    mean, sd = rng.normal(size=(rows, 1)), rng.uniform(0.5, 2, (rows, 1))
    y = mean + sd * rng.standard_t(5, size=(rows, 1))
    grid = st.norm.ppf((np.arange(200) + 0.5) / 200)[:, None, None]
    found = Prediction(("y",), mean, factor * sd, 0.1 * sd, samples=mean + factor * sd * grid)
    return found, y


@pytest.mark.parametrize("method", ["split", "cqr"])
@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_coverage_holds_for_a_model_that_is_wrong(method, factor):
    own, shares = [], []
    for seed in range(100):
        new, y = overconfident(100, seed, factor)
        low, high = new.interval(0.8)
        own.append(((low <= y) & (y <= high)).mean())
        held_out, seen = overconfident(39, 1000 + seed, factor)
        low, high = Conformal(method, held_out, seen).correct(new).interval(0.8)
        shares.append(((low <= y) & (y <= high)).mean())
    assert abs(np.mean(own) - 0.8) > 0.15
    # Over held-out parts: within [0.8, 0.8 + 1 / (n + 1)].
    error = np.std(shares) / 10
    assert 0.8 - 3 * error < np.mean(shares) < 0.825 + 3 * error


def test_margin_is_the_ranked_score():
    held_out, y = overconfident(19, 0)
    scores = np.sort(np.abs(y - held_out.mean) / held_out.sd, axis=0)
    found = Conformal("split", held_out, y)
    np.testing.assert_array_equal(found.margin(0.9), scores[17])  # ceil(20 * 0.9) = 18
    low, high = held_out.interval(0.9)
    scores = np.sort(np.maximum(low - y, y - high), axis=0)
    np.testing.assert_array_equal(Conformal("cqr", held_out, y).margin(0.9), scores[17])
    with pytest.raises(InputError, match="need at least 99 held-out rows, but there are 19"):
        found.margin(0.99)


def test_what_is_corrected_says_so():
    held_out, y = overconfident(50, 0)
    new, _ = overconfident(4, 1)
    for method, name in (("split", "split-conformal"), ("cqr", "conformalised quantile")):
        corrected = fit_correction(method, held_out, y).correct(new)
        assert corrected.calibration == f"{name} intervals from 50 held-out rows"
        assert name in repr(corrected)
        assert corrected.to_frame().attrs["calibration"] == corrected.calibration
        assert corrected.to_xarray().attrs["calibration"] == corrected.calibration
        np.testing.assert_array_equal(
            corrected.to_frame(0.8)["y_lower_80"], corrected.interval(0.8)[0][:, 0]
        )
        np.testing.assert_array_equal(corrected.quantile(0.3), new.quantile(0.3))  # the posterior's
        assert new.calibration == ""


def classes(rows, seed, temperature=3.0):
    """Probabilities that are too sure by a temperature, labels, and calibrated probabilities."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(rows, 3))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    y = (rng.random((rows, 1)) > np.cumsum(true, axis=1)[:, :-1]).sum(axis=1)
    sharp = np.exp(temperature * logits)
    sharp /= sharp.sum(axis=1, keepdims=True)
    labels = ("a", "b", "c")
    found = Prediction(("y",), probabilities=sharp, classes=labels, expected_entropy=np.zeros(rows))
    return found, np.array(labels)[y], true


def test_temperature_undoes_overconfidence():
    held_out, y, _ = classes(4000, 0)
    fitted = Temperature(held_out, y)
    assert fitted.value == pytest.approx(3.0, rel=0.1)
    new, labels, true = classes(3000, 1)
    corrected = fitted.correct(new)
    np.testing.assert_allclose(corrected.probabilities, true, atol=0.03)
    index = np.searchsorted(["a", "b", "c"], labels)
    assert ece(index, corrected.probabilities) < 0.5 * ece(index, new.probabilities)
    assert corrected.log_prob(labels).mean() > new.log_prob(labels).mean()
    np.testing.assert_array_equal(corrected.labels(), new.labels())
    assert corrected.calibration == f"temperature {fitted.value:.3g} from 4000 held-out rows"
    with pytest.raises(InputError, match="mutual_information needs"):
        _ = corrected.mutual_information


def test_a_class_of_no_probability_has_a_temperature():
    # In float32 a logit of -104 is a probability of zero; what happened is not impossible for that.
    held_out, y, _ = classes(200, 0)
    probabilities = held_out.probabilities.copy()
    probabilities[0] = [1.0, 0.0, 0.0]
    y[0] = "c"
    fitted = Temperature(replace(held_out, probabilities=probabilities), y)
    assert np.isfinite(fitted.value)
    assert fitted.value > Temperature(held_out, y).value
    corrected = fitted.correct(replace(held_out, probabilities=probabilities))
    assert np.isfinite(corrected.log_prob(y)).all()


def test_corrections_that_do_not_go_with_the_target():
    numbers, y = overconfident(30, 0)
    labels, seen, _ = classes(30, 0)
    with pytest.raises(InputError, match="needs a classification; use split or cqr"):
        fit_correction("temperature", numbers, y)
    with pytest.raises(InputError, match="need a numeric target; use temperature"):
        fit_correction("cqr", labels, np.zeros((30, 1)))
    with pytest.raises(InputError, match="expected split, cqr or temperature"):
        fit_correction("platt", labels, seen)
    with pytest.raises(InputError, match=r"y: found shape \(30,\), expected \(30, 1\)"):
        fit_correction("split", numbers, y[:, 0])
