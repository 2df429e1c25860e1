"""A page as Markdown, with its figures as PNG files."""

import re
from pathlib import Path

from bnnmcmc.report.parts import Page, Section, Table
from bnnmcmc.store import write_atomic


def write_markdown(page: Page, folder: Path, name: str = "report") -> Path:
    """Write a page as ``name.md`` and its figures into ``name-figures/``.

    Parameters
    ----------
    page : Page
    folder : Path
    name : str

    Returns
    -------
    Path
        The Markdown file.
    """
    pictures = folder / f"{name}-figures"
    lines = [f"# {escape(page.title)}", "", escape(page.subtitle), ""]
    if page.tiles:
        lines += ["| | | |", "|---|---|---|"]
        lines += [
            f"| {escape(t['label'])} | **{escape(t['value'])}** | {escape(t['detail'])} |"
            for t in page.tiles
        ]
        lines.append("")
    if page.strip_said:
        lines += [escape(page.strip_said), ""]
    lines += [f"- **{s.level}** {escape(s.text)}" for s in page.verdict]
    for section in page.sections:
        lines += ["", f"## {escape(section.title)}", ""]
        lines += _section(section, pictures)
    lines += ["", escape(page.footer)]
    path = folder / f"{name}.md"
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return path


def escape(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)


def _section(section: Section, pictures: Path) -> list[str]:
    lines = [f"- **{s.level}** {escape(s.text)}" for s in section.takeaways]
    if section.takeaways:
        lines.append("")
    lines += [f"- {escape(name)}: {escape(text)}" for name, text in section.facts]
    lines += [f"- {escape(part.label)}: {escape(part.text)}" for part in section.bars]
    for plot in section.plots:
        # In Markdown an address must not hold spaces or brackets.
        file = pictures / f"{section.key}-{re.sub(r'[^0-9A-Za-z-]+', '-', plot.name)}.png"
        write_atomic(file, plot.png())
        lines += ["", f"### {escape(plot.title)}", ""]
        lines += [f"![{escape(plot.alt)}]({pictures.name}/{file.name})", "", escape(plot.takeaway)]
    for table in section.tables:
        lines += ["", *_table(table)]
    if section.listed:
        lines += ["", *(f"- {escape(text)}" for text in section.listed)]
    for title, text in section.texts:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += ["", f"### {escape(title)}", "", fence, text, fence]
    if section.explained:
        lines += ["", "<details><summary>What these mean</summary>", ""]
        for item in section.explained:
            parts = [item.text, item.formula, f"({item.source})" if item.source else ""]
            lines.append(f"- **{escape(item.term)}**: {escape(' '.join(filter(None, parts)))}")
        lines += ["", "</details>"]
    return lines


def _table(table: Table) -> list[str]:
    lines = [f"### {escape(table.title)}", ""] if table.title else []
    lines += [escape(table.note), ""] if table.note else []
    heads = [escape(column.label) or " " for column in table.columns]
    lines.append(f"| {' | '.join(heads)} |")
    lines.append("|" + "|".join("---" if c.text else "---:" for c in table.columns) + "|")
    for row in table.rows:
        cells = [f"**{escape(row[0].text)}**"] + [""] * (len(heads) - 1)
        if row[0].classes != "group":
            bold = ("**{}**" if cell.classes == "best" else "{}" for cell in row)
            cells = [form.format(escape(c.text)) for form, c in zip(bold, row, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
