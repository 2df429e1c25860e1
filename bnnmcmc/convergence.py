"""R-hat and effective sample sizes of many sequences at once. NumPy and SciPy only.

The same numbers as ArviZ's (a test holds them together), which works through one quantity after
the other: at a millisecond each, ten thousand chains would take many minutes. Arrays are
``(..., sequence, draw)``; the statistics of one quantity are over its last two axes.

References
----------
Vehtari, Gelman, Simpson, Carpenter, Bürkner (2021), 1903.08008; Geyer (1992), Statistical Science
7 (the initial monotone sequence); Margossian et al. (2024), 2110.13017 (nested R-hat).
"""

from collections.abc import Iterable
from typing import NamedTuple

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


def nested_rhat(values: np.ndarray, superchains: np.ndarray) -> np.ndarray:
    r"""Return the rank-normalised nested R-hat (...), the larger of location and scale.

    For chains in groups that started at the same place (superchains),

    .. math:: \hat R_\nu = \sqrt{1 + B_\nu / W_\nu}

    with B the variance of the superchains' means, and W the mean over superchains of the variance
    between their chains plus the mean variance within these. Many short chains make it small where
    the plain R-hat needs long ones.

    Parameters
    ----------
    values : array (..., chain, draw)
        Finite, not all equal; at least 4 draws.
    superchains : int array (chain,)
        Which superchain each chain is of; as many chains in each.
    """
    halves = split_in_halves(np.asarray(values, np.float64))
    twice = np.tile(superchains, 2)
    centre = np.median(halves, axis=(-2, -1), keepdims=True)
    folded = np.abs(halves - centre)
    found = [
        _nested(z.mean(axis=-1), z.var(axis=-1, ddof=1), twice)
        for z in (normal_scores(halves), normal_scores(folded))
    ]
    return np.maximum(*found)


def _nested(means: np.ndarray, variances: np.ndarray, superchains: np.ndarray) -> np.ndarray:
    """Return the nested R-hat (...) from means and variances of chains (..., chain)."""
    members = [np.flatnonzero(superchains == k) for k in np.unique(superchains)]
    means_of = [means[..., m] for m in members]
    between = np.stack([m.mean(axis=-1) for m in means_of], axis=-1).var(axis=-1, ddof=1)
    within = np.mean(
        [
            variances[..., m].mean(axis=-1) + (values.var(axis=-1, ddof=1) if len(m) > 1 else 0.0)
            for m, values in zip(members, means_of, strict=True)
        ],
        axis=0,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(1 + between / within)


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


# ------------------------------------------------------------- moments, a block at a time


class Moments(NamedTuple):
    """Means and variances of parts of chains: what streams of any length leave behind.

    Parameters
    ----------
    length : int
        Draws in a part.
    means : numpy array (chain, part, n)
    variances : numpy array (chain, part, n)
        With ``length - 1`` in the denominator.
    """

    length: int
    means: np.ndarray
    variances: np.ndarray


def stream_moments(blocks: Iterable[np.ndarray], draws: int, parts: int = 4) -> Moments:
    """Take the moments of chains that come in blocks; memory does not depend on their length.

    Parameters
    ----------
    blocks : iterable of arrays (chain, count, n)
        In order, ``draws`` in all. Cut them into blocks of a few draws for little memory.
    draws : int
        Per chain.
    parts : int
        Equal parts of each chain; what is left over is dropped at the start. 2 for a split R-hat,
        4 for one within each chain, 20 or so for `batch_ess`.

    Returns
    -------
    Moments
        In float64, by Chan's update, so that large means cancel nothing. NaN where a draw is not
        finite.

    Raises
    ------
    ValueError
        Another number of draws than said, or fewer than two in a part.
    """
    length = draws // parts
    if length < 2:
        raise ValueError(f"{draws} draws do not make {parts} parts of two or more")
    first, seen = draws - parts * length, 0
    means = squares = None
    for block in blocks:
        if means is None or squares is None:
            shape = (len(block), parts, block.shape[2])
            means, squares = np.zeros(shape), np.zeros(shape)
        here = np.arange(seen, seen + block.shape[1]) - first
        seen += block.shape[1]
        for part in np.unique(here[here >= 0] // length):
            if part >= parts:
                break  # more draws than said, which is said below
            chosen = here // length == part
            before = max(0, int(here[chosen][0]) - part * length)
            some = block[:, chosen & (here >= 0)].astype(np.float64)
            count = some.shape[1]
            with np.errstate(invalid="ignore", over="ignore"):
                mean = some.mean(axis=1)
                some -= mean[:, None]
                delta = mean - means[:, part]
                squares[:, part] += np.einsum("cdn,cdn->cn", some, some)
                squares[:, part] += np.square(delta) * before * count / (before + count)
                means[:, part] += delta * count / (before + count)
    if seen != draws or means is None or squares is None:
        raise ValueError(f"found {seen} draws, expected {draws}")
    return Moments(length, means, squares / (length - 1))


def moments_rhat(moments: Moments, superchains: np.ndarray | None = None) -> np.ndarray:
    """Return the split R-hat (n,) across chains, not rank-normalised; nested with superchains."""
    means, variances = (
        np.moveaxis(part.reshape(-1, part.shape[-1]), 0, -1)
        for part in (moments.means, moments.variances)
    )
    if superchains is not None:
        parts = moments.means.shape[1]
        return _nested(means, variances, np.repeat(superchains, parts))
    return _rhat_of_moments(means, variances, moments.length)


def chainwise_moments_rhat(moments: Moments) -> np.ndarray:
    """Return R-hat (chain, n) over the parts of each chain, not rank-normalised."""
    means, variances = (np.moveaxis(part, 1, -1) for part in (moments.means, moments.variances))
    return _rhat_of_moments(means, variances, moments.length)


def _rhat_of_moments(means: np.ndarray, variances: np.ndarray, length: int) -> np.ndarray:
    between, within = length * means.var(axis=-1, ddof=1), variances.mean(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt((between / within + length - 1) / length)


def batch_ess(moments: Moments) -> np.ndarray:
    r"""Return the ESS (chain, n) of each chain's mean by batch means.

    .. math:: n_\text{eff} = \frac{N \, \operatorname{Var}(x)}{b \, \operatorname{Var}(\bar x_k)}

    with parts of b draws as batches; at most the number of draws. Right if a part is much longer
    than the correlation, and known to about :math:`\sqrt{2 / (\text{parts} - 1)}`.

    References
    ----------
    Flegal and Jones (2010), Annals of Statistics 38.
    """
    parts, b = moments.means.shape[1], moments.length
    between = moments.means.var(axis=1, ddof=1)
    total = parts * b
    # All draws' variance, from that within and between the parts.
    whole = (moments.variances.sum(axis=1) * (b - 1) + between * (parts - 1) * b) / (total - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.minimum(total * whole / (b * between), float(total))
