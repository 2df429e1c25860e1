"""How far a run is that still goes on."""

from typing import Any

import numpy as np

from bnnmcmc.report.drawing import COLOURS, Plot, log_axis
from bnnmcmc.report.folder import STAGE_NAMES, RunFolder
from bnnmcmc.report.parts import Bar, Section, Sentence
from bnnmcmc.report.text import duration, number, percent

LABELS = {
    "log_density": "log-density",
    "step_size": "step size",
    "acceptance_rate": "acceptance rate",
    "energy_error_squared": "EEVPD",
}


def section(run: RunFolder) -> Section | None:
    """Return the section, None for a run that has ended or has written no progress yet."""
    if run.manifest.get("stage") == "done" or not run.progress:
        return None
    stage = str(run.manifest.get("stage"))
    found = run.progress.get(stage)
    if found is None:
        return None
    bars = [
        Bar("done", found["done"], f"{found['done']:,} {found['unit']}"),
        Bar("to go", found["total"] - found["done"], f"{found['total'] - found['done']:,}"),
    ]
    names = [name for name in found["points"][-1] if name not in ("done", "time")]
    return Section(
        "progress",
        "Progress",
        takeaways=[how_far(stage, found)],
        bars=bars,
        plots=[band(stage, name, found) for name in names],
    )


def how_far(stage: str, found: dict[str, Any]) -> Sentence:
    """Say how far a stage is, and how long it will take at the present speed.

    Parameters
    ----------
    stage : str
    found : dict
        "done", "total", "unit", "since" and "points" (see `bnnmcmc.live`).
    """
    done, total, unit = found["done"], found["total"], found["unit"]
    name = STAGE_NAMES.get(stage, stage)
    text = f"{name[0].upper()}{name[1:]}: {done:,} of {total:,} {unit} ({percent(done / total)})"
    # Not the pause before this sitting.
    points = [p for p in found["points"] if p["time"] >= found.get("since", 0)]
    first, last = (points or found["points"])[0], found["points"][-1]
    span, made = last["time"] - first["time"], last["done"] - first["done"]
    if done >= total:
        return Sentence("good", f"{text}: complete.")
    if span <= 0 or made <= 0:
        return Sentence("info", f"{text}; too early to say how long it will take.")
    left = duration((total - done) * span / made)
    return Sentence("info", f"{text}, {number(made / span)} {unit} per second: {left} left.")


def band(stage: str, name: str, found: dict[str, Any]) -> Plot:
    """Draw a statistic over the blocks of a stage: median and 5 to 95 % band over chains.

    Parameters
    ----------
    stage, name : str
    found : dict
    """
    label = LABELS.get(name, name)
    points = [p for p in found["points"] if p.get(name) and None not in p[name]]
    x = np.array([p["done"] for p in points])
    values = np.array([p[name] for p in points], float).reshape(-1, 3)

    def draw(ax):
        if len(points):
            low, middle, high = values.T
            ax.fill_between(x, low, high, color=COLOURS["posterior"], alpha=0.22, lw=0)
            ax.plot(x, middle, "o-", ms=3, mew=0, lw=1.3, color=COLOURS["posterior"])
        if name in ("step_size", "energy_error_squared"):
            log_axis(ax, values)
        ax.set(xlabel=found["unit"], ylabel=label)

    takeaway = "Nothing finite so far."
    if len(points):
        low, middle, high = (number(float(v)) for v in values[-1])
        takeaway = f"Now {middle} (median over chains; 5 to 95 %: {low} to {high})."
    alt = f"{label} over {found['unit']}: median and 5 to 95 % band over chains."
    return Plot(f"So far: {label}", takeaway, alt, f"progress-{stage}-{name}", draw)
