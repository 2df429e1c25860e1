"""Intervals and class probabilities corrected on held-out rows, on top of the posterior.

What is corrected says so (`Prediction.calibration`): it is no longer the posterior's own.
"""

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import scipy.optimize

from bnnmcmc.data import Encoding, target_to_units
from bnnmcmc.errors import InputError
from bnnmcmc.prediction import Prediction, in_target_units
from bnnmcmc.predictive import Pooled

Correction = Literal["split", "cqr", "temperature"]
# So many rows the intervals that are scored need (95 %), or a temperature.
SMALLEST_HELD_OUT = {"none": 0, "split": 19, "cqr": 19, "temperature": 1}
# Temperatures are looked for between these.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True, eq=False)
class Conformal:
    r"""Conformal intervals: wide enough to have covered so many of the held-out rows.

    ``method="split"``: the scores are :math:`e_i = |y_i - m_i| / s_i` with mean and standard
    deviation of the prediction, the interval is :math:`m \pm Q s`. ``method="cqr"``: with the
    posterior's own central interval :math:`[l, u]` of the level asked for,

    .. math:: e_i = \max(l_i - y_i, \; y_i - u_i), \qquad [l - Q, \; u + Q].

    Q is the :math:`\lceil (n + 1) \ell \rceil`-th smallest of the n scores, for each target alone.
    For rows exchangeable with the held-out ones, a target falls inside with probability of at least
    :math:`\ell`, on average over rows, whatever the model.

    Parameters
    ----------
    method : "split" or "cqr"
    held_out : Prediction
        Of rows that the model has not seen.
    y : array (rows, targets)
        Their targets, in target units.

    Raises
    ------
    InputError
        A classification, or targets that do not fit the rows.

    References
    ----------
    Lei et al. (2018), JASA 113 (split); Romano et al. (2019), 1905.03222 (CQR).
    """

    method: Literal["split", "cqr"]
    held_out: Prediction
    y: np.ndarray

    def __post_init__(self):
        mean = self.held_out.mean
        if mean is None:
            raise InputError(f"{self.method}: intervals need a numeric target; use temperature")
        if np.shape(self.y) != mean.shape:
            raise InputError(f"y: found shape {np.shape(self.y)}, expected {mean.shape}")

    @functools.cached_property
    def _margins(self) -> dict[float, np.ndarray]:
        return {}

    def margin(self, level: float) -> np.ndarray:
        """Return Q of each target, (targets,); NaN if any score is.

        Raises
        ------
        InputError
            Too few held-out rows for the level.
        """
        if level not in self._margins:
            self._margins[level] = self._margin(level)
        return self._margins[level]

    def _margin(self, level: float) -> np.ndarray:
        n = len(self.y)
        rank = math.ceil(round((n + 1) * level, 6))  # 0.9 x 10 is 9, whatever the rounding
        if rank > n:
            least = math.ceil(round(level / (1 - level), 6))
            raise InputError(
                f"level: found {level}, for which conformal intervals need at least {least} "
                f"held-out rows, but there are {n}; ask for a lower level, or hold out more rows"
            )
        if self.method == "split":
            scores = np.abs(self.y - self.held_out.mean) / self.held_out.sd
        else:
            low, high = self.held_out.interval(level)
            scores = np.maximum(low - self.y, self.y - high)
        return np.where(np.isnan(scores).any(axis=0), np.nan, np.sort(scores, axis=0)[rank - 1])

    def interval(self, prediction: Prediction, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the corrected interval (rows, targets) of a prediction of the posterior's own."""
        margin = self.margin(level)
        if self.method == "split":
            assert prediction.mean is not None and prediction.sd is not None
            return (
                prediction.mean - margin * prediction.sd,
                prediction.mean + margin * prediction.sd,
            )
        low, high = prediction.interval(level)
        # A negative margin may turn a narrow interval over.
        middle = (low + high) / 2
        return np.minimum(low - margin, middle), np.maximum(high + margin, middle)

    def correct(self, prediction: Prediction) -> Prediction:
        """Return the prediction with these intervals, marked as such."""
        own = replace(prediction, adjusted=None, calibration="")
        name = {"split": "split-conformal", "cqr": "conformalised quantile"}[self.method]
        return replace(
            prediction,
            adjusted=lambda _, level: self.interval(own, level),
            calibration=f"{name} intervals from {len(self.y)} held-out rows",
        )


@dataclass(frozen=True, eq=False)
class Temperature:
    r"""One temperature for class probabilities: :math:`p_c^{1/T} / \sum_k p_k^{1/T}`.

    T is what makes the log score of held-out rows best, between 0.05 and 20; above 1 the
    probabilities become less sure. The most probable class stays the same.

    Parameters
    ----------
    held_out : Prediction
        Of rows that the model has not seen.
    y : array (rows,)
        Their labels.

    Raises
    ------
    InputError
        No classification, or unknown labels.

    References
    ----------
    Guo et al. (2017), 1706.04599, applied to the pooled probabilities.
    """

    held_out: Prediction
    y: np.ndarray
    value: float = field(init=False, default=math.nan)

    def __post_init__(self):
        if self.held_out.probabilities is None:
            raise InputError("temperature: needs a classification; use split or cqr for numbers")
        probabilities = self.held_out.probabilities
        if np.isnan(probabilities).any():
            raise InputError("temperature: probabilities of the held-out rows are not finite")

        def loss(log_temperature: float) -> float:
            tempered = _tempered(self.held_out, math.exp(log_temperature))
            return -float(tempered.log_prob(self.y).mean())

        bounds = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
        found = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
        object.__setattr__(self, "value", math.exp(found.x))

    def correct(self, prediction: Prediction) -> Prediction:
        """Return the prediction with tempered probabilities, marked as such.

        It has no mutual information: the draws' own probabilities were not tempered.
        """
        marked = f"temperature {self.value:.3g} from {len(self.y)} held-out rows"
        return replace(_tempered(prediction, self.value), calibration=marked)


def _tempered(prediction: Prediction, temperature: float) -> Prediction:
    # What is zero in float32 was not computed as zero, and no temperature would help it.
    floor = np.finfo(np.float32).tiny
    logs = np.log(np.maximum(np.asarray(prediction.probabilities, np.float64), floor)) / temperature
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    probabilities = raised / raised.sum(axis=1, keepdims=True)
    return replace(prediction, probabilities=probabilities, expected_entropy=None)


def correction_of(
    method: Correction, pooled: Pooled, y: np.ndarray, encoding: Encoding | None
) -> Conformal | Temperature:
    """Fit a correction to the pooled predictive of held-out rows.

    Parameters
    ----------
    method : "split", "cqr" or "temperature"
    pooled : Pooled
    y : array
        Targets as the network sees them.
    encoding : Encoding or None

    Returns
    -------
    Conformal or Temperature

    Raises
    ------
    InputError
        As in `fit_correction`.
    """
    prediction, observed = in_target_units(pooled, encoding), np.asarray(y)
    if prediction.classes is not None:
        observed = np.array(prediction.classes, dtype=object)[observed.astype(int)]
    elif encoding is not None:
        observed = target_to_units(encoding, observed)
    return fit_correction(method, prediction, observed)


def fit_correction(
    method: Correction, held_out: Prediction, y: np.ndarray
) -> Conformal | Temperature:
    """Fit a correction to held-out rows.

    Parameters
    ----------
    method : "split", "cqr" or "temperature"
    held_out : Prediction
        Of these rows, by the posterior alone.
    y : array (rows, targets), or (rows,) labels
        In target units.

    Returns
    -------
    Conformal or Temperature

    Raises
    ------
    InputError
        An unknown word, or one that does not go with the target.
    """
    if method == "temperature":
        return Temperature(held_out, np.asarray(y))
    if method in ("split", "cqr"):
        return Conformal(method, held_out, np.asarray(y, np.float64))
    raise InputError(f"correction: found {method!r}, expected split, cqr or temperature")
