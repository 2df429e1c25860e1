"""How values show themselves in a notebook: small HTML tables, all text escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

# More rows than this are cut short.
MAX_ROWS = 10


def html_table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]], more: str = ""):
    """Return a table as HTML.

    Parameters
    ----------
    caption : str
    heads : sequence of str
    rows : sequence of sequences
        Numbers are shown with four digits.
    more : str
        A line below the table.

    Returns
    -------
    str
    """
    top = "".join(f"<th scope='col'>{escape(str(head))}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_short(cell))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    below = f"<p><small>{escape(more)}</small></p>" if more else ""
    return (
        f"<div><table><caption style='text-align: left'><b>{escape(caption)}</b></caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
    )


def paragraphs(sentences: Sequence[str]) -> str:
    """Return sentences as HTML, one below the other."""
    return "".join(f"<p>{escape(str(sentence))}</p>" for sentence in sentences)


def _short(cell: Any) -> str:
    if isinstance(cell, float) or (type(cell).__module__ == "numpy" and cell.dtype.kind == "f"):
        return f"{float(cell):.4g}"
    return str(cell)
