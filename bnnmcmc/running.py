"""The score of the pool as it grows: whether more draws would help more, or more chains."""

from typing import NamedTuple

import numpy as np

# The curve over chains is a mean over so many random choices of them.
SUBSETS = 20


class RunningScores(NamedTuple):
    """LPPD of the pool against its size.

    Parameters
    ----------
    draws, by_draws : numpy arrays (k,)
        Number of draws per chain, the first so many of each; LPPD of all chains with these.
    chains, by_chains : numpy arrays (j,)
        Number of chains; LPPD of so many with all their draws, mean over choices of chains.
    gain_draws, gain_chains : float
        What the last doubling of draws, and of chains, added to the LPPD; NaN if there is one draw
        or one chain only.
    """

    draws: np.ndarray
    by_draws: np.ndarray
    chains: np.ndarray
    by_chains: np.ndarray
    gain_draws: float
    gain_chains: float


def running_lppd(log_density: np.ndarray, seed: int = 0) -> RunningScores:
    r"""Score growing parts of a pool of draws.

    .. math:: \text{LPPD}(S) = \frac{1}{n} \sum_i \log \frac{1}{|S|} \sum_{s \in S} p(y_i | s)

    Parameters
    ----------
    log_density : array (chain, draw, row)
        ``log p(y | draw)`` of held-out rows. A NaN makes the scores it enters NaN.
    seed : int
        Of the choices of chains.

    Returns
    -------
    RunningScores
    """
    values = np.asarray(log_density, np.float64)
    chains, draws, _ = values.shape
    with np.errstate(invalid="ignore"):
        # Means over draws, in logarithms, cut off at each size.
        sums = np.logaddexp.accumulate(values, axis=1)
        sizes_d, sizes_c = _doublings(draws), _doublings(chains)
        by_draws = [
            (np.logaddexp.reduce(sums[:, d - 1], axis=0) - np.log(chains * d)).mean()
            for d in sizes_d
        ]
        whole = sums[:, -1] - np.log(draws)
        rng = np.random.default_rng(seed)
        by_chains = [_mean_over_subsets(whole, c, rng) for c in sizes_c]
    return RunningScores(
        sizes_d, np.array(by_draws), sizes_c, np.array(by_chains), _last(by_draws), _last(by_chains)
    )


def _doublings(most: int) -> np.ndarray:
    """Return ..., most / 4, most / 2, most, rounded up, from 1."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return np.array(sizes[::-1])


def _mean_over_subsets(whole: np.ndarray, count: int, rng: np.random.Generator) -> float:
    chains = len(whole)
    if count == chains:
        return float((np.logaddexp.reduce(whole, axis=0) - np.log(count)).mean())
    if count == 1:
        return float(whole.mean())
    chosen = (rng.permutation(chains)[:count] for _ in range(SUBSETS))
    return float(
        np.mean([(np.logaddexp.reduce(whole[c], axis=0) - np.log(count)).mean() for c in chosen])
    )


def _last(scores: list) -> float:
    return float(scores[-1] - scores[-2]) if len(scores) > 1 else float("nan")
