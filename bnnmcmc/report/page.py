"""The page of a run: reads its folder, finished or not, and writes report.html."""

import math
import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bnnmcmc.report import figures, html, markdown
from bnnmcmc.report.drawing import laid_out
from bnnmcmc.report.folder import STAGE_NAMES, RunFolder, read_run
from bnnmcmc.report.parts import Page, Section, Sentence
from bnnmcmc.report.sections import (
    calibration,
    chains,
    inputs,
    modes,
    predictions,
    predictive_checks,
    progress,
    scores,
    setup,
    training,
    uncertainty,
)
from bnnmcmc.report.text import number, percent, plural, signed
from bnnmcmc.store import write_atomic
from bnnmcmc.targets import is_met, say_outcome, target_of

# In the order of the page. Each makes a section of what the folder holds, or None; the file named
# is blamed if it does not hold what it should.
SECTIONS: tuple[tuple[str, Callable[[RunFolder], Section | None]], ...] = (
    ("progress.json", progress.section),
    ("metrics.json", scores.section),
    ("predictions.npz", predictions.section),
    ("predictions.npz", calibration.section),
    ("predictions.npz", uncertainty.section),
    ("predictive_checks.json", predictive_checks.section),
    ("inputs.npz", inputs.section),
    ("the chains' statistics", chains.section),
    ("diagnostics.json", modes.section),
    ("ensemble/history.npz", training.section),
    ("warmup.npz", training.warmup),
    ("manifest.json", setup.data),
    ("config.toml", setup.settings),
    ("manifest.json", setup.cost),
    ("manifest.json", setup.environment),
)
# What a file raises that does not hold what it should.
WRONG = (KeyError, IndexError, ValueError, TypeError, AttributeError)
# More chains than this are counted by status, not shown one by one.
MAX_STRIP = 400


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


def write_markdown(folder: Path) -> Path:
    """Write the report of a run as ``report.md``, with its figures in ``report-figures/``.

    Parameters
    ----------
    folder : Path
        As for `write_report`.

    Returns
    -------
    Path
        ``folder/report.md``.

    Raises
    ------
    InputError
        As `write_report`.
    """
    run = read_run(Path(folder))
    return markdown.write_markdown(make_page(run), run.folder)


def render(run: RunFolder, refresh: int = 0) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    run : RunFolder
    refresh : int
        As in `Page`.
    """
    return html.render(make_page(run, refresh))


def make_page(run: RunFolder, refresh: int = 0) -> Page:
    """Return what is on the page.

    Parameters
    ----------
    run : RunFolder
    refresh : int
        As in `Page`.
    """
    manifest = run.manifest
    broken: list[str] = []
    sections = make_sections(run, broken)
    numbers = _guarded(TILES, run, broken)
    said = _guarded(SENTENCES, run, broken, going=bool(refresh))
    found = _guarded((("the chains' status", _strip),), run, broken)
    strip, strip_said = found[0] if found else ([], "")
    return Page(
        title=manifest.get("name") or run.folder.name,
        subtitle=_subtitle(run),
        sections=sections,
        verdict=[*said, *(Sentence("bad", text) for text in dict.fromkeys(broken))],
        tiles=numbers,
        strip=strip,
        strip_said=strip_said,
        footer=f"Written by bnnmcmc {manifest.get('bnnmcmc') or ''} from {run.folder.name}.",
        refresh=refresh,
    )


def make_sections(run: RunFolder, broken: list[str]) -> list[Section]:
    """Return every section that the folder has the data for.

    Parameters
    ----------
    run : RunFolder
    broken : list of str
        Gets a sentence for every file whose content is not what it should be.
    """
    found = []
    for name, make in SECTIONS:
        try:
            # What is not finite is said in the takeaways, not in warnings.
            with np.errstate(all="ignore"):
                section = make(run)
                section = section and section._replace(plots=laid_out(section.plots))
                for plot in section.plots if section else ():
                    _ = plot.svg  # drawn here, where what cannot be drawn is caught
        except WRONG as error:
            broken.append(f"{name} does not hold what it should, so it is not drawn: {error!r}.")
            continue
        if section:
            found.append(section)
    return found


def _guarded(
    makers: Sequence[tuple[str, Callable[..., Sequence[Any]]]],
    run: RunFolder,
    broken: list[str],
    **options: Any,
) -> list[Any]:
    """Return what all make, one after the other; one that fails costs its own part only.

    Parameters
    ----------
    makers : sequence of (file, callable)
        ``callable(run, **options)``; the file is blamed if it fails.
    run : RunFolder
    broken : list of str
        Gets a sentence for every file whose content is not what it should be.
    **options
    """
    found: list[Any] = []
    for name, make in makers:
        try:
            found += make(run, **options)
        except WRONG as error:
            broken.append(f"{name} does not hold what it should, so it is not shown: {error!r}.")
    return found


def _strip(run: RunFolder) -> list[tuple[list[tuple[int, str, str]], str]]:
    return [chain_strip(run)]


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


def tiles(run: RunFolder) -> list[dict[str, str]]:
    """Return the five numbers that matter at the top of the page: label, value, detail.

    Parameters
    ----------
    run : RunFolder
        What a damaged file should have told is left out; the page names the file.
    """
    return _guarded(TILES, run, [])


def _tile(label: str, value: str, detail: str) -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail}


def _score_tiles(run: RunFolder) -> list[dict[str, str]]:
    found = []
    test = _tests(run)
    posterior, ensemble = test.get("posterior") or {}, test.get("ensemble") or {}
    if "lppd" in posterior:
        detail = "posterior, nats per test row"
        if "lppd" in ensemble:
            detail = f"{signed(posterior['lppd'] - ensemble['lppd'])} against the ensemble"
        found.append(_tile("Test LPPD", number(posterior["lppd"]), detail))
    of = f"{run.test_rows:,} test rows"
    if "coverage_90" in posterior:
        covered = percent(posterior["coverage_90"])
        found.append(_tile("90 % intervals cover", covered, f"of {of}"))
    elif "accuracy" in posterior:
        found.append(_tile("Accuracy", percent(posterior["accuracy"]), f"on {of}"))
    return found


def _chain_tiles(run: RunFolder) -> list[dict[str, str]]:
    found = []
    chains = run.manifest.get("chains")
    if chains and (run.manifest.get("status") or run.chains):
        detail = "all of them" if not run.failed else f"{len(run.failed)} with a problem"
        found.append(_tile("Chains ok", f"{chains - len(run.failed):,} of {chains:,}", detail))
    if chains and run.draws:
        planned = run.manifest.get("draws") or run.draws
        detail = f"{run.draws:,} from each of {plural(chains, 'chain')}"
        if run.draws < planned:
            detail = f"{run.draws:,} of {planned:,} from each of {plural(chains, 'chain')}"
        found.append(_tile("Posterior draws", f"{run.going * run.draws:,}", detail))
    return found


def _worth_tiles(run: RunFolder) -> list[dict[str, str]]:
    worth = (run.diagnostics or {}).get("ess_function_total_median")
    if worth is None:
        return []
    across = (run.diagnostics or {}).get("rhat_function_across_median")
    detail = "independent draws, for a typical prediction"
    if across is not None and math.isfinite(across):
        detail += f"; R-hat across chains {across:.2f}"
    shown = number(round(worth) if math.isfinite(worth) else worth)
    return [_tile("They are worth", shown, detail)]


def chain_strip(run: RunFolder) -> tuple[list[tuple[int, str, str]], str]:
    """Return a mark for each chain (chain, status, sentence), and what they say in words.

    Parameters
    ----------
    run : RunFolder
        Of more than `MAX_STRIP` chains there are no marks, only the words.
    """
    status = run.manifest.get("status") or run.chains or []
    if not status:
        return [], ""
    counts: dict[str, int] = {}
    for chain in sorted(status, key=lambda c: c["status"] != "ok"):
        counts[chain["status"]] = counts.get(chain["status"], 0) + 1
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    marks = [(int(c["chain"]), c["status"], str(c.get("sentence") or "")) for c in status]
    return (marks if len(marks) <= MAX_STRIP else []), f"{plural(len(status), 'chain')}: {said}"


def verdict(run: RunFolder, going: bool = False) -> list[Sentence]:
    """Say in sentences what came out of the run, the good and the bad.

    Parameters
    ----------
    run : RunFolder
        What a damaged file should have told is left out; the page names the file.
    going : bool
        Whether it is at work now: then it need not be told how to go on, or what is missing.
    """
    return _guarded(SENTENCES, run, [], going=going)


def _scored(run: RunFolder, going: bool) -> list[Sentence]:
    test = _tests(run)
    if "posterior" not in test:
        return []
    return [
        *_compared(test, run.test_rows, scores.paired_leads(run)),
        *_calibrated(test["posterior"], run.test_rows),
    ]


def _diagnosed(run: RunFolder, going: bool) -> list[Sentence]:
    return [
        Sentence(_level(str(text)), str(text))
        for text in (run.diagnostics or {}).get("verdict") or []
        if "have status ok" not in text  # said by `_chains_said`, with what the scores pool
    ]


def _noted(run: RunFolder, going: bool) -> list[Sentence]:
    return [Sentence("note", f"Note: {text}.") for text in run.manifest.get("notes") or []]


def _missing(run: RunFolder, going: bool) -> list[Sentence]:
    if not run.missing or going:
        return []
    level = "bad" if run.manifest.get("stage") == "done" else "note"
    return [Sentence(level, f"Missing: {', '.join(run.missing)}.")]


def _level(text: str) -> str:
    """Return the level of a sentence of the diagnostics: the verdict's is good, a note or bad."""
    # Of others, such as too few draws: a note.
    levels = {"converged:": "good", "nearly": "good", "not": "bad"}
    words = text.removeprefix("Verdict: ").split()
    return levels.get(words[0], "note") if text.startswith("Verdict: ") and words else "info"


def _progress(run: RunFolder, going: bool) -> list[Sentence]:
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
        if going:
            return [Sentence("info", f"{text}. It goes on now.")]
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


def _compared(
    test: dict[str, dict[str, float]], rows: int, leads: list[Sentence]
) -> list[Sentence]:
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
    if leads:
        # Row by row it is known which differences may be chance.
        order = ("bad", "note", "info", "good")
        level = min((sentence.level for sentence in leads), key=order.index)
    parts = []
    for i, (label, d) in enumerate(differences.items()):
        if math.isfinite(d) and d != 0:
            word = "better" if d > 0 else "worse"
            text = f"{abs(d):.{3 if abs(d) >= 0.01 else 4}f} nats per row {word} than {label}"
        else:
            text = f"{'level with' if d == 0 else 'not comparable with'} {label}"
        unsure = len(leads) == len(differences) and leads[i].level == "note"
        parts.append(f"{text}{' (which may be chance)' if unsure else ''}")
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


def _chains_said(run: RunFolder, going: bool) -> list[Sentence]:
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
        weights = (run.metrics or {}).get("pool") or {}
        if weights.get("weights", "equal") != "equal":
            used += (
                f" By {weights['weights'].replace('_', '-')} weights they are worth "
                f"{weights['effective_chains']:.1f}."
            )
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


# What makes the numbers and the sentences of the first screen, and the file that each is from.
TILES: tuple[tuple[str, Callable[..., Sequence[Any]]], ...] = (
    ("metrics.json", _score_tiles),
    ("manifest.json", _chain_tiles),
    ("diagnostics.json", _worth_tiles),
)
SENTENCES: tuple[tuple[str, Callable[..., Sequence[Any]]], ...] = (
    ("manifest.json", _progress),
    ("metrics.json", _scored),
    ("manifest.json or metrics.json", _chains_said),
    ("diagnostics.json", _diagnosed),
    ("manifest.json", _noted),
    ("manifest.json", _missing),
)
