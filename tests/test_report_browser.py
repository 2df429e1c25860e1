"""The report in a browser: nothing loaded, nothing complained of, tables sort and filter, axe.

Needs Chromium on the path (Debian: ``apt install chromium``), and for the last test axe-core, whose
script comes with ``pip install --no-deps axe-playwright-python``; without them the tests skip.
"""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from test_report import CHROMIUM, make_run

from bnnmcmc.report.page import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")

# What is looked at in the page; the result goes into its title.
LOOK = """
const words = (list) => list.map((e) => e.textContent.trim());
const found = {};
found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
found.sections = words([...document.querySelectorAll("section > h2")]);
found.links = [...document.querySelectorAll("nav a")]
  .filter((a) => !document.querySelector(a.getAttribute("href"))).length;
found.folds = [...document.querySelectorAll("details")].map((fold) => {
  fold.querySelector("summary").click();
  return fold.open && fold.querySelector("dl").offsetHeight > 0;
});
found.unnamed = [...document.querySelectorAll("svg")]
  .filter((svg) => !(svg.closest("[role=img]") || {ariaLabel: ""}).ariaLabel).length;
found.unreachable = [...document.querySelectorAll("button, a, summary, input, .scroll")]
  .filter((e) => e.tabIndex < 0).length;
found.wide = document.documentElement.scrollWidth - window.innerWidth;
found.overlaps = [...document.querySelectorAll(".tiles .card")]
  .filter((card) => card.scrollWidth > card.clientWidth).length;
found.dark = getComputedStyle(document.body).backgroundColor;
found.sorted = [...document.querySelectorAll("table.sortable")].every((table) => {
  return [...table.tHead.rows[0].cells].every((head, column) => {
    if (head.classList.contains("text")) return true;
    const read = () => [...table.tBodies[0].rows]
      .map((row) => row.cells[column].dataset.value).filter((v) => v !== "" && !isNaN(Number(v)));
    head.querySelector("button").click(); const up = read().map(Number);
    head.querySelector("button").click(); const down = read().map(Number);
    return up.every((v, i) => !i || up[i - 1] <= v) && down.every((v, i) => !i || down[i - 1] >= v);
  });
});
const box = document.querySelector(".filter input");
if (box) {
  const rows = [...box.closest(".tabled").querySelector("tbody").rows];
  box.value = rows[3].cells[0].textContent; box.dispatchEvent(new Event("input"));
  const seen = rows.filter((row) => !row.hidden);
  found.filtered = seen.every((row) => row.textContent.includes(box.value));
  found.hidden = rows.filter((row) => row.hidden).length;
  box.value = ""; box.dispatchEvent(new Event("input"));
  found.back = rows.every((row) => !row.hidden);
}
"""
AXE = """
document.querySelectorAll("details").forEach((fold) => { fold.open = true; });
axe.run().then((result) => {
  document.title = JSON.stringify(result.violations.map((v) => [v.id, v.nodes[0].html]));
});
"""
RUNS = {
    "regression": {},
    "classification": {"task": "classification"},
    "diverged": {"status": {1: ("diverging", "Steps diverged."), 2: ("nonfinite", "Lost.")}},
    "interrupted": {"stage": "sampling", "draws": 30, "planned": 90, "stopped": "interrupted"},
    "thousand": {"chains": 1000, "draws": 12, "planned": 12},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {
        name: write_report(make_run(folder / name, rows=40, **options))
        for name, options in RUNS.items()
    }


def shown(page: Path, script: str, *flags: str) -> tuple[list[str], str]:
    """Open a page with a script at its end; return what the console says, and the title."""
    changed = page.with_name("changed.html")
    html = page.read_text(encoding="utf-8")
    changed.write_text(html.replace("</body>", f"<script>{script}</script></body>"))
    run = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={page.parent / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            *flags,
            "--dump-dom",
            changed.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    title = re.search(r"<title>(.*?)</title>", run.stdout, re.S)
    assert title
    return [line for line in run.stderr.splitlines() if ":CONSOLE" in line], title[1]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("width", [1440, 500])
def test_nothing_is_loaded_and_everything_works(pages, name, width):
    script = LOOK + "document.title = JSON.stringify(found);"
    complaints, title = shown(pages[name], script, f"--window-size={width},900")
    found = json.loads(title.replace("&amp;", "&"))
    assert complaints == []
    assert found["requests"] == []
    assert found["links"] == found["unnamed"] == found["unreachable"] == found["overlaps"] == 0
    assert found["wide"] <= 0
    assert all(found["folds"])
    assert found["folds"]
    assert found["sorted"]
    expected = {"Chains", "Training", "Warm-up", "Data and split", "Environment"}
    if name != "interrupted":
        expected |= {"Scores on held-out data", "Calibration", "Uncertainty", "Time and memory"}
    assert expected <= set(found["sections"])
    if "filtered" in found:
        assert found["filtered"]
        assert found["hidden"] > 0
        assert found["back"]


def test_dark_where_dark_is_wanted(pages):
    script = LOOK + "document.title = found.dark;"
    _, light = shown(pages["regression"], script)
    _, dark = shown(pages["regression"], script, "--blink-settings=preferredColorScheme=0")
    assert (light, dark) == ("rgb(246, 247, 249)", "rgb(18, 22, 28)")


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("name", ["regression", "classification", "diverged", "interrupted"])
def test_axe_finds_nothing(pages, name, scheme):
    home = importlib.util.find_spec("axe_playwright_python")
    if home is None or home.origin is None:
        pytest.skip("no axe-core here")
    axe = Path(home.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    flag = f"--blink-settings=preferredColorScheme={scheme}"
    _, title = shown(pages[name], f"{axe.replace('</script', '<\\/script')};{AXE}", flag)
    assert json.loads(title) == []
