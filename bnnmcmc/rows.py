"""Predicting the rows of a file, a piece at a time, with a run or a saved predictor."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console

from bnnmcmc import progress
from bnnmcmc.data import count_rows, encode_features, encode_targets, read_pieces
from bnnmcmc.errors import InputError
from bnnmcmc.prediction import in_target_units
from bnnmcmc.predictive import pool
from bnnmcmc.predictor import Predictor, load
from bnnmcmc.run import Run, scores
from bnnmcmc.store import disk_errors

if TYPE_CHECKING:
    import pandas

# Rows that are read together, and rows that are predicted together: memory holds the predictive
# samples of those that are scored.
READ_ROWS, SCORED_ROWS = 16_384, 2000


class Predicted(NamedTuple):
    """What became of a file: rows written, scores if it holds the targets, how it was corrected."""

    rows: int
    scores: dict[str, float] | None
    calibration: str = ""


def open_predictor(path: Path) -> Run | Predictor:
    """Open a run folder, or a file written by `Run.save`."""
    return load(path) if path.is_file() else Run.open(path)


def predict_file(
    source: Path, table: Path, out: Path | None, level: float, console: Console
) -> Predicted:
    """Predict every row of a file with a run folder or a saved predictor.

    Parameters
    ----------
    source : Path
        A run folder, or a file written by `Run.save`.
    table : Path
        CSV, space-separated text, Parquet or npz; read in pieces (npz as a whole).
    out : Path or None
        A .csv or .parquet file, with a line per row of the table (see `Prediction.to_frame`);
        CSV goes to the terminal if None. It appears when it is complete.
    level : float
        Of the intervals.
    console : Console
        Where progress is shown.

    Returns
    -------
    Predicted
        Scores in target units.

    Raises
    ------
    InputError
        Source or table cannot be used; the message names the line or row, and the column.
    """
    predictor = open_predictor(source)
    encoding = predictor.encoding
    if encoding is None:
        raise InputError(f"{source}: the run has no encoding of rows")
    done, scored, marked = 0, [], ""
    total = count_rows(table)
    with (
        progress.stage(console, "Predicting", total, "rows") as update,
        _writer(out) as write,
    ):
        for piece in read_pieces(table, READ_ROWS):
            x, y = encode_features(encoding, piece), encode_targets(encoding, piece)
            step = len(x) if y is None else SCORED_ROWS
            for low in range(0, len(x), step):
                here = slice(low, low + step)
                target = None if y is None else y[here]
                pooled = pool(
                    predictor.posterior,
                    predictor.pooled_draws,
                    x[here],
                    target,
                    seed=predictor.seed,
                    first_row=done,
                    samples=target is not None,
                )
                prediction = in_target_units(pooled, encoding)
                if predictor.correction is not None:
                    prediction = predictor.correction.correct(prediction)
                marked, frame = prediction.calibration, prediction.to_frame(level)
                write(frame)
                if target is not None:
                    scored.append((len(frame), scores(pooled, target, encoding)["target"]))
                done += len(frame)
                update(min(done, total), "")
    return Predicted(done, _mean_scores(scored) if scored else None, marked)


def _mean_scores(scored: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Join the scores of chunks: all are means over rows, but for the root of one."""
    rows = np.array([count for count, _ in scored], dtype=float)
    joined = {}
    for name in scored[0][1]:
        values = np.array([found[name] for _, found in scored])
        power = 2 if name == "rmse" else 1
        joined[name] = float((np.average(values**power, weights=rows)) ** (1 / power))
    joined.pop("ece", None) if len(scored) > 1 else None  # no mean of parts
    return joined


@contextmanager
def _writer(out: Path | None) -> Iterator[Callable[["pandas.DataFrame"], None]]:
    """Write frames one below the other; the file takes its name when all are there."""
    if out is None:
        yield _csv_lines(sys.stdout, "%.7g")
        return
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make = _parquet_rows if out.suffix.lower() == ".parquet" else _csv_file
    try:
        with disk_errors(out.parent):
            with make(partial) as write:
                yield write
            partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _csv_lines(file: Any, numbers: str | None) -> Callable[["pandas.DataFrame"], None]:
    begun = False

    def write(frame: "pandas.DataFrame") -> None:
        nonlocal begun
        frame.to_csv(file, index=False, header=not begun, float_format=numbers)
        begun = True

    return write


@contextmanager
def _csv_file(path: Path) -> Iterator[Callable[["pandas.DataFrame"], None]]:
    with path.open("w", encoding="utf-8", newline="") as file:
        yield _csv_lines(file, None)


@contextmanager
def _parquet_rows(path: Path) -> Iterator[Callable[["pandas.DataFrame"], None]]:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None

    def write(frame: "pandas.DataFrame") -> None:
        nonlocal writer
        frame = frame.copy()
        frame.attrs = {}
        rows = pa.Table.from_pandas(frame, preserve_index=False)
        if writer is None:
            writer = parquet.ParquetWriter(path, rows.schema)
        writer.write_table(rows.cast(writer.schema))

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
