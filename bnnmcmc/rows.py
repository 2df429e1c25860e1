"""Predicting the rows of a table, a chunk at a time."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from bnnmcmc import progress
from bnnmcmc.data import Table, encode_features, encode_targets
from bnnmcmc.prediction import in_target_units
from bnnmcmc.predictive import pool
from bnnmcmc.run import Run, scores
from bnnmcmc.store import disk_errors

if TYPE_CHECKING:
    import pandas

# Rows that are predicted together; memory holds the predictive samples of one chunk.
CHUNK_ROWS = 2000


def predict_table(
    folder: Path, table: Table, level: float, console: Console
) -> tuple["pandas.DataFrame", dict[str, float] | None]:
    """Predict every row of a table with the run in a folder.

    Parameters
    ----------
    folder : Path
        The run folder.
    table : Table
        New rows.
    level : float
        Of the intervals.
    console : Console
        Where progress is shown.

    Returns
    -------
    frame : pandas.DataFrame
        One line per row of the table (see `Prediction.to_frame`).
    scores : dict or None
        In target units, if the table holds the targets.

    Raises
    ------
    InputError
        The folder is no run with draws, or a row cannot be encoded.
    """
    import pandas as pd

    run = Run.open(folder)
    assert run.encoding is not None
    x, y = encode_features(run.encoding, table), encode_targets(run.encoding, table)
    frames, scored = [], []
    with progress.stage(console, "Predicting", len(x), "rows") as update:
        for low in range(0, len(x), CHUNK_ROWS):
            here = slice(low, low + CHUNK_ROWS)
            target = None if y is None else y[here]
            pooled = pool(
                run.posterior, run.pooled_draws, x[here], target, seed=run.seed, first_row=low
            )
            frames.append(in_target_units(pooled, run.encoding).to_frame(level))
            if target is not None:
                scored.append((len(frames[-1]), scores(pooled, target, run.encoding)["target"]))
            update(min(low + CHUNK_ROWS, len(x)), "")
    return pd.concat(frames, ignore_index=True), _mean_scores(scored) if scored else None


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


def write_rows(frame: "pandas.DataFrame", out: Path | None) -> None:
    """Write predictions as .csv or .parquet, or as CSV to the terminal."""
    if out is None:
        frame.to_csv(sys.stdout, index=False, float_format="%.7g")
        return
    with disk_errors(out.parent):
        if out.suffix.lower() == ".parquet":
            frame.to_parquet(out, index=False)
        else:
            frame.to_csv(out, index=False)
