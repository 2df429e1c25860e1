"""Runs side by side: scores with standard errors, paired differences, cost. NumPy only.

Scores are in the targets' own units, so that runs with another scaling can be compared.
"""

import csv
import json
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnmcmc.errors import InputError
from bnnmcmc.metrics import brier_terms, interval_terms, mean_score
from bnnmcmc.store import read_arrays, read_manifest

# A difference within so many standard errors is told as a tie.
TIE = 2.0
INTERVAL = 0.9
# Score -> label, and the direction that is better.
SCORES = {
    "lppd": ("LPPD", "high"),
    "rmse": ("RMSE", "low"),
    "interval_score": (f"interval score {100 * INTERVAL:.0f} %", "low"),
    "accuracy": ("accuracy", "high"),
    "brier": ("Brier score", "low"),
}
# Not what was asked for, but where it was run, or what was chosen for it.
IGNORED = ("run.", "data.split.train_rows", "data.split.validation_rows", "data.split.test_rows")


@dataclass(frozen=True)
class Candidate:
    """One run that is compared.

    Parameters
    ----------
    folder : Path
    label : str
        What tells the folder from the others.
    manifest : dict
    settings : dict
        Of config.toml, flat: "sampler.kernel" -> value.
    rows : numpy int array (rows,)
        Numbers of the test rows in the table, in rising order.
    y : numpy array (rows, targets) or (rows,)
    terms : dict
        Score -> numpy array (rows,): what the score is the mean of (of the RMSE: the squares).
    convergence : dict
        "chains", "ok", "ess", "rhat", "verdict"; None for what is not known.
    seconds : float
    gradients : float or None
        While sampling, all chains together.
    """

    folder: Path
    label: str
    manifest: dict[str, Any]
    settings: dict[str, Any]
    rows: np.ndarray
    y: np.ndarray
    terms: dict[str, np.ndarray]
    convergence: dict[str, Any]
    seconds: float
    gradients: float | None


class Result(NamedTuple):
    """A score of one run, and how far it is from the best run's.

    Parameters
    ----------
    value, error : float
        The score, and its standard error over test rows.
    difference, difference_error : float
        This run's less the best one's, paired where both have the same test rows; 0 and NaN for
        the best one itself.
    paired : bool
    mark : str
        "best", "tie" (within two standard errors of the best), "worse", or "" if it cannot be said.
    """

    value: float
    error: float
    difference: float
    difference_error: float
    paired: bool
    mark: str


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Parameters
    ----------
    candidates : list of Candidate
    left_out : dict
        Folder -> why it could not be compared.
    results : dict
        Score -> one `Result` per candidate; best first in ``best``.
    best : dict
        Score -> number of the best candidate, -1 if no value is finite.
    groups : list of lists of int
        Candidates with the same test rows.
    settings : dict
        Setting -> values by candidate (None: not set), of the settings that differ.
    """

    candidates: list[Candidate]
    left_out: dict[str, str]
    results: dict[str, list[Result]]
    best: dict[str, int]
    groups: list[list[int]]
    settings: dict[str, list[Any]]

    @property
    def paired(self) -> bool:
        """Whether all runs have the same test rows."""
        return len(self.groups) == 1

    def _repr_html_(self) -> str:
        """Show the scores, with what is best and what is a tie, in a notebook."""
        from bnnmcmc.notebook import MAX_ROWS, html_table, paragraphs

        heads = ["run", *(SCORES[name][0] for name in self.results), "ESS", "R-hat", "seconds"]
        rows = []
        for i, candidate in enumerate(self.candidates[:MAX_ROWS]):
            cells = [_shown(results[i], markup=False) for results in self.results.values()]
            found = candidate.convergence
            ends = (found["ess"], found["rhat"], candidate.seconds)
            rows.append([candidate.label, *cells, *map(_few_digits, ends)])
        more = ""
        if len(rows) < len(self.candidates):
            more = f"The first {len(rows)} of {len(self.candidates)} runs."
        return html_table("Runs side by side", heads, rows, more) + paragraphs(say(self))


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare the scores of runs on their test rows.

    Parameters
    ----------
    folders : sequence of Path
        Run folders; those without test predictions are left out, with the reason.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        Fewer than two runs that can be compared, one given twice, or runs of different tables.
    """
    found: list[Candidate] = []
    left_out: dict[str, str] = {}
    seen: dict[Path, Path] = {}
    labels = _labels([Path(folder) for folder in folders])
    for folder, label in zip(map(Path, folders), labels, strict=True):
        real = folder.resolve()
        if real in seen:
            raise InputError(f"compare: {folder} is given twice (also as {seen[real]})")
        seen[real] = folder
        try:
            found.append(read_candidate(folder, label))
        except InputError as error:
            left_out[str(folder)] = str(error)
    if len(found) < 2:
        reasons = "".join(f"\n  {why}" for why in left_out.values())
        raise InputError(
            f"compare: found {len(found)} run{'' if len(found) == 1 else 's'} to compare, expected "
            f"at least two{reasons}"
        )
    for other in found[1:]:
        _check_same_table(found[0], other)
    groups = _groups(found)
    results, best = {}, {}
    for name in SCORES:
        if all(name in candidate.terms for candidate in found):
            results[name], best[name] = _judged(name, found, groups)
    settings = _differing(found)
    return Comparison(found, left_out, results, best, groups, settings)


def _labels(folders: list[Path]) -> list[str]:
    """Return the folders' names from where they part."""
    whole = [folder.absolute() for folder in folders]
    try:
        common = Path(os.path.commonpath([path.parent for path in whole]))
    except ValueError:
        return [str(folder) for folder in folders]
    return [str(path.relative_to(common)) for path in whole]


def read_candidate(folder: Path, label: str = "") -> Candidate:
    """Read what a comparison needs of a run folder.

    Parameters
    ----------
    folder : Path
    label : str
        The folder's name if not given.

    Raises
    ------
    InputError
        Not a run folder, no test predictions, or damaged ones.
    """
    manifest = read_manifest(folder)
    path = folder / "predictions.npz"
    if not path.is_file():
        none = (manifest.get("data") or {}).get("test") == 0
        advice = "it has no test part" if none else f"make them with: bnnmcmc report {folder}"
        raise InputError(f"{folder}: has no predictions of test rows (predictions.npz); {advice}")
    found = read_arrays(path)
    try:
        order = np.argsort(found["row"])
        rows, y = found["row"][order], found["y"][order]
        terms = {name: values[order] for name, values in _terms(found).items()}
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path}: does not hold what it should ({error!r})") from error
    blocks = manifest.get("blocks") or []
    return Candidate(
        folder=folder,
        label=label or folder.name,
        manifest=manifest,
        settings=_settings(folder),
        rows=rows,
        y=y,
        terms=terms,
        convergence=_convergence(folder, manifest, sum(block["count"] for block in blocks)),
        seconds=float(sum((manifest.get("seconds") or {}).values())),
        gradients=_gradients(folder),
    )


def _terms(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each row's part of every score."""
    y = found["y"]
    terms = {}
    if "log_density_posterior" in found:
        terms["lppd"] = np.asarray(found["log_density_posterior"], np.float64)
    if "probabilities" in found:
        p = np.asarray(found["probabilities"], np.float64)
        true = np.arange(p.shape[1]) == y[:, None]
        unknown = np.isnan(p).any(axis=1)
        with np.errstate(divide="ignore"):
            terms.setdefault("lppd", np.log(p[true]))
        terms["accuracy"] = np.where(unknown, np.nan, p.argmax(axis=1) == y)
        terms["brier"] = brier_terms(y, p)
        return terms
    y = np.asarray(y, np.float64)
    terms["rmse"] = np.square(y - found["mean"]).mean(axis=1)
    low, high = (_quantile(found, (1 + sign * INTERVAL) / 2) for sign in (-1, 1))
    if low is not None and high is not None:
        terms["interval_score"] = interval_terms(y, low, high, INTERVAL)
    return terms


def _quantile(found: dict[str, np.ndarray], level: float) -> np.ndarray | None:
    at = np.flatnonzero(np.isclose(found["levels"], level))
    return found["quantiles"][at[0]] if len(at) else None


def _settings(folder: Path) -> dict[str, Any]:
    try:
        text = (folder / "config.toml").read_text(encoding="utf-8")
        return dict(_flat(tomllib.loads(text)))
    except (OSError, ValueError):
        return {}


def _flat(section: dict[str, Any], prefix: str = ""):
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _convergence(folder: Path, manifest: dict[str, Any], draws: int) -> dict[str, Any]:
    status = manifest.get("status") or []
    try:
        found = json.loads((folder / "diagnostics.json").read_text())
    except (OSError, ValueError):
        found = {}
    said = [text for text in found.get("verdict") or [] if text.startswith("Verdict:")]
    return {
        "chains": manifest.get("chains"),
        "draws": draws,
        "ok": sum(chain["status"] == "ok" for chain in status) if status else None,
        "ess": found.get("ess_function_total_median"),
        "rhat": found.get("rhat_function_across_median"),
        "verdict": said[0].removeprefix("Verdict: ") if said else None,
    }


def _gradients(folder: Path) -> float | None:
    try:
        with open(folder / "diagnostics.csv", newline="", encoding="utf-8") as file:
            counts = [row.get("gradients") for row in csv.DictReader(file)]
        return sum(float(count) for count in counts if count) or None
    except (OSError, ValueError):
        return None


def _check_same_table(first: Candidate, other: Candidate) -> None:
    """Raise InputError if two runs do not predict the same targets of the same table."""

    def told(candidate: Candidate) -> str:
        data = candidate.manifest.get("data") or {}
        return (
            f"{candidate.label}: {data.get('name')}, {data.get('rows')} rows, "
            f"{candidate.manifest.get('task')} of {', '.join(map(str, data.get('targets') or []))}"
        )

    refused = f"compare: the runs are of different tables; {told(first)}, but {told(other)}"
    one, two = (c.manifest.get("data") or {} for c in (first, other))
    kinds = ("rows", "targets", "classes")
    if any(one.get(k) != two.get(k) for k in kinds) or (
        first.manifest.get("task") != other.manifest.get("task")
    ):
        raise InputError(refused)
    common, here, there = np.intersect1d(
        first.rows, other.rows, assume_unique=True, return_indices=True
    )
    if len(common) and not np.allclose(first.y[here], other.y[there], rtol=1e-4, atol=1e-6):
        raise InputError(f"{refused}: their targets differ in rows that both have")


def _groups(candidates: list[Candidate]) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for i, candidate in enumerate(candidates):
        groups.setdefault(candidate.rows.astype("<i8").tobytes(), []).append(i)
    return list(groups.values())


def _judged(
    name: str, candidates: list[Candidate], groups: list[list[int]]
) -> tuple[list[Result], int]:
    """Return the results of one score, and the number of the best run."""
    sign = 1.0 if SCORES[name][1] == "high" else -1.0
    scored = [score(name, candidate.terms[name]) for candidate in candidates]
    quality = [sign * value if math.isfinite(value) else -math.inf for value, _ in scored]
    best = int(np.argmax(quality)) if max(quality) > -math.inf else -1
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    results = []
    for i, (value, error) in enumerate(scored):
        if best < 0 or not math.isfinite(value):
            results.append(Result(value, error, math.nan, math.nan, False, ""))
            continue
        paired = group_of[i] == group_of[best]
        if i == best:
            results.append(Result(value, error, 0.0, math.nan, True, "best"))
            continue
        gap = value - scored[best][0]
        if paired:
            spread = paired_error(name, candidates[i].terms[name], candidates[best].terms[name])
        else:
            spread = math.hypot(error, scored[best][1])
        tied = gap == 0 or not abs(gap) > TIE * spread
        results.append(Result(value, error, gap, spread, paired, "tie" if tied else "worse"))
    return results, best


def score(name: str, terms: np.ndarray) -> tuple[float, float]:
    """Return a score and its standard error over rows.

    Parameters
    ----------
    name : str
        One of `SCORES`.
    terms : numpy array (rows,)

    Returns
    -------
    tuple of float
        Of the RMSE, the error is that of the mean square over twice the RMSE (delta method).
    """
    mean, error = mean_score(terms)
    if name != "rmse":
        return mean, error
    root = math.sqrt(mean)
    return root, error / (2 * root) if root else 0.0


def paired_error(name: str, terms: np.ndarray, others: np.ndarray) -> float:
    """Return the standard error of the difference of two scores on the same rows."""
    if name == "rmse":
        roots = [math.sqrt(float(values.mean())) for values in (terms, others)]
        if not all(roots):
            return 0.0
        return mean_score(terms / (2 * roots[0]) - others / (2 * roots[1])).error
    with np.errstate(invalid="ignore"):
        return mean_score(terms - others).error


def _differing(candidates: list[Candidate]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(name for c in candidates for name in c.settings))
    found = {
        name: [candidate.settings.get(name) for candidate in candidates]
        for name in names
        if not (name.startswith(IGNORED) and name != "run.seed")
    }
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def say(comparison: Comparison) -> list[str]:
    """Say in sentences which run is best by each score, and which ones tie with it.

    Parameters
    ----------
    comparison : Comparison

    Returns
    -------
    list of str
        First what was compared, then a sentence for each score.
    """
    runs = comparison.candidates
    rows = sorted({len(candidate.rows) for candidate in runs})
    counted = f"{rows[0]:,}" if len(rows) == 1 else f"{rows[0]:,} to {rows[-1]:,}"
    if comparison.paired:
        said = [
            f"{len(runs)} runs on the same {counted} test rows: differences are paired, row by row."
        ]
    else:
        said = [
            f"The runs have different test rows ({len(comparison.groups)} sets, {counted} rows): "
            "between sets, differences are not paired, their standard errors are larger, and they "
            "hold the luck of the split as well."
        ]
    for name, results in comparison.results.items():
        said.append(_say_score(comparison, name, results))
    if "lppd" not in comparison.results:
        lacking = [c.label for c in runs if "lppd" not in c.terms]
        said.append(
            f"No LPPD: {_listed(lacking)} came from an earlier version, which kept no densities "
            "of single rows."
        )
    return said


def _say_score(comparison: Comparison, name: str, results: list[Result]) -> str:
    label, best = SCORES[name][0], comparison.best[name]
    label = label[0].upper() + label[1:]
    if best < 0:
        return f"{label}: no run has a finite value."
    names = [candidate.label for candidate in comparison.candidates]
    tied = [names[i] for i, result in enumerate(results) if result.mark == "tie"]
    worse = [names[i] for i, result in enumerate(results) if result.mark == "worse"]
    unknown = [names[i] for i, result in enumerate(results) if not result.mark]
    value = f"{names[best]} is best ({results[best].value:.4g})".replace("(-", "(−")
    if tied and not worse:
        text = f"{label}: a tie; {value}, but no other is farther than two standard errors from it."
    elif tied:
        text = (
            f"{label}: {value}; {_listed(tied)} {'ties' if len(tied) == 1 else 'tie'} with it "
            f"(within two standard errors), {_listed(worse)} "
            f"{'is' if len(worse) == 1 else 'are'} worse."
        )
    elif worse:
        text = f"{label}: {value}, by more than two standard errors of every other."
    else:
        text = f"{label}: {value}."
    if unknown:
        text += f" Not finite: {_listed(unknown)}."
    return text


def _listed(names: list[str], most: int = 5) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the runs side by side, a line each, and what the scores say.

    Parameters
    ----------
    console : Console
    comparison : Comparison
        The best of each score is bold, what ties with it is marked ``=``.
    """
    if not console.is_terminal:
        console.width = max(console.width, 140)
    table = Table(
        title="Runs side by side (± standard error over test rows; in brackets: less the best)",
        title_justify="left",
        title_style="bold",
        box=None,
    )
    table.add_column("run", overflow="fold")
    for name in comparison.results:
        arrow = "↑" if SCORES[name][1] == "high" else "↓"
        table.add_column(f"{SCORES[name][0]} {arrow}", justify="right")
    for title in ("chains ok", "ESS", "R-hat", "seconds"):
        table.add_column(title, justify="right")
    for i, candidate in enumerate(comparison.candidates):
        found = candidate.convergence
        ok = "-" if found["ok"] is None else f"{found['ok']}/{found['chains']}"
        table.add_row(
            escape(candidate.label),
            *(_shown(results[i]) for results in comparison.results.values()),
            ok,
            *(_few_digits(value) for value in (found["ess"], found["rhat"], candidate.seconds)),
        )
    console.print(table)
    for text in say(comparison):
        console.print(f"• {escape(text)}", highlight=False)
    for reason in comparison.left_out.values():
        console.print(f"[yellow]left out[/]  {escape(reason)}", highlight=False)


def _shown(result: Result, markup: bool = True) -> str:
    if not result.mark:
        return f"{result.value:.4g}"
    text = f"{result.value:.4g} ± {result.error:.2g}"
    if result.mark == "best":
        return f"[bold]{text}[/]" if markup else f"{text} (best)"
    unpaired = "" if result.paired else " unpaired"
    tied = " =" if result.mark == "tie" else ""
    return f"{text} ({result.difference:+.2g} ± {result.difference_error:.1g}{unpaired}){tied}"


def _few_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
