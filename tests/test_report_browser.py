"""The report in a browser, driven by Playwright: what a reader clicks, types, prints and hears.

Needs Chromium on the path (Debian: ``apt install chromium``); without it these tests skip.
"""

import re
import shutil
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright
from test_comparison import make_run as compared
from test_report import change, explored, make_run

from bnnmcmc.comparison import compare
from bnnmcmc.live import Live
from bnnmcmc.report.compare import write_comparison
from bnnmcmc.report.folder import read_run
from bnnmcmc.report.page import SECTIONS, render, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
RUNS = {
    "regression": {},
    "classification": {"task": "classification"},
    "diverged": {"status": {1: ("diverging", "Steps diverged."), 2: ("nonfinite", "Lost.")}},
    "interrupted": {"stage": "sampling", "draws": 30, "planned": 90, "stopped": "interrupted"},
    "thousand": {"chains": 1000, "draws": 12, "planned": 12},
}
EARLY = {"Chains", "Training", "Warm-up", "Data and split", "Model, prior, sampler", "Environment"}
LATE = {
    "Prior and posterior predictive checks",
    "Scores on held-out data",
    "Calibration",
    "Uncertainty",
    "Modes",
    "Time and memory",
}
PAPER = (718, 1000)  # A4 less 1 cm on each side, in CSS pixels


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Return how to get the page of a made run; each is written once, when asked for."""
    folder = tmp_path_factory.mktemp("pages")

    @cache
    def written(name):
        if name == "compare":
            runs = [
                compared(folder / "first", noise=0.5),
                compared(folder / "second", noise=3, seed=1, settings={"warmup": 9}),
                compared(folder / "third", noise=0.6, seed=2, ok=3),
            ]
            return write_comparison(compare(runs), folder / "compare.html")
        run = make_run(folder / name, rows=40, **RUNS[name])
        if name not in ("interrupted", "thousand"):
            explored(run, [0, 1, 0, 0, 1, 2])
        return write_report(run)

    return written


@contextmanager
def opened(browser, path, **options):
    """Open a page; nothing may be complained of, and nothing but the file be asked for."""
    context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
    context.set_default_timeout(20_000)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(path.as_uri())
        yield page
        assert said == []
        assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    finally:
        context.close()


def column_of(table, column):
    """Return what the cells of a column are sorted by, in the order of the page."""
    read = "(t, c) => [...t.tBodies[0].rows].map((row) => row.cells[c].dataset.value)"
    return table.evaluate(read, column)


def numbers(values):
    return [float(v) for v in values if v not in ("", "nan", "NaN", "None")]


@pytest.mark.parametrize("name", [*RUNS, "compare"])
@pytest.mark.parametrize("width", [1440, 400])
def test_everything_is_there_and_fits(browser, report, name, width):
    with opened(browser, report(name), viewport={"width": width, "height": 900}) as page:
        titles = set(page.locator("section > h2").all_inner_texts())
        expected = EARLY if name == "interrupted" else EARLY | LATE
        if name == "thousand":
            expected = expected - {"Modes"}
        assert name == "compare" or expected <= titles
        links = page.locator("nav a").evaluate_all("list => list.map((a) => a.hash)")
        assert page.locator("nav a").all_inner_texts() == page.locator("h2").all_inner_texts()
        assert all(page.locator(link).count() == 1 for link in links)
        # Nothing makes the page wider than the window, no number is wider than its card.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        wide = "list => list.filter((e) => e.scrollWidth > e.clientWidth).length"
        assert page.locator(".tiles .card").evaluate_all(wide) == 0
        # Whoever does not see a picture is told what is on it.
        pictures = page.locator("svg, img, canvas")
        assert name == "compare" or pictures.count() >= 3
        told = "list => list.map((e) => e.closest('[role=img]')?.ariaLabel || e.alt || '')"
        assert all(len(text) > 20 for text in pictures.evaluate_all(told))


@pytest.mark.parametrize("name", [*RUNS, "compare"])
def test_a_click_on_a_heading_sorts(browser, report, name):
    with opened(browser, report(name)) as page:
        tables = page.locator("table.sortable").all()
        assert tables or name in ("interrupted", "compare")
        for table in tables:
            heads = table.locator("thead th").all()
            # All columns of the table of chains of one run; of the others a few.
            whole = name == "regression" and len(heads) > 10
            for i in range(len(heads)) if whole else (0, 1, len(heads) - 1):
                before = column_of(table, i)
                heads[i].locator("button").click()
                up = column_of(table, i)
                assert heads[i].get_attribute("aria-sort") == "ascending"
                heads[i].locator("button").click()
                down = column_of(table, i)
                assert heads[i].get_attribute("aria-sort") == "descending"
                assert sorted(before) == sorted(up) == sorted(down)  # no row is lost
                if "text" not in (heads[i].get_attribute("class") or ""):
                    assert numbers(up) == sorted(numbers(up))
                    assert numbers(down) == sorted(numbers(down), reverse=True)
                    # What is not a number is last, either way.
                    missing = [v for v in before if not numbers([v])]
                    assert up[len(numbers(up)) :] == down[len(numbers(down)) :] or not missing


def test_sorted_by_what_is_shown(browser, report):
    with opened(browser, report("regression")) as page:
        head = page.locator("table.sortable th", has_text=re.compile("^R-hat function max$"))
        table = head.locator("xpath=ancestor::table")
        place = head.evaluate("e => e.cellIndex")

        def shown():
            return [float(v) for v in table.locator(f"td:nth-child({place + 1})").all_inner_texts()]

        head.locator("button").click()
        up = shown()
        assert up == sorted(up)
        assert up[0] != up[-1]
        head.locator("button").click()
        assert shown() == up[::-1]


@pytest.mark.parametrize("name", ["regression", "thousand"])
def test_typing_filters_the_rows(browser, report, name):
    with opened(browser, report(name)) as page:
        box = page.locator(".filter input").first
        rows = box.locator("xpath=ancestor::div[@class='tabled']").locator("tbody tr")
        total = rows.count()
        word = rows.nth(3).locator("td").first.inner_text()
        box.click()
        page.keyboard.type(word)
        left = rows.filter(visible=True)
        assert 0 < left.count() < total
        texts = left.all_inner_texts()
        assert all(word in text for text in texts)
        page.keyboard.type(" no such words")
        assert left.count() == 0
        box.fill("")
        assert left.count() == total


@pytest.mark.parametrize("name", [*RUNS, "compare"])
def test_the_keyboard_reaches_and_opens_everything(browser, report, name):
    with opened(browser, report(name)) as page:
        # One way through the page with the Tab key alone.
        wanted = page.evaluate(
            """() => {
              const found = [...document.querySelectorAll(
                "a, button, summary, input, .scroll, .wide .drawing")];
              found.forEach((e, i) => { e.dataset.stop = i; });
              return found.length;
            }"""
        )
        reached, unseen = [], []
        for _ in range(wanted):
            page.keyboard.press("Tab")
            stop, tag, outline = page.evaluate(
                """() => {
                  const e = document.activeElement;
                  const outline = getComputedStyle(e).outlineStyle;
                  return [Number(e.dataset.stop ?? -1), e.tagName, outline];
                }"""
            )
            reached.append(stop)
            if outline == "none":
                unseen.append(tag)
            if tag == "SUMMARY":
                page.keyboard.press("Enter")
        assert reached == list(range(wanted))
        assert unseen == []  # where one is can be seen
        folds = page.locator("details")
        assert folds.count() > 0
        assert folds.evaluate_all("list => list.every((e) => e.open)")
        for words in page.locator("details dl").all():
            assert words.is_visible()
        page.locator("summary").first.focus()
        page.keyboard.press("Enter")
        assert not page.locator("details dl").first.is_visible()


def test_the_keyboard_sorts(browser, report):
    with opened(browser, report("regression")) as page:
        head = page.locator("table.sortable th").nth(1)
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") == "descending"


def test_dark_where_dark_is_wanted(browser, report):
    found = {}
    for scheme in ("light", "dark"):
        with opened(browser, report("regression"), color_scheme=scheme) as page:
            read = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
            label = page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
            found[scheme] = (*page.locator("body").evaluate(read), label)
    assert found["light"][0] == "rgb(246, 247, 249)"
    assert found["dark"][0] == "rgb(18, 22, 28)"
    # Words and the labels of pictures change with it.
    assert all(a != b for a, b in zip(found["light"], found["dark"], strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [*RUNS, "compare"])
def test_axe_finds_nothing(browser, report, name, scheme):
    with opened(browser, report(name), color_scheme=scheme) as page:
        page.locator("details").evaluate_all("list => list.forEach((e) => { e.open = true; })")
        if name == "thousand":
            # Rows are alike: twenty of them tell what a thousand do.
            page.locator("tbody tr:nth-child(n+21)").evaluate_all(
                "list => list.forEach((e) => e.remove())"
            )
        found = Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found] == []


@pytest.mark.parametrize("name", [*RUNS, "compare"])
def test_prints_whole(browser, report, name):
    with opened(browser, report(name)) as page:
        pdf = page.pdf(format="A4", margin=dict.fromkeys(("left", "right", "top", "bottom"), "1cm"))
        assert pdf.startswith(b"%PDF")
        sheets = len(re.findall(rb"/Type\s*/Page\b", pdf))
        assert 2 <= sheets < (100 if name == "thousand" else 40)
        # What is folded in has been opened for it, and nothing is wider than the paper.
        page.set_viewport_size(dict(zip(("width", "height"), PAPER, strict=True)))
        page.emulate_media(media="print")
        assert page.locator("details").evaluate_all("list => list.every((e) => e.open)")
        wide = f"""list => list.filter((e) => e.getBoundingClientRect().right > {PAPER[0]} + 1)
          .map((e) => e.closest("section")?.id)"""
        assert page.locator("table, svg, .card").evaluate_all(wide) == []
        assert page.locator("nav").count() == 0 or not page.locator("nav").is_visible()


def test_a_watched_page_loads_itself_again(browser, tmp_path):
    folder = make_run(tmp_path / "run", stage="sampling", draws=30, planned=90)
    Live(folder).add("sampling", 30, 90, "draws", {"log_density": np.arange(4.0)})
    path = folder / "report.html"
    path.write_text(render(read_run(folder), 1))
    with opened(browser, path) as page:
        assert "30 of 90 draws" in page.locator("main").inner_text()
        Live(folder).add("sampling", 60, 90, "draws", {"log_density": np.arange(4.0)})
        path.write_text(render(read_run(folder), 1))
        page.get_by_text("60 of 90 draws").first.wait_for()
        # Whoever wants to read in peace can: then it stays as it is.
        page.locator("#reload").uncheck()
        page.evaluate("document.title = 'mine'")
        page.wait_for_timeout(1200)
        assert page.title() == "mine"
        # The last page, of a run that has ended, does not load itself again.
        page.locator("#reload").check()
        change(folder / "manifest.json", stage="done")
        path.write_text(render(read_run(folder)))
        page.locator("#reload").wait_for(state="detached")


def test_hostile_names_do_nothing(browser, tmp_path):
    script = "<script>document.title = 'broken'; console.log('broken')</script>"
    path = write_report(make_run(tmp_path / "run", name=script, targets=(script,), rows=40))
    with opened(browser, path) as page:
        assert page.locator("h1").inner_text() == script
        assert page.title() == f"{script} · bnnmcmc"
        assert page.locator("script").count() == 1


def test_every_section_of_the_page_is_known():
    # A section that is added is looked for in the browser too.
    assert len(SECTIONS) == 15
