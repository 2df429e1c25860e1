"""How a figure is drawn: on one pair of axes, as SVG in the page's colours or as PNG."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Above so many points the marks become an image inside the SVG; axes and text stay vectors.
MAX_VECTOR_POINTS = 20_000
# Mid-tones, readable on light and on dark; in the SVG the page's CSS variables take their place.
COLOURS = {
    "posterior": "#2f7fb5",
    "ensemble": "#c9802b",
    "member": "#80868f",
    "bad": "#cf4a4a",
    "ink": "#70767f",
    "grid": "#a9afb8",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a target may be named "$"
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Plot:
    """One figure of the page.

    Parameters
    ----------
    title : str
    takeaway : str
        One line, computed from the data: what the figure shows.
    alt : str
        What is drawn, for those who do not see it.
    name : str
        Makes what the figure refers to inside unique on the page; also the name of its PNG file.
    draw : callable
        Draws on matplotlib axes.
    wide : bool
        Whether it takes the width of the page.
    height : float, optional
        In inches, 3.5 if not given.
    """

    title: str
    takeaway: str
    alt: str
    name: str
    draw: Callable[[Any], None]
    wide: bool = False
    height: float | None = None

    @cached_property
    def svg(self) -> str:
        """An ``<svg>`` element that takes its colours from the page."""
        return _svg(self)

    def png(self) -> bytes:
        """Return the picture as a PNG file."""
        return _drawn(self, "png")


def laid_out(plots: Sequence[Plot]) -> list[Plot]:
    """Return the figures so that they fill the page, two in a row: one alone takes all of it."""
    found: list[Plot] = []
    waiting = False
    for i, plot in enumerate(plots):
        alone = not waiting and (i + 1 == len(plots) or plots[i + 1].wide)
        found.append(replace(plot, wide=True) if alone and not plot.wide else plot)
        waiting = not found[-1].wide and not waiting
    return found


def log_axis(ax, values: np.ndarray) -> None:
    """Make the vertical axis logarithmic, with plain numbers, if any value is positive."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return
    ax.set_yscale("log")
    short = positive.max() < 100 * positive.min()
    label = FuncFormatter(lambda v, _: f"{v:g}")
    ax.yaxis.set_major_formatter(label)
    # Within a decade or two the powers of ten alone are too few labels.
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(label if short else NullFormatter())


def _drawn(plot: Plot, kind: Literal["svg", "png"]) -> bytes:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}), warnings.catch_warnings():
        # The browser has glyphs that the font used for measuring lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        height = 3.5 if plot.height is None else plot.height
        figure = Figure(figsize=(11.2 if plot.wide else 5.4, height), layout="constrained")
        ax = figure.subplots()
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        plot.draw(ax)
        buffer = io.BytesIO()
        if kind == "svg":
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(buffer, format=kind, transparent=True, metadata=nothing, dpi=180)
        else:  # a picture alone, which lies on white
            figure.savefig(buffer, format=kind, dpi=130)
    return buffer.getvalue()


def _svg(plot: Plot) -> str:
    """Return an SVG element without any address or fixed colour."""
    root = ElementTree.fromstring(_drawn(plot, "svg"))
    text = ElementTree.tostring(root, encoding="unicode")
    for parent in root.iter():
        for child in list(parent):
            # A style element would hold for the whole page.
            if _local(child.tag) == "style":
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
        # Of the names only those referred to are needed; the salt makes them unique on the page.
        if f"#{element.get('id')}" not in text:
            element.attrib.pop("id", None)
        if "d" in element.attrib:
            element.set("d", re.sub(r"(\.\d\d)\d+", r"\1", element.attrib["d"].replace("\n", "")))
        for role, colour in COLOURS.items():
            if "style" in element.attrib:
                element.set("style", element.attrib["style"].replace(colour, f"var(--{role})"))
    root.attrib = {"viewBox": root.attrib["viewBox"], "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]
