"""The page: reads a run folder, finished or not, and writes report.html."""

import csv
import json
import math
import shlex
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
import zarr
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bnnmcmc.report import figures, modes
from bnnmcmc.report.figures import Plot, number, percent, plural
from bnnmcmc.store import read_arrays, read_manifest, write_atomic
from bnnmcmc.targets import is_met, say_outcome, target_of

# More chains than this: the table shows the worst ten, and quantiles over all.
MAX_CHAIN_ROWS = 30
WORST_CHAINS = 10
MAX_TARGETS = 4
MAX_LISTED = 20
# Sommer et al. (2024) call a chain's R-hat acceptable up to here.
RHAT_LIMIT = 1.1

STAGE_NAMES = {
    "compile": "compiling",
    "ensemble": "ensemble training",
    "warmup": "warm-up",
    "sampling": "sampling",
    "results": "prediction and scores",
}
MODELS = ("best_member", "ensemble", "posterior")
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
# Column of diagnostics.csv -> heading, meaning.
COLUMNS = {
    "chain": ("chain", "number of the chain, and of the ensemble member it started from"),
    "status": ("status", "ok, or what went wrong"),
    "draws": ("draws", "kept draws of the chain"),
    "log_density": ("log-density", "unnormalised log-posterior, mean over draws"),
    "log_density_drift": (
        "drift",
        "mean log-density of the last quarter of the draws minus that of the first, in standard "
        "deviations within the chain; a straight climb gives 2.6",
    ),
    "acceptance_rate": ("accepted", "mean acceptance rate of the kernel"),
    "energy_error": ("EEVPD", "mean squared energy error of a step, per dimension"),
    "divergences": ("diverged", "steps that left the finite numbers or lost the energy"),
    "tree_depth_max": ("max depth", "deepest NUTS tree, in doublings"),
    "step_size": ("step size", "step size after the warm-up"),
    "gradients": ("gradients", "gradient evaluations while sampling"),
    "rows": ("rows", "rows looked at while sampling, each as often as it was (minibatch kernels)"),
    "ess_log_density": ("ESS log-density", "effective sample size of the log-density"),
    "ess_function_median": (
        "ESS function",
        "effective sample size of the predictions, median over predictions",
    ),
    "ess_function_min": ("ESS function min", "the same, smallest over predictions"),
    "ess_function_tail": (
        "tail ESS",
        "the smaller effective sample size of the predictions' 5 % and 95 % quantiles, median over "
        "predictions",
    ),
    "ess_per_gradient": (
        "ESS per gradient",
        "effective sample size of the predictions by gradients while sampling",
    ),
    "rhat_function_median": (
        "R-hat function",
        "chain-wise R-hat of the predictions (the chain split into parts), median over "
        f"predictions; 1 when the parts agree, coloured above {RHAT_LIMIT}",
    ),
    "rhat_function_max": ("R-hat function max", "the same, largest over predictions"),
    "rhat_weights_max": (
        "R-hat weights max",
        "chain-wise R-hat of the weights, largest over weights; mixing in the weights is not "
        "needed for good predictions",
    ),
    "rhat_log_density": ("R-hat log-density", "chain-wise R-hat of the log-density"),
    "sentence": ("what happened", "the chain's status in words"),
}


class Sentence(NamedTuple):
    """One sentence of the verdict; level is good, bad, note or info."""

    level: str
    text: str


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds; None for what is missing.

    Parameters
    ----------
    folder : Path
    manifest : dict
    config_text : str or None
    config : dict
        Empty if config.toml is missing.
    metrics, diagnostics : dict or None
    chains : list of dict or None
        Rows of diagnostics.csv; an empty cell is None.
    history, warmup, predictions : dict of numpy arrays or None
    log_density : numpy array (chain, draw) or None
        The committed draws' statistics.
    missing : list of str
        What a finished run has and this one lacks, or has damaged.
    """

    folder: Path
    manifest: dict[str, Any]
    config_text: str | None
    config: dict[str, Any]
    metrics: dict[str, Any] | None
    diagnostics: dict[str, Any] | None
    chains: list[dict[str, Any]] | None
    history: dict[str, np.ndarray] | None
    warmup: dict[str, np.ndarray] | None
    predictions: dict[str, np.ndarray] | None
    log_density: np.ndarray | None
    missing: list[str]

    @property
    def draws(self) -> int:
        """Draws per chain on disk."""
        return sum(block["count"] for block in self.manifest.get("blocks") or [])

    @property
    def failed(self) -> list[int]:
        """Chains whose status is not ok."""
        status = self.manifest.get("status") or self.chains or []
        return [int(c["chain"]) for c in status if c["status"] != "ok"]


def write_report(folder: Path) -> Path:
    """Write the report of a run, finished or not.

    Parameters
    ----------
    folder : Path
        A run folder. Whatever else than the manifest is missing or damaged is named in the report.

    Returns
    -------
    Path
        ``folder/report.html``: one file that loads nothing else.

    Raises
    ------
    InputError
        Not a run folder, a damaged manifest, or the report cannot be written.
    """
    run = read_run(Path(folder))
    path = run.folder / "report.html"
    write_atomic(path, render(run).encode())
    return path


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises
    ------
    InputError
        Not a run folder, or a damaged manifest.
    """
    manifest = read_manifest(folder)
    missing: list[str] = []
    unwanted: set[str] = set()
    if manifest.get("warmup") == 0:
        unwanted |= {"warmup.npz"}
    if (manifest.get("data") or {}).get("test") == 0:
        unwanted |= {"metrics.json", "predictions.npz"}

    def read(name: str, what: str, reader: Callable[[Path], Any]) -> Any:
        path = folder / name
        if name in unwanted:
            return None
        if not path.exists():
            missing.append(f"{name} ({what})")
            return None
        try:
            return reader(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            missing.append(f"{name} ({what}; damaged: {error})")
            return None

    text = read("config.toml", "settings", lambda path: path.read_text(encoding="utf-8"))
    config = read("config.toml", "settings", lambda path: tomllib.loads(text)) if text else None
    draws = sum(block["count"] for block in manifest.get("blocks") or [])
    return RunFolder(
        folder=folder,
        manifest=manifest,
        config_text=text,
        config=config or {},
        history=read("ensemble/history.npz", "training curves", read_arrays),
        warmup=read("warmup.npz", "warm-up statistics", read_arrays),
        log_density=read("stats", "statistics of the draws", lambda path: _trace(path, draws)),
        predictions=read("predictions.npz", "test predictions", read_arrays),
        metrics=read("metrics.json", "scores", lambda path: json.loads(path.read_text())),
        chains=read("diagnostics.csv", "diagnostics per chain", _read_chains),
        diagnostics=read("diagnostics.json", "diagnostics", lambda p: json.loads(p.read_text())),
        missing=missing,
    )


def _trace(path: Path, draws: int) -> np.ndarray | None:
    """Read the log-density of the committed draws."""
    stored: Any = zarr.open_group(path, mode="r")["log_density"]
    return np.asarray(stored[:, :draws]) if draws else None


def _read_chains(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)
        ]


def _cell(name: str, text: str | None) -> Any:
    if name in ("status", "sentence"):
        return text or ""
    if not text:
        return None
    value = float(text)
    return int(value) if value.is_integer() else value


def render(run: RunFolder) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    run : RunFolder
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    manifest = run.manifest
    broken: list[str] = []
    plots = all_plots(run, broken)
    seen = _modes(run, broken)
    return environment.get_template("template.html").render(
        title=manifest.get("name") or run.folder.name,
        subtitle=_subtitle(run),
        tiles=tiles(run),
        verdict=[*verdict(run), *(Sentence("bad", text) for text in broken)],
        scores=score_groups(run.metrics),
        scores_note=_scores_note(run),
        chains=chain_table(run),
        modes=seen,
        plots=plots,
        facts=facts(run),
        seconds=_seconds(manifest.get("seconds") or {}),
        settings=_settings(run),
        command=manifest.get("command"),
        version=manifest.get("bnnmcmc") or "",
        folder=run.folder.name,
    )


def _subtitle(run: RunFolder) -> str:
    manifest, data = run.manifest, run.manifest.get("data") or {}
    parts = ["Bayesian neural network"]
    if manifest.get("task"):
        parts = [f"Bayesian neural network {manifest['task']}"]
    if data.get("name"):
        parts.append(f"on {data['name']}")
    text = " ".join(parts)
    if manifest.get("created"):
        try:
            created = datetime.fromisoformat(manifest["created"])
            text += f" · {created.day} {created.strftime('%B %Y, %H:%M %Z').strip()}"
        except ValueError:
            text += f" · {manifest['created']}"
    return text


def _tests(run: RunFolder) -> dict[str, dict[str, float]]:
    return (run.metrics or {}).get("test") or {}


def _rows(run: RunFolder) -> int:
    """Return the number of test rows."""
    return int((run.metrics or {}).get("rows") or (run.manifest.get("data") or {}).get("test") or 0)


def tiles(run: RunFolder) -> list[dict[str, str]]:
    """Return the few numbers at the top of the page: label, value, detail.

    Parameters
    ----------
    run : RunFolder
    """
    found = []
    test, chains = _tests(run), run.manifest.get("chains")
    posterior, ensemble = test.get("posterior") or {}, test.get("ensemble") or {}

    def add(label: str, value: str, detail: str) -> None:
        found.append({"label": label, "value": value, "detail": detail})

    if "lppd" in posterior:
        detail = "posterior, nats per test row"
        if "lppd" in ensemble:
            detail = f"{_signed(posterior['lppd'] - ensemble['lppd'])} against the ensemble"
        add("Test LPPD", number(posterior["lppd"]), detail)
    if "coverage_90" in posterior:
        add(
            "90 % intervals cover",
            percent(posterior["coverage_90"]),
            f"of {_rows(run):,} test rows",
        )
    elif "accuracy" in posterior:
        add("Accuracy", percent(posterior["accuracy"]), f"on {_rows(run):,} test rows")
    if chains and (run.manifest.get("status") or run.chains):
        detail = "all of them" if not run.failed else f"{len(run.failed)} with a problem"
        add("Chains ok", f"{chains - len(run.failed):,} of {chains:,}", detail)
    if chains and run.draws:
        planned = run.manifest.get("draws") or run.draws
        detail = f"{run.draws:,} from each of {plural(chains, 'chain')}"
        if run.draws < planned:
            detail = f"{run.draws:,} of {planned:,} from each of {plural(chains, 'chain')}"
        add("Posterior draws", f"{chains * run.draws:,}", detail)
    return found


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(round(value, 4))


def verdict(run: RunFolder) -> list[Sentence]:
    """Say in sentences what came out of the run, the good and the bad.

    Parameters
    ----------
    run : RunFolder
    """
    sentences = _progress(run)
    test = _tests(run)
    if "posterior" in test:
        sentences += _compared(test, _rows(run))
        sentences += _calibrated(test["posterior"], _rows(run))
    sentences += _chains_said(run)
    for text in (run.diagnostics or {}).get("verdict") or []:
        if "have status ok" not in text:  # said above, with what the scores pool
            sentences.append(Sentence(_level(str(text)), str(text)))
    sentences += [Sentence("note", f"Note: {text}.") for text in run.manifest.get("notes") or []]
    if run.missing:
        level = "bad" if run.manifest.get("stage") == "done" else "note"
        sentences.append(Sentence(level, f"Missing: {', '.join(run.missing)}."))
    return sentences


def _level(text: str) -> str:
    """Return the level of a sentence of the diagnostics: the verdict's is good, a note or bad."""
    # Of others, such as too few draws: a note.
    levels = {"converged:": "good", "nearly": "good", "not": "bad"}
    words = text.removeprefix("Verdict: ").split()
    return levels.get(words[0], "note") if text.startswith("Verdict: ") and words else "info"


def _progress(run: RunFolder) -> list[Sentence]:
    manifest = run.manifest
    stage, stopped = manifest.get("stage"), manifest.get("stopped")
    planned, resume = manifest.get("draws"), f"bnnmcmc resume {shlex.quote(str(run.folder))}"
    on_disk = f"{run.draws:,} of {planned:,} draws per chain" if planned else ""
    why = f" ({stopped})" if stopped else ""
    if stage != "done":
        where = STAGE_NAMES.get(stage or "", stage or "an unknown stage")
        text = f"Unfinished: the run is in the stage “{where}”{why}"
        if run.draws and on_disk:
            text += f", with {on_disk} on disk"
        if len(manifest.get("stopped_chains") or {}) == manifest.get("chains"):
            return [Sentence("bad", f"{text}. There is no chain left to go on with.")]
        return [Sentence("note", f"{text}. To go on: {resume}")]
    if manifest.get("until") and run.draws:
        outcome, met = say_outcome(manifest), is_met(*target_of(manifest))
        if outcome and (met or run.draws >= (planned or 0)):
            return [Sentence("good" if met else "note", f"Sampling: {outcome}.")]
    if stopped or (planned and run.draws < planned):
        return [
            Sentence(
                "note",
                f"Stopped early{why}: everything here rests on {on_disk}. To go on: {resume}",
            )
        ]
    return []


def _compared(test: dict[str, dict[str, float]], rows: int) -> list[Sentence]:
    """Compare the pooled posterior with the ensemble and the best member by LPPD."""
    own = test["posterior"].get("lppd", math.nan)
    if not math.isfinite(own):
        return [Sentence("bad", "The pooled posterior cannot be scored: its LPPD is not finite.")]
    sentences = []
    differences = {}
    for name, label in (("ensemble", "the deep ensemble"), ("best_member", "the best member")):
        if name in test and "lppd" in test[name]:
            differences[label] = own - test[name]["lppd"]
    if not differences:
        return []
    beaten = [label for label, d in differences.items() if d > 0]
    level = "good" if len(beaten) == len(differences) else "bad"
    parts = [
        f"{number(abs(round(d, 4)))} nats per row {'better' if d > 0 else 'worse'} than {label}"
        if math.isfinite(d) and d != 0
        else f"{'level with' if d == 0 else 'not comparable with'} {label}"
        for label, d in differences.items()
    ]
    sentences.append(
        Sentence(
            level,
            f"The pooled posterior scores an LPPD of {number(own)} on {plural(rows, 'test row')}: "
            f"{' and '.join(parts)}.",
        )
    )
    return sentences


def _calibrated(scores: dict[str, float], rows: int) -> list[Sentence]:
    """Judge coverage (regression) or the calibration error (classification)."""
    levels = figures.coverage_levels(scores)
    if not levels or not rows:
        if "ece" in scores:
            text = f"The expected calibration error of the posterior is {percent(scores['ece'])}."
            return [Sentence("info", text)]
        return []
    names = " / ".join(map(str, levels))
    found = " / ".join(f"{100 * scores[f'coverage_{level}']:.1f}" for level in levels)
    shown = f"{names} % intervals cover {found} % of the test rows"
    deviations = {}
    for level in levels:
        p = level / 100
        # In standard errors of a share of so many rows.
        deviations[level] = (scores[f"coverage_{level}"] - p) / math.sqrt(p * (1 - p) / rows)
    if not all(map(math.isfinite, deviations.values())):
        return [Sentence("bad", f"Coverage is not finite: the {shown}.")]
    narrow = [level for level, z in deviations.items() if z < -2]
    wide = [level for level, z in deviations.items() if z > 2]
    if not narrow and not wide:
        return [
            Sentence(
                "good",
                f"The posterior's intervals cover what they promise, within the sampling error of "
                f"{plural(rows, 'row')} (2 standard errors): its {shown}.",
            )
        ]
    judged = [
        f"too {word} at {' and '.join(map(str, at))} %"
        for word, at in (("narrow", narrow), ("wide", wide))
        if at
    ]
    return [
        Sentence(
            "note",
            f"The posterior's intervals are {' and '.join(judged)}, by more than the sampling "
            f"error of {plural(rows, 'row')} (2 standard errors): its {shown}.",
        )
    ]


def _chains_said(run: RunFolder) -> list[Sentence]:
    status = run.manifest.get("status") or run.chains
    if not status:
        return []
    sentences = []
    total = len(status)
    bad = [c for c in status if c["status"] != "ok"]
    pooled = (run.metrics or {}).get("pooled_chains")
    used = ""
    if pooled is not None:
        share = f"all {total:,}" if len(pooled) == total else f"{len(pooled):,} of {total:,}"
        used = f" The scores pool {share} chains."
    if not bad:
        return [Sentence("good", f"All {plural(total, 'chain')} are ok.{used}")]
    counts: dict[str, int] = {}
    for chain in bad:
        counts[chain["status"]] = counts.get(chain["status"], 0) + 1
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()))
    text = f"{len(bad):,} of {plural(total, 'chain')} not ok ({kinds}).{used}"
    if len(bad) <= 3:
        text += "".join(f" Chain {c['chain']}: {c.get('sentence') or c['status']}" for c in bad)
    sentences.append(Sentence("bad", text))
    return sentences


def score_groups(metrics: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the score table: groups of rows, one cell per model.

    Parameters
    ----------
    metrics : dict or None
        As in metrics.json.
    """
    if not metrics or not metrics.get("test"):
        return []
    test, units = metrics["test"], metrics.get("test_target_units")
    names = list(dict.fromkeys(n for model in MODELS for n in test.get(model) or {}))
    intervals = [n for n in names if n.startswith("coverage_")]
    plain = [n for n in names if n not in intervals]
    groups = [
        ("Standardised target" if units else "", test, plain),
        ("In the target's own units", units, plain),
        ("Coverage of the intervals", test, intervals),
    ]
    return [
        {"title": title, "rows": [_score_row(name, scores) for name in rows]}
        for title, scores, rows in groups
        if scores and rows
    ]


def _score_row(name: str, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    values = [(scores.get(model) or {}).get(name) for model in MODELS]
    label, wanted = METRICS.get(name, (name, ""))
    direction = DIRECTIONS.get(wanted, "")
    write: Callable[[Any], str] = _same_decimals(values)
    if name.startswith("coverage_"):
        wanted = name.removeprefix("coverage_")
        label, direction = f"{wanted} % intervals", f"→ {wanted} % is right"
        write = _share
    losses = [_loss(value, wanted) for value in values]
    best = min(losses)
    cells = [
        {"text": write(value), "best": math.isfinite(best) and loss == best}
        for value, loss in zip(values, losses, strict=True)
    ]
    return {"label": label, "direction": direction, "cells": cells}


def _same_decimals(values: list[Any]) -> Callable[[Any], str]:
    """Return how to write the numbers of a row so that they line up: four digits of the largest."""
    sizes = [abs(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    largest = max(sizes, default=0.0)
    if not 1e-3 <= largest < 1e5:
        return number
    decimals = min(4, max(0, 3 - math.floor(math.log10(largest))))
    return lambda v: (
        f"{v:,.{decimals}f}".replace("-", "−")
        if isinstance(v, int | float) and math.isfinite(v)
        else number(v)
    )


def _share(value: float | None) -> str:
    return number(value) if value is None or not math.isfinite(value) else percent(value)


def _loss(value: float | None, wanted: str) -> float:
    """Return what the best of a row has least of; a NaN is never best."""
    if value is None or not wanted or not math.isfinite(value):
        return math.inf
    if wanted in DIRECTIONS:
        return -value if wanted == "high" else value
    return round(abs(value - float(wanted) / 100), 9)


def _scores_note(run: RunFolder) -> str:
    member = (run.metrics or {}).get("best_member")
    text = f"On {plural(_rows(run), 'test row')}; the best value of each row is shaded. "
    if member is not None:
        text += f"The best member is number {member}. "
    return text + (
        "One split and one seed: the scores carry no error bar; small differences may be chance."
    )


def chain_table(run: RunFolder) -> dict[str, Any] | None:
    """Return the table of chains: columns, rows, and quantiles if there are many.

    Parameters
    ----------
    run : RunFolder
        Without diagnostics.csv the status in the manifest takes its place.
    """
    chains = run.chains or run.manifest.get("status")
    if not chains:
        return None
    filled = [n for n in chains[0] if any(c.get(n) not in (None, "") for c in chains)]
    ordered = [n for n in COLUMNS if n in filled] + [n for n in filled if n not in COLUMNS]
    # What is the same in all chains needs no column, and what happened to one needs a line.
    constant = [
        n
        for n in ordered
        if n not in ("chain", "status", "sentence")
        and len(chains) > 1
        and all(c.get(n) == chains[0][n] for c in chains)
    ]
    ordered = [n for n in ordered if n not in (*constant, "sentence")]
    many = len(chains) > MAX_CHAIN_ROWS
    shown = sorted(chains, key=_badness, reverse=True)[:WORST_CHAINS] if many else chains
    notes = ["Click a heading to sort by it; hover for its meaning."]
    if many:
        notes.insert(
            0,
            f"The worst {WORST_CHAINS} of {len(chains):,} chains: those that are not ok first, "
            f"then by R-hat. All of them are in diagnostics.csv.",
        )
    if constant:
        same = [f"{_heading(n)} {number(chains[0][n])}" for n in constant]
        notes.append(f"The same in all chains: {', '.join(same)}.")
    columns = [
        {
            "label": _heading(name),
            "meaning": COLUMNS.get(name, ("", ""))[1],
            "text": name == "status",
        }
        for name in ordered
    ]
    table: dict[str, Any] = {
        "note": " ".join(notes),
        "columns": columns,
        "rows": [[_chain_cell(name, chain.get(name)) for name in ordered] for chain in shown],
        "sentences": [
            (c["chain"], c["sentence"]) for c in shown if c["status"] != "ok" and c.get("sentence")
        ],
        "quantiles": [],
        "quantile_labels": [],
    }
    if many:
        numeric = [n for n in ordered if n not in ("chain", "status")]
        table["quantile_labels"] = ["min", "5 %", "median", "95 %", "max", "not finite", "missing"]
        table["quantiles"] = [_quantiles(n, [c.get(n) for c in chains]) for n in numeric]
    return table


def _badness(chain: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: not ok is worse than ok, a NaN worse than any number, then R-hat decides."""
    names = ("rhat_function_max", "rhat_function_median", "rhat_weights_max", "rhat_log_density")
    value = next((chain[n] for n in names if chain.get(n) is not None), -math.inf)
    return chain["status"] != "ok", math.inf if math.isnan(value) else value


def _quantiles(name: str, values: list[Any]) -> dict[str, Any]:
    given = np.array([v for v in values if v is not None], float)
    finite = given[np.isfinite(given)]
    at = (0, 0.05, 0.5, 0.95, 1)
    cells = ["–"] * len(at)
    if len(finite):
        cells = [_diagnostic(name, float(q)) for q in np.quantile(finite, at)]
    cells += [number(len(given) - len(finite)), number(len(values) - len(given))]
    return {"label": _heading(name), "cells": cells}


def _heading(name: str) -> str:
    return COLUMNS.get(name, (name, ""))[0]


def _chain_cell(name: str, value: Any) -> dict[str, str]:
    classes = []
    if name == "status":
        classes += ["text", "good" if value == "ok" else "bad"]
    is_number = isinstance(value, int | float)
    # Weights need not mix for the predictions to do so: no warning for them.
    judged = name.startswith("rhat_") and name != "rhat_weights_max"
    if judged and is_number and not value <= RHAT_LIMIT:
        classes.append("note")
    if name == "divergences" and is_number and value != 0:
        classes.append("bad")
    return {
        "classes": " ".join(classes),
        "value": "" if value is None else str(value),
        "text": _diagnostic(name, value),
    }


def _diagnostic(name: str, value: Any) -> str:
    """Write a diagnostic so that a column lines up."""
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e6:
        for start, decimals in (("rhat_", 3), ("ess_", 0), ("log_density", 1)):
            if name.startswith(start) and name != "log_density_drift":
                return f"{value:,.{decimals}f}".replace("-", "−")
    return number(value)


def _modes(run: RunFolder, broken: list[str]) -> dict[str, Any] | None:
    """Return the section on modes (see `modes.section`)."""
    try:
        with np.errstate(all="ignore"):
            return modes.section(run.diagnostics)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        broken.append(f"diagnostics.json does not hold what it should: {error!r}.")
        return None


def all_plots(run: RunFolder, broken: list[str]) -> list[Plot]:
    """Draw every figure that the folder has the data for.

    Parameters
    ----------
    run : RunFolder
    broken : list of str
        Gets a sentence for every file whose arrays are not what they should be.
    """
    plots: list[Plot] = []

    def add(name: str, draw: Callable[[], list[Plot]]) -> None:
        try:
            # What is not finite is said in the takeaways, not in warnings.
            with np.errstate(all="ignore"):
                plots.extend(draw())
        except (KeyError, IndexError, ValueError, TypeError) as error:
            broken.append(f"{name} does not hold what it should, so it is not drawn: {error!r}.")

    test, rows = _tests(run), _rows(run)
    if "posterior" in test and figures.coverage_levels(test["posterior"]) and rows:
        add("metrics.json", lambda: [figures.coverage(test, rows)])
    if run.predictions is not None:
        add("predictions.npz", lambda: _prediction_plots(run))
    if run.history is not None:
        add("ensemble/history.npz", lambda: _training_plot(run))
    if run.warmup is not None and "step_size" in run.warmup:
        add("warmup.npz", lambda: _warmup_plot(run))
    if run.log_density is not None:
        # The last figure fills the row that it would otherwise leave half empty.
        wide = len(plots) % 2 == 0
        trace = run.log_density
        add("stats", lambda: [figures.log_density(trace, run.failed, wide)])
    return plots


def _training_plot(run: RunFolder) -> list[Plot]:
    assert run.history is not None
    history = run.history["history"]
    if history.ndim != 3 or history.shape[2] != 2:
        raise ValueError(f"history has shape {history.shape}, expected (member, epoch, 2)")
    if history.size == 0:
        return []
    return [figures.training(history, run.history["epochs"], run.history["best_epoch"])]


def _warmup_plot(run: RunFolder) -> list[Plot]:
    assert run.warmup is not None
    values = run.warmup["step_size"]
    if values.size == 0:  # a run without warm-up
        return []
    return [figures.step_size(values, run.failed, run.manifest["warmup"])]


def _prediction_plots(run: RunFolder) -> list[Plot]:
    found, data = run.predictions, run.manifest.get("data") or {}
    assert found is not None
    if "probabilities" in found:
        return [figures.reliability(found["y"], found["probabilities"])]
    targets = found["y"].shape[1]
    names = data.get("targets") or [f"target {k}" for k in range(targets)]
    ends = []
    for level in (0.05, 0.95):
        at = np.flatnonzero(np.isclose(found["levels"], level))
        ends.append(found["quantiles"][at[0]] if len(at) else None)
    low, high = ends
    return [
        figures.predicted(
            str(names[k]),
            found["y"][:, k],
            found["mean"][:, k],
            None if low is None or high is None else low[:, k],
            None if low is None or high is None else high[:, k],
        )
        for k in range(min(targets, MAX_TARGETS))
    ]


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """Return what was run on what, as (name, text).

    Parameters
    ----------
    run : RunFolder
    """
    manifest, data = run.manifest, run.manifest.get("data") or {}
    devices = manifest.get("devices") or {}
    found: list[tuple[str, str]] = []

    def add(name: str, text: str) -> None:
        if text:
            found.append((name, text))

    if data.get("rows"):
        text = f"{data.get('name', '')}: {plural(data['rows'], 'row')}"
        add("Data", f"{text}, {plural(data.get('features') or 0, 'feature')}")
        split = [
            f"{part} {data[part]:,}" for part in ("train", "validation", "test") if part in data
        ]
        sampled = data.get("sampled_on")
        add("Split", ", ".join(split) + (f"; posterior sampled on {sampled}" if sampled else ""))
    targets, classes = data.get("targets") or [], data.get("classes") or []
    add("Target" if len(targets) == 1 else "Targets", _listed(targets))
    add("Classes", _listed(classes))
    if len(targets) > MAX_TARGETS:
        add("Drawn", f"the first {MAX_TARGETS} of {len(targets)} targets")
    if manifest.get("parameters"):
        size, sampled = manifest["parameters"], manifest.get("sampled", manifest["parameters"])
        rest = f", {sampled:,} of them sampled" if sampled < size else ""
        add("Parameters", f"{size:,}{rest}")
    if manifest.get("kernel"):
        plan = [f"{manifest['kernel']}"]
        if manifest.get("chains"):
            plan.append(plural(manifest["chains"], "chain"))
        if manifest.get("warmup") is not None:
            plan.append(plural(manifest["warmup"], "warm-up step"))
        if manifest.get("draws"):
            thin = manifest.get("thin") or 1
            plan.append(
                plural(manifest["draws"], "draw")
                + (f", one every {thin} steps" if thin > 1 else "")
            )
        add("Sampler", "; ".join(plan))
    if devices:
        add(
            "Devices",
            f"{devices.get('count', '')} × {devices.get('kind') or devices.get('platform')}",
        )
    add("Placement", manifest.get("placement") or "")
    if manifest.get("seed") is not None:
        add("Seed", str(manifest["seed"]))
    versions = {"bnnmcmc": manifest.get("bnnmcmc"), **(manifest.get("versions") or {})}
    add("Versions", ", ".join(f"{name} {v}" for name, v in versions.items() if v))
    return found


def _listed(names: list[Any]) -> str:
    text = ", ".join(str(name) for name in names[:MAX_LISTED])
    return text + (f" and {len(names) - MAX_LISTED:,} more" if len(names) > MAX_LISTED else "")


def _seconds(seconds: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "stage": STAGE_NAMES.get(stage, stage),
            "seconds": f"{value:.6g}",
            "text": _duration(value),
        }
        for stage, value in seconds.items()
        if value
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _settings(run: RunFolder) -> list[tuple[str, str]]:
    """Return the sections of the config as text; the whole file if it cannot be read."""
    if run.config_text and not run.config:
        return [("config.toml", run.config_text)]
    return [
        (f"[{name}]", "\n".join(_toml_lines(section)))
        for name, section in run.config.items()
        if isinstance(section, dict)
    ]


def _toml_lines(section: dict[str, Any], prefix: str = "") -> list[str]:
    """Write a section as TOML with dotted keys, one line per value, long lists cut short."""
    lines = []
    for key, value in section.items():
        if isinstance(value, dict):
            lines += _toml_lines(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            items = [_toml_value(item) for item in value[:MAX_LISTED]]
            rest = f", ... ({len(value):,} in all)" if len(value) > MAX_LISTED else ""
            lines.append(f"{prefix}{key} = [{', '.join(items)}{rest}]")
        else:
            lines.append(f"{prefix}{key} = {_toml_value(value)}")
    return lines


def _toml_value(value: Any) -> str:
    return tomli_w.dumps({"value": value}).strip().removeprefix("value = ")
