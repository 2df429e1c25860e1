"""Runs side by side: paired differences against SciPy, ties, refusals, the page."""

import json
import math

import numpy as np
import pytest
import tomli_w
from scipy.stats import ttest_rel

from bnnmcmc.comparison import compare, print_comparison, say
from bnnmcmc.errors import InputError
from bnnmcmc.report.compare import fastest, make_page, settings, trouble, write_comparison
from bnnmcmc.store import write_arrays, write_json

LEVELS = np.array([0.05, 0.5, 0.95])


def make_run(
    folder,
    offset=0.0,
    noise=1.0,
    rows=None,
    seconds=20.0,
    ess=500.0,
    ok=4,
    settings=None,
    seed=0,
    density=True,
    targets=("y",),
):
    """Write a finished run whose predictions are off by ``offset``, with its own small noise."""
    rows = np.arange(100, 180) if rows is None else np.asarray(rows)
    truth = np.random.default_rng(12).normal(50, 10, 500)[:, None]
    own = np.random.default_rng(seed)
    y = truth[rows]
    shared = np.random.default_rng(5).normal(0, 3, 500)[:, None][rows]
    mean = y + shared + offset + noise * own.normal(size=y.shape)
    sd = np.full_like(y, 3.3)
    arrays = {"row": rows, "y": y, "mean": mean, "sd": sd, "epistemic_sd": sd / 3}
    arrays |= {
        "levels": LEVELS,
        "quantiles": mean + np.array([-1.645, 0, 1.645])[:, None, None] * sd,
    }
    if density:
        z = (y - mean) / sd
        arrays["log_density_posterior"] = (-0.5 * z**2 - np.log(sd * math.sqrt(2 * math.pi)))[:, 0]
    write_arrays(folder / "predictions.npz", arrays)
    manifest = {
        "schema": 1,
        "name": folder.name,
        "task": "regression",
        "chains": 4,
        "data": {"name": "t", "rows": 500, "test": len(rows), "targets": targets, "classes": None},
        "blocks": [{"start": 0, "count": 50}],
        "status": [{"chain": c, "status": "ok" if c < ok else "stuck"} for c in range(4)],
        "seconds": {"sampling": seconds},
    }
    write_json(folder / "manifest.json", manifest)
    write_json(
        folder / "diagnostics.json",
        {"ess_function_total_median": ess, "rhat_function_across_median": 1.01, "verdict": []},
    )
    (folder / "config.toml").write_text(
        tomli_w.dumps({"sampler": {"kernel": "mclmc", **(settings or {})}, "run": {"seed": seed}})
    )
    return folder


def test_paired_differences_are_those_of_a_paired_t_test(tmp_path):
    a, b = make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", offset=2.0, seed=2)
    found = compare([a, b])
    lppd = found.results["lppd"]
    terms = [c.terms["lppd"] for c in found.candidates]
    reference = ttest_rel(terms[1], terms[0])
    assert found.paired
    assert found.best["lppd"] == 0
    assert lppd[1].difference == pytest.approx(terms[1].mean() - terms[0].mean())
    assert lppd[1].difference / lppd[1].difference_error == pytest.approx(reference.statistic)
    # Rows that are hard for both cancel.
    assert lppd[1].difference_error < 0.8 * math.hypot(lppd[0].error, lppd[1].error)
    assert [r.mark for r in lppd] == ["best", "worse"]


def test_the_error_of_an_rmse_difference_is_that_of_resampled_rows(tmp_path):
    a, b = make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", noise=2.5, seed=2)
    found = compare([a, b])
    squares = np.stack([c.terms["rmse"] for c in found.candidates])
    rows = np.random.default_rng(0).integers(0, 80, (4000, 80))
    resampled = np.sqrt(squares[:, rows].mean(axis=2))
    gap = found.results["rmse"][1]
    assert gap.difference_error == pytest.approx((resampled[1] - resampled[0]).std(), rel=0.1)
    assert found.results["rmse"][0].value == pytest.approx(math.sqrt(squares[0].mean()))


def test_a_tie_is_told_as_a_tie_and_a_difference_as_one(tmp_path):
    runs = [make_run(tmp_path / name, seed=s) for s, name in enumerate("ab")]
    tied = say(compare(runs))
    assert any(text.startswith("LPPD: a tie; ") for text in tied)
    runs.append(make_run(tmp_path / "c", offset=4.0, seed=3))
    told = next(text for text in say(compare(runs)) if text.startswith("LPPD"))
    assert "ties with it (within two standard errors), c is worse." in told
    only = next(text for text in say(compare(runs[1:])) if text.startswith("LPPD"))
    assert "b is best" in only
    assert "by more than two standard errors of every other" in only


def test_a_name_does_not_make_a_tie(tmp_path):
    runs = [make_run(tmp_path / "properties", seed=1), make_run(tmp_path / "b", 5.0, seed=2)]
    _, *said = make_page(compare(runs)).verdict
    assert {sentence.level for sentence in said} == {"info"}
    runs = [runs[0], make_run(tmp_path / "c", seed=3)]
    assert "note" in {sentence.level for sentence in make_page(compare(runs)).verdict}


def test_other_test_rows_are_compared_unpaired_and_said_so(tmp_path):
    a = make_run(tmp_path / "a", seed=1)
    b = make_run(tmp_path / "b", rows=np.arange(300, 400), offset=1.0, seed=2)
    found = compare([a, b])
    assert not found.paired
    assert "different test rows (2 sets, 80 to 100 rows)" in say(found)[0]
    gap = found.results["lppd"][1 - found.best["lppd"]]
    assert not gap.paired
    errors = [r.error for r in found.results["lppd"]]
    assert gap.difference_error == pytest.approx(math.hypot(*errors))
    assert "unpaired" in str(make_page(found).sections[0].tables[0].rows)


def test_rows_in_another_order_are_the_same_rows(tmp_path):
    a, b = make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", offset=2.0, seed=2)
    before = compare([a, b]).results["lppd"][1]
    stored = dict(np.load(b / "predictions.npz"))
    order = np.random.default_rng(0).permutation(80)
    shuffled = {n: v[order] for n, v in stored.items() if n not in ("levels", "quantiles")}
    quantiles = stored["quantiles"][:, order]
    write_arrays(b / "predictions.npz", {**stored, **shuffled, "quantiles": quantiles})
    assert compare([a, b]).results["lppd"][1] == pytest.approx(before)


@pytest.mark.parametrize("change", ["targets", "values", "rows"])
def test_other_tables_are_refused(tmp_path, change):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", targets=("z",) if change == "targets" else ("y",))
    if change == "values":
        stored = dict(np.load(b / "predictions.npz"))
        write_arrays(b / "predictions.npz", {**stored, "y": stored["y"] + 1})
    if change == "rows":
        manifest = json.loads((b / "manifest.json").read_text())
        manifest["data"]["rows"] = 600
        write_json(b / "manifest.json", manifest)
    with pytest.raises(InputError, match="different tables"):
        compare([a, b])


def test_too_few_runs_are_refused_with_the_reasons(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (b / "predictions.npz").unlink()
    with pytest.raises(InputError, match=r"found 1 run to compare[\s\S]*bnnmcmc report"):
        compare([a, b])
    with pytest.raises(InputError, match="given twice"):
        compare([a, a / ".." / "a"])
    c = make_run(tmp_path / "c", seed=4)
    found = compare([a, b, c])
    assert list(found.left_out) == [str(b)]
    assert any("Left out" in s.text for s in make_page(found).verdict)


def test_a_score_that_is_not_finite_is_never_best(tmp_path):
    a, b, c = (make_run(tmp_path / n, seed=s) for s, n in enumerate("abc"))
    stored = dict(np.load(b / "predictions.npz"))
    stored["log_density_posterior"][3] = np.nan
    write_arrays(b / "predictions.npz", stored)
    found = compare([b, a, c])
    assert found.results["lppd"][0].mark == ""
    assert found.best["lppd"] in (1, 2)
    assert "Not finite: b." in next(t for t in say(found) if t.startswith("LPPD"))


def test_runs_of_an_earlier_version_lack_the_lppd_and_say_so(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", density=False, seed=3)
    found = compare([a, b])
    assert set(found.results) == {"rmse", "interval_score"}
    assert say(found)[-1].startswith("No LPPD: b came from an earlier version")


def test_classes(tmp_path):
    for seed, name in enumerate("ab"):
        folder = make_run(tmp_path / name, seed=seed)
        rng = np.random.default_rng(9)
        y = rng.integers(0, 3, 80)
        p = rng.dirichlet(np.ones(3), 80) * (0.5 + seed) + np.eye(3)[y] * (seed + 0.3)
        p /= p.sum(axis=1, keepdims=True)
        arrays = {
            "row": np.arange(80),
            "y": y,
            "probabilities": p,
            "classes": np.array(list("xyz")),
        }
        write_arrays(folder / "predictions.npz", arrays)
    found = compare([tmp_path / "a", tmp_path / "b"])
    assert set(found.results) == {"lppd", "accuracy", "brier"}
    # Without stored densities they are the probabilities of the classes observed.
    first = np.load(tmp_path / "a" / "predictions.npz")
    expected = np.log(first["probabilities"][np.arange(80), first["y"]]).mean()
    assert found.results["lppd"][0].value == pytest.approx(expected)


def test_settings_that_differ(tmp_path):
    a = make_run(tmp_path / "a", settings={"warmup": 100, "draws": 50})
    b = make_run(tmp_path / "b", settings={"warmup": 200, "draws": 50}, seed=0, offset=0.1)
    found = compare([a, b])
    assert found.settings == {"sampler.warmup": [100, 200]}
    assert "differ in sampler.warmup" in settings(found).takeaways[0].text
    c = make_run(tmp_path / "c", settings={"warmup": 100, "draws": 50})
    assert "All settings are the same" in settings(compare([a, c])).takeaways[0].text


def test_speed_and_trouble_are_said_where_there_are_some(tmp_path):
    a, b = make_run(tmp_path / "a", seed=1), make_run(tmp_path / "b", seed=2)
    runs = compare([a, b]).candidates
    assert "as many effective draws per second" in fastest(runs).text.replace("about ", "")
    assert trouble(runs).level == "good"
    c = make_run(tmp_path / "c", seconds=200.0, ok=3, seed=3)
    runs = compare([a, c]).candidates
    assert "a makes most effective draws per second (25), 10 times" in fastest(runs).text
    assert "c (1 chain not ok)" in trouble(runs).text


def test_the_page_loads_nothing_and_shows_names_as_text(tmp_path):
    runs = [make_run(tmp_path / n, seed=s) for s, n in enumerate(["<script>1", "b&c"])]
    path = write_comparison(compare(runs), tmp_path / "compare.html")
    html = path.read_text()
    assert html.count("<script>") == 1
    assert "&lt;script&gt;1" in html
    assert "b&amp;c" in html
    assert "://" not in html
    assert html.count("<figure") == 3


def test_the_command_prints_a_table_and_writes_a_page(tmp_path, here):
    make_run(tmp_path / "a", seed=1)
    make_run(tmp_path / "b", offset=3.0, seed=2)
    code, out, _ = here("compare", "a", "b", "--out", "side.html", cwd=tmp_path)
    assert code == 0
    assert "paired, row by row" in out
    assert "b" in out.split("Runs side by side")[1]
    assert (tmp_path / "side.html").is_file()
    code, _, err = here("compare", "a", cwd=tmp_path)
    assert code == 2
    assert "expected at least two" in err


def test_markup_in_a_name_is_printed_as_text(tmp_path, capsys):
    from rich.console import Console

    runs = [make_run(tmp_path / n, seed=s) for s, n in enumerate(["[bold]a", "b"])]
    console = Console(width=160)
    print_comparison(console, compare(runs))
    assert "[bold]a" in capsys.readouterr().out
