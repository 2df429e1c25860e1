"""A page as HTML: one file that loads nothing else."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bnnmcmc.report.parts import Page

# A table with more rows than this gets a box to filter them by.
FILTERED = 8


def render(page: Page) -> str:
    """Return a page as HTML.

    Parameters
    ----------
    page : Page
        All text in it is shown as text, whatever it looks like.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(page=page, filtered=FILTERED)
