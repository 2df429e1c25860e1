"""The report in its other forms: Markdown, followed while a run goes on, in a notebook."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from test_comparison import make_run as compared
from test_report import change, make_run

from bnnmcmc.comparison import compare
from bnnmcmc.live import Live
from bnnmcmc.report.folder import read_run
from bnnmcmc.report.page import chain_strip, make_page, tiles, write_markdown
from bnnmcmc.report.watch import watch_report


def test_markdown_holds_what_the_page_does(tmp_path):
    folder = make_run(tmp_path / "run")
    path = write_markdown(folder)
    assert path == folder / "report.md"
    text = path.read_text(encoding="utf-8")
    page = make_page(read_run(folder))
    for section in page.sections:
        assert f"## {section.title}" in text
        for plot in section.plots:
            assert f"### {plot.title}" in text
    pictures = re.findall(r"^!\[[^\]]+\]\((report-figures/[\w-]+\.png)\)$", text, re.M)
    assert len(pictures) == sum(len(s.plots) for s in page.sections) == len(set(pictures))
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "| LPPD ↑ higher is better | −1.321 | −1.130 | **−1.052** |" in text
    # A table's rows have as many cells as its head.
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_names_cannot_break_out_of_markdown(tmp_path):
    target = "a|b `c` <script>alert(1)</script> [x](y)"
    folder = make_run(tmp_path / "run", targets=(target,), name="<i>n</i>\n# heading")
    change(folder / "manifest.json", command="bnnmcmc run '```'")
    text = write_markdown(folder).read_text()
    assert "````\nbnnmcmc run '```'\n````" in text
    # What is between fences is shown as it is.
    text = re.sub(r"^(`{3,})\n[\s\S]*?^\1$", "", text, flags=re.M)
    assert "<script>" not in text
    assert "<i>" not in text
    assert "\n# heading" not in text
    assert "a\\|b \\`c\\` &lt;script&gt;" in text


def test_five_numbers_at_the_top(tmp_path):
    found = tiles(read_run(make_run(tmp_path / "run")))
    assert [tile["label"] for tile in found] == [
        "Test LPPD",
        "90 % intervals cover",
        "Chains ok",
        "Posterior draws",
        "They are worth",
    ]
    assert found[4]["value"] == "812"
    assert "R-hat across chains 1.03" in found[4]["detail"]
    unfinished = tiles(read_run(make_run(tmp_path / "b", stage="sampling", draws=30, planned=90)))
    assert [tile["label"] for tile in unfinished] == ["Posterior draws"]


def test_a_mark_for_each_chain_and_words_for_many(tmp_path):
    status = {2: ("stuck", "It never moved.")}
    folder = make_run(tmp_path / "run", status=status)
    marks, said = chain_strip(read_run(folder))
    assert said == "4 chains: 3 ok, 1 stuck"
    assert marks[2] == (2, "stuck", "It never moved.")
    many = make_run(tmp_path / "many", chains=1000, draws=9, planned=9, status=status)
    assert chain_strip(read_run(many)) == ([], "1,000 chains: 999 ok, 1 stuck")


def test_a_run_is_followed_until_it_ends(tmp_path):
    folder = make_run(tmp_path / "run", stage="sampling", draws=30, planned=90)
    Live(folder).add("sampling", 30, 90, "draws", {"log_density": np.arange(4.0)})
    pages, said = [], []

    def sleep(seconds):
        assert seconds == 7
        pages.append((folder / "report.html").read_text())
        if len(pages) == 2:
            change(folder / "manifest.json", stage="done")

    watch_report(folder, 7, lambda: True, said.append, sleep)
    assert len(pages) == 2
    assert all('data-seconds="7"' in html for html in pages)
    assert "Sampling: 30 of 90 draws" in pages[0]
    assert "It goes on now." in pages[0]
    assert "To go on: bnnmcmc resume" not in pages[0]
    last = (folder / "report.html").read_text()
    assert "data-seconds=" not in last
    assert "It goes on now." not in last
    assert "every 7 s" in said[0]
    assert said[-1] == "the run is done"


def test_a_run_that_was_stopped_or_killed_is_not_followed_for_ever(tmp_path):
    folder = make_run(tmp_path / "run", stage="warmup")
    said = []
    watch_report(folder, 1, lambda: False, said.append, pytest.fail)
    assert said[-1] == "no longer watched, in the stage warmup"
    assert "data-seconds=" not in (folder / "report.html").read_text()


def test_ctrl_c_leaves_a_page_that_stands_still(tmp_path):
    folder = make_run(tmp_path / "run", stage="warmup")

    def interrupt(_):
        raise KeyboardInterrupt

    watch_report(folder, 1, lambda: True, [].append, interrupt)
    assert "data-seconds=" not in (folder / "report.html").read_text()


def test_a_run_writes_progress_and_is_seen_at_work(tiny, here):
    from bnnmcmc.live import read_progress
    from bnnmcmc.stopping import at_work, locked

    code, _, err = here("run", "tiny.toml", "--out", "run", "--quiet", cwd=tiny)
    assert code == 0, err
    found = read_progress(tiny / "run")
    assert list(found) == ["ensemble", "warmup", "sampling"]
    assert (found["sampling"]["done"], found["sampling"]["total"]) == (40, 40)
    assert "log_density" in found["warmup"]["points"][-1]
    assert "validation loss" in found["ensemble"]["points"][-1]
    assert not at_work(tiny / "run")
    with locked(tiny / "run"):
        assert at_work(tiny / "run")
    memory = next(s for s in make_page(read_run(tiny / "run")).sections if s.key == "cost")
    assert "MiB" in dict(memory.facts)["Memory"]
    stored = dict(np.load(tiny / "run" / "predictions.npz"))
    assert stored["pit"].shape == stored["y"].shape
    assert ((stored["pit"] >= 0) & (stored["pit"] <= 1)).all()
    code, out, _ = here("report", "run", "--format", "md", cwd=tiny)
    assert code == 0
    assert (tiny / "run" / "report.md").is_file()
    code, out, _ = here("report", "run", "--watch", cwd=tiny)
    assert "the run is done" in out
    code, _, err = here("report", "run", "--watch", "--every", "0", cwd=tiny)
    assert code == 2
    assert "--every above 0" in err


def test_values_show_themselves_in_a_notebook(finished):
    from bnnmcmc.run import Run

    run = Run.open(finished / "run")
    html = run._repr_html_()
    assert "3 ok" in html
    assert "40 from each chain" in html
    assert "Verdict:" in html
    prediction = run.predict(pd.DataFrame({"a": [0.1] * 12, "b": 0.2, "kind": "red"}))
    html = prediction._repr_html_()
    assert html.count("<tr>") == 11
    assert "y_lower_90" in html
    assert "the first 10 of 12 rows" in html
    assert run.report() == finished / "run" / "report.html"


def test_diagnostics_show_themselves_in_a_notebook(finished):
    from bnnmcmc.run import Run

    found = Run.open(finished / "run").diagnose()
    html = found._repr_html_()
    assert html.startswith(f"<p>{found.summary['verdict'][0]}</p>")
    assert html.count("<tr>") == 1 + 3
    assert "<th scope='col'>R-hat (predictions)</th>" in html
    frame = found.to_frame()
    assert frame["status"].tolist() == ["ok"] * 3
    stored = json.loads((finished / "run" / "diagnostics.json").read_text())
    assert found.summary["verdict"] == stored["verdict"]
    # The worst first, one that is not ok before them, and only so many of them.
    row = found.chains[0]
    many = [row | {"chain": c, "rhat_function_median": 1 + c / 100} for c in range(40)]
    many[7] |= {"status": "stuck", "sentence": "<script>it</script> never moved"}
    html = found._replace(chains=many)._repr_html_()
    assert re.findall(r"<tr><td>(\d+)</td>", html)[:3] == ["7", "39", "38"]
    assert "10 chains to look at first, of 40" in html
    assert "<script>" not in html
    assert "&lt;script&gt;it" in html


def test_a_comparison_shows_itself_in_a_notebook(tmp_path):
    runs = [compared(tmp_path / "a<b>", noise=0.5), compared(tmp_path / "other", noise=5, seed=1)]
    html = compare(runs)._repr_html_()
    assert "a&lt;b&gt;" in html
    assert "<b>a" not in html
    assert html.count("<tr>") == 3
    assert "(best)" in html
    assert "±" in html


def test_names_are_text_in_a_notebook():
    from bnnmcmc.prediction import Prediction

    classes = ("<script>", "b&")
    prediction = Prediction(("<b>",), probabilities=np.full((2, 2), 0.5), classes=classes)
    html = prediction._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "p(b&amp;)" in html
