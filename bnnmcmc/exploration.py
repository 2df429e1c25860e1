"""How much of the posterior the chains of a run have seen: modes, the growing pool, weights.

Everything comes from a bounded number of draws and held-out rows, so that it costs a run of ten
chains no more than a second or two.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnnmcmc.diagnostics import (
    MIN_ESS_DRAWS,
    nested_rhat,
    prediction_ess,
    rhat_across,
)
from bnnmcmc.errors import InputError
from bnnmcmc.modes import Modes, Unseen, find_modes, function_distances, unseen
from bnnmcmc.running import RunningScores, running_lppd
from bnnmcmc.symmetry.alignment import align
from bnnmcmc.symmetry.group import apply, layers_of, names

# Distances are a matrix, and the tree that sorts it takes as long: of more chains, evenly spaced
# ones are looked at.
MAX_CHAINS = 1000
# Differences between predictions far below the noise do not make a mode: this part of its variance
# is added to the function's own.
NOISE_SHARE = 0.01
# In R-hat and ESS within a mode, and in the alignment of weights: at the most so many.
MAX_PREDICTIONS, MAX_WEIGHTS = 20, 200
# An assignment takes about width^3 steps; beyond so many in all, each counted once (starts, sweeps
# and rounds make it up to 50 times as many), the weights are not aligned.
MAX_ASSIGNMENT = 2e7


class WeightAgreement(NamedTuple):
    """R-hat of weights across chains, median and largest, before and after alignment.

    Parameters
    ----------
    chains, draws : int
        How many chains, and draws of each.
    mode : bool
        Whether these are the chains of the largest mode; else all.
    before_median, before_max, after_median, after_max : float
    """

    chains: int
    draws: int
    mode: bool
    before_median: float
    before_max: float
    after_median: float
    after_max: float


class Exploration(NamedTuple):
    """What a run has seen; None for what cannot be said.

    Parameters
    ----------
    chains : numpy int array
        The chains that were looked at: all that go on, or evenly spaced ones; with ``modes``, those
        without copies and those that are not finite.
    frozen : list of int
        Chains in which no prediction ever changes.
    copies : list of lists of int
        Chains with the very same draws; each but the first is left out of the modes' counts.
    modes : Modes or None
        Of ``chains`` without copies and without those that are not finite; None with too few draws.
    unseen : Unseen or None
    rhat_within : float or None
        R-hat of predictions across the chains of a mode, median over predictions, the largest of
        all modes with two chains or more.
    ess_modes : list of float
        Function-space ESS of each mode: summed over its chains, median over predictions.
    running : RunningScores or None
        Of held-out rows.
    nested : float or None
        Nested R-hat of predictions over superchains, median over predictions; None if no two chains
        began at the same member.
    weights : WeightAgreement or None
    """

    chains: np.ndarray
    frozen: list[int]
    copies: list[list[int]]
    modes: Modes | None
    unseen: Unseen | None
    rhat_within: float | None
    ess_modes: list[float]
    running: RunningScores | None
    nested: float | None
    weights: WeightAgreement | None


def explore(
    functions: np.ndarray,
    noise: np.ndarray,
    *,
    log_density: np.ndarray | None = None,
    stopped: Sequence[int] = (),
    superchains: np.ndarray | None = None,
    seed: int = 0,
) -> Exploration:
    """Find the modes of a run, and what its pool gains by draws and by chains.

    Parameters
    ----------
    functions : array (chain, draw, n)
        Predictions at held-out inputs.
    noise : array (chain, n)
        Variance of the outcome about them.
    log_density : array (chain, draw, row), optional
        Of held-out targets.
    stopped : sequence of int
        Chains that are left out.
    superchains : int array (chain,), optional
        Which member each chain began at.
    seed : int
        Of the running scores' choices of chains.

    Returns
    -------
    Exploration
        Without ``weights``, which `weight_agreement` finds.
    """
    draws = functions.shape[1]
    going = np.setdiff1d(np.arange(len(functions)), stopped)
    chains = going[np.linspace(0, len(going) - 1, min(len(going), MAX_CHAINS)).astype(int)]
    values = functions[chains]
    copies = _copies(values, chains) if draws > 1 else []
    finite = np.isfinite(values).all(axis=(1, 2))
    still = (values == values[:, :1]).all(axis=(1, 2)) & (draws >= MIN_ESS_DRAWS) & finite
    running = None
    if log_density is not None and finite.any():
        # As the pool, which leaves out the others.
        running = running_lppd(log_density[chains[finite]], seed)
    nested = None
    if superchains is not None and draws >= MIN_ESS_DRAWS and finite.all():
        nested = _nested(values, superchains[chains])
    found = Exploration(
        chains, chains[still].tolist(), copies, None, None, None, [], running, nested, None
    )
    if draws < MIN_ESS_DRAWS or len(chains) == 0:
        return found
    again = [chain for group in copies for chain in group[1:]]
    # A chain that is not finite is in no mode; its status says what happened.
    kept = ~np.isin(chains, again) & finite
    if not kept.any():
        return found
    values, chains = values[kept], chains[kept]
    sizes = prediction_ess(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        variances = values.var(axis=1, ddof=1, dtype=np.float64)
        # A chain that stands still has no error that its draws could show.
        errors = np.where(sizes > 0, variances / sizes, np.where(variances == 0, 0.0, np.nan))
    known = np.isfinite(noise[chains]).all(axis=1)
    floor = NOISE_SHARE * noise[chains][known].mean(axis=0) if known.any() else None
    with np.errstate(invalid="ignore"):
        distances = function_distances(
            values.mean(axis=1, dtype=np.float64), variances, errors, floor
        )
    modes = find_modes(distances)
    few = np.linspace(0, values.shape[2] - 1, min(values.shape[2], MAX_PREDICTIONS)).astype(int)
    within = [
        float(np.nanmedian(rhats))
        for k in np.flatnonzero(modes.counts > 1)
        if np.isfinite(rhats := rhat_across(values[modes.labels == k][..., few])).any()
    ]
    return found._replace(
        chains=chains,
        modes=modes,
        unseen=unseen(modes.counts),
        rhat_within=max(within) if within else None,
        ess_modes=[
            float(np.median(sizes[modes.labels == k].sum(axis=0))) for k in range(len(modes.counts))
        ],
    )


def _copies(values: np.ndarray, chains: np.ndarray) -> list[list[int]]:
    """Return groups of chains that have the very same draws."""
    groups: dict[bytes, list[int]] = {}
    for chain, own in zip(chains.tolist(), values, strict=True):
        if np.isfinite(own).all():
            groups.setdefault(np.ascontiguousarray(own).tobytes(), []).append(chain)
    return [group for group in groups.values() if len(group) > 1]


def _nested(values: np.ndarray, superchains: np.ndarray) -> float | None:
    try:
        found = nested_rhat(values, superchains)
    except InputError:  # not as many chains from each member
        return None
    return float(np.nanmedian(found)) if np.isfinite(found).any() else None


def superchains_of(members: np.ndarray) -> np.ndarray | None:
    """Return which of the starting points each chain has, None if no two share one.

    Parameters
    ----------
    members : array (chain, size)
    """
    kinds, of = np.unique(members, axis=0, return_inverse=True)
    return of.reshape(-1) if 1 < len(kinds) < len(members) else None


def alignment_work(network: Any, chains: int, draws: int) -> float:
    """Return about how many steps the assignments of an alignment take."""
    return float(chains * draws * sum(width**3 for width in layers_of(network).sizes[1:-1]))


def weight_agreement(network: Any, params: Mapping[str, Any], mode: bool) -> WeightAgreement:
    """Compare weights across chains before and after they are aligned with each other.

    Parameters
    ----------
    network : Network or Layers
    params : mapping
        Weights (chain, draw, *leaf), finite.
    mode : bool
        Whether the chains are of one mode.

    Returns
    -------
    WeightAgreement
        NaN with fewer than 4 draws.
    """
    layers = layers_of(network)
    moved = apply(layers, align(layers, params, rounds=2), params)
    found = []
    for tree in (params, moved):
        leaves = [np.asarray(v) for name in names(layers) for v in tree[name].values()]
        flat = np.concatenate([v.reshape(*v.shape[:2], -1) for v in leaves], axis=-1)
        few = np.linspace(0, flat.shape[2] - 1, min(flat.shape[2], MAX_WEIGHTS)).astype(int)
        rhats = rhat_across(flat[..., few])
        rhats = rhats[~np.isnan(rhats)]
        found += [float(np.median(rhats)), float(rhats.max())] if len(rhats) else [np.nan] * 2
    chains, draws = flat.shape[:2]
    return WeightAgreement(chains, draws, mode, found[0], found[1], found[2], found[3])


def as_json(found: Exploration, most: int = 60) -> dict[str, Any]:
    """Return an exploration as what `json` can write; of many chains, a part of the matrix."""
    result: dict[str, Any] = {
        "frozen": found.frozen,
        "copies": found.copies,
        "rhat_function_within_modes": found.rhat_within,
        "rhat_function_nested": found.nested,
        "weights": None if found.weights is None else found.weights._asdict(),
        "modes": None,
        "running_lppd": None,
    }
    if found.running is not None:
        result["running_lppd"] = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in found.running._asdict().items()
        }
    if found.modes is not None and found.unseen is not None:
        modes = found.modes
        shown = modes.order[
            np.linspace(0, len(modes.order) - 1, min(len(modes.order), most)).astype(int)
        ]
        result["modes"] = {
            "counts": modes.counts.tolist(),
            "ess": found.ess_modes,
            "chains": found.chains.tolist(),
            "labels": modes.labels.tolist(),
            "limit": modes.limit,
            "unseen": found.unseen._asdict(),
            "shown": found.chains[shown].tolist(),
            "shown_labels": modes.labels[shown].tolist(),
            "distances": np.round(modes.distances[np.ix_(shown, shown)], 3).tolist(),
        }
    return result
