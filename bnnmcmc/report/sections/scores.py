"""The scores of best member, deep ensemble and posterior, side by side."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bnnmcmc.comparison import TIE
from bnnmcmc.metrics import mean_score
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.text import number, percent, plural, same_decimals, with_error

MODELS = {"best_member": "Best member", "ensemble": "Deep ensemble", "posterior": "Posterior"}
# Score -> label, and whether to want it high, low, or (coverage) at its nominal value.
METRICS: dict[str, tuple[str, str]] = {
    "lppd": ("LPPD", "high"),
    "nll_gaussian": ("Gaussian NLL", "low"),
    "rmse": ("RMSE", "low"),
    "crps": ("CRPS", "low"),
    "accuracy": ("Accuracy", "high"),
    "brier": ("Brier score", "low"),
    "ece": ("Calibration error (ECE)", "low"),
}
DIRECTIONS = {"high": "↑ higher is better", "low": "↓ lower is better"}
EXPLAINED = {
    "lppd": Explanation(
        "LPPD",
        "Mean log pointwise predictive density: how much density the pooled predictive puts on "
        "what was observed, in nats per row. A row predicted e times as densely adds one.",
        "(1/n) Σᵢ log( (1/S) Σₛ p(yᵢ | xᵢ, θₛ) )",
        "Gelman et al. (2013), Bayesian Data Analysis, Eq. 7.5, divided by the rows",
    ),
    "nll_gaussian": Explanation(
        "Gaussian NLL",
        "Negative log-density of a Gaussian with the predictive's mean and variance.",
        "(1/n) Σᵢ ½ ( log 2πvᵢ + (yᵢ − mᵢ)² / vᵢ )",
        "Gneiting and Raftery (2007), JASA 102, section 4.1",
    ),
    "rmse": Explanation(
        "RMSE", "Root of the mean squared error of the predictive mean.", "√( (1/n) Σᵢ (yᵢ − mᵢ)² )"
    ),
    "crps": Explanation(
        "CRPS",
        "Continuous ranked probability score: the distance of the predictive distribution from "
        "the observation, in the target's unit; the absolute error if there is no spread.",
        "E|X − y| − ½ E|X − X′|",
        "Gneiting and Raftery (2007), JASA 102, Eq. 21; Ferro (2014), QJRMS 140",
    ),
    "accuracy": Explanation("Accuracy", "Share of rows whose most probable class is the true one."),
    "brier": Explanation(
        "Brier score",
        "Squared distance of the class probabilities from the class observed.",
        "(1/n) Σᵢ Σ꜀ (pᵢ꜀ − 1[yᵢ = c])²",
        "Brier (1950), Monthly Weather Review 78, Eq. 2",
    ),
    "ece": Explanation(
        "ECE",
        "Expected calibration error: the gap between confidence and accuracy, over bins of "
        "confidence.",
        "Σₖ (nₖ/n) | accuracyₖ − confidenceₖ |",
        "Guo et al. (2017), arXiv 1706.04599, Eq. 3",
    ),
}


def section(run: RunFolder) -> Section | None:
    """Return the section, None without scores."""
    test = (run.metrics or {}).get("test")
    if not test:
        return None
    assert run.metrics is not None
    units = run.metrics.get("test_target_units")
    errors = run.metrics.get("standard_errors") or {}
    names = list(dict.fromkeys(n for model in MODELS for n in test.get(model) or {}))
    intervals = [n for n in names if n.startswith("coverage_")]
    plain = [n for n in names if n not in intervals]
    rows: list[list[Cell]] = []
    for title, scores, unit, chosen in (
        ("Standardised target" if units else "", test, "standardised", plain),
        ("In the target's own units", units, "target", plain),
        ("Coverage of the intervals", test, "standardised", intervals),
    ):
        if scores and chosen:
            rows += [[Cell(title, classes="group")]] if title else []
            of = errors.get(unit) or {}
            rows += [_row(name, scores, of.get(name, math.nan)) for name in chosen]
    columns = [Column("Score"), *(Column(label) for label in MODELS.values())]
    return Section(
        "scores",
        "Scores on held-out data",
        takeaways=paired_leads(run),
        tables=[Table(columns, rows, note=_note(run), headed=True)],
        explained=[EXPLAINED[name] for name in plain if name in EXPLAINED],
    )


def paired_leads(run: RunFolder) -> list[Sentence]:
    """Say whether the difference to ensemble and best member is more than chance.

    Parameters
    ----------
    run : RunFolder
        Without densities of single rows there is nothing to say.
    """
    found = run.predictions or {}
    said = []
    for name in ("ensemble", "best_member"):
        try:
            gap = found["log_density_posterior"] - found[f"log_density_{name}"]
        except (KeyError, ValueError):  # the section on predictions says what is wrong
            continue
        said.append(lead(gap, MODELS[name].lower()))
    return said


def lead(gap: np.ndarray, other: str) -> Sentence:
    """Say whether the posterior is better than another model, by paired rows.

    Parameters
    ----------
    gap : numpy array (rows,)
        Log predictive density of each row, the posterior's less the other's.
    other : str
    """
    mean, error = mean_score(gap)
    if not math.isfinite(mean):
        return Sentence("bad", f"Against the {other}, the LPPD cannot be compared: not finite.")
    gained = f"{with_error(mean, error)} nats per row (paired over {plural(len(gap), 'row')})"
    if not math.isfinite(error):
        return Sentence("info", f"Against the {other}: {gained}; one row shows nothing.")
    if mean > TIE * error:
        return Sentence("good", f"Better than the {other}, by {gained}: more than chance.")
    if mean < -TIE * error:
        return Sentence("bad", f"Worse than the {other}, by {gained}: more than chance.")
    return Sentence("note", f"Not told apart from the {other}: {gained}.")


def _row(name: str, scores: dict[str, dict[str, float]], error: float) -> list[Cell]:
    """Return a row: the score of each model, the posterior's with its standard error."""
    values = [(scores.get(model) or {}).get(name) for model in MODELS]
    label, wanted = METRICS.get(name, (name, ""))
    direction = DIRECTIONS.get(wanted, "")
    write: Callable[[Any], str] = same_decimals(values)
    if name.startswith("coverage_"):
        wanted = name.removeprefix("coverage_")
        label, direction = f"{wanted} % intervals", f"→ {wanted} % is right"
        write = _share
    losses = [_loss(value, wanted) for value in values]
    best = min(losses)
    cells = []
    for model, value, loss in zip(MODELS, values, losses, strict=True):
        text = write(value)
        if model == "posterior" and value is not None and math.isfinite(value + error):
            # The space after the sign does not break.
            text = f"{text} ±\N{NO-BREAK SPACE}{_as_error(write, error)}"
        cells.append(Cell(text, classes="best" if math.isfinite(best) and loss == best else ""))
    return [Cell(f"{label} {direction}".strip()), *cells]


def _as_error(write: Callable[[Any], str], error: float) -> str:
    """Write a standard error to as many decimals as its row, the unit but once."""
    return write(error).removesuffix(" %")


def _share(value: float | None) -> str:
    return number(value) if value is None or not math.isfinite(value) else percent(value)


def _loss(value: float | None, wanted: str) -> float:
    """Return what the best of a row has least of; a NaN is never best."""
    if value is None or not wanted or not math.isfinite(value):
        return math.inf
    if wanted in DIRECTIONS:
        return -value if wanted == "high" else value
    return round(abs(value - float(wanted) / 100), 9)


def _note(run: RunFolder) -> str:
    member = (run.metrics or {}).get("best_member")
    text = f"On {plural(run.test_rows, 'test row')}; the best value of each row is shaded. "
    if member is not None:
        text += f"The best member is number {member}. "
    if (run.metrics or {}).get("standard_errors"):
        text += "After ± is the posterior's standard error. "
    if paired_leads(run) or (run.metrics or {}).get("standard_errors"):
        return text + "Standard errors are over these rows; another split or seed adds to them."
    return text + (
        "One split and one seed: the scores carry no error bar; small differences may be chance."
    )
