"""Predictions of the test rows against what was observed (regression)."""

import numpy as np
from scipy.stats import spearmanr

from bnnmcmc.report import figures
from bnnmcmc.report.drawing import COLOURS, MAX_VECTOR_POINTS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.text import number, percent, plural, same_decimals

MAX_TARGETS = 4
WORST_ROWS = 10
# Beyond so many predictive standard deviations a row is far off; of a Gaussian's, 0.3 % are.
FAR = 3.0
# Such a p-value or less is no chance.
UNLIKELY = 0.01
EXPLAINED = (
    Explanation(
        "Residual",
        "Observed less predicted mean, in standard deviations of that row's prediction: of "
        "calibrated predictions they have mean 0 and standard deviation 1, wherever one looks.",
        "zᵢ = (yᵢ − mᵢ) / sᵢ",
        "Dawid (1984), JRSS A 147",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None for classes or without predictions."""
    found = run.predictions
    if found is None or "mean" not in found:
        return None
    names = target_names(run)
    plots, takeaways, tables = [], [], []
    for k, name in enumerate(names[:MAX_TARGETS]):
        y, mean, sd = (found[key][:, k] for key in ("y", "mean", "sd"))
        low, high = interval(found, k)
        plots.append(figures.predicted(name, y, mean, low, high))
        plots.append(residuals(name, y, mean, sd))
        said = [bias(y, mean, sd), spread(mean, (y - mean) / sd)]
        if len(names) > 1:
            said = [s._replace(text=f"{name}: {s.text}") for s in said]
        takeaways += said
        title = f"Rows farthest from their prediction: {name}"
        tables.append(worst_rows(title, found["row"], y, mean, low, high, (y - mean) / sd))
    return Section(
        "predictions",
        "Predictions",
        takeaways=takeaways,
        plots=plots,
        tables=tables,
        explained=EXPLAINED,
    )


def target_names(run: RunFolder) -> list[str]:
    """Return the names of a regression's targets."""
    assert run.predictions is not None
    targets = run.predictions["y"].shape[1]
    data = run.manifest.get("data") or {}
    return list(map(str, data.get("targets") or [f"target {k}" for k in range(targets)]))[:targets]


def interval(found: dict[str, np.ndarray], k: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the ends of the 90 % intervals of a target, or None."""
    ends = []
    for level in (0.05, 0.95):
        at = np.flatnonzero(np.isclose(found["levels"], level))
        ends.append(found["quantiles"][at[0]][:, k] if len(at) else None)
    low, high = ends
    return (None, None) if low is None or high is None else (low, high)


def bias(y: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Sentence:
    """Say whether predictions are too high or too low on average.

    Parameters
    ----------
    y, mean, sd : numpy array (rows,)
    """
    z = (y - mean) / sd
    n = len(z)
    if not np.isfinite(z).all():
        return Sentence("bad", "Residuals are not finite: they cannot be judged.")
    if n < 2:
        return Sentence("info", "One row is too few to judge residuals.")
    centre, error = float(z.mean()), float(z.std(ddof=1) / np.sqrt(n))
    shown = f"{number(abs(round(centre, 3)))} standard deviations on average"
    if abs(centre) > 2 * error:
        word = "low" if centre > 0 else "high"
        return Sentence("note", f"Predictions are too {word}, by {shown}.")
    return Sentence(
        "good",
        f"Predictions are neither too high nor too low: residuals are off by {shown}, within the "
        "sampling error.",
    )


def spread(mean: np.ndarray, z: np.ndarray) -> Sentence:
    """Say whether residuals are larger where predictions are larger than the intervals allow for.

    Parameters
    ----------
    mean, z : numpy array (rows,)
        Prediction and its standardised residual.
    """
    if len(z) < 10 or not np.isfinite(z).all() or np.ptp(mean) == 0:
        return Sentence("info", "Too few rows to say whether the spread is right everywhere.")
    found = spearmanr(mean, np.abs(z))
    if found.pvalue < UNLIKELY:
        word = "larger" if found.statistic > 0 else "smaller"
        return Sentence(
            "note",
            f"Where predictions are large, residuals are {word} than their spread says (rank "
            f"correlation {found.statistic:.2f}): the noise model misses how noise changes.",
        )
    return Sentence(
        "good",
        "Small predictions and large ones are off by what their spread says (rank correlation "
        f"{found.statistic:.2f}).".replace("-", "−"),
    )


def residuals(target: str, y: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> Plot:
    """Draw standardised residuals against the predictions.

    Parameters
    ----------
    target : str
    y, mean, sd : numpy array (rows,)
    """
    z = (y - mean) / sd
    far = np.abs(z) > FAR

    def draw(ax):
        for level in (-2, 0, 2):
            ax.axhline(level, color=COLOURS["ink"], lw=1, ls="-" if level == 0 else (0, (4, 3)))
        for where, colour in ((~far, "posterior"), (far, "bad")):
            ax.plot(
                mean[where],
                z[where],
                "o",
                ms=3.2,
                mew=0,
                alpha=float(np.clip(200 / max(len(z), 1), 0.15, 0.8)),
                color=COLOURS[colour],
                rasterized=len(z) > MAX_VECTOR_POINTS,
            )
        ax.set(xlabel=f"predicted {target}", ylabel="residual, standard deviations")

    takeaway = (
        f"{number(int(far.sum()))} of {plural(len(z), 'row')} ({percent(float(far.mean()))}) are "
        f"more than {FAR:g} standard deviations off; of a Gaussian's, 0.3 % would be."
    )
    alt = (
        "Residual in predictive standard deviations against the predicted mean, with lines at 0 "
        f"and ± 2, {plural(len(z), 'test row')}."
    )
    return Plot(f"Residuals: {target}", takeaway, alt, f"residuals-{target}", draw)


def worst_rows(title, rows, y, mean, low, high, z) -> Table:
    """Return the rows that are farthest from their prediction.

    Parameters
    ----------
    title : str
    rows, y, mean, z : numpy array (rows,)
        Number of the row in the table, observed, predicted, standardised residual.
    low, high : numpy array (rows,) or None
    """
    size = np.where(np.isnan(z), np.inf, np.abs(z))
    columns = [Column("row", "number of the row in the table, from 0"), Column("observed")]
    columns += [Column("predicted"), Column("residual", "in predictive standard deviations")]
    if low is not None:
        columns[3:3] = [Column("5 %"), Column("95 %")]
    order = np.argsort(-size, kind="stable")[:WORST_ROWS]
    values = [y, mean, *((low, high) if low is not None else ()), z]
    return Table(columns, table_rows(rows, values, order), title=title, sortable=True)


def table_rows(rows, values, order) -> list[list[Cell]]:
    """Return some rows of a table: their number, then numbers that line up column by column.

    Parameters
    ----------
    rows : numpy array (rows,)
        Numbers of the rows.
    values : sequence of numpy array (rows,)
    order : numpy int array
        Which rows, in their order.
    """
    shown = [[float(v) for v in np.asarray(column)[order]] for column in values]
    columns = []
    for column in shown:
        write = same_decimals(column)
        columns.append([Cell(write(v), str(v)) for v in column])
    numbers = [Cell(str(rows[i]), str(rows[i])) for i in order]
    return [list(cells) for cells in zip(numbers, *columns, strict=True)]
