"""R-hat and effective sample sizes of many sequences at once. NumPy and SciPy only.

The same numbers as ArviZ's (a test holds them together), which works through one quantity after
the other: at a millisecond each, ten thousand chains would take many minutes. Arrays are
``(..., sequence, draw)``; the statistics of one quantity are over its last two axes.

References
----------
Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), 1903.08008; Geyer (1992), Statistical Science
7 (the initial monotone sequence).
"""

import numpy as np


def split_in_halves(values: np.ndarray) -> np.ndarray:
    """Return (..., 2 k, draw // 2): the first and the last halves of k sequences."""
    half = values.shape[-1] // 2
    return np.concatenate([values[..., :half], values[..., values.shape[-1] - half :]], axis=-2)


def normal_scores(values: np.ndarray) -> np.ndarray:
    r"""Replace values by normal quantiles of their ranks over the last two axes.

    .. math:: z = \Phi^{-1}\big((r - 3/8) / (n + 1/4)\big)

    with average ranks r for values that are equal.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    flat = values.reshape(*values.shape[:-2], -1)
    ranks = rankdata(flat, axis=-1)
    return ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25)).reshape(values.shape)


def rank_rhat(values: np.ndarray) -> np.ndarray:
    """Return the rank-normalised split R-hat (...), the larger of location and scale.

    Parameters
    ----------
    values : array (..., sequence, draw)
        Finite, not all equal; at least 4 draws.
    """
    halves = split_in_halves(np.asarray(values, np.float64))
    centre = np.median(halves, axis=(-2, -1), keepdims=True)
    return np.maximum(_rhat(normal_scores(halves)), _rhat(normal_scores(np.abs(halves - centre))))


def _rhat(values: np.ndarray) -> np.ndarray:
    draws = values.shape[-1]
    between = draws * values.mean(axis=-1).var(axis=-1, ddof=1)
    within = values.var(axis=-1, ddof=1).mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((between / within + draws - 1) / draws)


def bulk_ess(values: np.ndarray) -> np.ndarray:
    """Return the rank-normalised bulk ESS (...).

    Parameters
    ----------
    values : array (..., sequence, draw)
        Finite, not all equal; at least 8 draws.
    """
    return mean_ess(normal_scores(split_in_halves(np.asarray(values, np.float64))))


def tail_ess(values: np.ndarray, tails: tuple[float, float]) -> np.ndarray:
    """Return the smaller ESS (...) of two quantiles.

    Parameters
    ----------
    values : array (..., sequence, draw)
        Finite, not all equal; at least 8 draws.
    tails : tuple of float
        The quantiles' probabilities.
    """
    values = np.asarray(values, np.float64)
    limits = np.quantile(values, tails, axis=(-2, -1), keepdims=True)
    found = [mean_ess(split_in_halves(values <= limit).astype(np.float64)) for limit in limits]
    return np.minimum(*found)


def mean_ess(values: np.ndarray) -> np.ndarray:
    r"""Return the ESS (...) of the mean of sequences, as they are.

    .. math:: n_\text{eff} = \frac{m n}{\hat\tau}, \quad
              \hat\tau = -1 + 2 \sum_{k < K} P_k + \hat\rho_{2K}

    for m sequences of n draws, with pairs :math:`P_k = \hat\rho_{2k} + \hat\rho_{2k+1}` of
    autocorrelations, made to fall monotonely, up to the first pair that is not positive, K.

    Parameters
    ----------
    values : array (..., sequence, draw)
        At least 4 draws. Where all are equal, each draw counts.
    """
    sequences, draws = values.shape[-2:]
    total = sequences * draws
    covariance = _autocovariance(values).mean(axis=-2)
    within = covariance[..., :1] * draws / (draws - 1)
    pooled = covariance[..., :1].copy()
    if sequences > 1:
        pooled += values.mean(axis=-1).var(axis=-1, ddof=1)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rho = 1 - (within - covariance) / pooled
    rho[..., 0] = 1.0
    last = max(0, (draws - 3) // 2)
    even, odd = rho[..., 0 : 2 * last + 1 : 2], rho[..., 1 : 2 * last + 2 : 2]
    pairs = even + odd
    stops = pairs <= 0
    end = np.where(stops.any(axis=-1), stops.argmax(axis=-1), last)[..., None]
    falling = np.minimum.accumulate(pairs, axis=-1)
    summed = np.where(np.arange(last + 1) < end, falling, 0.0).sum(axis=-1)
    final_even = np.take_along_axis(even, end, axis=-1)[..., 0]
    final_pair = np.take_along_axis(pairs, end, axis=-1)[..., 0]
    # Of a pair that is not positive only a positive first half counts.
    final = np.where(final_pair >= 0, final_even, np.maximum(final_even, 0.0))
    tau = np.maximum(-1 + 2 * summed + final, 1 / np.log10(total))
    spread = values.max(axis=(-2, -1)) - values.min(axis=(-2, -1))
    return np.where(spread < np.finfo(float).resolution, float(total), total / tau)


def _autocovariance(values: np.ndarray) -> np.ndarray:
    """Return the biased autocovariance of every sequence, (..., sequence, lag)."""
    from scipy.fft import irfft, next_fast_len, rfft

    draws = values.shape[-1]
    length = next_fast_len(2 * draws, real=True)
    spectrum = rfft(values - values.mean(axis=-1, keepdims=True), n=length, axis=-1)
    power = spectrum.real**2 + spectrum.imag**2
    return irfft(power, n=length, axis=-1)[..., :draws] / draws
