"""Sampling until a target is met: what the draws are worth, and whether a score has settled.

Targets are checked at numbers of draws that follow from the target alone, so that a run stops at
the same draw however it was divided into blocks and however often it was interrupted. Held-out
scores come from validation rows; test rows are not an argument anywhere here. NumPy only.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnnmcmc.diagnostics import MIN_ESS_DRAWS, prediction_ess
from bnnmcmc.errors import InputError

# Up to so many checks, one follows the other after `Target.every` draws; then each after about a
# tenth more draws than the last, so that all together cost little more than the last few.
EVEN_CHECKS = 10
# Predictions of so many rows are followed: fewer for many chains, within these limits.
MAX_SEQUENCES, MIN_ROWS, MAX_ROWS = 2000, 5, 20
# So many predictions are kept for the ESS, thinned beyond that, and of each chain at least so many.
MAX_KEPT, MIN_KEPT_DRAWS = 2_000_000, 128
# The LPPD is that of so many validation rows at the most.
MAX_SCORED_ROWS = 500
# So many draws of all chains are evaluated at a time.
MAX_AT_ONCE = 4096


class Target(NamedTuple):
    """When the draws suffice; what is 0 is no condition, and all others have to hold.

    Parameters
    ----------
    ess : float
        Function-space ESS: bulk ESS of a prediction within each chain, summed over chains, median
        over predictions at a few inputs of validation rows (training rows if there are none).
        Chains that are not finite do not count.
    lppd : float
        Nats per row: the LPPD of validation rows, pooled over all draws so far, has settled when
        its values at the last ``checks + 1`` checks differ by no more than this.
    every : int
        Draws per chain to the next check, at first (see `next_check`).
    checks : int
        For how many checks the LPPD has to stay where it is.
    """

    ess: float = 0.0
    lppd: float = 0.0
    every: int = 50
    checks: int = 3

    @property
    def wanted(self) -> bool:
        """Whether there is a condition at all."""
        return bool(self.ess or self.lppd)


def check_target(target: Target, *, rows: str, validation: int) -> None:
    """Raise InputError for a target that is out of range or that these rows cannot serve.

    Parameters
    ----------
    target : Target
    rows : str
        The rows that the posterior conditions on: "train" or "train+validation".
    validation : int
        Number of validation rows.
    """
    least = {"ess": 0, "lppd": 0, "every": MIN_ESS_DRAWS, "checks": 2}
    for name, lowest in least.items():
        value = getattr(target, name)
        if not lowest <= value < math.inf:
            raise InputError(f"stop.{name}: found {value}, expected a number from {lowest} on")
    if not target.lppd:
        return
    if rows != "train":
        raise InputError(
            'stop.lppd: needs sampler.rows = "train"; with the validation rows among those that '
            "the posterior conditions on, their LPPD is no score of held-out rows"
        )
    if not validation:
        raise InputError(
            "stop.lppd: there are no validation rows to score; set data.split.validation = 0.1, or "
            "stop by stop.ess"
        )


def next_check(every: int, done: int) -> int:
    """Return the number of draws at which the first check after ``done`` draws is due.

    Parameters
    ----------
    every : int
    done : int
        Draws per chain so far.
    """
    at = every
    while at <= done:
        at += every * max(1, at // (EVEN_CHECKS * every))
    return at


def is_met(target: Target, checks: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether the last check finds the target met; a NaN meets nothing.

    Parameters
    ----------
    target : Target
    checks : sequence of dict
        As `Checks.check` returns them, in order.
    """
    if not target.wanted or not checks:
        return False
    enough = not target.ess or _number(checks[-1]["ess"]) >= target.ess
    return enough and (not target.lppd or _spread(target, checks) <= target.lppd)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _spread(target: Target, checks: Sequence[Mapping[str, Any]]) -> float:
    """Return how far the last LPPDs lie apart; NaN if there are too few."""
    last = [_number(check["lppd"]) for check in checks[-target.checks - 1 :]]
    return float(np.ptp(last)) if len(last) > target.checks else math.nan


def say_progress(target: Target, checks: Sequence[Mapping[str, Any]]) -> str:
    """Say in a few words how near the target is; nothing without a target.

    Parameters
    ----------
    target : Target
    checks : sequence of dict
    """
    if not target.wanted:
        return ""
    if not checks:
        return f"first check at {target.every} draws"
    parts = []
    if target.ess:
        parts.append(f"function-space ESS {_count(checks[-1]['ess'])} of {target.ess:g}")
    if target.lppd:
        spread = _spread(target, checks)
        parts.append(f"validation LPPD {_number(checks[-1]['lppd']):.4g}")
        if not math.isnan(spread):
            parts[-1] += (
                f", within {spread:.2g} over {target.checks + 1} checks (to settle: "
                f"{target.lppd:g})"
            )
        elif len(checks) <= target.checks:
            parts[-1] += f", {len(checks)} of {target.checks + 1} checks"
    return ", ".join(parts)


def _count(value: float | None) -> str:
    number = _number(value)
    # Rounded down: what is shown as 400 of 400 shall be met.
    return f"{math.floor(number)}" if math.isfinite(number) else f"{number}"


def say_outcome(manifest: Mapping[str, Any]) -> str:
    """Say why sampling ended, for a run with a target; nothing for others.

    Parameters
    ----------
    manifest : mapping
        With "until" and "checks" (`target_of`), "blocks" and "draws".
    """
    target, checks = target_of(manifest)
    done = sum(block["count"] for block in manifest["blocks"])
    if not target.wanted or not done:
        return ""
    near = say_progress(target, checks)
    if checks:
        took = sum(check["seconds"] for check in checks)
        near += f" ({len(checks)} checks in {took:.1f} s)"
        fewest = checks[-1]["chains"]
        if fewest < manifest["chains"]:
            near += f"; {manifest['chains'] - fewest} chains that failed do not count"
    if is_met(target, checks):
        return f"target met at draw {done} of at most {manifest['draws']}: {near}"
    if done >= manifest["draws"]:
        return f"cap of {done} draws reached before the target, more draws are needed: {near}"
    return f"target not met at draw {done} of at most {manifest['draws']}: {near}"


def target_of(manifest: Mapping[str, Any]) -> tuple[Target, list[dict[str, Any]]]:
    """Return the target of a run and the checks made so far, from its manifest."""
    return Target(**manifest.get("until") or {}), list(manifest.get("checks") or [])


def few_rows(rows: int, chains: int) -> slice:
    """Return which of so many rows are followed for the ESS: a few, evenly spaced."""
    most = int(np.clip(MAX_SEQUENCES // chains, MIN_ROWS, MAX_ROWS))
    return slice(None, None, max(1, -(-rows // most)))


class Checks:
    """What is known of the draws so far, as far as a target asks for it.

    Parameters
    ----------
    target : Target
    evaluate : callable
        ``evaluate(draws) -> (predictions, log_density)``: of flat draws (chain, count, size), the
        predictions (chain, count, n) at a few inputs, and the log-density (chain, count, row) of
        validation rows, or None. Chains are those of this process.
    chains : int
        Of all processes.
    share : callable
        Gives a value to all processes and returns theirs (`Group.share`).
    history : sequence of dict
        The checks made before. The draws made before are to be added again.

    Attributes
    ----------
    done : int
        Draws per chain added.
    history : list of dict
        All checks.
    """

    def __init__(
        self,
        target: Target,
        evaluate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]],
        chains: int,
        share: Callable[[Any], list[Any]] = lambda value: [value],
        history: Sequence[Mapping[str, Any]] = (),
    ):
        self.target, self.history, self.done = target, [dict(check) for check in history], 0
        self._evaluate, self._chains, self._share = evaluate, chains, share
        self._stride, self._seconds = 1, 0.0
        self._kept: np.ndarray | None = None
        self._log_sum: np.ndarray | None = None
        self._finite: np.ndarray = np.array(True)

    def next(self, done: int) -> int:
        """Return the number of draws at which the next check is due."""
        return next_check(self.target.every, done)

    @property
    def due(self) -> bool:
        """Whether a check is due at this number of draws and has not been made."""
        return self.next(self.done - 1) == self.done and not self.checked

    @property
    def checked(self) -> bool:
        """Whether the last check was made at this number of draws."""
        return bool(self.history) and self.history[-1]["draw"] >= self.done

    @property
    def met(self) -> bool:
        """Whether the last check finds the target met."""
        return is_met(self.target, self.history)

    def add(self, draws: np.ndarray) -> None:
        """Take in the next draws (chain, count, size) of this process's chains."""
        few = max(1, MAX_AT_ONCE // len(draws))
        for low in range(0, draws.shape[1], few):
            self._add(draws[:, low : low + few])

    def _add(self, draws: np.ndarray) -> None:
        begun = time.monotonic()
        predictions, log_density = self._evaluate(draws)
        finite = np.isfinite(draws).all(axis=(1, 2)) & np.isfinite(predictions).all(axis=(1, 2))
        if log_density is not None:
            finite &= ~np.isnan(log_density).any(axis=(1, 2))
            values = log_density.astype(np.float64)
            if self._log_sum is not None:
                values = np.concatenate([self._log_sum[:, None], values], axis=1)
            with np.errstate(invalid="ignore", over="ignore"):
                # One draw after the other, so that blocks make no difference.
                self._log_sum = np.logaddexp.reduce(values, axis=1)
        self._finite = self._finite & finite
        new = predictions[:, -self.done % self._stride :: self._stride]
        kept = new if self._kept is None else np.concatenate([self._kept, new], axis=1)
        most = max(MIN_KEPT_DRAWS, MAX_KEPT // (self._chains * kept.shape[2]))
        while kept.shape[1] > most:
            kept, self._stride = kept[:, ::2].copy(), 2 * self._stride
        self._kept = kept
        self.done += draws.shape[1]
        self._seconds += time.monotonic() - begun

    def check(self) -> dict[str, Any]:
        """Note down how near the target is; a meeting point of all processes.

        Returns
        -------
        dict
            Also the last entry of ``history``: "draw" (draws per chain), "ess", "lppd" (None
            without a log-density), "chains" (those that count), "seconds" (of this process, with
            what `add` took since the last check).
        """
        begun = time.monotonic()
        assert self._kept is not None
        kept = self._kept[self._finite]
        width = kept.shape[2]
        own: dict[str, Any] = {"chains": len(kept), "ess": [0.0] * width}
        if len(kept):
            own["ess"] = prediction_ess(kept).sum(axis=0).tolist()
            own["low"], own["high"] = (f(kept, axis=(0, 1)).tolist() for f in (np.min, np.max))
        if self._log_sum is not None and len(kept):
            own["log_sum"] = np.logaddexp.reduce(self._log_sum[self._finite], axis=0).tolist()
        parts = [part for part in self._share(own) if part["chains"]]
        chains = sum(part["chains"] for part in parts)
        found: dict[str, Any] = {"draw": self.done, "ess": math.nan, "lppd": None}
        if parts:
            low = np.min([part["low"] for part in parts], axis=0)
            moving = low < np.max([part["high"] for part in parts], axis=0)
            sums = np.sum([part["ess"] for part in parts], axis=0)
            found["ess"] = float(np.median(sums[moving])) if moving.any() else math.nan
            if self._log_sum is not None:
                pooled = np.logaddexp.reduce([part["log_sum"] for part in parts], axis=0)
                found["lppd"] = float(np.mean(pooled - math.log(chains * self.done)))
        found |= {"chains": chains, "seconds": self._seconds + time.monotonic() - begun}
        self._seconds = 0.0
        self.history.append(found)
        return found
