"""How much each chain counts in the pool: equal weights, stacking, pseudo-BMA. NumPy only."""

import math
from typing import Literal

import numpy as np

from bnnmcmc.errors import InputError

Weighting = Literal["equal", "stacking", "pseudo_bma"]
# The stacked score is within this of the best one, in nats per row.
GAP = 1e-6
MAX_STEPS = 100_000
REPLICATES = 1000


def chain_weights(method: Weighting, log_density, seed: int = 0) -> np.ndarray:
    """Return the weights of chains by their predictions of held-out rows.

    Parameters
    ----------
    method : "equal", "stacking" or "pseudo_bma"
    log_density : array (chain, rows)
        Log predictive density of each chain, pooled over its draws, at rows that neither the chain
        conditions on nor the test scores are from.
    seed : int
        Of the bootstrap of "pseudo_bma".

    Returns
    -------
    numpy array (chain,)
        Not negative, adding up to one.

    Raises
    ------
    InputError
        An unknown method, no rows, a NaN, or a row whose density is zero in every chain.
    """
    log_density = np.asarray(log_density, np.float64)
    if log_density.ndim != 2 or log_density.size == 0:
        raise InputError(
            f"log_density: found shape {log_density.shape}, expected (chain, rows), at least one "
            "of each"
        )
    if np.isnan(log_density).any():
        raise InputError("log_density: found a NaN; weights would have no meaning")
    if (log_density == -np.inf).all(axis=0).any():
        row = int((log_density == -np.inf).all(axis=0).argmax())
        raise InputError(
            f"log_density: every chain gives row {row} of the validation part a density of zero, "
            "so nothing tells them apart; use a likelihood with longer tails, or equal weights"
        )
    if method == "equal":
        return np.full(len(log_density), 1 / len(log_density))
    if method == "stacking":
        return _stacking(log_density)
    if method == "pseudo_bma":
        return _pseudo_bma(log_density, seed)
    raise InputError(f"weights: found {method!r}, expected equal, stacking or pseudo_bma")


def _stacking(log_density: np.ndarray) -> np.ndarray:
    r"""Maximise the log score of the weighted pool.

    .. math:: \max_w \frac1n \sum_i \log \sum_k w_k p_{ik}, \qquad w_k \ge 0, \; \sum_k w_k = 1

    by :math:`w_k \leftarrow w_k \frac1n \sum_i p_{ik} / \sum_j w_j p_{ij}`, EM for the shares of a
    mixture. It never lowers the score, which is concave; the largest of these factors, less one,
    bounds how far it is from the best, and says when to stop.

    References
    ----------
    Yao, Vehtari and Gelman (2022), JMLR 23(79), 2006.12335 (stacking for multimodal posteriors).
    """
    density = np.exp(log_density - log_density.max(axis=0))
    weights = np.full(len(density), 1 / len(density))
    for _ in range(MAX_STEPS):
        factors = (density / (weights @ density)).mean(axis=1)
        if factors.max() - 1 <= GAP:
            break
        weights = weights * factors
        weights /= weights.sum()
    return weights


def _pseudo_bma(log_density: np.ndarray, seed: int) -> np.ndarray:
    r"""Average softmax weights of the summed log scores over the Bayesian bootstrap of the rows.

    .. math:: w_k = \mathrm E_\alpha \left[ \mathrm{softmax}_k \left( n \sum_i \alpha_i
              \log p_{ik} \right) \right], \qquad \alpha \sim \mathrm{Dirichlet}(1, \dots, 1)

    References
    ----------
    Yao, Vehtari, Simpson and Gelman (2018), Bayesian Analysis 13 (pseudo-BMA+).
    """
    n = log_density.shape[1]
    shares = np.random.default_rng(seed).dirichlet(np.ones(n), REPLICATES)
    with np.errstate(invalid="ignore"):
        scores = np.where(np.isinf(log_density), -1e30, log_density) @ shares.T * n
    scores = np.exp(scores - scores.max(axis=0))
    return (scores / scores.sum(axis=0)).mean(axis=1)


def effective_chains(weights) -> float:
    r"""Return how many equally weighted chains a pool is worth, :math:`1 / \sum_k w_k^2`.

    Parameters
    ----------
    weights : array (chain,)
        Adding up to one.

    Returns
    -------
    float
        From 1 to the number of chains.
    """
    return 1 / math.fsum(np.square(np.asarray(weights, np.float64)).tolist())
