"""When a run stops, and who may work on it."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from bnnmcmc.errors import InputError
from bnnmcmc.processes import Group
from bnnmcmc.store import disk_errors

# Of a time budget, scores and report get this part, within these seconds.
RESULTS_SHARE, RESULTS_SECONDS = 0.15, (8.0, 120.0)
# Of a time budget, training gets this part of what is there for training and sampling, and a
# warm-up that turns out longer than expected this part of what is left then (the second one for
# one that was planned to fit).
TRAINING_SHARE, WARMUP_SHARE, PLANNED_SHARE = 0.3, 0.7, 0.85
# A plan for a time budget keeps at least so many warm-up steps and draws.
MIN_PLANNED = 100
# Speed is measured on at least this many seconds of compiled warm-up.
CALIBRATION_SECONDS = 0.5


@dataclass
class Stop:
    """When to stop between two blocks: at a time, or because the user asked.

    Parameters
    ----------
    deadline : float
        When all must be done (monotonic seconds); that of process 0 counts.
    group : Group
        The processes that stop together.
    asked : bool
        Whether the user asked this process to stop.
    interrupted : bool
        Whether the user asked any process, as of the last call of `at`.
    begun : float
    """

    deadline: float | None = None
    group: Group = field(default_factory=Group)
    asked: bool = False
    interrupted: bool = False
    begun: float = field(default_factory=time.monotonic)

    def at(self, deadline: float | None = None) -> bool:
        """Tell whether to stop now, given a deadline (monotonic seconds): all or none.

        A meeting point of all processes.
        """
        late = deadline is not None and time.monotonic() >= deadline
        answers = self.group.share([self.asked, late])
        self.interrupted = any(asked for asked, _ in answers)
        return self.interrupted or answers[0][1]

    def share(self, part: float) -> float | None:
        """Return when this part of the time until sampling must end will be used up."""
        now, end = time.monotonic(), self.sampling_deadline
        return None if end is None else now + part * max(0.0, end - now)

    def draws_deadline(self, draws: int) -> float | None:
        """Return when sampling must end that has made so many draws.

        The first few are worth more than a punctual report: they may take the time kept for it.
        """
        return self.sampling_deadline if draws >= MIN_PLANNED else self.deadline

    @property
    def sampling_deadline(self) -> float | None:
        """When sampling must end so that scores and report still fit."""
        if self.deadline is None:
            return None
        return self.deadline - np.clip(
            RESULTS_SHARE * (self.deadline - self.begun), *RESULTS_SECONDS
        )


def fewer_steps(
    warmup: int,
    draws: int,
    thin: int,
    step_seconds: float,
    done: int,
    left: float,
    cold: Callable[[], float],
) -> tuple[int, int] | None:
    """Plan fewer warm-up steps and draws, in proportion, if those planned do not fit.

    Parameters
    ----------
    warmup, draws, thin : int
        As planned by now.
    step_seconds : float
        What a step takes.
    done : int
        Steps of the warm-up that are done, and would be lost.
    left : float
        Seconds until sampling must end.
    cold : callable
        Returns the seconds of compiling for other numbers of steps.

    Returns
    -------
    tuple of int, or None
        Warm-up steps and draws; None if it fits as it is.
    """
    if (warmup - done + draws * thin) * step_seconds <= left:
        return None
    # Blocks are saved too.
    share = 0.7 * max(0.0, left - cold()) / ((warmup + draws * thin) * step_seconds)
    return (
        min(warmup, max(MIN_PLANNED, int(warmup * share))),
        min(draws, max(MIN_PLANNED, int(draws * share))),
    )


class FolderInUseError(InputError):
    """Another process is working on the run folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on the same run folder.

    Raises
    ------
    FolderInUseError
        Another process is at work there.
    InputError
        The folder cannot be written to.
    """
    import fcntl

    with disk_errors(folder):
        file = open(folder / ".lock", "w")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(
                f"{folder}: another process is working on this run; wait for it, or stop it first"
            ) from error
        yield


def at_work(folder: Path) -> bool:
    """Return whether a process is working on a run folder now."""
    try:
        with locked(folder):
            return False
    except FolderInUseError:
        return True


@contextmanager
def interruptible(stop: Stop, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C stop between blocks; the second one stops at once."""

    def handle(number, frame):
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        console.print(
            "[yellow]Stopping after this block (Ctrl-C again: at once, losing the block)[/]"
        )

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not in the main thread: Ctrl-C is not ours to handle
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
