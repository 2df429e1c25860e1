"""Whether probabilities and intervals mean what they say."""

from typing import Any

import numpy as np
from scipy.stats import binom

from bnnmcmc.metrics import pit_uniformity
from bnnmcmc.report import figures
from bnnmcmc.report.drawing import COLOURS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.sections.predictions import MAX_TARGETS, UNLIKELY, target_names
from bnnmcmc.report.text import number, percent, plural
from bnnmcmc.summary import say_calibration

# More classes than this: the confusion table shows the pairs most often confused.
MAX_CLASSES = 12
WORST_PAIRS = 10
COVERAGE = Explanation(
    "Coverage",
    "Share of test rows inside the central interval: of calibrated predictions, the interval's own "
    "level, give or take the sampling error of so many rows.",
    "2 SE = 2 √( p (1 − p) / n )",
    "Gneiting, Balabdaoui and Raftery (2007), JRSS B 69",
)
PIT = Explanation(
    "PIT",
    "Probability integral transform: the predictive's distribution function at what was observed. "
    "Uniform if calibrated; high at both ends if intervals are too narrow, high in the middle if "
    "too wide, on one side if predictions are off to one side. The Kolmogorov-Smirnov distance is "
    "the largest gap to uniform.",
    "uᵢ = Fᵢ(yᵢ)",
    "Dawid (1984), JRSS A 147; Gneiting et al. (2007)",
)
RELIABILITY = Explanation(
    "Reliability",
    "Of the rows whose predicted class has probability p, the share p should be right.",
    source="Murphy (1973), J. Applied Meteorology 12; Guo et al. (2017), arXiv 1706.04599",
)
CORRECTION = Explanation(
    "Correction",
    "Intervals or class probabilities fitted on held-out rows, on top of the posterior: for rows "
    "like these, conformal intervals cover at least their level, on average, whatever the model, "
    "if nothing else was chosen by these rows (here they also ended the training of the members).",
    "split: m ± Q s; cqr: [l − Q, u + Q]; temperature: p^(1/T) / Σ p^(1/T)",
    "Lei et al. (2018), JASA 113; Romano et al. (2019), arXiv 1905.03222; Guo et al. (2017)",
)
CONFUSION = Explanation(
    "Confusion",
    "Rows of the table are the classes observed, columns those predicted; the diagonal is right.",
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None without test predictions or coverage."""
    test = (run.metrics or {}).get("test") or {}
    found, rows = run.predictions, run.test_rows
    plots: list[Plot] = []
    takeaways: list[Sentence] = []
    tables: list[Table] = []
    explained: list[Explanation] = []
    if "posterior" in test and figures.coverage_levels(test["posterior"]) and rows:
        plots.append(figures.coverage(test, rows))
        explained.append(COVERAGE)
    corrected = (run.metrics or {}).get("calibrated")
    if corrected:
        missing = "missing" in corrected
        said = say_calibration(corrected)
        takeaways.append(Sentence("bad" if missing else "info", f"Corrected by {said}."))
        tables += [] if missing else [correction_table(corrected)]
        explained.append(CORRECTION)
    if found is not None and "pit" in found:
        for k, name in enumerate(target_names(run)[:MAX_TARGETS]):
            plots.append(pit_histogram(name, found["pit"][:, k]))
        explained.append(PIT)
    if found is not None and "probabilities" in found:
        plots.append(figures.reliability(found["y"], found["probabilities"]))
        names = [str(name) for name in found["classes"]]
        counts = confusion_counts(found["y"], found["probabilities"])
        takeaways.append(confused(counts, names))
        tables.append(confusion_table(counts, names))
        explained += [RELIABILITY, CONFUSION]
    if not plots:
        return None
    return Section(
        "calibration",
        "Calibration",
        takeaways=takeaways,
        plots=plots,
        tables=tables,
        explained=explained,
    )


def correction_table(found: dict[str, Any]) -> Table:
    """Return what a correction changed, score by score, of each target."""
    rows: list[list[Cell]] = []
    several = len(found["parts"]) > 1
    for part in found["parts"]:
        if several:
            rows.append([Cell(part["name"], classes="group")])
        for name, own in part["posterior"].items():
            both = (own, part["corrected"][name])
            cells = [Cell(number(value), str(value)) for value in both]
            rows.append([Cell(name.replace("_", " ")), *cells])
    columns = [Column("on the test rows", text=True), Column("posterior"), Column("corrected")]
    note = "Widths in target units, means over rows." if found["method"] != "temperature" else ""
    return Table(columns, rows, title="Corrected on held-out rows", note=note, headed=True)


def pit_histogram(target: str, pit: np.ndarray, bins: int = 10) -> Plot:
    """Draw how often the PIT falls into each part of [0, 1].

    Parameters
    ----------
    target : str
    pit : numpy array (rows,)
    bins : int
    """
    finite = pit[np.isfinite(pit)]
    counts = np.histogram(finite, bins=bins, range=(0, 1))[0]
    n = len(finite)

    def draw(ax):
        low, high = binom.ppf([0.025, 0.975], n, 1 / bins)
        for level, style in ((low, ":"), (n / bins, "--"), (high, ":")):
            ax.axhline(level, color=COLOURS["ink"], lw=1, ls=style, zorder=3)
        centres = (np.arange(bins) + 0.5) / bins
        ax.bar(centres, counts, width=0.92 / bins, color=COLOURS["posterior"], alpha=0.75, lw=0)
        ax.set(xlim=(0, 1), xlabel=f"F(observed {target})", ylabel="test rows")

    alt = (
        f"Histogram of the probability integral transform of {plural(n, 'test row')} in {bins} "
        "bins; between the dotted lines lie 95 % of the bins if it is uniform."
    )
    return Plot(f"PIT: {target}", say_pit(pit).text, alt, f"pit-{target}", draw)


def say_pit(pit: np.ndarray) -> Sentence:
    """Say whether the PIT is uniform, and if not, how.

    Parameters
    ----------
    pit : numpy array (rows,)
    """
    broken = int(np.sum(~np.isfinite(pit)))
    if broken:
        return Sentence("bad", f"{plural(broken, 'row')} of {len(pit):,} with a PIT that is NaN.")
    found = pit_uniformity(pit)
    shown = f"Kolmogorov-Smirnov distance {found.distance:.3f}, p = {found.p_value:.2g}"
    # A uniform variable has mean 1/2 and variance 1/12.
    centre, width = float(pit.mean() - 0.5), float(pit.var() * 12)
    skewed = abs(centre) > 2 / np.sqrt(12 * len(pit))
    # The variance of (u - 1/2)^2 is 1/180.
    shape = abs(width - 1) > 2 * 12 / np.sqrt(180 * len(pit))
    if found.p_value >= UNLIKELY:
        return Sentence("good", f"Nothing speaks against a uniform PIT ({shown}).")
    what = []
    if skewed:
        what.append(f"predictions are too {'low' if centre > 0 else 'high'}")
    if shape:
        what.append(f"the predictive is too {'narrow' if width > 1 else 'wide'}")
    return Sentence(
        "note", f"The PIT is not uniform ({shown}): {' and '.join(what) or 'its shape is wrong'}."
    )


def confusion_counts(y: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return how often a class (row) is predicted as another (column), (classes, classes)."""
    classes = probabilities.shape[1]
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (y.astype(int), probabilities.argmax(axis=1)), 1)
    return counts


def confused(counts: np.ndarray, names: list[str]) -> Sentence:
    """Say which class is most often taken for which.

    Parameters
    ----------
    counts : numpy array (classes, classes)
        Observed by predicted.
    names : list of str
    """
    off = counts - np.diag(np.diag(counts))
    wrong, total = int(off.sum()), int(counts.sum())
    if not wrong:
        return Sentence("good", f"All {plural(total, 'test row')} get their own class.")
    i, j = np.unravel_index(int(off.argmax()), off.shape)
    of = int(counts[i].sum())
    share = percent(float(off[i, j] / of))
    # Always to predict the class that is most frequent is right this often.
    naive, right = counts.sum(axis=1).max() / total, 1 - wrong / total
    better = right > naive
    return Sentence(
        "info" if better else "bad",
        f"{number(wrong)} of {plural(total, 'test row')} get a wrong class, most often {names[j]} "
        f"instead of {names[i]} ({number(int(off[i, j]))} of {of:,}, {share}); "
        + (
            f"always the most frequent class would be right for {percent(float(naive))}, "
            f"this is for {percent(right)}."
            if better
            else f"no better than always the most frequent class ({percent(float(naive))})."
        ),
    )


def confusion_table(counts: np.ndarray, names: list[str]) -> Table:
    """Return the confusion table, or for many classes the pairs most often confused."""
    if len(names) > MAX_CLASSES:
        off = counts - np.diag(np.diag(counts))
        order = np.argsort(-off, axis=None, kind="stable")[:WORST_PAIRS]
        rows = []
        for i, j in zip(*np.unravel_index(order, off.shape), strict=True):
            if off[i, j]:
                texts = [names[i], names[j]]
                size = number(int(off[i, j]))
                cells = [Cell(text, classes="text") for text in texts]
                rows.append([*cells, Cell(size, str(off[i, j]))])
        columns = [Column("observed", text=True), Column("predicted", text=True), Column("rows")]
        return Table(columns, rows, title="Pairs most often confused", sortable=True)
    columns = [Column("observed"), *(Column(f"predicted {name}") for name in names)]
    columns.append(Column("right", "share of the observed class that is predicted right"))
    rows = []
    for i, name in enumerate(names):
        total = int(counts[i].sum())
        cells = [
            Cell(number(int(c)), classes="best" if i == j else "") for j, c in enumerate(counts[i])
        ]
        share = Cell(percent(counts[i, i] / total) if total else "–")
        rows.append([Cell(name), *cells, share])
    return Table(columns, rows, title="Confusion table", headed=True)
