"""The status of each chain, from what the sampler saw. NumPy only.

Failure is data: a chain is reported here, never dropped. The rules look at the draws and the
sampler's statistics alone; test data are not an argument, so they cannot choose among chains.
A chain that fails in every one of many draws is stopped (`look`), and reported as such.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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

# Shares and means of fewer draws are no evidence.
MIN_DRAWS = 20
# Chains of one posterior need steps of one order of magnitude; their metrics make up a factor of
# ten or so.
MAX_COLLAPSE = 100.0
# The bias grows with the energy variance, whose mean has a heavy tail: five times the wanted one is
# still seen in chains that are well.
MAX_ENERGY_EXCESS = 10.0
# Dual averaging ends within 0.1 of its target, as a rule.
MAX_ACCEPTANCE_GAP = 0.25
# A tree that ends at its greatest depth is no error, only a short trajectory; if most do, the
# draws are more alike than those of NUTS should be.
MAX_SATURATED = 0.5
# From the first to the last quarter, in standard deviations within the last: a straight fall gives
# 8, a settled chain with draws much alike seldom 3.
MAX_FALL = 5.0

# A chain is stopped after so many draws in a row that fail. Of a chain that accepts one proposal in
# a hundred, a hundred draws refused have probability 0.37, but refused outright they are not.
STOP_AFTER = 100
# Less than any accepted proposal will ever have.
REFUSED = 1e-6
# Where weights are of order one, float32 loses a step this short.
NO_STEP = 1e-6

# Worst first.
STATUSES = (
    "stopped",
    "nonfinite",
    "stuck",
    "collapsed",
    "diverging",
    "biased",
    "off target",
    "sinking",
    "low",
    "saturated",
    "ok",
)
# Chains with these do not enter the pool.
LEFT_OUT = ("stopped", "nonfinite")


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


class Watch(NamedTuple):
    """What `look` has seen of some chains by now.

    Parameters
    ----------
    failing : int array (chain,)
        How many of the last draws have failed, one after the other.
    log_density : array (chain,)
        Of the last draw.
    stopped : int array (chain,)
        After how many draws a chain was stopped, -1 for those that go on.
    """

    failing: np.ndarray
    log_density: np.ndarray
    stopped: np.ndarray


def nothing_seen(chains: int, stopped: Mapping[int, int] | None = None) -> Watch:
    """Return the watch before the first draw, or before a replay of the last ones.

    Parameters
    ----------
    chains : int
    stopped : mapping, optional
        Chain -> after how many draws it was stopped.
    """
    found = np.full(chains, -1)
    for chain, draw in (stopped or {}).items():
        found[chain] = draw
    return Watch(np.zeros(chains, int), np.full(chains, np.nan), found)


def look(watch: Watch, stats: Mapping[str, np.ndarray], start: int, steps_per_draw: int) -> Watch:
    """Look at the next draws of all chains; a chain with `STOP_AFTER` failures in a row is stopped.

    A draw has failed if

    - its log-density is not finite,
    - every step of it diverged (and was taken back),
    - every proposal was refused outright: the mean acceptance rate is below `REFUSED`, or NaN,
    - the step size is not positive, or below `NO_STEP` and the log-density as it was before.

    Which draw a chain is stopped after does not depend on how draws are handed over. The last
    `STOP_AFTER` + 1 draws tell all that is to be known.

    Parameters
    ----------
    watch : Watch
    stats : mapping
        Name -> (chain, count), as in `chain_statuses`.
    start : int
        Number of the first of these draws.
    steps_per_draw : int

    Returns
    -------
    Watch
    """
    failed = _failed_draws(stats, watch.log_density, steps_per_draw)
    failing, stopped = watch.failing.copy(), watch.stopped.copy()
    for i in range(failed.shape[1]):
        failing = np.where(failed[:, i], failing + 1, 0)
        stopped[(failing >= STOP_AFTER) & (stopped < 0)] = start + i + 1
    return Watch(failing, np.asarray(stats["log_density"])[:, -1].copy(), stopped)


def _failed_draws(stats, before: np.ndarray, steps_per_draw: int) -> np.ndarray:
    """Return which draws (chain, count) failed, given the log-densities of the draw before."""
    log_density = np.asarray(stats["log_density"])
    failed = ~np.isfinite(log_density)
    if "diverging" in stats:
        failed |= np.asarray(stats["diverging"]) >= steps_per_draw
    if "acceptance_rate" in stats:
        failed |= ~(np.asarray(stats["acceptance_rate"]) >= REFUSED)
    if "step_size" in stats:
        size = np.asarray(stats["step_size"])
        same = log_density == np.concatenate([before[:, None], log_density[:, :-1]], axis=1)
        failed |= ~(size > 0) | (same & (size < NO_STEP))
    return failed


def stopped_chains(stopped: np.ndarray, first: int = 0) -> dict[int, int]:
    """Return chain -> draws before its stop, of a watch's ``stopped``; chains from ``first`` on."""
    return {first + int(c): int(stopped[c]) for c in np.flatnonzero(stopped >= 0)}


def say_all_stopped(
    stats: Mapping[str, np.ndarray], stopped: Mapping[int, int], steps_per_draw: int
) -> str:
    """Say that no chain is left, why, and what to try.

    Parameters
    ----------
    stats : mapping
        Name -> (chain, draw).
    stopped : mapping
        Every chain -> after how many draws it was stopped.
    steps_per_draw : int
    """
    reasons = Counter(
        _why_stopped(stats, chain, draw, steps_per_draw) for chain, draw in stopped.items()
    )
    said = "; ".join(
        f"{count} chain{'s' if count > 1 else ''}: {reason}"
        for reason, count in reasons.most_common(3)
    )
    return (
        f"every chain was stopped, the last one after draw {max(stopped.values())}: {said}. To "
        f"try: {_smaller_steps(stats)}; warm up longer (sampler.warmup); compute in float64 "
        '(run.precision = "float64"); or change what the density is made of (prior.scale, scaling '
        "of the data, the likelihood)"
    )


def _why_stopped(stats, chain: int, draw: int, steps_per_draw: int) -> str:
    last = slice(draw - STOP_AFTER, draw)
    if not np.isfinite(stats["log_density"][chain][last]).any():
        return f"the log-density of the last {STOP_AFTER} draws is not finite"
    if "diverging" in stats and (stats["diverging"][chain][last] >= steps_per_draw).all():
        return f"every step of the last {STOP_AFTER} draws diverged"
    if "acceptance_rate" in stats and not (stats["acceptance_rate"][chain][last] >= REFUSED).any():
        return f"every proposal of the last {STOP_AFTER} draws was refused"
    if "step_size" in stats and not (stats["step_size"][chain][last] >= NO_STEP).any():
        size = stats["step_size"][chain][draw - 1]
        return f"the step size {size:.2g} does not move it, in the last {STOP_AFTER} draws"
    return f"each of the last {STOP_AFTER} draws failed, for more than one reason"


def chain_statuses(
    stats: Mapping[str, np.ndarray],
    finite: np.ndarray,
    steps_per_draw: int,
    *,
    wanted: Mapping[str, float] | None = None,
    stopped: Mapping[int, int] | None = None,
) -> list[ChainStatus]:
    """Judge each chain by its draws and statistics.

    A chain gets the first status that fits:

    - "stopped": it failed in `STOP_AFTER` draws in a row and makes no more (see `look`);
    - "nonfinite": a draw, its log-density or its acceptance rate is not finite;
    - "stuck": the log-density does not change over the last half of the draws (at least
      `MIN_STILL_DRAWS`), or the mean acceptance rate is below `MIN_ACCEPTANCE`;
    - "collapsed": with at least `MIN_CHAINS` chains, the step size is more than `MAX_COLLAPSE`
      times below their median;
    - "diverging": more than the share `MAX_DIVERGING` of the steps diverged;
    - "biased": the energy variance per dimension (EEVPD), mean over the draws, is more than
      `MAX_ENERGY_EXCESS` times the one that the kernel was tuned for;
    - "off target": the mean acceptance rate is more than `MAX_ACCEPTANCE_GAP` from its target;
    - "sinking": the median log-density of the last quarter of the draws lies more than `MAX_FALL`
      standard deviations (those within the last quarter, from its median absolute deviation, and
      no less than `MIN_SPREAD`) below that of the first quarter;
    - "low": with at least `MIN_CHAINS` finite chains, the chain's median log-density lies more
      than `MAX_DEVIATIONS` standard deviations below the median of the chains' medians. The
      standard deviation is the largest of three: between the chains' medians and typical within a
      chain (both from median absolute deviations), and `MIN_SPREAD`;
    - "saturated": more than the share `MAX_SATURATED` of the draws have a tree of the greatest
      depth allowed;
    - "ok": none of these. That no rule fired does not show that the chain has converged.

    "low" is a hint only. Chains of a neural network sit in different modes, and a mode of lower
    density can hold as much mass as the others; a chain may also just not have arrived.
    "biased", "off target", "sinking" and "saturated" need at least `MIN_DRAWS` draws.

    Parameters
    ----------
    stats : mapping
        Name -> (chain, draw), as `Samples.stats`. Needs "log_density"; uses "acceptance_rate",
        "diverging" (count of steps per draw) and "step_size" where the kernel has them.
    finite : bool array (chain,)
        Whether all numbers of all draws of the chain are finite.
    steps_per_draw : int
        Steps of the kernel per kept draw (``thin``).
    wanted : mapping, optional
        What the kernel aims at, by statistic (`Kernel.wanted`); without it, nobody is "biased",
        "off target" or "saturated".
    stopped : mapping, optional
        Chain -> after how many draws it was stopped; what comes after that is not looked at.

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
    wanted, stopped = wanted or {}, stopped or {}
    median = _median_step(stats, usable)
    # Of many chains most are ok: rules that one look at all chains can rule out go first.
    concerned = _concerned(stats, log_density, wanted)
    found = []
    for chain in range(len(log_density)):
        status = (
            _stopped(stats, chain, steps_per_draw, stopped)
            or _nonfinite(stats, chain, bool(finite[chain]))
            or _stuck(stats, chain)
            or _collapsed(stats, chain, median)
            or _diverging(stats, chain, steps_per_draw)
        )
        for name, say in CONCERNS.items():
            if status is None and name == "low":
                status = _low(log_density[chain], gaps[chain])
            elif status is None and concerned[name][chain]:
                status = ChainStatus(name, say(stats, chain, wanted))
        found.append(
            status or ChainStatus("ok", f"Median log-density {np.median(log_density[chain]):.5g}.")
        )
    return found


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
    others = (
        "acceptance_rate",
        "diverging",
        "step_size",
        "energy_error_squared",
        "tree_depth",
    )
    for name in others:
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


def _stopped(stats, chain: int, steps: int, stopped: Mapping[int, int]) -> ChainStatus | None:
    if chain not in stopped:
        return None
    draw = stopped[chain]
    return ChainStatus(
        "stopped",
        f"Stopped after draw {draw}: {_why_stopped(stats, chain, draw, steps)}. It is left out of "
        f"predictions, scores and comparisons of chains: {_smaller_steps(stats)}, or warm up "
        "longer (sampler.warmup).",
    )


def _median_step(stats, usable: np.ndarray) -> float:
    """Return the median step size over chains, NaN if there are too few."""
    if "step_size" not in stats or usable.sum() < MIN_CHAINS:
        return np.nan
    return float(np.median(np.asarray(stats["step_size"])[usable, -1]))


def _collapsed(stats, chain: int, median: float) -> ChainStatus | None:
    if "step_size" not in stats:
        return None
    size = float(stats["step_size"][chain][-1])
    if not size * MAX_COLLAPSE < median:
        return None
    return ChainStatus(
        "collapsed",
        f"The step size {size:.2g} is {median / size:.0f} times below the chains' median "
        f"{median:.2g} (limit {MAX_COLLAPSE:.0f}), so the chain hardly moves: its warm-up met "
        "something steep; warm up longer (sampler.warmup), or compute in float64 "
        '(run.precision = "float64").',
    )


def _mean(values) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.mean(values, axis=-1, dtype=np.float64)


def _concerned(stats, log_density: np.ndarray, wanted: Mapping[str, float]) -> dict[str, Any]:
    """Return which chains (chain,) each of the rules that need some draws applies to."""
    nobody = np.zeros(len(log_density), bool)
    found = dict.fromkeys(CONCERNS, nobody)
    if log_density.shape[1] < MIN_DRAWS:
        return found
    aims = {name: wanted[name] for name in wanted if name in stats}
    if "energy_error_squared" in aims:
        excess = _mean(stats["energy_error_squared"]) / aims["energy_error_squared"]
        found["biased"] = excess > MAX_ENERGY_EXCESS
    if "acceptance_rate" in aims:
        gap = np.abs(_mean(stats["acceptance_rate"]) - aims["acceptance_rate"])
        found["off target"] = gap > MAX_ACCEPTANCE_GAP
    if "tree_depth" in aims:
        found["saturated"] = _mean(stats["tree_depth"] >= aims["tree_depth"]) > MAX_SATURATED
    first, last, spread = _quarters(log_density)
    found["sinking"] = first - last > MAX_FALL * spread
    return found


def _quarters(log_density: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return medians of the first and the last quarter, and the spread within the last."""
    quarter = log_density.shape[-1] // 4
    with np.errstate(invalid="ignore"):
        first, last = log_density[..., :quarter], log_density[..., -quarter:]
        centre = np.median(last, axis=-1)
        spread = MAD_TO_SD * np.median(np.abs(last - centre[..., None]), axis=-1)
        return np.median(first, axis=-1), centre, np.maximum(spread, MIN_SPREAD)


def _say_biased(stats, chain: int, wanted: Mapping[str, float]) -> str:
    found, aim = float(_mean(stats["energy_error_squared"][chain])), wanted["energy_error_squared"]
    return (
        f"The energy variance per dimension (EEVPD) is {found:.2g}, {found / aim:.1f} times the "
        f"wanted {aim:.2g} (limit {MAX_ENERGY_EXCESS:.0f}){_step_size(stats, chain)}, and the bias "
        f"of the draws grows with it: {_smaller_steps(stats)}, or warm up longer (sampler.warmup)."
    )


def _say_off_target(stats, chain: int, wanted: Mapping[str, float]) -> str:
    found, aim = float(_mean(stats["acceptance_rate"][chain])), wanted["acceptance_rate"]
    what = "steps are longer" if found < aim else "steps are shorter, and draws dearer,"
    return (
        f"The mean acceptance rate is {found:.2f}, more than {MAX_ACCEPTANCE_GAP} from its target "
        f"{aim:.2f}{_step_size(stats, chain)}: {what} than they should be; warm up longer "
        "(sampler.warmup)."
    )


def _say_sinking(stats, chain: int, wanted: Mapping[str, float]) -> str:
    first, last, spread = _quarters(np.asarray(stats["log_density"][chain], np.float64))
    return (
        f"The log-density falls: its median is {first:.5g} in the first quarter of the draws and "
        f"{last:.5g} in the last, {(first - last) / spread:.0f} robust standard deviations "
        f"({spread:.3g}) lower (limit {MAX_FALL:.0f}). The chain has not settled, or its steps are "
        f"too long: look at its trace, warm up longer (sampler.warmup), or {_smaller_steps(stats)}."
    )


def _say_saturated(stats, chain: int, wanted: Mapping[str, float]) -> str:
    depth = wanted["tree_depth"]
    share = float(_mean(stats["tree_depth"][chain] >= depth))
    return (
        f"{100 * share:.0f} % of the draws have a tree of the greatest depth, {depth:.0f} (limit "
        f"{100 * MAX_SATURATED:.0f} %): trajectories are cut short and neighbouring draws alike. "
        "The draws are right, but worth less: raise sampler.max_depth (each level doubles the "
        "cost), or draw more."
    )


# In the order of their severity; "low" looks at the other chains too.
CONCERNS: dict[str, Callable[..., str]] = {
    "biased": _say_biased,
    "off target": _say_off_target,
    "sinking": _say_sinking,
    "low": lambda *_: "",
    "saturated": _say_saturated,
}


def say_now(
    stats: Mapping[str, np.ndarray],
    steps_per_draw: int,
    *,
    wanted: Mapping[str, float] | None = None,
    stopped: int = 0,
) -> str:
    """Say in a few words which troubles some new draws show, for a line of progress.

    Counts chains by status, worst first; nothing if all are ok. Cheap for many chains.

    Parameters
    ----------
    stats : mapping
        Name -> (chain, count) of the new draws.
    steps_per_draw : int
    wanted : mapping, optional
        As in `chain_statuses`.
    stopped : int
        How many chains were stopped.
    """
    log_density = np.asarray(stats["log_density"], np.float64)
    usable = np.isfinite(log_density).all(axis=1)
    counts = dict.fromkeys(STATUSES, 0) | {"stopped": stopped}
    counts["nonfinite"] = max(0, int((~usable).sum()) - stopped)
    left = usable.copy()
    flags = {"collapsed": np.zeros(len(left), bool), "diverging": np.zeros(len(left), bool)}
    if "step_size" in stats:
        sizes = np.asarray(stats["step_size"])[:, -1]
        flags["collapsed"] = sizes * MAX_COLLAPSE < _median_step(stats, usable)
    if "diverging" in stats:
        share = np.asarray(stats["diverging"]).sum(axis=1) / (log_density.shape[1] * steps_per_draw)
        flags["diverging"] = share > MAX_DIVERGING
    flags |= _concerned(stats, log_density, wanted or {})
    flags["low"] = np.array([gap[2] for gap in _gaps_below(log_density, usable)]) > MAX_DEVIATIONS
    for name in STATUSES:
        if name in flags:
            counts[name] = int((left & flags[name]).sum())
            left &= ~flags[name]
    troubles = [f"{count} {name}" for name, count in counts.items() if count]
    return f"chains: {', '.join(troubles)}" if troubles else ""


def _smaller_steps(stats) -> str:
    """Say how to get smaller steps from the kernel that wrote these statistics."""
    if "energy_error_squared" in stats:
        return "lower the step size, e.g. sampler.energy_variance_end = 0.01"
    if "rows" in stats:  # a minibatch kernel: microcanonical ones have a decoherence length
        options = ("step_size", "energy_variance_end")
        return f"lower the step size: sampler.{options['decoherence_length' in stats]}"
    if "acceptance_rate" in stats:
        return "lower the step size, e.g. sampler.target_acceptance = 0.9"
    return "lower the step size"


def _step_size(stats, chain: int) -> str:
    return f" at step size {stats['step_size'][chain][-1]:.2g}" if "step_size" in stats else ""
