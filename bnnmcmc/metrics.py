"""Scores of predictions. NumPy only, all sums in float64.

A NaN in an input makes every score that uses this input NaN, also those that compare or count,
where it would pass unseen. Nothing is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bnnmcmc.errors import InputError

# Central intervals in the reports, in percent.
LEVELS = (50, 80, 90, 95)
BINS = 15
# Predictive samples are taken in chunks of rows; a chunk in float64 has at most this size.
CHUNK_BYTES = 32 * 2**20
# Rows of float32 softmax outputs add up to one far better than this; logits do not.
SUM_TOLERANCE = 1e-3
# Resamples of rows for the standard error of a score that is no mean over rows.
RESAMPLES = 200

_erf = np.frompyfunc(math.erf, 1, 1)


class Score(NamedTuple):
    """A score and its standard error over rows.

    Parameters
    ----------
    value : float
    error : float
        How far the value would be off for another test part as large: the standard deviation of
        the rows' terms over the root of their number, unless the score says otherwise. NaN for a
        single row.
    """

    value: float
    error: float


def mean_score(terms) -> Score:
    r"""Return the mean of one term per row, and its standard error.

    .. math:: \bar t = \frac1n \sum_i t_i, \qquad
              \sqrt{\frac{1}{n (n - 1)} \sum_i (t_i - \bar t)^2}

    Parameters
    ----------
    terms : array (rows,)

    Returns
    -------
    Score
    """
    terms = np.asarray(terms, np.float64)
    n = len(terms)
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(terms.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return Score(float(terms.mean()), error)


def lppd(log_density) -> float:
    r"""Mean log pointwise predictive density.

    .. math:: \frac1n \sum_i \log \frac1S \sum_s p(y_i \mid x_i, \theta_s)

    Parameters
    ----------
    log_density : array (rows,)
        The inner logarithm: pooled over all draws of all chains, joint over the targets of a row.

    Returns
    -------
    float
        In nats per row; larger is better.

    Raises
    ------
    InputError
        A wrong shape or no rows.

    References
    ----------
    Gelman et al. (2013), Bayesian Data Analysis, Eq. 7.5, divided by the number of rows.
    """
    log_density = np.asarray(log_density, np.float64)
    if log_density.ndim != 1 or log_density.size == 0:
        raise InputError(
            f"log_density: found shape {log_density.shape}, expected (rows,) with at least one row"
        )
    with np.errstate(invalid="ignore"):
        return float(log_density.mean())


def nll_gaussian(y, mean, variance) -> float:
    r"""Negative log-density of a Gaussian with the predictive's mean and variance.

    .. math:: \frac1n \sum_i \sum_t \tfrac12 \left( \log 2 \pi v_{it}
              + \frac{(y_{it} - m_{it})^2}{v_{it}} \right)

    Comparable to ``-lppd``: mean over rows, sum over targets. It equals ``-lppd`` if the
    predictive is Gaussian and independent over targets; a mixture of draws is usually not.

    Parameters
    ----------
    y, mean, variance : array (rows, targets)
        In the target's units; the variance in their square.

    Returns
    -------
    float
        In nats per row; smaller is better.

    Raises
    ------
    InputError
        Shapes that differ, no rows, or a variance that is not positive.

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, section 4.1 (the logarithmic score).
    """
    y = _targets(y)
    mean, variance = _of_shape("mean", mean, y.shape), _of_shape("variance", variance, y.shape)
    if np.any(variance <= 0):
        row, target = np.argwhere(variance <= 0)[0]
        raise InputError(
            f"variance: found {variance[row, target]} in row {row}, target {target}, expected "
            "more than 0: a Gaussian density needs a spread"
        )
    return float(_nll_terms(y, mean, variance).mean())


def _nll_terms(y: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        terms = np.log(2 * np.pi * variance) + np.square(y - mean) / variance
        return 0.5 * terms.sum(axis=1)


def rmse(y, mean) -> float:
    r"""Root of the mean squared error of the predictive mean.

    .. math:: \sqrt{\frac{1}{n T} \sum_i \sum_t (y_{it} - m_{it})^2}

    Parameters
    ----------
    y, mean : array (rows, targets)
        In the target's units.

    Returns
    -------
    float
        In the target's units; smaller is better. Several targets weigh by their units.

    Raises
    ------
    InputError
        Shapes that differ, or no rows.
    """
    y = _targets(y)
    mean = _of_shape("mean", mean, y.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.sqrt(np.square(y - mean).mean()))


def crps_samples(y, samples) -> float:
    r"""Continuous ranked probability score, from samples of the predictive.

    .. math:: \mathrm{CRPS}(F, y) = \mathrm E|X - y| - \tfrac12 \mathrm E|X - X'|

    with X, X' independent draws from F, estimated without bias from m independent samples,

    .. math:: \frac1m \sum_j |x_j - y| - \frac{1}{2 m (m-1)} \sum_{j, k} |x_j - x_k|,
              \qquad \tfrac12 \sum_{j, k} |x_j - x_k| = \sum_j (2 j - m - 1)\, x_{(j)},

    where :math:`x_{(1)} \le \dots \le x_{(m)}`: one sort, :math:`O(m \log m)`. Mean over rows and
    targets. Being unbiased, the estimate for a single row can be negative.

    Parameters
    ----------
    y : array (rows, targets)
    samples : array (samples, rows, targets)
        At least two samples per row.

    Returns
    -------
    float
        In the target's units; smaller is better.

    Raises
    ------
    InputError
        Shapes that do not fit, no rows, or fewer than two samples.

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, Eq. 21; Ferro (2014), QJRMS 140 (the fair estimator);
    Zamo and Naveau (2018), Mathematical Geosciences 50 (its form by sorting).
    """
    y = _targets(y)
    samples = _samples(samples, y.shape)
    return float(_crps_terms(y, samples).mean())


def _crps_terms(y: np.ndarray, samples: np.ndarray) -> np.ndarray:
    m = len(samples)
    if m < 2:
        raise InputError(f"samples: found {m} per row, expected at least 2 for the CRPS")
    weights = (2 * np.arange(1, m + 1) - m - 1) / (m * (m - 1))
    terms = np.empty(len(y))
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in _chunks(samples):
            # Relative to y: the score is invariant, and large offsets then cost no digits. Samples
            # last: sorting along a contiguous axis is faster.
            error = np.moveaxis(samples[:, rows] - y[rows], 0, -1).copy()
            error.sort(axis=-1)
            terms[rows] = (np.abs(error).mean(axis=-1) - error @ weights).mean(axis=1)
    return terms


def crps_gaussian_mixture(y, means, sds, weights=None) -> Score:
    r"""Continuous ranked probability score of a mixture of Gaussians, in closed form.

    .. math:: \sum_s w_s A(y - \mu_s, \sigma_s^2)
              - \tfrac12 \sum_{s, t} w_s w_t A(\mu_s - \mu_t, \sigma_s^2 + \sigma_t^2), \qquad
              A(\mu, \sigma^2) = \mu \, (2 \Phi(\mu / \sigma) - 1) + 2 \sigma \varphi(\mu / \sigma)

    Time grows with the square of the number of draws: some 0.1 s per row for 1000. Of many draws,
    give evenly spaced ones, or use `crps_samples`.

    Parameters
    ----------
    y : array (rows, targets)
    means, sds : array (draws, rows, targets)
    weights : array (draws,), optional
        Adding up to one; all the same if not given.

    Returns
    -------
    Score
        In the target's units; smaller is better. Mean over rows and targets.

    Raises
    ------
    InputError
        Shapes that do not fit, no rows, or a standard deviation that is not positive.

    References
    ----------
    Grimit et al. (2006), QJRMS 132, Eq. 5.
    """
    y = _targets(y)
    means, sds = _samples(means, y.shape), np.asarray(sds, np.float64)
    if sds.shape != means.shape or np.any(sds <= 0):
        raise InputError(
            f"sds: found shape {sds.shape}, expected positive numbers of shape {means.shape}"
        )
    count = len(means)
    w = np.full(count, 1 / count) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (count,):
        raise InputError(f"weights: found shape {w.shape}, expected ({count},)")
    terms = np.zeros(y.shape)
    first, second = np.triu_indices(count, 1)
    with np.errstate(invalid="ignore"):
        for row, target in np.ndindex(*y.shape):
            mu, sd = means[:, row, target].astype(np.float64), sds[:, row, target]
            near = w @ _absolute(y[row, target] - mu, sd)
            spread = np.sqrt(sd[first] ** 2 + sd[second] ** 2)
            pairs = (w[first] * w[second]) @ _absolute(mu[first] - mu[second], spread)
            own = (w**2) @ (math.sqrt(4 / math.pi) * sd)  # of a draw with itself, A(0, 2 sd^2)
            terms[row, target] = near - pairs - own / 2
    return mean_score(terms.mean(axis=1))


def _absolute(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return E|X| of a Gaussian X."""
    z = mean / sd
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return mean * _erf(z / math.sqrt(2)).astype(np.float64) + 2 * sd * density


def mae(y, predicted) -> Score:
    r"""Mean absolute error, :math:`\frac{1}{n T} \sum_{i, t} |y_{it} - m_{it}|`.

    Parameters
    ----------
    y, predicted : array (rows, targets)
        In the target's units; the median is what makes it smallest.

    Returns
    -------
    Score
        Smaller is better.

    Raises
    ------
    InputError
        Shapes that differ, or no rows.
    """
    y = _targets(y)
    return mean_score(np.abs(y - _of_shape("predicted", predicted, y.shape)).mean(axis=1))


def interval_score(y, low, high, level: float) -> Score:
    r"""Score of a central interval: its width, and a penalty for targets outside.

    .. math:: (u - l) + \frac{2}{\alpha} (l - y)_+ + \frac{2}{\alpha} (y - u)_+,
              \qquad \alpha = 1 - \ell

    Parameters
    ----------
    y, low, high : array (rows, targets)
    level : float
        Wanted probability of the interval, between 0 and 1.

    Returns
    -------
    Score
        In the target's units; smaller is better. Mean over rows and targets.

    Raises
    ------
    InputError
        Shapes that differ, no rows, or a level out of range.

    References
    ----------
    Gneiting and Raftery (2007), JASA 102, Eq. 43.
    """
    y, low, high = _interval(y, low, high)
    if not 0 < level < 1:
        raise InputError(f"level: found {level}, expected between 0 and 1 (0.9 for 90 %)")
    return mean_score(interval_terms(y, low, high, level))


def interval_terms(y: np.ndarray, low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
    """Return each row's part of the `interval_score`, (rows,), of arrays (rows, targets)."""
    outside = np.maximum(low - y, 0) + np.maximum(y - high, 0)
    return (high - low + 2 / (1 - level) * outside).mean(axis=1)


def interval_coverage(y, low, high) -> Score:
    r"""Share of targets inside intervals, :math:`\frac{1}{nT} \sum \mathbb 1 [l \le y \le u]`.

    Parameters
    ----------
    y, low, high : array (rows, targets)

    Returns
    -------
    Score
        Between 0 and 1; close to the intervals' level for calibrated ones.

    Raises
    ------
    InputError
        Shapes that differ, or no rows.
    """
    y, low, high = _interval(y, low, high)
    unknown = np.isnan(low) | np.isnan(high) | np.isnan(y)
    return mean_score(np.where(unknown, np.nan, (low <= y) & (y <= high)).mean(axis=1))


def interval_width(low, high) -> Score:
    r"""Mean width of intervals, :math:`\frac{1}{nT} \sum (u - l)`.

    Parameters
    ----------
    low, high : array (rows, targets)

    Returns
    -------
    Score
        In the target's units; smaller is better among intervals with the same coverage.

    Raises
    ------
    InputError
        Shapes that differ, or no rows.
    """
    _, low, high = _interval(low, low, high)
    return mean_score((high - low).mean(axis=1))


def _interval(y, low, high) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    y = _targets(y)
    return y, _of_shape("low", low, y.shape), _of_shape("high", high, y.shape)


class Uniformity(NamedTuple):
    """How far values are from uniform: the largest gap, and the chance of one as large."""

    distance: float
    p_value: float


def pit_uniformity(pit) -> Uniformity:
    r"""Kolmogorov-Smirnov distance of probability integral transforms from uniform.

    .. math:: D = \sup_u |\hat F(u) - u|, \qquad
              P(D > d) \approx 2 \sum_{k \ge 1} (-1)^{k-1} e^{-2 k^2 \lambda^2},
              \quad \lambda = \left(\sqrt n + 0.12 + 0.11 / \sqrt n \right) d

    Parameters
    ----------
    pit : array
        F(y) for each row (and target: rows of several targets are not independent, the p-value is
        then a guide). See `Prediction.pit`.

    Returns
    -------
    Uniformity
        The distance is about 0.87 / sqrt(n) for calibrated predictions; the p-value says what a
        standard error would.

    Raises
    ------
    InputError
        No values, or values outside [0, 1].

    References
    ----------
    Dawid (1984), JRSS A 147; Stephens (1970), JRSS B 32 (the p-value).
    """
    values = np.sort(np.asarray(pit, np.float64).ravel())
    n = len(values)
    if n == 0 or np.any((values < 0) | (values > 1)):
        raise InputError("pit: expected at least one value, all of them from 0 to 1")
    if np.isnan(values).any():
        return Uniformity(math.nan, math.nan)
    above = np.arange(1, n + 1) / n - values
    distance = float(max(above.max(), (values - np.arange(n) / n).max()))
    scaled = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    k = np.arange(1, 101)
    p = 2 * float(((-1.0) ** (k - 1) * np.exp(-2 * k**2 * scaled**2)).sum())
    return Uniformity(distance, min(1.0, max(0.0, p)) if scaled > 0.2 else 1.0)


def coverage(y, samples, level: float) -> float:
    r"""Share of targets inside the central interval of the samples.

    .. math:: \frac{1}{n T} \sum_{i, t} \mathbb 1 \left[ q_{it}(\tfrac{1 - \ell}{2}) \le y_{it}
              \le q_{it}(\tfrac{1 + \ell}{2}) \right]

    with the samples' quantiles q as `numpy.quantile` interpolates them. The interval of m samples
    is a little narrow: exchangeable targets fall inside with probability
    :math:`\ell (m - 1) / (m + 1)`.

    Parameters
    ----------
    y : array (rows, targets)
    samples : array (samples, rows, targets)
    level : float
        Wanted probability of the interval, between 0 and 1.

    Returns
    -------
    float
        Between 0 and 1; close to ``level`` for calibrated predictions.

    Raises
    ------
    InputError
        Shapes that do not fit, no rows, or a level out of range.

    References
    ----------
    Gneiting, Balabdaoui and Raftery (2007), JRSS B 69, section 3 (calibration of intervals).
    """
    if not 0 < level < 1:
        raise InputError(f"level: found {level}, expected between 0 and 1 (0.9 for 90 %)")
    return float(_coverages(y, samples, [level])[0].mean())


def _coverages(y, samples, levels: Sequence[float]) -> np.ndarray:
    """Return (levels, rows) terms of `coverage` at several levels, in one pass over the samples."""
    y = _targets(y)
    samples = _samples(samples, y.shape)
    tails = np.array([[(1 - level) / 2, (1 + level) / 2] for level in levels])
    inside = np.empty((len(levels), len(y)))
    with np.errstate(invalid="ignore"):
        for rows in _chunks(samples):
            values = np.moveaxis(samples[:, rows], 0, -1).astype(np.float64, order="C")
            low, high = np.moveaxis(np.quantile(values, tails, axis=-1, overwrite_input=True), 1, 0)
            unknown = np.isnan(low) | np.isnan(high) | np.isnan(y[rows])
            hit = np.where(unknown, np.nan, (low <= y[rows]) & (y[rows] <= high))
            inside[:, rows] = hit.mean(axis=2)
    return inside


def _covered_by_cdf(upto: np.ndarray, below: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Return (levels, rows): the share of a row's targets in the central interval.

    A quantile is the smallest y with F(y) >= p, so y is inside if F(y) >= (1 - level) / 2, and
    P(Y < y) < (1 + level) / 2.
    """
    tails = np.asarray(levels)[:, None, None]
    hit = (upto >= (1 - tails) / 2) & (below < (1 + tails) / 2)
    return np.where(np.isnan(upto + below), np.nan, hit).mean(axis=2)


def accuracy(y, probabilities) -> float:
    r"""Share of rows whose most probable class is the true one (the first one, if several tie).

    .. math:: \frac1n \sum_i \mathbb 1 [\arg\max_c p_{ic} = y_i]

    Parameters
    ----------
    y : integer array (rows,)
        Class indices.
    probabilities : array (rows, classes)

    Returns
    -------
    float
        Between 0 and 1; larger is better.

    Raises
    ------
    InputError
        Shapes that do not fit, no rows, class indices out of range, or rows that are no
        probabilities.
    """
    y, probabilities = _classes(y, probabilities)
    if np.isnan(probabilities).any():
        return float("nan")
    return float((probabilities.argmax(axis=1) == y).mean())


def brier(y, probabilities) -> float:
    r"""Brier score: squared error of the probabilities, summed over the classes.

    .. math:: \frac1n \sum_i \sum_c (p_{ic} - \mathbb 1[y_i = c])^2

    Brier's own definition, between 0 and 2 for any number of classes. For two classes it is
    :math:`\frac2n \sum_i (p_{i1} - y_i)^2`: twice what ``sklearn.metrics.brier_score_loss`` gives
    by default, and what it gives with ``scale_by_half=False``. For three classes and more the two
    agree.

    Parameters
    ----------
    y : integer array (rows,)
        Class indices.
    probabilities : array (rows, classes)

    Returns
    -------
    float
        Between 0 and 2; smaller is better.

    Raises
    ------
    InputError
        As in `accuracy`.

    References
    ----------
    Brier (1950), Monthly Weather Review 78, Eq. 2.
    """
    y, probabilities = _classes(y, probabilities)
    return float(brier_terms(y, probabilities).mean())


def brier_terms(y: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return each row's part of the `brier` score, (rows,)."""
    true = np.arange(probabilities.shape[1]) == y[:, None]
    return np.square(probabilities - true).sum(axis=1)


class BrierParts(NamedTuple):
    """The Brier score as ``reliability - resolution + uncertainty + within``, each with its error.

    Parameters
    ----------
    reliability : Score
        Squared distance of probabilities from observed shares; 0 if calibrated.
    resolution : Score
        How far observed shares differ from the overall ones; larger is better.
    uncertainty : Score
        Of the classes themselves: that of a forecast of the overall shares.
    within : Score
        What binning hides: variance less twice the covariance within bins.
    """

    reliability: Score
    resolution: Score
    uncertainty: Score
    within: Score


def brier_decomposition(y, probabilities, bins: int = BINS) -> BrierParts:
    r"""Decompose the Brier score by bins of the predicted probability, class by class.

    .. math:: \sum_c \frac1n \sum_k \left[ n_k (\bar p_k - \bar o_k)^2
              - n_k (\bar o_k - \bar o)^2
              + \sum_{i \in k} \left( (p_i - \bar p_k)^2
              - 2 (o_i - \bar o_k)(p_i - \bar p_k) \right) \right] + \bar o (1 - \bar o)

    The four parts add up to `brier` exactly.

    Parameters
    ----------
    y : integer array (rows,)
        Class indices.
    probabilities : array (rows, classes)
    bins : int
        Of equal width.

    Returns
    -------
    BrierParts
        Standard errors are from resampling the rows (200 times, a fixed seed).

    Raises
    ------
    InputError
        As in `accuracy`.

    References
    ----------
    Murphy (1973), J. Applied Meteorology 12; Stephenson et al. (2008), Weather and Forecasting 23
    (the part within bins).
    """
    y, probabilities = _classes(y, probabilities)

    def parts(rows: np.ndarray) -> np.ndarray:
        total = np.zeros(4)
        for c in range(probabilities.shape[1]):
            p, o = probabilities[rows, c], (y[rows] == c).astype(float)
            where = np.minimum((np.nan_to_num(p) * bins).astype(int), bins - 1)
            size = np.maximum(np.bincount(where, minlength=bins), 1)
            mean_p = (np.bincount(where, p, bins) / size)[where]
            mean_o = (np.bincount(where, o, bins) / size)[where]
            total += [
                ((mean_p - mean_o) ** 2).mean(),
                ((mean_o - o.mean()) ** 2).mean(),
                o.mean() * (1 - o.mean()),
                ((p - mean_p) ** 2 - 2 * (o - mean_o) * (p - mean_p)).mean(),
            ]
        return total

    values, errors = _resampled(parts, len(y))
    return BrierParts(*(Score(float(v), float(e)) for v, e in zip(values, errors, strict=True)))


def _resampled(statistic: Callable[[np.ndarray], np.ndarray], rows: int):
    """Return a statistic of all rows, and its standard deviation over resampled rows."""
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(0, rows, rows)) for _ in range(RESAMPLES)]
    error = np.std(found, axis=0, ddof=1) if rows > 1 else np.full(np.shape(found[0]), np.nan)
    return statistic(np.arange(rows)), error


def ece(y, probabilities) -> float:
    r"""Expected calibration error of the most probable class, in 15 bins of equal width.

    .. math:: \sum_b \frac{|B_b|}{n} \left| \mathrm{acc}(B_b) - \mathrm{conf}(B_b) \right|

    Bin b holds the rows with :math:`\max_c p_{ic} \in ((b-1)/15, b/15]`; acc is the share of them
    whose most probable class is true, conf their mean largest probability. Biased upwards for
    few rows: also a calibrated model does not reach zero.

    Parameters
    ----------
    y : integer array (rows,)
        Class indices.
    probabilities : array (rows, classes)

    Returns
    -------
    float
        Between 0 and 1; smaller is better.

    Raises
    ------
    InputError
        As in `accuracy`.

    References
    ----------
    Guo et al. (2017), 1706.04599, Eq. 3.
    """
    y, probabilities = _classes(y, probabilities)
    return _ece(y, probabilities)


def _ece(y: np.ndarray, probabilities: np.ndarray) -> float:
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == y
    edges = np.arange(1, BINS) / BINS
    gaps = np.bincount(np.digitize(confidence, edges, right=True), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(y))


def auroc(inside, outside) -> Score:
    r"""Area under the ROC curve of a score that should be larger for other rows.

    .. math:: P(u_\text{out} > u_\text{in}) + \tfrac12 P(u_\text{out} = u_\text{in})

    Such as of the epistemic uncertainty, for rows from elsewhere than the training data.

    Parameters
    ----------
    inside : array (rows,)
        The score (epistemic standard deviation, mutual information, ...) of rows like those of the
        training data.
    outside : array (rows,)
        Of rows that are not.

    Returns
    -------
    Score
        0.5: the score does not tell them apart; 1: it does, always. Its standard error is that of
        DeLong et al.

    Raises
    ------
    InputError
        No rows, or not one score per row.

    References
    ----------
    DeLong et al. (1988), Biometrics 44.
    """
    inside, outside = (np.asarray(part, np.float64) for part in (inside, outside))
    for name, part in (("inside", inside), ("outside", outside)):
        if part.ndim != 1 or len(part) == 0:
            raise InputError(f"{name}: found shape {part.shape}, expected (rows,), at least one")
    if np.isnan(inside).any() or np.isnan(outside).any():
        return Score(math.nan, math.nan)

    def placed(values: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Return for each value the share of the others below it, ties half."""
        ordered = np.sort(among)
        low = np.searchsorted(ordered, values, side="left")
        return (low + np.searchsorted(ordered, values, side="right")) / (2 * len(among))

    out, within = placed(outside, inside), 1 - placed(inside, outside)
    few = min(len(out), len(within)) < 2
    variance = math.nan if few else out.var(ddof=1) / len(out) + within.var(ddof=1) / len(within)
    return Score(float(out.mean()), math.sqrt(variance))


def regression_scores(
    y, mean, variance, samples, log_density, upto=None, below=None
) -> dict[str, float]:
    """Return all scores of a pooled regression.

    Parameters
    ----------
    y, mean, variance : array (rows, targets)
        Targets, and mean and variance of the pooled predictive.
    samples : array (samples, rows, targets)
        From the pooled predictive.
    log_density : array (rows,)
        Pooled log predictive density of each row.
    upto, below : array (rows, targets), optional
        The pooled P(Y <= y) and P(Y < y): coverage is then that of the exact intervals, else of
        the samples' quantiles.

    Returns
    -------
    dict
        "lppd", "nll_gaussian", "rmse", "crps", and "coverage_50" ... "coverage_95" (see `LEVELS`).

    Raises
    ------
    InputError
        As in the single scores.
    """
    terms = _regression_terms(y, mean, variance, samples, log_density, upto, below)
    with np.errstate(invalid="ignore", over="ignore"):
        means = {name: float(each.mean()) for name, each in terms.items()}
    return {**means, "rmse": math.sqrt(means["rmse"])}


def regression_errors(
    y, mean, variance, samples, log_density, upto=None, below=None
) -> dict[str, float]:
    r"""Return the standard errors of `regression_scores`, with the same names and arguments.

    That of the RMSE is that of the mean square over twice the RMSE (delta method).
    """
    terms = _regression_terms(y, mean, variance, samples, log_density, upto, below)
    errors = {name: mean_score(each).error for name, each in terms.items()}
    root = float(np.sqrt(terms["rmse"].mean()))
    return {**errors, "rmse": errors["rmse"] / (2 * root) if root else 0.0}


def _regression_terms(y, mean, variance, samples, log_density, upto, below):
    """Return the terms (rows,) of all scores: squares for the RMSE."""
    y = _targets(y)
    samples = _samples(samples, y.shape)
    levels = [level / 100 for level in LEVELS]
    if upto is None:
        covered = _coverages(y, samples, levels)
    else:
        upto = _of_shape("upto", upto, y.shape)
        covered = _covered_by_cdf(upto, _of_shape("below", below, y.shape), levels)
    nll_gaussian(y, mean, variance)  # checks the variance
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        squares = np.square(y - mean).mean(axis=1)
    return {
        "lppd": _of_shape("log_density", log_density, y.shape[:1]),
        "nll_gaussian": _nll_terms(y, mean, variance),
        "rmse": squares,
        "crps": _crps_terms(y, samples),
        **{f"coverage_{level}": share for level, share in zip(LEVELS, covered, strict=True)},
    }


def classification_errors(y, probabilities, log_density) -> dict[str, float]:
    """Return the standard errors of `classification_scores`, with the same names and arguments.

    That of the ECE is from resampling the rows (200 times, a fixed seed).
    """
    y, probabilities = _classes(y, probabilities)
    right = np.where(np.isnan(probabilities).any(), np.nan, probabilities.argmax(axis=1) == y)
    calibration = _resampled(lambda rows: np.array(_ece(y[rows], probabilities[rows])), len(y))
    return {
        "lppd": mean_score(_of_shape("log_density", log_density, y.shape)).error,
        "accuracy": mean_score(right).error,
        "brier": mean_score(brier_terms(y, probabilities)).error,
        "ece": float(calibration[1]),
    }


def classification_scores(y, probabilities, log_density) -> dict[str, float]:
    """Return all scores of a pooled classification.

    Parameters
    ----------
    y : integer array (rows,)
        Class indices.
    probabilities : array (rows, classes)
        Pooled class probabilities.
    log_density : array (rows,)
        Pooled log predictive probability of each row's class.

    Returns
    -------
    dict
        "lppd", "accuracy", "brier", "ece".

    Raises
    ------
    InputError
        As in the single scores.
    """
    y, probabilities = _classes(y, probabilities)
    return {
        "lppd": lppd(_of_shape("log_density", log_density, y.shape)),
        "accuracy": accuracy(y, probabilities),
        "brier": brier(y, probabilities),
        "ece": ece(y, probabilities),
    }


def _targets(y) -> np.ndarray:
    y = np.asarray(y, np.float64)
    if y.ndim != 2 or y.size == 0:
        raise InputError(
            f"y: found shape {y.shape}, expected (rows, targets) with at least one of each; for "
            "one target use y[:, None]"
        )
    return y


def _of_shape(name: str, value, shape: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.shape != shape:
        raise InputError(f"{name}: found shape {value.shape}, expected {shape} to fit y")
    return value


def _samples(samples, shape: tuple[int, ...]) -> np.ndarray:
    # Not converted: a float64 copy of all samples may be too large.
    samples = np.asarray(samples)
    if samples.ndim != 3 or samples.shape[1:] != shape or len(samples) == 0:
        raise InputError(
            f"samples: found shape {samples.shape}, expected (samples, {shape[0]}, {shape[1]}) to "
            "fit y, with at least one sample"
        )
    return samples


def _chunks(samples: np.ndarray) -> Iterator[slice]:
    count, rows, targets = samples.shape
    size = max(1, CHUNK_BYTES // (8 * count * targets))
    for low in range(0, rows, size):
        yield slice(low, low + size)


def _classes(y, probabilities) -> tuple[np.ndarray, np.ndarray]:
    y, probabilities = np.asarray(y), np.asarray(probabilities, np.float64)
    if y.ndim != 1 or y.size == 0 or y.dtype.kind not in "iu":
        raise InputError(
            f"y: found {y.dtype} of shape {y.shape}, expected integer class indices (rows,) with "
            "at least one row"
        )
    if probabilities.ndim != 2 or len(probabilities) != len(y) or probabilities.shape[1] < 2:
        raise InputError(
            f"probabilities: found shape {probabilities.shape}, expected ({len(y)}, classes) to "
            "fit y, with at least 2 classes"
        )
    classes = probabilities.shape[1]
    if y.min() < 0 or y.max() >= classes:
        row = int(np.flatnonzero((y < 0) | (y >= classes))[0])
        raise InputError(
            f"y: found class {y[row]} in row {row}, expected 0 to {classes - 1}: probabilities "
            f"has {classes} columns"
        )
    sums = probabilities.sum(axis=1)
    wrong = (probabilities < 0).any(axis=1) | (np.abs(sums - 1) > SUM_TOLERANCE)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"probabilities: found {probabilities[row]} in row {row}, expected numbers from 0 to 1 "
            "that add up to 1; turn logits into probabilities first"
        )
    return y, probabilities
