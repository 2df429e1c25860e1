"""What the sections of the report say: each sentence in a case of yes and one of no."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from test_report import change, make_run

from bnnmcmc.live import MAX_POINTS, Live, read_progress
from bnnmcmc.report.folder import read_run
from bnnmcmc.report.page import tiles, verdict
from bnnmcmc.report.ranks import ranks
from bnnmcmc.report.sections import (
    calibration,
    chains,
    inputs,
    predictions,
    progress,
    setup,
    uncertainty,
)
from bnnmcmc.report.sections import scores as scores_section


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_bias_of_predictions(rng):
    mean, sd = rng.normal(size=200), np.full(200, 2.0)
    noise = norm.ppf((np.arange(200) + 0.5) / 200)
    fine = predictions.bias(mean + 2 * noise, mean, sd)
    assert fine.level == "good"
    assert "neither too high nor too low" in fine.text
    off = predictions.bias(mean + 2 * noise + 1, mean, sd)
    assert (off.level, off.text[:30]) == ("note", "Predictions are too low, by 0.")
    assert "0.5 standard deviations" in off.text
    assert "too high" in predictions.bias(mean + 2 * noise - 1, mean, sd).text
    assert predictions.bias(mean * np.nan, mean, sd).level == "bad"


def test_spread_that_misses_how_noise_changes(rng):
    mean, z = np.linspace(0, 1, 300), rng.normal(size=300)
    assert predictions.spread(mean, z).level == "good"
    wrong = predictions.spread(mean, z * (0.2 + 2 * mean))
    assert wrong.level == "note"
    assert "residuals are larger" in wrong.text
    assert "residuals are smaller" in predictions.spread(mean, z * (2.2 - 2 * mean)).text
    assert "Too few" in predictions.spread(mean[:5], z[:5]).text


def test_residuals_count_what_is_far_off():
    mean, sd = np.arange(10.0), np.ones(10)
    assert predictions.residuals("y", mean + 1, mean, sd).takeaway.startswith(
        "0 of 10 rows (0.0 %)"
    )
    y = mean + np.where(np.arange(10) < 2, 4, 1)
    assert predictions.residuals("y", y, mean, sd).takeaway.startswith("2 of 10 rows (20.0 %)")


def test_the_worst_rows_come_first_and_a_nan_before_them():
    z = np.array([0.1, -3.0, np.nan, 2.0])
    rows = np.array([7, 8, 9, 10])
    table = predictions.worst_rows("t", rows, z, z, None, None, z)
    assert [row[0].text for row in table.rows] == ["9", "8", "10", "7"]


def test_pit(rng):
    uniform = (np.arange(400) + 0.5) / 400
    assert "Nothing speaks against" in calibration.say_pit(uniform).text
    z = rng.normal(size=400)
    narrow = calibration.say_pit(norm.cdf(2 * z))
    assert narrow.level == "note"
    assert "the predictive is too narrow" in narrow.text
    assert "the predictive is too wide" in calibration.say_pit(norm.cdf(0.5 * z)).text
    assert "predictions are too low" in calibration.say_pit(norm.cdf(z + 1)).text
    assert "predictions are too high" in calibration.say_pit(norm.cdf(z - 1)).text
    assert calibration.say_pit(np.array([0.5, np.nan])).level == "bad"


def test_confusion():
    names = ["cat", "dog", "cow"]
    right = calibration.confused(np.diag([3, 4, 5]), names)
    assert (right.level, right.text) == ("good", "All 12 test rows get their own class.")
    counts = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 10]])
    some = calibration.confused(counts, names)
    assert (
        "3 of 30 test rows get a wrong class, most often dog instead of cat (2 of 10" in some.text
    )
    assert "right for 33.3 %, this is for 90.0 %" in some.text
    useless = calibration.confused(np.array([[0, 2], [0, 8]]), names)
    assert useless.level == "bad"
    assert "no better than always the most frequent class (80.0 %)" in useless.text
    table = calibration.confusion_table(counts, names)
    assert [cell.text for cell in table.rows[0]] == ["cat", "8", "2", "0", "80.0 %"]


def test_many_classes_are_told_by_the_worst_pairs():
    counts = np.diag(np.full(40, 5))
    counts[3, 7], counts[7, 1] = 4, 2
    table = calibration.confusion_table(counts, [f"c{i}" for i in range(40)])
    assert [[c.text for c in row] for row in table.rows] == [["c3", "c7", "4"], ["c7", "c1", "2"]]


def test_what_more_data_would_do():
    assert "More data would narrow" in uncertainty.say_share(np.full(9, 0.4)).text
    little = uncertainty.say_share(np.full(9, 0.04))
    assert "would help little: of the variance 4.0 % is epistemic" in little.text
    assert uncertainty.say_share(np.array([0.1, np.nan])).level == "bad"


def test_whether_errors_grow_with_the_spread(rng):
    sd = rng.uniform(0.5, 3, 300)
    error = np.abs(rng.normal(size=300))
    assert "it errs more" in uncertainty.honest(sd, sd * error).text
    assert "it errs less" in uncertainty.honest(sd, error / sd).text
    assert uncertainty.honest(sd, rng.permutation(sd)).level == "note"
    assert "Too little" in uncertainty.honest(np.ones(300), error).text


def test_inputs_that_do_nothing():
    names, low, high = ["a", "b", "c"], np.full(3, 0.01), np.full(3, 3.0)
    said = inputs.relevance(names, low, np.array([0.02, 1.5, 0.7]), high)
    assert "b has the largest scale (1.5, median); 1 of 3 inputs" in said.text
    assert "next to nothing: a." in said.text
    assert "rule none out" in inputs.relevance(names, low, np.array([0.5, 1.5, 0.7]), high).text


def test_lead_over_another_model(rng):
    gap = 0.1 * rng.normal(size=100)
    assert scores_section.lead(gap + 0.2, "ensemble").level == "good"
    assert scores_section.lead(gap - 0.2, "ensemble").level == "bad"
    even = scores_section.lead(gap - gap.mean(), "ensemble")
    assert (even.level, even.text[:20]) == ("note", "Not told apart from ")
    assert scores_section.lead(gap * np.nan, "ensemble").level == "bad"
    assert "one row shows nothing" in scores_section.lead(gap[:1], "ensemble").text


def test_the_verdict_says_which_difference_may_be_chance(tmp_path):
    folder = make_run(tmp_path / "run")
    stored = dict(np.load(folder / "predictions.npz"))
    noise = np.random.default_rng(0).normal(size=len(stored["y"]))
    densities = {
        "log_density_posterior": 0.0 * noise,
        "log_density_ensemble": -0.08 + 2 * (noise - noise.mean()),
        "log_density_best_member": -0.27 + 0.1 * (noise - noise.mean()),
    }
    np.savez(folder / "predictions.npz", **(stored | densities))
    said = next(s for s in verdict(read_run(folder)) if "scores an LPPD" in s.text)
    assert "than the deep ensemble (which may be chance) and 0.269 nats" in said.text
    assert said.text.endswith("than the best member.")
    assert said.level == "note"


def test_what_chains_count_for_is_said(tmp_path):
    folder = make_run(tmp_path / "run", status={2: ("stopped", "it failed")})
    path = folder / "metrics.json"
    said = " ".join(s.text for s in verdict(read_run(folder)))
    assert "weights" not in said
    found = json.loads(path.read_text())
    found["pool"] = {"weights": "stacking", "of_chains": [1, 0, 0, 0], "effective_chains": 1.0}
    path.write_text(json.dumps(found))
    run = read_run(folder)
    assert "By stacking weights they are worth 1.0." in " ".join(s.text for s in verdict(run))
    # Draws after a chain was stopped are none.
    assert run.going == 3
    assert next(t for t in tiles(run) if t["label"] == "Posterior draws")["value"] == "180"
    path.write_text("[1]")
    assert any("metrics.json" in text for text in read_run(folder).missing)


def test_how_much_test_rows_tell():
    assert setup.known(0).text.startswith("No test rows")
    assert setup.known(20).text.startswith("Few test rows")
    # 2 sqrt(0.9 * 0.1 / 3600)
    assert "to ± 1.0 points" in setup.known(3600).text
    assert "accuracy to ± 10.0 points" in setup.known(100, classes=True).text


def test_agreement_and_worth_of_chains(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    mixed, worth = chains.section(run).takeaways
    assert mixed.text.startswith("4 of 4 chains have an R-hat")
    assert "All 240 draws together are worth 812 independent ones" in worth.text
    assert (mixed.level, worth.level) == ("good", "good")
    for chain in run.chains[:3]:
        chain["rhat_function_median"] = 1.4
    run.diagnostics["ess_function_total_median"] = 12.0
    mixed, worth = chains.section(run).takeaways
    assert mixed.text.startswith("1 of 4 chains")
    assert (mixed.level, worth.level) == ("bad", "note")
    assert "few for its mean and spread" in worth.text


def test_which_stage_took_longest(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    said = setup.longest({"ensemble": 1.0, "sampling": 9.0}, run).text
    assert "Most of the time went into sampling (90.0 %)" in said
    assert "gradients per second" in said
    said = setup.longest({"ensemble": 4.0, "warmup": 3.0, "sampling": 3.0}, run).text
    assert "The longest stage was ensemble training (40.0 %)" in said


def test_progress_of_a_run_that_goes_on(tmp_path):
    folder = make_run(tmp_path / "run", stage="sampling", draws=30, planned=90)
    live = Live(folder)
    for done in (10, 20, 30):
        values = {"log_density": np.linspace(-5, -1, 4) + done, "step_size": np.full(4, np.nan)}
        live.add("sampling", done, 90, "draws", values)
    assert read_progress(folder)["sampling"]["points"][0]["log_density"][1] == pytest.approx(7)
    section = progress.section(read_run(folder))
    assert "Sampling: 30 of 90 draws (33.3 %)" in section.takeaways[0].text
    assert section.plots[0].takeaway.startswith("Now 27 (median")
    assert section.plots[1].takeaway == "Nothing finite so far."
    change(folder / "manifest.json", stage="done")
    assert progress.section(read_run(folder)) is None


def test_time_left_is_that_of_the_present_speed():
    def at(done, now):
        return {"done": done, "time": now}

    found = {"done": 30, "total": 90, "unit": "draws", "points": [at(10, 100.0), at(30, 110.0)]}
    assert "2 draws per second: 30.0 s left" in progress.how_far("sampling", found).text
    early = {**found, "points": [at(30, 110.0)]}
    assert "too early to say" in progress.how_far("sampling", early).text
    assert progress.how_far("sampling", {**found, "done": 90}).text.endswith("complete.")


def test_a_pause_between_sittings_does_not_count_as_work():
    points = [{"done": d, "time": 60.0 * d} for d in range(40)]
    points += [{"done": d, "time": 60.0 * d + 43_200} for d in range(41, 51)]
    found = {"done": 50, "total": 100, "unit": "draws", "points": points}
    assert "50 min" in progress.how_far("sampling", {**found, "since": 43_200.0}).text


def test_progress_stays_small_and_goes_on_after_an_interruption(tmp_path):
    live = Live(tmp_path)
    for done in range(1, 3 * MAX_POINTS):
        live.add("warmup", done, 1000, "steps", {"log_density": np.array([done, math.inf])})
    points = Live(tmp_path).stages["warmup"]["points"]
    assert len(points) <= MAX_POINTS + 1
    assert points[-1]["done"] == 3 * MAX_POINTS - 1
    assert [p["done"] for p in points] == sorted(p["done"] for p in points)
    again = Live(tmp_path)
    again.add("warmup", 5, 1000, "steps", {})
    assert max(p["done"] for p in again.stages["warmup"]["points"]) == 5
    assert again.stages["warmup"]["since"] >= again.begun > live.begun
    (tmp_path / "progress.json").write_text("{")
    assert read_progress(tmp_path) == {}


def test_a_chain_s_seconds_are_its_part_by_gradients():
    rows = [{"chain": i, "gradients": g} for i, g in enumerate([100, 300, 600])]
    found = chains.with_seconds(rows, 20.0)
    assert [row["seconds"] for row in found] == [2.0, 6.0, 12.0]
    assert found[0]["chain"] == 0
    # A stage without a time, and kernels that count no gradients.
    assert chains.with_seconds(rows, None) == rows
    assert chains.with_seconds([*rows, {"chain": 3, "gradients": None}], 20.0)[-1].keys() == {
        "chain",
        "gradients",
    }


# --- ranks ------------------------------------------------------------------------------------


def test_ranks_say_whether_chains_are_of_one_distribution():
    rng = np.random.default_rng(0)
    same = rng.normal(size=(6, 400))
    found = ranks(same, [], None)
    assert "Nothing speaks against one distribution" in found.takeaway
    apart = same.copy()
    apart[2] += 0.5
    apart[4] -= 0.6
    said = ranks(apart, [], None)
    assert "not of one distribution" in said.takeaway
    assert "lowest is chain 4, highest chain 2" in said.takeaway
    assert said.svg.startswith("<svg")
    assert "p=" not in said.svg
    # A chain that failed is none of them.
    assert "Nothing speaks against" in ranks(apart, [2, 4], None).takeaway
    lost = same.copy()
    lost[1, 7] = np.nan
    assert "5 chains" in ranks(lost, [], None).takeaway


def test_ranks_know_what_draws_are_worth():
    # Random walks of one law: as independent draws they would differ.
    rng = np.random.default_rng(1)
    walks = np.zeros((8, 4000))
    for t in range(1, 4000):
        walks[:, t] = 0.99 * walks[:, t - 1] + rng.normal(size=8)
    assert "not of one distribution" in ranks(walks, [], None).takeaway
    assert "Nothing speaks against" in ranks(walks, [], 4000 * 0.01 / 1.99).takeaway
    assert ranks(walks, [], 12.0) is None
    assert ranks(walks[:1], [], None) is None
    assert ranks(walks[:, :10], [], None) is None
    many = ranks(rng.normal(size=(1000, 50)), [], None)
    assert "20 chains of all" in many.takeaway
    assert len(many.svg) < 200_000
