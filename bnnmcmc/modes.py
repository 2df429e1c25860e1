r"""How many chains are enough: the seed paper's bound, and what the chains of a run say themselves.

Chains are put into functional modes by what they predict, whatever their weights. How often each
mode was hit then says how much of the posterior no chain has been in yet, as species in a sample
say how many are missing from it.

NumPy and SciPy only. A mode's probability here is that of a chain's start to lead into it, which is
its posterior mass only for chains that mix.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bnnmcmc.errors import InputError

# Up to so many modes the bound is the sum over all subsets, which are then 65 536.
MAX_SUBSETS = 16
# Chains are in one mode if their predictions differ, beyond what their own draws leave open, by
# less than this many standard deviations within a chain: R-hat of two such chains is 1.1.
LIMIT = math.sqrt(2 * (1.1**2 - 1))
# The sample is enough when so little of the posterior is left unseen.
UNSEEN_GOAL = 0.05


# ------------------------------------------------------------------------------- the bound


def expected_chains(probabilities: Sequence[float] | np.ndarray) -> float:
    r"""Return how many chains it takes on average until each mode has been hit.

    The coupon collector's expectation with unequal probabilities,

    .. math:: E[G] = \sum_{q=0}^{\nu-1} (-1)^{\nu-1-q} \sum_{|J|=q} \frac{1}{1 - \Pi_J}
              = \int_0^\infty \Big(1 - \prod_{i=1}^{\nu} (1 - e^{-\pi_i t})\Big) dt

    with :math:`\Pi_J` the probability of the modes in J. The sum up to 16 modes; its terms cancel,
    so beyond that the integral, by quadrature.

    Parameters
    ----------
    probabilities : sequence of float
        Of the modes, all positive, summing to one.

    Returns
    -------
    float

    Raises
    ------
    InputError
        No modes, a probability that is not positive, or a sum other than one.

    References
    ----------
    Wiese et al. (2023), 2304.02902, eq. 5; Flajolet, Gardy and Thimonier (1992), Discrete Applied
    Mathematics 39 (the integral).

    Examples
    --------
    >>> round(expected_chains([0.56651, 0.35050, 0.08299]), 3)
    12.731
    """
    p = _probabilities(probabilities)
    if len(p) > MAX_SUBSETS:
        return _integral(p)
    sums, signs = np.zeros(1), np.full(1, (-1.0) ** (len(p) - 1))
    for value in p:
        sums, signs = np.concatenate([sums, sums + value]), np.concatenate([signs, -signs])
    # The last subset is all modes, which the sum leaves out.
    return math.fsum(signs[:-1] / (1 - sums[:-1]))


def _integral(p: np.ndarray) -> float:
    """Integrate over u = log t, where the integrand is smooth whatever the probabilities."""
    low, high = math.log(1e-12 / p.max()), math.log(60.0 / p.min())
    nodes = 20_000
    u = np.linspace(low, high, nodes)
    total = np.zeros(nodes)
    # Equal probabilities are counted once.
    for value, count in zip(*np.unique(p, return_counts=True), strict=True):
        total += count * np.log(-np.expm1(-value * np.exp(u)))
    rate = -np.expm1(total) * np.exp(u)
    return float(np.exp(low) + np.trapezoid(rate, u))


def _probabilities(probabilities: Any) -> np.ndarray:
    p = np.asarray(probabilities, float)
    if p.ndim != 1 or len(p) == 0 or not (p > 0).all() or abs(p.sum() - 1) > 1e-6:
        raise InputError(
            f"probabilities: found {np.array2string(p, threshold=8)}, expected positive numbers "
            "that sum to 1, one for each mode"
        )
    return p / p.sum()


def chains_needed(probabilities: Sequence[float] | np.ndarray, confidence: float = 0.95) -> int:
    r"""Return how many chains hit every mode with at least this confidence.

    By Markov's inequality, :math:`P(G < \rho) \ge 1 - E[G] / \rho`. For few modes that is far more
    than it takes; see `chains_for` for the exact number.

    Parameters
    ----------
    probabilities : sequence of float
        Of the modes.
    confidence : float
        In (0, 1).

    Returns
    -------
    int

    Raises
    ------
    InputError
        As `expected_chains`, or a confidence that is not between 0 and 1.

    References
    ----------
    Wiese et al. (2023), 2304.02902, eq. 5.

    Examples
    --------
    >>> chains_needed([0.56651, 0.35050, 0.08299], 0.99)
    1274
    """
    _check_confidence(confidence)
    # 1 - 0.99 is not 0.01: without the rounding, a whole number could be one too large.
    return math.ceil(round(expected_chains(probabilities) / round(1 - confidence, 12), 6))


def chains_for(probabilities: Sequence[float] | np.ndarray, confidence: float = 0.95) -> int:
    r"""Return the least number of chains that hit every mode with at least this confidence.

    .. math:: P(G \le n) \ge 1 - \sum_i (1 - \pi_i)^n

    by the union bound, which is nearly exact where it matters; `chains_needed` is the bound of the
    paper.

    Raises
    ------
    InputError
        As `chains_needed`.
    """
    _check_confidence(confidence)
    p = _probabilities(probabilities)
    if len(p) == 1:
        return 1

    def missed(n: int) -> float:
        return float(np.exp(n * np.log1p(-p)).sum())

    low, high = 0, 1
    while missed(high) > 1 - confidence:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if missed(middle) <= 1 - confidence else (middle, high)
    return high


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence: found {confidence}, expected between 0 and 1, such as 0.95")


# ----------------------------------------------------------------------------- the modes


class Modes(NamedTuple):
    """The functional modes that chains were found in.

    Parameters
    ----------
    labels : numpy int array (chain,)
        The mode of each chain; 0 is the one with most chains.
    counts : numpy int array (mode,)
        Chains in each, falling.
    distances : numpy array (chain, chain)
        Between chains (see `function_distances`).
    order : numpy int array (chain,)
        Chains by mode, and within it by the tree of the clustering.
    limit : float
        Chains of one mode differ by less than this on average.
    """

    labels: np.ndarray
    counts: np.ndarray
    distances: np.ndarray
    order: np.ndarray
    limit: float


def function_distances(
    means: np.ndarray, variances: np.ndarray, errors: np.ndarray, noise: np.ndarray | None = None
) -> np.ndarray:
    r"""Return how far the predictions of chains are from each other.

    .. math:: d_{ab}^2 = \frac{1}{m} \sum_j
              \frac{\big[(\mu_{aj} - \mu_{bj})^2 - e_{aj} - e_{bj}\big]}
                   {\tfrac12 (v_{aj} + v_{bj}) + \tau_j}

    with mean :math:`\mu` and variance v over the draws of a chain of prediction j, and e the
    squared Monte Carlo error of the mean: a difference of d standard deviations of the function
    within a mode, with what the draws leave open taken off. Negative sums count as 0.

    Parameters
    ----------
    means, variances, errors : arrays (chain, m)
        Of predictions at held-out inputs, over each chain's draws; errors are of the means,
        squared.
    noise : array (m,), optional
        :math:`\tau`: differences far below this variance do not matter.

    Returns
    -------
    numpy array (chain, chain)
    """
    means = np.asarray(means, np.float64)
    chains, m = means.shape
    floor = np.zeros(m) if noise is None else np.asarray(noise, np.float64)
    result = np.zeros((chains, chains))
    for a in range(chains - 1):
        rest = slice(a + 1, None)
        squares = np.square(means[a] - means[rest]) - errors[a] - errors[rest]
        scale = 0.5 * (variances[a] + variances[rest]) + floor
        with np.errstate(divide="ignore", invalid="ignore"):
            still = np.where(squares > 0, np.inf, 0.0)
            ratio = np.where(scale == 0, still, squares / scale)
        result[a, rest] = np.sqrt(np.maximum(ratio.mean(axis=1), 0.0))
    return result + result.T


def find_modes(distances: np.ndarray, limit: float = LIMIT) -> Modes:
    """Put chains into modes: average linkage, cut where groups are more than a limit apart.

    The rule that fixes the number of modes is the limit: two groups of chains are one mode if the
    predictions of their chains differ on average by less than ``limit`` standard deviations of
    the function within a chain.

    Parameters
    ----------
    distances : array (chain, chain)
        As from `function_distances`; a chain whose distances are not finite is a mode of its own.
    limit : float

    Returns
    -------
    Modes
    """
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    distances = np.asarray(distances, np.float64)
    chains = len(distances)
    if chains == 1:
        one = np.zeros(1, int)
        return Modes(one, np.ones(1, int), distances, one, limit)
    finite = distances[np.isfinite(distances)]
    far = 1e3 * max(limit, float(finite.max(initial=0.0)))
    usable = np.where(np.isfinite(distances), distances, far)
    np.fill_diagonal(usable, 0.0)
    tree = linkage(squareform(usable, checks=False), method="average")
    found = fcluster(tree, limit, criterion="distance")
    names, counts = np.unique(found, return_counts=True)
    by_size = np.argsort(-counts, kind="stable")
    labels = np.argsort(by_size)[np.searchsorted(names, found)]
    leaves = leaves_list(tree)
    order = leaves[np.argsort(labels[leaves], kind="stable")]
    return Modes(labels, counts[by_size], distances, order, limit)


# ------------------------------------------------------------------------ what is unseen


class Unseen(NamedTuple):
    """What the chains did not see, from how often they hit each mode.

    Parameters
    ----------
    chains, modes, once, twice : int
        How many chains, modes seen, and modes seen by one and by two chains.
    share : float
        Good-Turing: the probability that another chain is in a mode not seen yet.
    low, high : float
        A 95 % interval of that share.
    total : float
        Chao1: a lower bound of the number of modes, seen and unseen.
    total_low, total_high : float
        A 95 % interval of that.
    more_chains : int
        So many chains in all would leave a share of 5 % unseen if as many modes as now were then
        seen once; the number at hand if it does already. Fewer do if there are few modes more.
    """

    chains: int
    modes: int
    once: int
    twice: int
    share: float
    low: float
    high: float
    total: float
    total_low: float
    total_high: float
    more_chains: int


def unseen(counts: Sequence[int] | np.ndarray) -> Unseen:
    r"""Estimate what was not seen, from how many chains were in each mode.

    With f1 modes seen once and f2 seen twice, among n chains,

    .. math:: \hat u = \frac{f_1}{n}, \qquad
              \hat S = S + \frac{n - 1}{n} \frac{f_1 (f_1 - 1)}{2 (f_2 + 1)}

    The share's interval is the wider, at each end, of Esty's normal one and of Clopper and
    Pearson's for f1 in n, which is right where nothing was seen once; the interval of the number is
    log-normal about the unseen ones (Chao 1987).

    Parameters
    ----------
    counts : sequence of int
        Chains in each mode.

    Returns
    -------
    Unseen

    References
    ----------
    Good (1953), Biometrika 40; Esty (1983), Annals of Statistics 11; Chao (1987), Biometrics 43;
    Chiu, Wang, Walther and Chao (2014), Biometrics 70 (the bias-corrected form, its variance).
    """
    seen = np.asarray(counts, int)
    seen = seen[seen > 0]
    if len(seen) == 0:
        raise InputError("counts: found no chains, expected at least one")
    n, modes = int(seen.sum()), len(seen)
    once, twice = int((seen == 1).sum()), int((seen == 2).sum())
    share = once / n
    low, high = _share_interval(n, once, twice)
    factor = (n - 1) / n
    extra = factor * once * (once - 1) / (2 * (twice + 1))
    variance = (
        factor * once * (once - 1) / (2 * (twice + 1))
        + factor**2 * once * (2 * once - 1) ** 2 / (4 * (twice + 1) ** 2)
        + factor**2 * once**2 * twice * (once - 1) ** 2 / (4 * (twice + 1) ** 4)
    )
    total = modes + extra
    if extra > 0:
        width = math.exp(1.96 * math.sqrt(math.log1p(variance / extra**2)))
        total_low, total_high = modes + extra / width, modes + extra * width
    else:
        total_low = total_high = float(modes)
    if high > UNSEEN_GOAL:
        # What may be unseen may be a mode, whatever the estimate.
        total_high = max(total_high, modes + 1.0)
    return Unseen(
        n, modes, once, twice, share, low, high, total, total_low, total_high,
        max(n, math.ceil(once / UNSEEN_GOAL - 1e-9)),
    )  # fmt: skip


def _share_interval(n: int, once: int, twice: int) -> tuple[float, float]:
    """Return the 95 % interval of the unseen share among n chains (see `unseen`)."""
    from scipy.stats import beta

    share = once / n
    spread = 1.96 * math.sqrt(once * (1 - share) + 2 * twice) / n
    high = float(beta.ppf(0.975, once + 1, n - once)) if once < n else 1.0
    low = float(beta.ppf(0.025, once, n - once + 1)) if once else 0.0
    return max(0.0, min(low, share - spread)), min(1.0, max(high, share + spread))


def say_unseen(found: Unseen) -> str:
    """Say in a sentence how many modes were seen, what share is unseen, and what to do."""
    chains = f"{found.chains} chains" if found.chains != 1 else "1 chain"
    if found.chains == 1:
        return (
            "One chain sees one mode: how much of the posterior is unseen cannot be said; run 10."
        )
    modes = f"{found.modes} functional modes" if found.modes != 1 else "1 functional mode"
    interval = f"(95 % interval {100 * found.low:.0f} to {100 * found.high:.0f} %)"
    if found.once == found.chains:
        return (
            f"{modes} seen in {chains}, each by a single one: no two chains predict alike, and "
            f"most of the posterior may be unseen {interval}; run "
            f"{_round_up(found.more_chains)} or more, or a model that the data determine better."
        )
    once = f"{found.once} of them once" if found.once else "none of them just once"
    head = f"{modes} seen in {chains}, {once}" if found.modes > 1 else f"{modes} seen in {chains}"
    text = f"{head}: the unseen share is about {100 * found.share:.0f} % {interval}"
    if found.share > UNSEEN_GOAL:
        return f"{text}, run {_round_up(found.more_chains)} or more."
    if found.high > 2 * UNSEEN_GOAL:
        # So many for an interval that ends below 10 %, if no mode more is seen once or twice.
        needed = found.chains + 1
        while _share_interval(needed, found.once, found.twice)[1] > 2 * UNSEEN_GOAL:
            needed += 1
        return f"{text}; to rule out one of {200 * UNSEEN_GOAL:.0f} %, run {needed} or more."
    return f"{text}; more chains would show little that is new."


def _round_up(count: int) -> int:
    """Round up to two digits at the most, the second a 0 or 5."""
    if count <= 20:
        return count
    step = 10 ** (len(str(count)) - 1) // 2 or 1
    return -(-count // step) * step
