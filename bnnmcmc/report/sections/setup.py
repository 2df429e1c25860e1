"""What was run on what: data and split, settings, time and memory, how to repeat it."""

import math
from typing import Any

import tomli_w

from bnnmcmc.report.folder import STAGE_NAMES, RunFolder
from bnnmcmc.report.parts import Bar, Explanation, Section, Sentence
from bnnmcmc.report.sections.predictions import MAX_TARGETS
from bnnmcmc.report.text import duration, listed, number, percent, plural

MAX_LISTED = 20
# With few test rows a share is known no better than this (2 standard errors).
WIDE_ERROR = 0.1


def data(run: RunFolder) -> Section | None:
    """Return the section on data and split, None if nothing is known of them."""
    found = run.manifest.get("data") or {}
    facts: list[tuple[str, str]] = []
    if found.get("rows"):
        text = f"{found.get('name', '')}: {plural(found['rows'], 'row')}"
        facts.append(("Data", f"{text}, {plural(found.get('features') or 0, 'feature')}"))
        split = [
            f"{part} {found[part]:,}" for part in ("train", "validation", "test") if part in found
        ]
        sampled = found.get("sampled_on")
        rest = f"; posterior sampled on {sampled}" if sampled else ""
        facts.append(("Split", ", ".join(split) + rest))
    targets, classes = found.get("targets") or [], found.get("classes") or []
    if targets:
        facts.append(("Target" if len(targets) == 1 else "Targets", listed(targets)))
    if classes:
        facts.append(("Classes", listed(classes)))
    if len(targets) > MAX_TARGETS:
        facts.append(("Drawn", f"the first {MAX_TARGETS} of {len(targets)} targets"))
    if not facts:
        return None
    said = [known(int(found["test"]), bool(classes))] if found.get("test") is not None else []
    return Section("data", "Data and split", takeaways=said, facts=facts)


def known(test: int, classes: bool = False) -> Sentence:
    """Say how well so many test rows can tell.

    Parameters
    ----------
    test : int
        Test rows.
    classes : bool
        Whether it is a classification.
    """
    if not test:
        return Sentence("note", "No test rows: nothing here says how good predictions are.")
    # Of a share p the standard error is the root of p (1 - p) / n.
    share, what = (0.5, "an accuracy") if classes else (0.9, "the coverage of 90 % intervals")
    error = 2 * math.sqrt(share * (1 - share) / test)
    shown = f"{plural(test, 'test row')} tell {what} to ± {100 * error:.1f}"
    if error > WIDE_ERROR:
        return Sentence("note", f"Few test rows: {shown} points only (2 standard errors).")
    return Sentence("info", f"{shown} points (2 standard errors).")


def settings(run: RunFolder) -> Section | None:
    """Return the section on model, prior and sampler, with the resolved config."""
    manifest = run.manifest
    facts: list[tuple[str, str]] = []
    if manifest.get("parameters"):
        size, sampled = manifest["parameters"], manifest.get("sampled", manifest["parameters"])
        rest = f", {sampled:,} of them sampled" if sampled < size else ""
        facts.append(("Parameters", f"{size:,}{rest}"))
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
        facts.append(("Sampler", "; ".join(plan)))
    texts = _settings(run)
    if not facts and not texts:
        return None
    return Section("settings", "Model, prior, sampler", facts=facts, texts=texts)


def cost(run: RunFolder) -> Section | None:
    """Return the section on time and memory, None before the first stage has ended."""
    seconds = {s: v for s, v in (run.manifest.get("seconds") or {}).items() if v}
    if not seconds:
        return None
    bars = [
        Bar(STAGE_NAMES.get(stage, stage), value, duration(value))
        for stage, value in seconds.items()
    ]
    facts = [("Together", duration(sum(seconds.values())))]
    peaks = run.manifest.get("peak_bytes") or {}
    if peaks:
        shown = [
            f"{STAGE_NAMES.get(stage, stage)} {value / 2**20:,.0f} MiB"
            for stage, value in peaks.items()
        ]
        facts.append(("Memory", f"the most by the end of a stage: {', '.join(shown)}"))
    explained = [
        Explanation(
            "Memory",
            "The largest resident set of the process up to the end of the stage, as the operating "
            "system counts it; what a GPU holds is not in it.",
        )
    ]
    return Section(
        "cost",
        "Time and memory",
        takeaways=[longest(seconds, run)],
        facts=facts,
        bars=bars,
        explained=explained if peaks else [],
    )


def longest(seconds: dict[str, float], run: RunFolder) -> Sentence:
    """Say which stage took longest, and how fast the chains were.

    Parameters
    ----------
    seconds : dict
        Stage -> seconds.
    run : RunFolder
    """
    stage = max(seconds, key=lambda s: seconds[s])
    share = seconds[stage] / sum(seconds.values())
    name = STAGE_NAMES.get(stage, stage)
    most = "Most of the time went into" if share > 0.5 else "The longest stage was"
    text = f"{most} {name} ({percent(share)})"
    counts = [c.get("gradients") for c in run.chains or []]
    total = sum(c for c in counts if c)
    if total and seconds.get("sampling"):
        speed = total / seconds["sampling"]
        text += f"; while sampling, all chains took {number(round(speed))} gradients per second"
    return Sentence("info", f"{text}.")


def environment(run: RunFolder) -> Section:
    """Return the section on machine, versions and the command."""
    manifest = run.manifest
    devices = manifest.get("devices") or {}
    facts: list[tuple[str, str]] = []
    if devices:
        kind = devices.get("kind") or devices.get("platform")
        facts.append(("Devices", f"{devices.get('count', '')} × {kind}"))
    if manifest.get("placement"):
        facts.append(("Placement", manifest["placement"]))
    if manifest.get("seed") is not None:
        facts.append(("Seed", str(manifest["seed"])))
    versions = {"bnnmcmc": manifest.get("bnnmcmc"), **(manifest.get("versions") or {})}
    shown = ", ".join(f"{name} {v}" for name, v in versions.items() if v)
    if shown:
        facts.append(("Versions", shown))
    command = manifest.get("command")
    texts = [("To repeat this run", command)] if command else []
    return Section("environment", "Environment", facts=facts, texts=texts)


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
