"""Progress on the terminal: a bar where there is a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

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
from rich.table import Column
from rich.text import Text

# Without a terminal (a log file, a batch job), one line this often.
LINE_SECONDS = 15.0


class Update(Protocol):
    """What a stage calls as it goes on."""

    def __call__(self, done: int, note: str, finished: bool = False) -> None:
        """Show the work done so far, and a few words; a stage may finish before its total."""


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
def working(console: Console, text: str) -> Iterator[None]:
    """Say what is being done where there is nothing to count."""
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(f"{text} ...", highlight=False, soft_wrap=True)
        yield


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
    Update
        ``update(done, note, finished=False)``.
    """
    shown = _bar if console.is_terminal else _lines
    with shown(console, label, total, unit, done) as update:
        yield update


@contextmanager
def _bar(console: Console, label: str, total: int, unit: str, done: int) -> Iterator[Update]:
    wide = console.width >= 100
    columns = [
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24 if wide else 10, table_column=Column(min_width=10)),
        TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
        RateColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("[dim]left", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        # Where the terminal is narrow, these words give way first.
        TextColumn(
            "[dim]{task.fields[note]}",
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    ]
    if not wide:
        del columns[5]
    with Progress(*columns, console=console, speed_estimate_period=30, expand=True) as progress:
        task = progress.add_task(
            f"{label:<8}", total=total, completed=done, unit=unit, note="compiling"
        )

        def update(done: int, note: str, finished: bool = False) -> None:
            progress.update(task, completed=total if finished else done, note=note)

        yield update


@contextmanager
def _lines(console: Console, label: str, total: int, unit: str, done: int) -> Iterator[Update]:
    begun = printed = time.monotonic()
    first = last = done
    words = ""

    def update(done: int, note: str, finished: bool = False) -> None:
        nonlocal printed, last, words
        now, last, words = time.monotonic(), done, note
        if finished or now - printed < LINE_SECONDS:
            return
        printed = now
        rate = (done - first) / max(now - begun, 1e-9)
        left = f", {duration((total - done) / rate)} left" if rate > 0 else ""
        line(f"{count(done)} of {count(total)} {unit}, {count(rate)} {unit}/s{left}", note)

    def line(text: str, note: str) -> None:
        words = f"; {note}" if note else ""
        console.print(f"{label}: {text}{words}", highlight=False, soft_wrap=True)

    yield update
    seconds = time.monotonic() - begun
    line(
        f"{count(last)} {unit} in {duration(seconds)}, {count((last - first) / seconds)} {unit}/s",
        words,
    )
