"""Seconds: the smallest of several, and how far the others lie."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the smallest time, the spread relative to it, and all of them.

    Other work on the machine only ever adds time, so the smallest is the estimate.
    """
    least = min(seconds)
    return {
        "seconds": least,
        "spread": (max(seconds) - least) / least,
        "all_seconds": list(seconds),
    }


def repeated(call: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Time a call that blocks until its result is there; it must have run (compiled) before."""
    return summary([timed(call) for _ in range(repeats)])


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Time several calls one after the other, again and again: what disturbs one disturbs all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    return {name: summary(each) for name, each in seconds.items()}


def timed(call: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def count_for(call: Callable[[int], Any], seconds: float) -> int:
    """Find how many repetitions inside a call take about so many seconds; the first compiles."""
    call(1)
    count, taken = 1, timed(lambda: call(1))
    while taken < seconds:
        count = max(count + 1, min(10 * count, int(1.2 * count * seconds / max(taken, 1e-9))))
        taken = timed(functools.partial(call, count))
    return count
