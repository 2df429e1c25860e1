"""The page of several runs side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bnnmcmc.comparison import SCORES, TIE, Candidate, Comparison, Result, say
from bnnmcmc.report import html
from bnnmcmc.report.drawing import COLOURS, Plot, laid_out
from bnnmcmc.report.parts import Cell, Column, Explanation, Page, Section, Sentence, Table
from bnnmcmc.report.text import duration, number, plural, with_error
from bnnmcmc.store import write_atomic

# More runs than this are in the tables only.
MAX_DRAWN = 30
WORDS = {"best": "best", "tie": "tie", "worse": "worse", "": "–"}
EXPLAINED = (
    Explanation(
        "Paired difference",
        "The mean over test rows of one run's term less the other's, and its standard error: rows "
        "that are hard for both cancel, so that it is known far better than either score. Where "
        "runs have different test rows, it is the difference of the scores, with both errors.",
        "d̄ = (1/n) Σᵢ (aᵢ − bᵢ), SE = sd(aᵢ − bᵢ) / √n",
        "Diebold and Mariano (1995), J. Business & Economic Statistics 13",
    ),
    Explanation(
        "Tie",
        f"A difference to the best run of at most {TIE:g} standard errors. The error is that over "
        "test rows: it does not hold what another seed or another split would change, and of many "
        "runs the best one is partly the luckiest.",
    ),
    Explanation(
        "Interval score",
        "Width of the 90 % interval, and 20 times the distance of observations outside of it; in "
        "the target's unit, smaller is better.",
        "(u − l) + (2/α) (l − y)₊ + (2/α) (y − u)₊",
        "Gneiting and Raftery (2007), JASA 102, Eq. 43",
    ),
)


def write_comparison(comparison: Comparison, path: Path, title: str = "Comparison of runs") -> Path:
    """Write a comparison as one HTML file that loads nothing else.

    Parameters
    ----------
    comparison : Comparison
    path : Path
        The file.
    title : str

    Returns
    -------
    Path
    """
    write_atomic(path, html.render(make_page(comparison, title)).encode())
    return path


def make_page(comparison: Comparison, title: str = "Comparison of runs") -> Page:
    """Return what is on the page.

    Parameters
    ----------
    comparison : Comparison
    title : str
    """
    first, *said = say(comparison)
    # A sentence for each score, and maybe one on what there is none of.
    tied = [any(r.mark == "tie" for r in results) for results in comparison.results.values()]
    levels = [*("note" if tie else "info" for tie in tied), "info"]
    data = comparison.candidates[0].manifest.get("data") or {}
    sections = [
        scores(comparison),
        convergence(comparison),
        settings(comparison),
    ]
    left_out = [Sentence("bad", f"Left out: {reason}") for reason in comparison.left_out.values()]
    return Page(
        title=title,
        subtitle=f"{len(comparison.candidates)} runs on {data.get('name') or 'one table'}",
        sections=[section for section in sections if section],
        verdict=[
            Sentence("info" if comparison.paired else "note", first),
            *(Sentence(level, text) for level, text in zip(levels, said, strict=False)),
            *left_out,
        ],
        footer="Written by bnnmcmc compare.",
    )


def scores(comparison: Comparison) -> Section:
    """Return the section on the scores: differences drawn, scores in a table."""
    columns = [Column("run", text=True)]
    for name in comparison.results:
        label, wanted = SCORES[name]
        better = "higher" if wanted == "high" else "lower"
        columns += [
            Column(label, f"with its standard error over test rows; {better} is better"),
            Column("less the best", f"{label} less the best run's, with its standard error"),
            Column("standing", "best, a tie with the best, or worse", text=True),
        ]
    rows = []
    for i, candidate in enumerate(comparison.candidates):
        cells = [Cell(candidate.label, classes="text")]
        for results in comparison.results.values():
            cells += _score_cells(results[i])
        rows.append(cells)
    plots = [
        _differences(comparison, name)
        for name, best in comparison.best.items()
        if best >= 0 and len(comparison.candidates) <= MAX_DRAWN
    ]
    note = "Targets in their own units."
    table = Table(columns, rows, note=note, sortable=True)
    return Section("scores", "Scores", plots=laid_out(plots), tables=[table], explained=EXPLAINED)


def _score_cells(result: Result) -> list[Cell]:
    gap = "–"
    if result.mark and result.mark != "best":
        gap = with_error(result.difference, result.difference_error)
        gap = ("+" if result.difference > 0 else "") + gap + ("" if result.paired else " unpaired")
    classes = {"best": "best", "tie": "tie", "worse": "", "": "bad"}[result.mark]
    return [
        Cell(with_error(result.value, result.error), str(result.value), classes),
        Cell(gap, str(result.difference)),
        Cell(WORDS[result.mark], classes="text"),
    ]


def _differences(comparison: Comparison, name: str) -> Plot:
    """Draw each run's difference to the best one, with two standard errors."""
    label, wanted = SCORES[name]
    results = comparison.results[name]
    names = [candidate.label for candidate in comparison.candidates]

    def draw(ax):
        for i, result in enumerate(reversed(results)):
            if not result.mark:
                continue
            colour = COLOURS["member" if result.mark == "worse" else "posterior"]
            error = 0.0 if result.mark == "best" else TIE * result.difference_error
            ends = [result.difference - error, result.difference + error]
            ax.plot(ends, [i, i], color=colour, lw=2, alpha=0.6)
            ax.plot([result.difference], [i], "o", ms=6, mew=0, color=colour)
        ax.axvline(0, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        ax.set_yticks(range(len(names)), [_short(text) for text in reversed(names)])
        ax.set_ylim(-0.6, len(names) - 0.4)
        ax.set(xlabel=f"{label} less the best run's")

    worse = sum(result.mark == "worse" for result in results)
    ties = sum(result.mark == "tie" for result in results)
    better = "left" if wanted == "high" else "right"
    verb = "is" if worse == 1 else "are"
    takeaway = (
        f"{ties} of {len(results) - 1} others cannot be told from the best; {worse} {verb} worse "
        f"(farther to the {better})."
    )
    alt = f"Difference in {label} to the best run, with two standard errors, for each run."
    height = max(2.0, 1.0 + 0.32 * len(names))
    title = f"{label[0].upper()}{label[1:]}"
    return Plot(title, takeaway, alt, f"difference-{name}", draw, False, height)


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def convergence(comparison: Comparison) -> Section:
    """Return the section on cost and convergence."""
    columns = [
        Column("run", text=True),
        Column("seconds", "of all stages"),
        Column("gradients", "while sampling, all chains together"),
        Column("draws", "per chain"),
        Column("chains ok"),
        Column("ESS", "independent draws that all draws are worth, for a typical prediction"),
        Column("ESS per second"),
        Column("R-hat", "of the predictions across chains, median over predictions"),
        Column("verdict", "of the run on itself", text=True),
    ]
    rows = []
    for candidate in comparison.candidates:
        found = candidate.convergence
        ess = found["ess"]
        speed = ess / candidate.seconds if _finite(ess) and candidate.seconds else None
        ok = "–" if found["ok"] is None else f"{found['ok']} of {found['chains']}"
        bad = found["ok"] is not None and found["ok"] < (found["chains"] or 0)
        verdict = (found["verdict"] or "–").split(". ")[0]
        rows.append(
            [
                Cell(candidate.label, classes="text"),
                Cell(duration(candidate.seconds), str(candidate.seconds)),
                _number(candidate.gradients),
                _number(found["draws"]),
                Cell(ok, "" if found["ok"] is None else str(found["ok"]), "bad" if bad else ""),
                _number(round(ess) if _finite(ess) else ess),
                _number(speed),
                _number(found["rhat"]),
                Cell(verdict, classes="text wrap"),
            ]
        )
    said = [fastest(comparison.candidates), trouble(comparison.candidates)]
    tables = [Table(columns, rows, sortable=True)]
    return Section("cost", "Cost and convergence", takeaways=said, tables=tables)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> Cell:
    return Cell(number(value), "" if value is None else str(value))


def fastest(candidates: Sequence[Candidate]) -> Sentence:
    """Say which run made most independent draws per second, and how far apart they are.

    Parameters
    ----------
    candidates : sequence of Candidate
    """
    speeds = {
        c.label: c.convergence["ess"] / c.seconds
        for c in candidates
        if _finite(c.convergence["ess"]) and c.seconds
    }
    if len(speeds) < 2:
        return Sentence("info", "Effective draws per second are known of fewer than two runs.")
    best = max(speeds, key=lambda label: speeds[label])
    ratio = speeds[best] / max(min(speeds.values()), 1e-12)
    if ratio < 1.5:
        return Sentence("info", "All runs make about as many effective draws per second.")
    return Sentence(
        "info",
        f"{best} makes most effective draws per second ({number(speeds[best])}), {number(ratio)} "
        "times as many as the slowest.",
    )


def trouble(candidates: Sequence[Candidate]) -> Sentence:
    """Say which runs have chains that are not ok, or chains that disagree.

    Parameters
    ----------
    candidates : sequence of Candidate
    """
    bad = []
    for candidate in candidates:
        found = candidate.convergence
        if found["ok"] is not None and found["ok"] < (found["chains"] or 0):
            bad.append(
                f"{candidate.label} ({plural(found['chains'] - found['ok'], 'chain')} not ok)"
            )
        elif (found["verdict"] or "").startswith("not converged"):
            bad.append(f"{candidate.label} (not converged)")
    if not bad:
        return Sentence("good", "No run has failed chains or says that it has not converged.")
    return Sentence("note", f"To be read with care: {', '.join(bad)}.")


def settings(comparison: Comparison) -> Section:
    """Return the section on the settings that differ."""
    found = comparison.settings
    if not found:
        said = Sentence("note", "All settings are the same: what differs is chance, or the code.")
        return Section("settings", "Settings", takeaways=[said])
    columns = [Column("run", text=True), *(Column(name, text=True) for name in found)]
    rows = [
        [
            Cell(candidate.label, classes="text"),
            *(Cell(_setting(values[i]), classes="text") for values in found.values()),
        ]
        for i, candidate in enumerate(comparison.candidates)
    ]
    said = Sentence("info", f"The runs differ in {', '.join(found)}.")
    tables = [Table(columns, rows, sortable=True)]
    return Section("settings", "Settings that differ", takeaways=[said], tables=tables)


def _setting(value: Any) -> str:
    if value is None:
        return "–"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
