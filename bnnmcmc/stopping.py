"""When a run stops, and who may work on it."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from bnnmcmc.errors import InputError

# Of a time budget, scores and report get this part, within these seconds.
RESULTS_SHARE, RESULTS_SECONDS = 0.15, (8.0, 120.0)


@dataclass
class Stop:
    """When to stop between two blocks: at a time, or because the user asked."""

    deadline: float | None = None
    interrupted: bool = False
    begun: float = field(default_factory=time.monotonic)

    def at(self, deadline: float | None) -> bool:
        """Tell whether to stop now, given a deadline (monotonic seconds)."""
        return self.interrupted or (deadline is not None and time.monotonic() >= deadline)

    def share(self, part: float) -> float | None:
        """Return the time at which this part of the budget is used up."""
        return None if self.deadline is None else self.begun + part * (self.deadline - self.begun)

    @property
    def sampling_deadline(self) -> float | None:
        """When sampling must end so that scores and report still fit."""
        if self.deadline is None:
            return None
        return self.deadline - np.clip(
            RESULTS_SHARE * (self.deadline - self.begun), *RESULTS_SECONDS
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working on the same run folder.

    Raises
    ------
    InputError
        Another process is at work there.
    """
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another process is working on this run; wait for it, or stop it first"
            ) from error
        yield


@contextmanager
def interruptible(stop: Stop, console: Console) -> Iterator[None]:
    """Let the first Ctrl-C stop between blocks; the second one stops at once."""

    def handle(number, frame):
        if stop.interrupted:
            raise KeyboardInterrupt
        stop.interrupted = True
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
