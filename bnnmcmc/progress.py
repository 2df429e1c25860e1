"""Progress on the terminal: a bar where there is a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Without a terminal (a log file, a batch job), one line this often.
LINE_SECONDS = 15.0

Update = Callable[[int, str], None]


class RateColumn(ProgressColumn):
    """Work done per second, in the stage's own unit."""

    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{count(rate)} {task.fields['unit']}/s", style="dim")


def count(number: float) -> str:
    """Write a number in few characters: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Write a time span: 3.2 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


@contextmanager
def stage(console: Console, label: str, total: int, unit: str, done: int = 0) -> Iterator[Update]:
    """Show the progress of one stage.

    Parameters
    ----------
    console : Console
        A quiet console shows nothing.
    label : str
        What is being done.
    total, done : int
        Work in all and work done already.
    unit : str
        What is counted, in the plural.

    Yields
    ------
    callable
        ``update(done, note)``: work done so far, and a few words on how it goes.
    """
    if not console.is_terminal:
        yield _lines(console, label, total, unit, done)
        return
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        RateColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=console, speed_estimate_period=30) as progress:
        task = progress.add_task(
            f"{label:<10}", total=total, completed=done, unit=unit, note="compiling"
        )
        yield lambda done, note: progress.update(task, completed=done, note=note)


def _lines(console: Console, label: str, total: int, unit: str, done: int) -> Update:
    begun = last = time.monotonic()
    first = done

    def update(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < LINE_SECONDS:
            return
        last = now
        rate = (done - first) / max(now - begun, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate > 0 and done < total else ""
        console.print(
            f"{label}: {count(done)} of {count(total)} {unit}, {count(rate)} {unit}/s{left}"
            + (f"; {note}" if note else ""),
            highlight=False,
            soft_wrap=True,
        )

    return update
