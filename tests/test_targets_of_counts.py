"""Counts and shares as targets: not scaled, checked before any long work, through a whole run."""

import json

import numpy as np
import pandas as pd
import pytest

import bnnmcmc
from bnnmcmc.config import parse
from bnnmcmc.data import encode_targets, prepare, table_from_arrays

QUICK = ["sampler.warmup=150", "sampler.draws=20", "ensemble.max_epochs=30", "ensemble.members=2"]


def counts(rows=80):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, rows))
    visits = rng.poisson(20 * np.exp(0.5 * a))
    return pd.DataFrame({"a": a, "b": b, "visits": visits})


def test_counts_stay_as_they_are():
    frame = counts()
    table = table_from_arrays(frame[["a", "b"]], frame["visits"])
    data = prepare(table, task="regression", support="count")
    np.testing.assert_array_equal(data.y[:, 0], frame["visits"])
    (target,) = data.encoding.targets
    assert (target.center, target.scale, target.support) == (0.0, 1.0, "count")
    assert target.level == frame["visits"][data.train].mean()
    again = type(data.encoding).from_json(data.encoding.to_json())
    assert again == data.encoding
    wrong = frame.assign(visits=-1.0)
    with pytest.raises(bnnmcmc.InputError, match=r"found -1\.0 .*expected whole numbers from 0"):
        encode_targets(again, table_from_arrays(wrong[["a", "b"]], wrong["visits"]))


@pytest.mark.parametrize(
    ("kind", "cell", "message"),
    [
        ("poisson", "-3", r"table\.csv, line 5, column 'y': found -3\.0, expected whole numbers"),
        ("negative_binomial", "2.5", r"line 5, column 'y': found 2\.5"),
        ("beta", "1", r"line 5, column 'y': found 1\.0.*between 0 and 1, without these"),
    ],
)
def test_wrong_targets_are_refused_before_any_work(kind, cell, message, tmp_path, here):
    good = "0.5" if kind == "beta" else "4"
    other = "0.2" if kind == "beta" else "7"
    rows = [f"{i % 7},{good if i % 2 else other}" for i in range(40)]
    rows[3] = f"1,{cell}"
    (tmp_path / "table.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    text = f'[data]\npath = "table.csv"\n[likelihood]\nkind = "{kind}"\n'
    (tmp_path / "a.toml").write_text(text)
    code, _, err = here("check", "a.toml", cwd=tmp_path)
    assert code == 2
    assert pd.Series([err.replace("\n", " ")]).str.contains(message, regex=True).all(), err


@pytest.mark.parametrize("kind", ["negative_binomial"])
@pytest.mark.slow
def test_a_whole_run_on_counts(kind, tmp_path, here):
    counts().to_csv(tmp_path / "table.csv", index=False)
    text = '[data]\npath = "table.csv"\ntarget = "visits"\n[model]\nhidden = [4]\n'
    (tmp_path / "a.toml").write_text(text + f'[likelihood]\nkind = "{kind}"\n')
    code, out, err = here("run", "a.toml", "--out", "run", "--set", *QUICK, cwd=tmp_path)
    assert code == 0, err
    assert "LPPD" in out
    scores = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["posterior"]
    run = bnnmcmc.Run.open(tmp_path / "run")
    found = run.predict(counts().head(9))
    low = found.quantile(0.1)
    assert np.array_equal(low, np.floor(low))
    assert np.all(found.samples == np.floor(found.samples))
    # Better than one Poisson rate for all rows.
    y = run.dataset.y[run.dataset.test]
    flat = (
        -y.mean()
        + y * np.log(y.mean())
        - np.vectorize(lambda k: np.log(np.arange(1, k + 1)).sum())(y)
    )
    assert scores["lppd"] > flat.mean()
    assert np.isfinite(found.log_prob(counts()["visits"].head(9))).all()


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (
            {"kind": "poisson", "scale": 0.5},
            r"likelihood\.scale: has no meaning for kind = 'poisson'",
        ),
        ({"df": 5.0}, r"likelihood\.df: has no meaning for kind = 'gaussian'"),
        ({"kind": "student_t", "df": 2.0}, r"likelihood\.df: found 2\.0, expected more than 2"),
        (
            {"kind": "beta", "concentration": 0.0},
            r"concentration: found 0\.0, expected more than 0",
        ),
        ({"kind": "laplace", "components": 4}, r"components: has no meaning for kind = 'laplace'"),
        ({"kind": "normal"}, r"likelihood\.kind: found 'normal'"),
        ({"kind": "beta", "scale_prior": 2.0}, r"scale_prior: needs scale = .sampled"),
    ],
)
def test_options_that_a_likelihood_does_not_have(likelihood, message):
    with pytest.raises(bnnmcmc.InputError, match=message):
        parse({"data": {"path": "a.csv"}, "likelihood": likelihood}, "a.toml")
