"""How a figure is drawn: on one pair of axes, as SVG in the page's colours or as PNG."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        options = {"transparent": True, "metadata": nothing} if kind == "svg" else {}
        # A picture alone lies on white; one that is part of the page on the page's colour.
        figure.savefig(buffer, format=kind, dpi=180 if kind == "svg" else 130, **options)
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
