import base64
import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import tomli_w
from scipy.special import xlogy
from scipy.stats import norm

from bnnmcmc.errors import InputError
from bnnmcmc.predictive_checks import check_classes, check_numbers
from bnnmcmc.report import figures
from bnnmcmc.report.folder import read_run
from bnnmcmc.report.page import write_report
from bnnmcmc.store import append, create_arrays, write_arrays, write_json

VOID = {"meta", "br", "hr", "img", "input", "link"}


def make_run(
    folder,
    *,
    task="regression",
    stage="done",
    chains=4,
    draws=60,
    planned=60,
    rows=89,
    targets=("progression",),
    name="diabetes",
    status=None,
    stopped=None,
    seed=0,
):
    """Write a run folder as the pipeline does, up to a stage; status: chain -> (word, sentence)."""
    rng = np.random.default_rng(seed)
    stages = ("ensemble", "warmup", "sampling", "results", "done")
    reached = stages.index(stage)
    folder.mkdir(parents=True)
    status = status or {}
    words = [status.get(c, ("ok", "the chain moved and stayed finite")) for c in range(chains)]
    classes = ["benign", "malignant"] if task == "classification" else None
    manifest = {
        "schema": 1,
        "bnnmcmc": "0.1.0",
        "versions": {"jax": "0.12.0", "blackjax": "1.7.1"},
        "name": name,
        "created": "2026-11-24T20:00:00+00:00",
        "command": f"bnnmcmc run experiments/{name}.toml",
        "seed": 7,
        "devices": {"platform": "cpu", "count": 2, "kind": "cpu"},
        "placement": f"{chains} chains on 2 CPU cores, {chains // 2} each, one after the other",
        "stage": stage,
        "stopped": stopped,
        "chains": chains,
        "draws": planned,
        "warmup": 5000,
        "thin": 10,
        "parameters": 963,
        "kernel": "mclmc",
        "task": task,
        "data": {
            "name": f"sklearn:{name}",
            "rows": 442,
            "features": 10,
            "train": 309,
            "validation": 44,
            "test": rows,
            "sampled_on": "train+validation",
            "targets": list(targets),
            "classes": classes,
        },
        "blocks": [],
        "status": [],
        "seconds": {"compile": 8.1, "ensemble": 4.2},
    }
    config = {
        "data": {"source": f"sklearn:{name}", "split": {"train_rows": list(range(309))}},
        "model": {"hidden": [16, 16], "activation": "silu"},
        "prior": {
            "layers": {"layer0": {"weight": {"scale": 0.5}}},
            "family": "normal",
            "scale": 1.0,
        },
        "sampler": {"kernel": "mclmc", "warmup": 5000, "draws": planned, "thin": 10},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config))
    if reached >= 1:
        write_arrays(folder / "ensemble" / "history.npz", training_history(rng, chains))
    if reached >= 2:
        t = np.linspace(0, 1, 200)
        noise = np.cumsum(rng.normal(0, 0.02, (chains, 200)), axis=1)
        step_size = 0.012 * np.exp(1.5 * (1 - t) * np.sin(9 * t) + noise * (1 - t))
        write_arrays(folder / "warmup.npz", {"step_size": step_size})
        manifest["seconds"]["warmup"] = 31.4
        trace = 700 + np.cumsum(rng.normal(0, 1.5, (chains, planned)), axis=1)
        trace += 12 * rng.normal(0, 1, (chains, planned))
        for chain, (word, _) in status.items():
            trace[chain] = np.nan if word == "nonfinite" else -5e4
        create_arrays(
            folder / "stats", {"log_density": ()}, {"log_density": "float32"}, chains, planned
        )
        append(folder / "stats", 0, {"log_density": trace[:, :draws].astype(np.float32)})
        manifest["blocks"] = [
            {"start": 0, "count": draws // 3},
            {"start": draws // 3, "count": draws - draws // 3},
        ]
    if reached >= 3:
        manifest["seconds"]["sampling"] = 44.0
        manifest["status"] = [
            {"chain": c, "status": w, "sentence": s} for c, (w, s) in enumerate(words)
        ]
    if reached >= 4:
        manifest["seconds"]["results"] = 3.3
        write_diagnostics(folder, rng, words, draws)
        write_checks(folder, rng, rows, targets, classes)
        results = write_regression if task == "regression" else write_classification
        results(folder, rng, rows, targets if task == "regression" else classes, chains)
    write_json(folder / "manifest.json", manifest)
    return folder


def training_history(rng, members):
    epochs = rng.integers(180, 420, members)
    history = np.full((members, 500, 2), np.nan)
    for m, stop in enumerate(epochs):
        e = np.arange(stop)
        fall = 2.5 * np.exp(-e / 15)
        history[m, :stop, 0] = 0.6 + fall - 0.0008 * e + 0.03 * rng.normal(size=stop)
        history[m, :stop, 1] = 0.75 + fall + 8e-6 * (e - 120) ** 2 + 0.02 * rng.normal(size=stop)
    best = np.nanargmin(history[:, :, 1], axis=1)
    return {
        "history": history,
        "epochs": epochs,
        "best_epoch": best + 1,
        "validation_loss": history[np.arange(members), best, 1],
    }


def write_diagnostics(folder, rng, words, draws):
    rows = [
        {
            "chain": chain,
            "status": word,
            "sentence": sentence,
            "draws": draws,
            "log_density": round(700 + rng.normal(0, 9), 3) if word != "nonfinite" else "nan",
            "log_density_drift": round(rng.normal(0, 0.4), 3),
            "acceptance_rate": "",
            "energy_error": round(rng.gamma(5, 0.01), 5),
            "divergences": 0 if word == "ok" else 14,
            "tree_depth_max": "",
            "step_size": round(0.012 + rng.normal(0, 0.001), 5),
            "gradients": 10 * draws,
            "ess_log_density": round(rng.uniform(10, 60), 1),
            "ess_function_median": round(rng.uniform(60, 300), 1),
            "ess_function_min": round(rng.uniform(5, 30), 1),
            "rhat_function_median": round(1 + rng.gamma(2, 0.01), 4),
            "rhat_function_max": round(1.02 + rng.gamma(2, 0.05), 4),
            "rhat_weights_max": round(1.2 + rng.gamma(2, 0.3), 4),
            "lppd": round(-1.1 + rng.normal(0, 0.1), 4),
            "rhat_log_density": round(1 + rng.gamma(2, 0.05), 4),
        }
        for chain, (word, sentence) in enumerate(words)
    ]
    with open(folder / "diagnostics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_json(
        folder / "diagnostics.json",
        {
            "rhat_function_across_median": 1.03,
            "rhat_function_across_max": 1.21,
            "ess_function_total_median": 812.0,
            "verdict": [
                "4 of 4 chains have status ok.",
                "The chains agree on the predictions (median R-hat 1.03).",
            ],
        },
    )


def write_checks(folder, rng, rows, targets, classes=None):
    about = {"rows": rows, "of": "test", "posterior_sets": 200, "prior_sets": 100}
    about |= {"prior_missing": "", "prior_of_some": False}
    if classes:
        y, sets, prior = (rng.binomial(1, 0.4, (n, rows)) for n in (1, 200, 100))
        found = check_classes(y[0], sets.astype(float), prior.astype(float), classes)
    else:
        size = (rows, len(targets))
        y, sets = 150 + 75 * rng.normal(size=size), 150 + 75 * rng.normal(size=(200, *size))
        found = check_numbers(y, sets, 300 * rng.normal(size=(100, *size)), list(targets))
    write_json(folder / "predictive_checks.json", {**about, **found})


def write_metrics(folder, test, units, rows, chains):
    metrics = {"test": test, "rows": rows, "best_member": 3, "pooled_chains": list(range(chains))}
    if units:
        metrics["test_target_units"] = units
    write_json(folder / "metrics.json", metrics)


def write_regression(folder, rng, rows, targets, chains):
    y = 150 + 75 * rng.normal(size=(rows, len(targets)))
    sd = np.full_like(y, 55.0)
    mean = y + sd * rng.normal(size=y.shape)
    levels = np.array([0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975])
    z = np.array([-1.96, -1.645, -1.282, -0.674, 0, 0.674, 1.282, 1.645, 1.96])
    arrays = {
        "row": np.arange(rows),
        "y": y,
        "mean": mean,
        "sd": sd,
        "epistemic_sd": sd / 3,
        "levels": levels,
        "quantiles": mean + z[:, None, None] * sd,
        "pit": norm.cdf((y - mean) / sd),
    }
    density = norm.logpdf(y, mean, sd).sum(axis=1)
    for model, gap in (("best_member", 0.27), ("ensemble", 0.078), ("posterior", 0.0)):
        arrays[f"log_density_{model}"] = density - gap + 0.1 * rng.normal(size=rows)
    write_arrays(folder / "predictions.npz", arrays)
    test = {
        name: {
            "lppd": lppd,
            "nll_gaussian": -lppd - 0.01,
            "rmse": rmse,
            "crps": 0.55 * rmse,
            "coverage_50": 0.50 - narrow,
            "coverage_80": 0.81 - narrow,
            "coverage_90": 0.91 - narrow,
            "coverage_95": 0.96 - narrow / 2,
        }
        for name, lppd, rmse, narrow in (
            ("best_member", -1.3214, 0.7512, 0.18),
            ("ensemble", -1.1302, 0.7201, 0.07),
            ("posterior", -1.0521, 0.7034, 0.01),
        )
    }
    units = {
        name: {
            **s,
            "lppd": s["lppd"] - 4.34,
            "nll_gaussian": s["nll_gaussian"] + 4.34,
            "rmse": 77 * s["rmse"],
            "crps": 77 * s["crps"],
        }
        for name, s in test.items()
    }
    write_metrics(folder, test, units, rows, chains)


def write_classification(folder, rng, rows, classes, chains):
    p = rng.beta(0.5, 0.5, rows)
    y = (rng.uniform(size=rows) < p).astype(int)
    arrays = {
        "row": np.arange(rows),
        "y": y,
        "probabilities": np.stack([1 - p, p], axis=1),
        "classes": np.array(classes),
        "expected_entropy": -0.8 * (xlogy(p, p) + xlogy(1 - p, 1 - p)),
    }
    write_arrays(folder / "predictions.npz", arrays)
    test = {
        name: {"lppd": lppd, "accuracy": 0.93, "brier": 0.1 - lppd / 10, "ece": 0.04}
        for name, lppd in (("best_member", -0.31), ("ensemble", -0.22), ("posterior", -0.25))
    }
    write_metrics(folder, test, None, rows, chains)


def change(path, **entries):
    write_json(path, {**json.loads(path.read_text()), **entries})


class Page(HTMLParser):
    """Reads a page; fails on tags that do not match, keeps text, attributes and tables' rows."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.ids, self.rows, self.texts = [], [], [], [], []
        self.tags, self.marks = [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_starttag(self, tag, attributes, closed=False):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        classes = dict(attributes).get("class") or ""
        if classes.startswith("mark "):
            self.marks.append(classes)
        if not closed and tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))

    def row(self, start):
        return next(r for r in self.rows if r and r[0].strip().startswith(start))

    def figure_captions(self):
        pairs = zip(self.attributes, self.attributes[1:], strict=False)
        return [label for (_, _, role), (_, name, label) in pairs if role == "img"]


def read(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "diabetes")


@pytest.fixture(scope="module")
def page(finished):
    return read(finished)


def test_verdict_compares_the_posterior(page):
    assert "scores an LPPD of −1.052 on 89 test rows" in page.text
    assert page.marks[:3] == ["mark good"] * 3
    assert "0.078 nats per row better than the deep ensemble" in page.text
    assert "0.269 nats per row better than the best member" in page.text
    assert "50 / 80 / 90 / 95 % intervals cover 49.0 / 80.0 / 90.0 / 95.5 %" in page.text
    assert "cover what they promise" in page.text
    assert "All 4 chains are ok. The scores pool all 4 chains." in page.text
    assert "The chains agree on the predictions (median R-hat 1.03)." in page.text
    assert "have status ok" not in page.text
    assert "Missing" not in page.text
    assert "Unfinished" not in page.text


def test_scores_table(page, finished):
    rows = {r[0].split("  ")[0].strip(): r[1:] for r in page.rows}
    assert page.row("LPPD")[1:] == ["−1.321", "−1.130", "−1.052"]
    assert rows["LPPD ↑ higher is better"]  # target units come second
    assert [r for r in page.rows if r[0].startswith("RMSE")] == [
        ["RMSE ↓ lower is better", "0.7512", "0.7201", "0.7034"],
        ["RMSE ↓ lower is better", "57.84", "55.45", "54.16"],
    ]
    assert page.row("90 % intervals") == [
        "90 % intervals → 90 % is right",
        "73.0 %",
        "84.0 %",
        "90.0 %",
    ]
    html = (finished / "report.html").read_text()
    assert '<td class="best">−1.052</td>' in html
    assert '<td class="best">90.0 %</td>' in html
    assert '<td class="best">−1.130</td>' not in html


def test_run_is_described(page):
    for text in (
        "442 rows, 10 features",
        "train 309, validation 44, test 89; posterior sampled on train+validation",
        "24 November 2026, 20:00 UTC",
        "963",
        "bnnmcmc 0.1.0, jax 0.12.0, blackjax 1.7.1",
        "warm-up 31.4 s",
        "4 chains on 2 CPU cores, 2 each, one after the other",
        "bnnmcmc run experiments/diabetes.toml",
        'activation = "silu"',
        "hidden = [16, 16]",
        "18, 19, ... (309 in all)]",
        "layers.layer0.weight.scale = 0.5",
        "[prior]",
    ):
        assert text in page.text


def test_long_traces_are_drawn_thinly(monkeypatch):
    values = np.random.default_rng(0).normal(size=(2, 900))
    whole = figures.log_density(values, []).svg
    monkeypatch.setattr(figures, "MAX_TRACE_POINTS", 100)
    few = figures.log_density(values, []).svg
    assert len(re.findall(r"[ML] [\d.]", few)) < len(re.findall(r"[ML] [\d.]", whole)) / 4


def test_figures_have_takeaway_and_alt(page, finished):
    assert page.tags.count("figure") == page.tags.count("figcaption") == 11
    captions = page.figure_captions()
    assert len(captions) == 11
    assert all(len(caption) > 40 for caption in captions)
    found = np.load(finished / "predictions.npz")
    low, high = found["quantiles"][1, :, 0], found["quantiles"][7, :, 0]
    inside = int(np.sum((low <= found["y"][:, 0]) & (found["y"][:, 0] <= high)))
    assert f"{inside} of 89 test rows" in page.text
    losses = np.load(finished / "ensemble" / "history.npz")["validation_loss"]
    assert f"a validation loss from {losses.min():.4g} to {losses.max():.4g}." in page.text
    last = np.load(finished / "warmup.npz")["step_size"][:, -1]
    assert f"end at {np.median(last):.4g} (median" in page.text


def test_committed_draws_only(tmp_path):
    folder = make_run(tmp_path / "run", stage="sampling", draws=30, planned=90)
    trace = read_run(folder).log_density
    assert trace.shape == (4, 30)
    assert np.isfinite(trace).all()


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_one_file_that_loads_nothing(tmp_path, task):
    folder = make_run(tmp_path / "run", task=task)
    page = read(folder)
    html = (folder / "report.html").read_text()
    assert "://" not in html
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [v for _, name, v in page.attributes if name in ("src", "srcset")]
    links = [v for _, name, v in page.attributes if name in ("href", "xlink:href")]
    links += re.findall(r"url\(([^)]*)\)", html)
    assert links
    for link in links:
        assert link.startswith("data:image/png;base64,") or link[1:] in page.ids
    assert len(page.ids) == len(set(page.ids))
    assert sorted(p.name for p in folder.glob("*.tmp")) == []


def test_same_folder_same_bytes(finished, page):
    before = (finished / "report.html").read_bytes()
    assert write_report(finished).read_bytes() == before


def test_classification(tmp_path):
    page = read(make_run(tmp_path / "run", task="classification", name="breast_cancer"))
    assert "0.030 nats per row worse than the deep ensemble" in page.text
    assert page.marks[0].endswith("bad")
    assert "0.060 nats per row better than the best member" in page.text
    assert page.row("Accuracy") == ["Accuracy ↑ higher is better", "0.9300", "0.9300", "0.9300"]
    assert "expected calibration error of the posterior is 4.0 %" in page.text
    assert "Reliability" in page.text
    assert "benign, malignant" in page.text
    assert "intervals" not in page.text


def test_miscalibrated_intervals_are_said(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["test"]["posterior"].update(coverage_50=0.7, coverage_90=0.8)
    write_json(folder / "metrics.json", metrics)
    page = read(folder)
    assert "too narrow at 90 % and too wide at 50 %" in page.text
    assert "cover what they promise" not in page.text


def test_a_score_that_is_not_finite_is_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["test"]["posterior"]["lppd"] = float("nan")
    write_json(folder / "metrics.json", metrics)
    page = read(folder)
    assert page.row("LPPD")[1:] == ["−1.321", "−1.130", "NaN"]
    assert "cannot be scored" in page.text
    assert '<td class="best">−1.130</td>' in (folder / "report.html").read_text()


@pytest.mark.parametrize("stage", ["ensemble", "warmup", "sampling", "results"])
def test_unfinished_run_says_what_is_missing(tmp_path, stage):
    folder = make_run(
        tmp_path / "run", stage=stage, draws=30, planned=90, stopped="interrupted", chains=3
    )
    page = read(folder)
    assert "Unfinished" in page.text
    assert "(interrupted)" in page.text
    assert f"To go on: bnnmcmc resume {folder}" in page.text
    assert "metrics.json (scores)" in page.text
    assert ("warmup.npz" in page.text) == (stage in ("ensemble", "warmup"))
    assert ("30 of 90 draws per chain on disk" in page.text) == (stage in ("sampling", "results"))
    assert page.tags.count("figure") == {"ensemble": 0, "warmup": 1}.get(stage, 4)


def test_time_budget_is_said_although_done(tmp_path):
    page = read(make_run(tmp_path / "run", draws=30, planned=90, stopped="time budget"))
    assert "Stopped early (time budget)" in page.text
    assert "30 of 90 draws per chain" in page.text


def test_failed_chains(tmp_path):
    status = {1: ("stuck", "It never moved."), 2: ("nonfinite", "It left the finite numbers.")}
    folder = make_run(tmp_path / "run", status=status)
    change(folder / "metrics.json", pooled_chains=[0, 3])
    page = read(folder)
    assert (
        "2 of 4 chains not ok (1 nonfinite, 1 stuck). The scores pool 2 of 4 chains." in page.text
    )
    assert "Chain 1: It never moved." in page.text
    assert "1 chain with a log-density that is not finite (2)" in page.text
    assert "Outside the figure: chains 1, 2." in page.text
    row = next(r for r in page.rows if r[:2] == ["2", "nonfinite"])
    assert "NaN" in row
    assert "14" in row
    assert "Chain 2: It left the finite numbers." in page.text.split("What the columns mean")[0]


def test_empty_and_constant_columns_are_left_out(page):
    heads = next(r for r in page.rows if r[0] == "chain")
    assert "R-hat function max" in heads
    assert "accepted" not in heads
    assert "max depth" not in heads
    assert "diverged" not in heads
    assert "same in all chains: draws 60, diverged 0, gradients 600, seconds 11." in page.text


def test_broken_files_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "predictions.npz").write_bytes(b"PK\x03\x04 cut short")
    (folder / "metrics.json").write_text("{")
    (folder / "diagnostics.csv").write_text("chain,status,sentence,draws\n0,ok,,many\n")
    write_arrays(folder / "ensemble" / "history.npz", {"history": np.zeros((3, 5))})
    page = read(folder)
    assert "predictions.npz (test predictions; damaged" in page.text
    assert "metrics.json (scores; damaged" in page.text
    assert "diagnostics.csv (diagnostics per chain; damaged" in page.text
    assert "ensemble/history.npz does not hold what it should" in page.text
    assert page.tags.count("figure") == 5


def test_a_run_of_before_the_checks_is_not_called_damaged(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "predictive_checks.json").unlink()
    page = read(folder)
    assert "Missing" not in page.text
    assert "predictive checks" not in page.text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", {"test": [1, 2], "rows": 9}),
        ("metrics.json", {"test": {"posterior": {"lppd": "low", "coverage_90": None}}}),
        ("diagnostics.json", {"verdict": [3], "ess_function_total_median": "many"}),
        ("predictive_checks.json", {"targets": 3}),
    ],
)
def test_a_broken_file_costs_its_own_part_only(tmp_path, file, content):
    folder = make_run(tmp_path / "run")
    whole = read(folder)
    write_json(folder / file, content)
    page = read(folder)
    assert f"{file} does not hold what it should" in page.text
    kept = ["All 4 chains are ok.", "Chains ok", "Posterior draws", "Environment", "Training"]
    if file != "metrics.json":
        kept += ["Test LPPD", "Scores on held-out data", "intervals cover what they promise"]
    if file != "diagnostics.json":
        kept += ["They are worth", "The chains agree on the predictions"]
    for text in kept:
        assert text in whole.text
        assert text in page.text


def test_the_posterior_s_scores_come_with_their_errors(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "±" not in "".join(read(folder).row("CRPS"))
    errors = {"lppd": 0.0713, "rmse": 0.0352, "crps": math.nan, "coverage_90": 0.0312}
    change(folder / "metrics.json", standard_errors={"standardised": errors, "target": {}})
    page = read(folder)
    assert page.row("LPPD")[1:] == ["−1.321", "−1.130", "−1.052 ±\N{NO-BREAK SPACE}0.071"]
    assert page.row("RMSE")[3] == "0.7034 ±\N{NO-BREAK SPACE}0.0352"
    assert page.row("CRPS")[3] == "0.3869"
    assert page.row("90 %")[3] == "90.0 % ±\N{NO-BREAK SPACE}3.1"
    assert "the posterior's standard error" in page.text


def test_not_a_run_folder(tmp_path):
    with pytest.raises(InputError, match="manifest"):
        write_report(tmp_path)


def test_hostile_names(tmp_path):
    targets = ("<script>alert(1)</script>", "price $ in $^{", '"><img src=x>', "质量 #2f7fb5")
    folder = make_run(tmp_path / "run", targets=targets, name="<b>&amp;</b>")
    change(folder / "manifest.json", command="bnnmcmc run 'a<b>.toml' --set x=\"&lt;\"")
    page = read(folder)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "<b>&amp;</b>" in page.text
    for target in targets:
        assert f"predicted {target}" in page.text
        assert f"Predicted against observed: {target}" in page.text
    assert "bnnmcmc run 'a<b>.toml' --set x=\"&lt;\"" in page.text


def test_a_thousand_chains(tmp_path):
    status = {c: ("diverging", f"chain {c} diverged") for c in range(100, 112)}
    folder = make_run(tmp_path / "run", chains=1000, draws=150, planned=150, status=status)
    page = read(folder)
    assert (folder / "report.html").stat().st_size < 1_000_000
    assert "12 of 1,000 chains not ok (12 diverging)" in page.text
    listed = [r for r in page.rows if r[1:2] == ["diverging"]]
    assert len(listed) == 10
    assert not [r for r in page.rows if r[1:2] == ["ok"]]
    quantiles = page.row("R-hat function max")
    with open(folder / "diagnostics.csv", newline="") as file:
        values = [float(row["rhat_function_max"]) for row in csv.DictReader(file)]
    assert quantiles[3] == f"{np.median(values):.3f}"
    assert quantiles[6:] == ["0", "0"]


def test_what_is_not_finite_is_said_and_drawn_around(tmp_path):
    folder = make_run(tmp_path / "run", chains=30)
    history = dict(np.load(folder / "ensemble" / "history.npz"))
    history["history"][4] = np.nan
    history["history"][5, 3:] = np.inf
    write_arrays(folder / "ensemble" / "history.npz", history)
    step_size = np.load(folder / "warmup.npz")["step_size"].copy()
    step_size[:2] = [[np.nan], [np.inf]]
    write_arrays(folder / "warmup.npz", {"step_size": step_size})
    page = read(folder)
    assert "2 members never had a finite loss." in page.text
    assert "2 chains with a step size that is not finite (0, 1), left out of the bands" in page.text
    assert page.tags.count("figure") == 11


def test_no_warmup_is_nothing_missing(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "warmup.npz").unlink()
    assert "Missing: warmup.npz" in read(folder).text
    change(folder / "manifest.json", warmup=0)
    assert "Missing" not in read(folder).text


def test_no_test_rows_is_nothing_missing(tmp_path):
    folder = make_run(tmp_path / "run")
    data = json.loads((folder / "manifest.json").read_text())["data"]
    change(folder / "manifest.json", data={**data, "test": 0})
    (folder / "metrics.json").unlink()
    (folder / "predictions.npz").unlink()
    page = read(folder)
    assert "Missing" not in page.text
    assert page.tags.count("figure") == 6


def test_warmup_cut_short_keeps_its_scale(tmp_path):
    folder = make_run(tmp_path / "run")
    step_size = np.load(folder / "warmup.npz")["step_size"][:, :40]
    write_arrays(folder / "warmup.npz", {"step_size": step_size})
    note = "warm-up was ended by the time budget after 1000 of 5000 steps"
    change(folder / "manifest.json", notes=[note])
    page = read(folder)
    assert f"Note: {note}." in page.text
    drawing = (folder / "report.html").read_text().split("Warm-up: step size")[1]
    ticks = re.findall(r">(\d+)</text>", drawing.split("</svg>")[0])
    assert max(int(tick) for tick in ticks) == 1000


def test_validation_loss_that_explodes_is_said(tmp_path):
    folder = make_run(tmp_path / "run")
    history = dict(np.load(folder / "ensemble" / "history.npz"))
    for curve, best in zip(history["history"], history["best_epoch"], strict=True):
        curve[best:, 1] += 40
    write_arrays(folder / "ensemble" / "history.npz", history)
    page = read(folder)
    assert re.search(r"Later it rises to 4[01]\.\d+ \(median\)", page.text)
    drawing = (folder / "report.html").read_text().split("Training of the ensemble")[1]
    ticks = re.findall(r">([\d.]+)</text>", drawing.split("</svg>")[0])
    assert "40" not in ticks


def test_many_rows_and_draws_stay_small(tmp_path):
    folder = make_run(tmp_path / "run", rows=30_000, chains=20, draws=3000, planned=3000)
    read(folder)
    html = (folder / "report.html").read_text()
    assert len(html) < 5_000_000
    images = re.findall(r'href="data:image/png;base64,([^"]*)"', html)
    assert len(images) >= 2
    # No figure keeps its many points as vectors beside the image.
    assert max(map(len, re.findall(r' d="([^"]*)"', html))) < 50_000
    assert html.count("<use") < 1000
    assert base64.b64decode(images[0]).startswith(b"\x89PNG")


def test_imports_no_jax():
    code = "import sys, bnnmcmc.report.page; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- modes ----------------------------------------------------------------------------------


def explored(folder, labels):
    """Put what `exploration` finds of chains in these modes into a run folder."""
    from bnnmcmc.exploration import as_json, explore

    rng = np.random.default_rng(0)
    places = 5 * np.random.default_rng(99).normal(size=(9, 12))
    functions = places[list(labels)][:, None] + rng.normal(size=(len(labels), 60, 12))
    noise = np.ones((len(labels), 12))
    found = explore(functions, noise, log_density=-0.5 * np.square(functions))
    path = folder / "diagnostics.json"
    content = json.loads(path.read_text()) if path.exists() else {"verdict": []}
    content["verdict"].insert(0, "Verdict: converged within each chain, but not across them.")
    write_json(path, {**content, "exploration": as_json(found)})
    return found


def test_the_section_on_modes(tmp_path):
    folder = make_run(tmp_path / "run")
    page = write_report(folder).read_text()
    assert ">Modes</h2>" not in page  # a folder of an older version
    explored(folder, [0, 1, 0, 0, 1, 2])
    page = write_report(folder).read_text()
    assert ">Modes</h2>" in page
    section = page[page.index(">Modes</h2>") :].partition("</section>")[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', section)
    assert rows == [("1", "3", "50.0 %"), ("2", "2", "33.3 %"), ("3", "1", "16.7 %")]
    assert "6 chains in 3 modes" in section
    assert section.count("<svg") == 2
    assert "The last doubling of draws" in section
    assert '<span class="mark note">note</span><span>Verdict: converged within each' in page


def test_modes_that_are_damaged_are_named(tmp_path):
    folder = make_run(tmp_path / "run")
    write_json(
        folder / "diagnostics.json", {"verdict": [], "exploration": {"modes": {"chains": [1, 2]}}}
    )
    page = write_report(folder).read_text()
    assert "diagnostics.json does not hold what it should" in page
