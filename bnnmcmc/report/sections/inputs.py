"""Which inputs matter, where the prior lets the data decide (a horseshoe)."""

import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from bnnmcmc.report.drawing import COLOURS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.text import listed, number, plural, same_decimals

MAX_DRAWN = 30
# An input whose scale is so much smaller than the largest does next to nothing.
SMALL = 0.1
EXPLAINED = (
    Explanation(
        "Scale of an input",
        "The standard deviation of the weights that leave an input, sampled with them. An input "
        "with a scale near zero does nothing; inputs that say the same share what they say.",
        "w ~ N(0, (τ λⱼ)²), λⱼ ~ C⁺(0, 1), τ ~ C⁺(0, τ₀)",
        "Carvalho et al. (2010), Biometrika 97; Piironen and Vehtari (2017), arXiv 1707.01694",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None if the prior has no scales of inputs."""
    found = run.inputs
    if found is None:
        return None
    names = [str(name) for name in found["names"]]
    levels = found["levels"]
    low, middle, high = (
        found["quantiles"][int(np.argmin(np.abs(levels - at)))] for at in (0.05, 0.5, 0.95)
    )
    order = np.argsort(-middle, kind="stable")
    columns = [Column("input", text=True), Column("median scale"), Column("5 %"), Column("95 %")]
    write = same_decimals([float(v) for v in high])
    rows = [
        [
            Cell(names[i], classes="text"),
            *(Cell(write(float(v)), str(float(v))) for v in (middle[i], low[i], high[i])),
        ]
        for i in order
    ]
    return Section(
        "inputs",
        "Inputs",
        takeaways=[relevance(names, low, middle, high)],
        plots=[_scales(names, low, middle, high, order)],
        tables=[Table(columns, rows, sortable=True)],
        explained=EXPLAINED,
    )


def relevance(names: list[str], low, middle, high) -> Sentence:
    """Say which inputs matter, and whether any surely do not.

    Parameters
    ----------
    names : list of str
    low, middle, high : numpy array (inputs,)
        The 5 %, 50 % and 95 % quantiles of the scales.
    """
    if not np.isfinite(middle).all():
        return Sentence("bad", "Scales of inputs are not finite.")
    top = int(np.argmax(middle))
    idle = [names[i] for i in np.argsort(middle) if middle[i] < SMALL * middle[top]]
    text = f"{names[top]} has the largest scale ({number(float(middle[top]))}, median)"
    if not idle:
        return Sentence(
            "info",
            f"{text}; none of the {plural(len(names), 'input')} has one ten times smaller: the "
            "data rule none out.",
        )
    return Sentence(
        "info",
        f"{text}; {len(idle)} of {plural(len(names), 'input')} have one more than ten times "
        f"smaller and do next to nothing: {listed(idle, 8)}.",
    )


def _scales(names, low, middle, high, order) -> Plot:
    shown = order[:MAX_DRAWN][::-1]

    def draw(ax):
        at = np.arange(len(shown))
        ax.hlines(at, low[shown], high[shown], color=COLOURS["posterior"], alpha=0.5, lw=2)
        ax.plot(middle[shown], at, "o", ms=5, mew=0, color=COLOURS["posterior"])
        ax.set_yticks(at, [names[i] for i in shown])
        if (low[shown] > 0).all():
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="scale of the input's weights")

    alt = (
        f"Median and 5 to 95 % interval of the scale of {plural(len(shown), 'input')}, largest on "
        "top."
    )
    rest = len(names) - len(shown)
    takeaway = "Medians with 5 to 95 % intervals over all chains that enter the pool."
    takeaway += f" The {rest} smallest are in the table only." if rest else ""
    return Plot(
        "Scales of the inputs",
        takeaway,
        alt,
        "inputs",
        draw,
        True,
        max(2.0, 0.6 + 0.26 * len(shown)),
    )
