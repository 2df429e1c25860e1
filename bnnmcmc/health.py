"""The status of each chain, from what the sampler saw. NumPy only.

Failure is data: a chain is reported here, never dropped. The rules look at the draws and the
sampler's statistics alone; test data are not an argument, so they cannot choose among chains.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bnnmcmc.errors import InputError

# A tuned Hamiltonian sampler accepts 0.6 to 0.95; below this, almost every proposal is refused
# and the draws are copies of each other.
MIN_ACCEPTANCE = 0.05
# A healthy chain may refuse a few proposals in a row. At an acceptance rate of 0.6, ten equal
# draws have probability 0.4^9 = 3e-4; fewer equal draws are no evidence.
MIN_STILL_DRAWS = 10
# Stan warns at the first divergence; in the curved posterior of a network that would mark nearly
# every chain and say nothing. Where to draw the line is a judgement.
MAX_DIVERGING = 0.01
# The median over chains and its spread mean little for fewer.
MIN_CHAINS = 5
# Chains sit in different modes, so their medians differ by more than chance: the rule is lenient.
MAX_DEVIATIONS = 10.0
# Makes a median absolute deviation the standard deviation of a Gaussian.
MAD_TO_SD = 1.4826
# Floor of the spread, in nats: a density lower by less than a factor e is no difference.
MIN_SPREAD = 1.0

# Worst first.
STATUSES = ("nonfinite", "stuck", "diverging", "low", "ok")


class ChainStatus(NamedTuple):
    """What is known about one chain.

    Parameters
    ----------
    status : str
        One of `STATUSES`.
    sentence : str
        The numbers behind it, and what to do.
    """

    status: str
    sentence: str


def chain_statuses(
    stats: Mapping[str, np.ndarray], finite: np.ndarray, steps_per_draw: int
) -> list[ChainStatus]:
    """Judge each chain by its draws and statistics.

    A chain gets the first status that fits:

    - "nonfinite": a draw, its log-density or its acceptance rate is not finite;
    - "stuck": the log-density does not change over the last half of the draws (at least
      `MIN_STILL_DRAWS`), or the mean acceptance rate is below `MIN_ACCEPTANCE`;
    - "diverging": more than the share `MAX_DIVERGING` of the steps diverged;
    - "low": with at least `MIN_CHAINS` finite chains, the chain's median log-density lies more
      than `MAX_DEVIATIONS` standard deviations below the median of the chains' medians. The
      standard deviation is the largest of three: between the chains' medians and typical within a
      chain (both from median absolute deviations), and `MIN_SPREAD`;
    - "ok": none of these. That no rule fired does not show that the chain has converged.

    "low" is a hint only. Chains of a neural network sit in different modes, and a mode of lower
    density can hold as much mass as the others; a chain may also just not have arrived.

    Parameters
    ----------
    stats : mapping
        Name -> (chain, draw), as `Samples.stats`. Needs "log_density"; uses "acceptance_rate",
        "diverging" (count of steps per draw) and "step_size" where the kernel has them.
    finite : bool array (chain,)
        Whether all numbers of all draws of the chain are finite.
    steps_per_draw : int
        Steps of the kernel per kept draw (``thin``).

    Returns
    -------
    list of ChainStatus
        One per chain, in order.

    Raises
    ------
    InputError
        No log-density, no draws, shapes that differ, or less than one step per draw.

    References
    ----------
    Leys et al. (2013), Journal of Experimental Social Psychology 49 (outliers by the median
    absolute deviation).
    """
    log_density, finite = _checked(stats, finite, steps_per_draw)
    usable = finite & np.isfinite(log_density).all(axis=1)
    gaps = _gaps_below(log_density, usable)
    return [
        _nonfinite(stats, chain, bool(finite[chain]))
        or _stuck(stats, chain)
        or _diverging(stats, chain, steps_per_draw)
        or _low(log_density[chain], gaps[chain])
        or ChainStatus("ok", f"Median log-density {np.median(log_density[chain]):.5g}.")
        for chain in range(len(log_density))
    ]


def _checked(stats, finite, steps_per_draw: int) -> tuple[np.ndarray, np.ndarray]:
    if "log_density" not in stats:
        raise InputError(
            f"stats: found {', '.join(stats) or 'nothing'}, expected 'log_density' among them"
        )
    log_density, finite = np.asarray(stats["log_density"], np.float64), np.asarray(finite)
    if log_density.ndim != 2 or log_density.size == 0:
        raise InputError(
            f"stats['log_density']: found shape {log_density.shape}, expected (chain, draw) with "
            "at least one draw"
        )
    for name in ("acceptance_rate", "diverging", "step_size"):
        if name in stats and np.shape(stats[name]) != log_density.shape:
            raise InputError(
                f"stats[{name!r}]: found shape {np.shape(stats[name])}, expected "
                f"{log_density.shape} as the log-density"
            )
    if finite.shape != log_density.shape[:1] or finite.dtype != bool:
        raise InputError(
            f"finite: found {finite.dtype} of shape {finite.shape}, expected bool of shape "
            f"{log_density.shape[:1]}"
        )
    if steps_per_draw < 1:
        raise InputError(f"steps_per_draw: found {steps_per_draw}, expected at least 1")
    return log_density, finite


def _gaps_below(log_density: np.ndarray, usable: np.ndarray) -> list[tuple[float, float, float]]:
    """Return per chain (median over chains, spread, spreads the chain lies below it)."""
    if usable.sum() < MIN_CHAINS:
        return [(np.nan, np.nan, 0.0)] * len(log_density)
    medians = np.full(len(log_density), np.nan)
    medians[usable] = np.median(log_density[usable], axis=1)
    centre = float(np.median(medians[usable]))
    between = MAD_TO_SD * np.median(np.abs(medians[usable] - centre))
    deviations = np.abs(log_density[usable] - medians[usable, None])
    within = MAD_TO_SD * np.median(np.median(deviations, axis=1))
    spread = float(max(between, within, MIN_SPREAD))
    return [(centre, spread, float((centre - median) / spread)) for median in medians]


def _nonfinite(stats, chain: int, finite: bool) -> ChainStatus | None:
    for name, label in (("log_density", "log-density"), ("acceptance_rate", "acceptance rate")):
        if name not in stats:
            continue
        bad = ~np.isfinite(stats[name][chain])
        if bad.any():
            return ChainStatus(
                "nonfinite",
                f"The {label} is not finite in {bad.sum()} of {bad.size} draws, first in draw "
                f"{bad.argmax()} (from 0): {_smaller_steps(stats)}, or compute in float64 "
                '(run.precision = "float64").',
            )
    if not finite:
        return ChainStatus(
            "nonfinite",
            "Some draws hold a NaN or an infinite number, and so do predictions pooled over them: "
            f'{_smaller_steps(stats)}, or compute in float64 (run.precision = "float64").',
        )
    return None


def _stuck(stats, chain: int) -> ChainStatus | None:
    log_density = stats["log_density"][chain]
    rate = None
    if "acceptance_rate" in stats:
        rate = float(np.mean(stats["acceptance_rate"][chain], dtype=np.float64))
    advice = f"{_smaller_steps(stats)}, or warm up longer (sampler.warmup)"
    # The last half: a chain that froze on its way counts too.
    still = max(-(-len(log_density) // 2), MIN_STILL_DRAWS)
    last = log_density[-still:]
    if len(last) == still and (last == last[0]).all():
        if rate is not None and rate > 0.5:
            advice = "the steps are accepted but too short to move it: warm up longer"
            advice += ' (sampler.warmup) or compute in float64 (run.precision = "float64")'
        return ChainStatus(
            "stuck",
            f"The log-density stayed at {last[0]:.6g} over the last {still} of "
            f"{len(log_density)} draws{_step_size(stats, chain)}: {advice}.",
        )
    if rate is not None and rate < MIN_ACCEPTANCE:
        return ChainStatus(
            "stuck",
            f"The mean acceptance rate is {rate:.2g}, less than {MIN_ACCEPTANCE}"
            f"{_step_size(stats, chain)}: {advice}.",
        )
    return None


def _diverging(stats, chain: int, steps_per_draw: int) -> ChainStatus | None:
    if "diverging" not in stats:
        return None
    counts = np.asarray(stats["diverging"][chain])
    steps = len(counts) * steps_per_draw
    diverged = int(counts.sum())
    if diverged <= MAX_DIVERGING * steps:
        return None
    return ChainStatus(
        "diverging",
        f"{100 * diverged / steps:.1f} % of the steps diverged ({diverged} of {steps})"
        f"{_step_size(stats, chain)}: {_smaller_steps(stats)}.",
    )


def _low(log_density: np.ndarray, gap: tuple[float, float, float]) -> ChainStatus | None:
    centre, spread, below = gap
    if not below > MAX_DEVIATIONS:
        return None
    return ChainStatus(
        "low",
        f"The median log-density {np.median(log_density):.5g} lies {below:.0f} robust standard "
        f"deviations ({spread:.3g}) below the chains' median {centre:.5g}. This is a hint, not an "
        "error: the chain may sit in a mode of its own, or may not have arrived; look at its "
        "trace, and warm up longer (sampler.warmup) if it still climbs.",
    )


def _smaller_steps(stats) -> str:
    """Say how to get smaller steps from the kernel that wrote these statistics."""
    if "acceptance_rate" in stats:
        return "lower the step size, e.g. sampler.target_acceptance = 0.9"
    if "energy_error_squared" in stats:
        return "lower the step size, e.g. sampler.energy_variance_end = 0.01"
    return "lower the step size"


def _step_size(stats, chain: int) -> str:
    return f" at step size {stats['step_size'][chain][-1]:.2g}" if "step_size" in stats else ""
