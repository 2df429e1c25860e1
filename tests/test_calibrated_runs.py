"""[calibration]: from the config to predictions, files, estimators and the report."""

import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import bnnmcmc
from bnnmcmc.config import parse
from bnnmcmc.errors import InputError
from bnnmcmc.summary import say_calibration

QUICK = ["sampler.warmup=150", "sampler.draws=20", "ensemble.max_epochs=30", "run.seed=1"]
HELD_OUT = ["sampler.rows=train", "data.split.validation=0.4"]


@pytest.mark.parametrize("method", ["split", "cqr"])
def test_a_run_with_corrected_intervals(tiny, here, method):
    options = [*QUICK, *HELD_OUT, f"calibration.method={method}"]
    code, out, err = here("run", "tiny.toml", "--out", "run", "--set", *options, cwd=tiny)
    assert code == 0, err
    run = bnnmcmc.Run.open(tiny / "run")
    name = {"split": "split-conformal", "cqr": "conformalised quantile"}[method]
    marked = f"{name} intervals from 24 held-out rows"
    # Scores by hand: the test rows' intervals, before and after.
    found = json.loads((tiny / "run" / "metrics.json").read_text())["calibrated"]
    assert (found["method"], found["said"]) == (method, marked)
    assert f"{marked}: the 90 % interval covers" in out
    table = bnnmcmc.read_table(tiny / "table.csv").frame
    rows = table.iloc[run.dataset.test]
    y = rows["y"].to_numpy(float)[:, None]
    for part, prediction in {
        "posterior": replace(run, calibration="none").predict(rows),
        "corrected": run.predict(rows),
    }.items():
        low, high = prediction.interval(0.9)
        scored = found["parts"][0][part]
        assert scored["coverage_90"] == pytest.approx(((low <= y) & (y <= high)).mean())
        assert scored["width_90"] == pytest.approx((high - low).mean(), rel=1e-4)
    widths = [found["parts"][0][part]["width_90"] for part in ("corrected", "posterior")]
    assert widths[0] != widths[1]
    # The command line and a saved predictor give the same intervals, and say what they are.
    rows.to_csv(tiny / "rows.csv", index=False)
    run.save(tiny / "model.bnn", draws=None)
    low, high = run.predict(rows).interval(0.9)
    for source in ("run", "model.bnn"):
        code, out, err = here("predict", source, "rows.csv", cwd=tiny)
        assert code == 0, err
        assert marked in err
        frame = pd.read_csv(io.StringIO(out))
        np.testing.assert_allclose(frame["y_lower_90"], low[:, 0], rtol=1e-4)
        np.testing.assert_allclose(frame["y_upper_90"], high[:, 0], rtol=1e-4)
    html = (tiny / "run" / "report.html").read_text()
    assert marked in html
    assert "Corrected on held-out rows" in html


def test_a_run_with_a_temperature(tiny, here):
    text = (tiny / "tiny.toml").read_text().replace('target = "y"', 'target = "kind"')
    (tiny / "k.toml").write_text(text + '\n[likelihood]\nkind = "categorical"\n')
    options = [*QUICK, *HELD_OUT, "calibration.method=temperature"]
    code, out, err = here("run", "k.toml", "--out", "run", "--set", *options, cwd=tiny)
    assert code == 0, err
    assert "temperature" in out
    run = bnnmcmc.Run.open(tiny / "run")
    rows = bnnmcmc.read_table(tiny / "table.csv").frame.iloc[run.dataset.test]
    found = json.loads((tiny / "run" / "metrics.json").read_text())["calibrated"]
    probabilities = run.predict(rows).probabilities
    labels = rows["kind"].to_numpy()
    right = [probabilities[i, run.encoding.classes.index(k)] for i, k in enumerate(labels)]
    assert found["parts"][0]["corrected"]["lppd"] == pytest.approx(np.mean(np.log(right)), abs=1e-5)
    assert found["said"] in (tiny / "run" / "report.html").read_text()


def config(method, likelihood="gaussian", rows="train", weights="equal"):
    return parse(
        {
            "data": {"source": "memory"},
            "likelihood": {"kind": likelihood},
            "sampler": {"rows": rows},
            "pool": {"weights": weights},
            "calibration": {"method": method},
        },
        "my.toml",
    )


def test_what_does_not_go_together_is_refused():
    assert config("split").calibration.method == "split"
    assert config("none", rows="train+validation").calibration.method == "none"
    for wrong, words in (
        ({"rows": "train+validation"}, r'needs sampler.rows = "train", found "train\+validation"'),
        ({"weights": "stacking"}, 'needs pool.weights = "equal", found "stacking"'),
        ({"likelihood": "categorical"}, 'method: found "split", expected temperature'),
    ):
        with pytest.raises(InputError, match=words):
            config("split", **wrong)
    with pytest.raises(InputError, match=r"stop\.lppd ends sampling by them"):
        parse({**config("split").model_dump(mode="json"), "stop": {"lppd": 0.01}}, "my.toml")
    with pytest.raises(InputError, match='found "temperature", expected split or cqr'):
        config("temperature")


def test_too_few_validation_rows_are_refused_before_training(tiny, here):
    options = [*QUICK, "sampler.rows=train", "calibration.method=split"]
    code, _, err = here("run", "tiny.toml", "--out", "run", "--set", *options, cwd=tiny)
    assert code == 2
    assert 'calibration.method: "split" needs at least 19 validation rows' in err
    assert not (tiny / "run").exists()


def test_estimators_keep_the_correction(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 2))
    y = x[:, 0] + rng.standard_t(3, 80)
    model = bnnmcmc.BNNRegressor(
        hidden=(4,),
        chains=2,
        warmup=100,
        draws=20,
        ensemble={"max_epochs": 20},
        validation_fraction=0.3,
        calibration="split",
    ).fit(x, y)
    assert model.fit_.config.sampler.rows == "train"
    found = model.predict_distribution(x[:5])
    assert found.calibration == "split-conformal intervals from 24 held-out rows"
    model.save(tmp_path / "model.bnn", draws=None)
    again = bnnmcmc.load(tmp_path / "model.bnn").predict(x[:5])
    assert again.calibration == found.calibration
    np.testing.assert_allclose(again.interval(0.9), found.interval(0.9), rtol=1e-5)
    ends = np.concatenate(found.interval(0.9), axis=1)
    np.testing.assert_array_equal(model.predict_interval(x[:5], level=0.9), ends)


def test_the_sentence_names_both_coverages():
    own, corrected = ({"coverage_90": c, "width_90": w} for c, w in ((0.8, 2.0), (0.91, 2.5)))
    part = {"name": "y", "posterior": own, "corrected": corrected}
    said = say_calibration({"said": "split", "parts": [part]})
    assert "a, the 90 % interval covers" in say_calibration(
        {"said": "split", "parts": [{**part, "name": name} for name in "ab"]}
    )
    assert say_calibration({"method": "temperature", "missing": "no"}) == "nothing: no"
    assert said == (
        "split: the 90 % interval covers 91.0 % of the test rows, the posterior's own 80.0 %; 2.5 "
        "wide instead of 2"
    )


def test_what_cannot_be_fitted_costs_the_correction_alone(tiny, here, monkeypatch):
    def fails(*_):
        raise InputError("it cannot be fitted")

    monkeypatch.setattr("bnnmcmc.run.correction_of", fails)
    options = [*QUICK, *HELD_OUT, "calibration.method=split"]
    code, out, err = here("run", "tiny.toml", "--out", "run", "--set", *options, cwd=tiny)
    assert code == 0, err
    assert "nothing: it cannot be fitted" in out
    found = json.loads((tiny / "run" / "metrics.json").read_text())
    assert found["calibrated"] == {"method": "split", "missing": "it cannot be fitted"}
    assert "Corrected by nothing: it cannot be fitted." in (tiny / "run/report.html").read_text()
