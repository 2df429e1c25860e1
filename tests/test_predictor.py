"""A predictor in one file, and the command that predicts files of any length."""

import subprocess
import sys
import zipfile

import jax
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import bnnmcmc
from bnnmcmc.data import read_pieces, read_table
from bnnmcmc.predictive import thinned
from bnnmcmc.rows import predict_file
from tests.test_estimators import TINY, houses

LOAD = """
import sys, numpy as np, pandas as pd, bnnmcmc
bnnmcmc.use_all_cores(2)
predictor = bnnmcmc.load(sys.argv[1])
found = predictor.predict(pd.read_parquet(sys.argv[2]))
values = found.probabilities if found.mean is None else np.column_stack([found.mean, found.sd])
np.save(sys.argv[3], values)
"""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A fitted estimator without gaps, and its predictor with all draws."""
    frame, price = houses()
    frame = frame.assign(size=frame["size"].fillna(100.0), city=frame["city"].fillna("Ulm"))
    model = bnnmcmc.BNNRegressor(**{**TINY, "chains": 2}).fit(frame, price)
    file = tmp_path_factory.mktemp("fitted") / "model.bnn"
    model.save(file, draws=None)
    return model, frame, file


def in_fresh_process(file, rows, folder):
    rows.to_parquet(folder / "rows.parquet")
    subprocess.run(
        [sys.executable, "-c", LOAD, file, folder / "rows.parquet", folder / "found.npy"],
        check=True,
        cwd=folder,
    )
    return np.load(folder / "found.npy")


def test_run_predicts_the_same_in_a_fresh_process(finished, tmp_path):
    run = bnnmcmc.Run.open(finished / "run")
    rows = pd.read_csv(finished / "table.csv").drop(columns="y")
    run.save(tmp_path / "model.bnn", draws=None)
    expected = run.predict(rows)
    found = in_fresh_process(tmp_path / "model.bnn", rows, tmp_path)
    np.testing.assert_array_equal(found, np.column_stack([expected.mean, expected.sd]))
    with zipfile.ZipFile(tmp_path / "model.bnn") as archive:
        assert set(archive.namelist()) == {"predictor.json", "draws.npy"}
    with np.load(tmp_path / "model.bnn", allow_pickle=False) as arrays:  # an npz, too
        assert arrays["draws"].shape[:2] == (3, 40)


def test_estimators_predict_the_same(tmp_path):
    frame, price = houses()
    model = bnnmcmc.BNNClassifier(**TINY).fit(frame, price > price.median())
    model.save(tmp_path / "model.bnn")
    predictor = bnnmcmc.load(tmp_path / "model.bnn")
    found = predictor.predict(frame)
    assert found.classes == (False, True)
    np.testing.assert_array_equal(
        found.probabilities, model.predict_distribution(frame).probabilities
    )
    assert "20 draws" in repr(predictor)


def test_draws_are_thinned_evenly(fitted, tmp_path):
    model, rows, _ = fitted
    model.save(tmp_path / "model.bnn", draws=9)  # 2 chains of 20: every fifth
    predictor = bnnmcmc.load(tmp_path / "model.bnn")
    assert (predictor.draws.chains, predictor.draws.draws) == (2, 4)
    kept = np.concatenate(list(thinned(model.run_.pooled_draws, 5).blocks()), axis=1)
    np.testing.assert_array_equal(next(iter(predictor.draws.blocks())), kept)
    assert np.all(np.isfinite(predictor.predict(rows).mean))


def test_scales_of_a_hierarchical_prior_are_applied(tmp_path):
    x = np.linspace(-1, 1, 40)[:, None]
    options = {**TINY, "prior": {"hierarchical": True}}
    model = bnnmcmc.BNNRegressor(**options).fit(x, x[:, 0])
    model.save(tmp_path / "model.bnn")
    predictor = bnnmcmc.load(tmp_path / "model.bnn")
    assert not any("prior" in name for name in predictor.draws.layout.names)
    np.testing.assert_allclose(predictor.predict(x).mean[:, 0], model.predict(x), rtol=1e-4)


def test_runs_made_in_python_say_how_they_are_built(tmp_path):
    posterior = bnnmcmc.Posterior(
        bnnmcmc.mlp(2, [3], 2, "tanh"), bnnmcmc.gaussian(), bnnmcmc.normal_prior()
    )
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    y = x[:, :1]
    starts = jax.vmap(posterior.init)(jax.random.split(jax.random.key(0), 2))
    run = bnnmcmc.sample(posterior, starts, x, y, kernel="hmc", warmup=5, draws=4)
    file = tmp_path / "model.bnn"
    with pytest.raises(bnnmcmc.InputError, match=r"give model=\.\.\. and likelihood="):
        run.save(file)
    kind = {"kind": "gaussian"}
    with pytest.raises(bnnmcmc.InputError, match="does not describe this run's network"):
        run.save(file, model={"hidden": [4], "activation": "tanh"}, likelihood=kind)
    with pytest.raises(bnnmcmc.InputError, match="does not describe this run's network"):
        run.save(file, model={"hidden": [3], "activation": "silu"}, likelihood=kind)
    with pytest.raises(bnnmcmc.InputError, match="does not describe this run's network"):
        run.save(file, model={"hidden": [3], "activation": "tanh"}, likelihood={"kind": "laplace"})
    run.save(file, model={"hidden": [3], "activation": "tanh"}, likelihood=kind)
    np.testing.assert_array_equal(bnnmcmc.load(file).predict(x).mean, run.predict(x).mean)


def test_files_that_are_no_predictor(fitted, tmp_path):
    with pytest.raises(bnnmcmc.InputError, match="no such file"):
        bnnmcmc.load(tmp_path / "none.bnn")
    (tmp_path / "text.bnn").write_text("hello")
    with pytest.raises(bnnmcmc.InputError, match=r"not a predictor written by Run\.save"):
        bnnmcmc.load(tmp_path / "text.bnn")
    run = fitted[0].run_
    run.save(tmp_path / "model.bnn")
    whole = (tmp_path / "model.bnn").read_bytes()
    (tmp_path / "cut.bnn").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(bnnmcmc.InputError, match="or damaged"):
        bnnmcmc.load(tmp_path / "cut.bnn")
    with zipfile.ZipFile(tmp_path / "model.bnn") as old:
        text, draws = old.read("predictor.json"), old.read("draws.npy")
    with zipfile.ZipFile(tmp_path / "later.bnn", "w") as new:
        later = text.replace(b'"version": 1', b'"version": 9').replace(b'"leaves"', b'"parts"')
        new.writestr("predictor.json", later)
        new.writestr("other.npy", draws)
    with pytest.raises(bnnmcmc.InputError, match="later version of bnnmcmc"):
        bnnmcmc.load(tmp_path / "later.bnn")
    with pytest.raises(bnnmcmc.InputError, match="there is no folder"):
        run.save(tmp_path / "none" / "model.bnn")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_command_predicts_in_pieces(fitted, here, tmp_path, monkeypatch, kind):
    model, rows, file = fitted
    rows = rows.sample(200, replace=True, random_state=0, ignore_index=True)
    if kind == "csv":
        rows.to_csv(tmp_path / "rows.csv", index=False)
    else:
        rows.to_parquet(tmp_path / "rows.parquet", index=False)
    expected = model.run_.predict(rows).to_frame(0.8)
    monkeypatch.setattr("bnnmcmc.rows.READ_ROWS", 64)
    other = {"csv": "parquet", "parquet": "csv"}[kind]
    arguments = (f"rows.{kind}", "--out", f"out.{other}", "--level", "0.8")
    code, _, err = here("predict", file, *arguments, cwd=tmp_path)
    assert code == 0, err
    assert "200 rows, " in err
    assert "rows/s" in err
    read = pd.read_parquet if other == "parquet" else pd.read_csv
    found = read(tmp_path / f"out.{other}")
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, check_dtype=False)
    assert not list(tmp_path.glob(".*partial"))


def test_scores_of_pieces_are_those_of_the_table(fitted, tmp_path, monkeypatch):
    model, rows, file = fitted
    monkeypatch.setattr("bnnmcmc.rows.READ_ROWS", 32)
    monkeypatch.setattr("bnnmcmc.rows.SCORED_ROWS", 13)
    table = rows.assign(**{model.run_.encoding.targets[0].name: np.linspace(0, 300, len(rows))})
    table.to_csv(tmp_path / "table.csv", index=False)
    console = Console(quiet=True)
    found = predict_file(file, tmp_path / "table.csv", tmp_path / "o.csv", 0.9, console)
    assert found.rows == len(rows)
    expected = model.run_.score(table)
    for name in ("lppd", "rmse", "crps", "coverage_90"):
        assert found.scores[name] == pytest.approx(expected[name], rel=1e-4), name


def test_a_bad_cell_in_a_late_piece_leaves_no_file(fitted, here, tmp_path, monkeypatch):
    monkeypatch.setattr("bnnmcmc.rows.READ_ROWS", 20)
    rows = fitted[1].astype({"age": object})
    rows.loc[33, "age"] = "many"
    rows.to_csv(tmp_path / "rows.csv", index=False)
    code, _, err = here("predict", fitted[2], "rows.csv", "--out", "o.csv", cwd=tmp_path)
    assert code == 2
    assert "rows.csv, line 35, column 'age': found 'many', expected a number" in err
    assert not list(tmp_path.glob("*o.csv*"))


def test_pieces_are_the_table(tmp_path):
    texts = {
        "a.csv": 'x;name;y\n1;"a;b";2\n3;c;4.5\n\n',
        "b.txt": "1 2 3\n4 5 6\n7 8 9\n",
        "c.csv": "\ufeffx,y\n1,2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        whole = read_table(tmp_path / name)
        pieces = list(read_pieces(tmp_path / name, 1))
        assert len(pieces) == len(whole.frame)
        assert [piece.row_offset for piece in pieces] == [
            whole.row_offset + i for i in range(len(pieces))
        ]
        joined = pd.concat([piece.frame for piece in pieces], ignore_index=True)
        pd.testing.assert_frame_equal(joined, whole.frame, check_dtype=False)
    for text, message in (
        ("x,y\n1,2\n3\n", "line 3: found 1 fields, expected 2"),
        ("x,y\n1,2\n\n3,4\n", "line 3: found an empty line"),
        ("x,y\n", r"a header \(line 1\) but no rows"),
        ("", "the file is empty"),
        ('x,y\n1,"2\n', "line 2: the quotes do not match"),
        ("x,y\n1,\0\n", "not UTF-8 text"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(bnnmcmc.InputError, match=message):
            list(read_pieces(tmp_path / "bad.csv", 1))
