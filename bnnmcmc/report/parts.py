"""What a page is made of: sentences, tables, sections. Plain values, no HTML."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bnnmcmc.report.drawing import Plot


class Sentence(NamedTuple):
    """One sentence of the verdict or a takeaway; level is good, bad, note or info."""

    level: str
    text: str


class Column(NamedTuple):
    """A column of a table: heading, what it means, whether it holds words."""

    label: str
    meaning: str = ""
    text: bool = False


class Cell(NamedTuple):
    """A cell of a table.

    Parameters
    ----------
    text : str
    value : str
        What rows are sorted by; the text if not given.
    classes : str
        Of CSS: "best", "good", "bad", "note", "text", "group" (a heading for the rows below it).
    """

    text: str
    value: str | None = None
    classes: str = ""


class Table(NamedTuple):
    """A table.

    Parameters
    ----------
    columns : sequence of Column
    rows : sequence of rows of Cell
        A row of one cell of class "group" is a heading.
    title, note : str
    headed : bool
        Whether the first cell of a row is its heading.
    sortable : bool
        Whether a click on a heading sorts, and a box filters where there are many rows.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""
    headed: bool = False
    sortable: bool = False


class Explanation(NamedTuple):
    """What a statistic is: its name, what it says, its formula, where it is from."""

    term: str
    text: str
    formula: str = ""
    source: str = ""


class Bar(NamedTuple):
    """One part of a bar of times: its name, its share, and the share in words."""

    label: str
    size: float
    text: str


class Section(NamedTuple):
    """A part of the page under a heading.

    Parameters
    ----------
    key : str
        Its address on the page.
    title : str
    takeaways : sequence of Sentence
        What it says, in a line each, computed from the data.
    facts : sequence of (name, text)
    bars : sequence of Bar
    plots : sequence of Plot
    tables : sequence of Table
    listed : sequence of str
        A list below the tables.
    texts : sequence of (title, text)
        Shown as they are, such as settings.
    explained : sequence of Explanation
        In a fold-out.
    """

    key: str
    title: str
    takeaways: Sequence[Sentence] = ()
    facts: Sequence[tuple[str, str]] = ()
    bars: Sequence[Bar] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    listed: Sequence[str] = ()
    texts: Sequence[tuple[str, str]] = ()
    explained: Sequence[Explanation] = ()


class Page(NamedTuple):
    """A whole page.

    Parameters
    ----------
    title, subtitle : str
    sections : sequence of Section
    verdict : sequence of Sentence
    tiles : sequence of dict
        Label, value, detail: the numbers that matter.
    strip : sequence of (chain, status, sentence)
        The status of chains, a mark for each.
    strip_said : str
        The same in words.
    footer : str
    refresh : int
        Seconds after which the page loads itself again; 0: never.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    verdict: Sequence[Sentence] = ()
    tiles: Sequence[dict[str, str]] = ()
    strip: Sequence[tuple[int, str, str]] = ()
    strip_said: str = ""
    footer: str = ""
    refresh: int = 0


def words(values: Sequence[Any]) -> list[Cell]:
    """Return cells of plain words."""
    return [Cell(str(value)) for value in values]
