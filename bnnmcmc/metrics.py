"""Scores of predictions. NumPy only, all sums in float64.

A NaN in an input makes every score that uses this input NaN, also those that compare or count,
where it would pass unseen. Nothing is left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from bnnmcmc.errors import InputError

# Central intervals in the reports, in percent.
LEVELS = (50, 80, 90, 95)
BINS = 15
# Predictive samples are taken in chunks of rows; a chunk in float64 has at most this size.
CHUNK_BYTES = 32 * 2**20
# Rows of float32 softmax outputs add up to one far better than this; logits do not.
SUM_TOLERANCE = 1e-3


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
    with np.errstate(invalid="ignore", over="ignore"):
        terms = np.log(2 * np.pi * variance) + np.square(y - mean) / variance
        return float(0.5 * terms.sum(axis=1).mean())


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
    m = len(samples)
    if m < 2:
        raise InputError(f"samples: found {m} per row, expected at least 2 for the CRPS")
    weights = (2 * np.arange(1, m + 1) - m - 1) / (m * (m - 1))
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for rows in _chunks(samples):
            # Relative to y: the score is invariant, and large offsets then cost no digits. Samples
            # last: sorting along a contiguous axis is faster.
            error = np.moveaxis(samples[:, rows] - y[rows], 0, -1).copy()
            error.sort(axis=-1)
            total += float(np.abs(error).mean(axis=-1).sum() - (error @ weights).sum())
    return total / y.size


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
    return _coverages(y, samples, [level])[0]


def _coverages(y, samples, levels: Sequence[float]) -> list[float]:
    """Return `coverage` at several levels in one pass over the samples."""
    y = _targets(y)
    samples = _samples(samples, y.shape)
    tails = np.array([[(1 - level) / 2, (1 + level) / 2] for level in levels])
    inside = np.zeros(len(levels))
    with np.errstate(invalid="ignore"):
        for rows in _chunks(samples):
            values = np.moveaxis(samples[:, rows], 0, -1).astype(np.float64, order="C")
            low, high = np.moveaxis(np.quantile(values, tails, axis=-1, overwrite_input=True), 1, 0)
            unknown = np.isnan(low) | np.isnan(high) | np.isnan(y[rows])
            hit = np.where(unknown, np.nan, (low <= y[rows]) & (y[rows] <= high))
            inside += hit.sum(axis=(1, 2))
    return [float(share) for share in inside / y.size]


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
    true = np.arange(probabilities.shape[1]) == y[:, None]
    return float(np.square(probabilities - true).sum(axis=1).mean())


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
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == y
    edges = np.arange(1, BINS) / BINS
    gaps = np.bincount(np.digitize(confidence, edges, right=True), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(y))


def regression_scores(y, mean, variance, samples, log_density) -> dict[str, float]:
    """Return all scores of a pooled regression.

    Parameters
    ----------
    y, mean, variance : array (rows, targets)
        Targets, and mean and variance of the pooled predictive.
    samples : array (samples, rows, targets)
        From the pooled predictive.
    log_density : array (rows,)
        Pooled log predictive density of each row.

    Returns
    -------
    dict
        "lppd", "nll_gaussian", "rmse", "crps", and "coverage_50" ... "coverage_95" (see `LEVELS`).

    Raises
    ------
    InputError
        As in the single scores.
    """
    y = _targets(y)
    covered = _coverages(y, samples, [level / 100 for level in LEVELS])
    return {
        "lppd": lppd(_of_shape("log_density", log_density, y.shape[:1])),
        "nll_gaussian": nll_gaussian(y, mean, variance),
        "rmse": rmse(y, mean),
        "crps": crps_samples(y, samples),
        **{f"coverage_{level}": share for level, share in zip(LEVELS, covered, strict=True)},
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
