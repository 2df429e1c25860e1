"""The exported function predicts what the run does, with JAX alone."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import bnnmcmc
from bnnmcmc.data import encode_features
from bnnmcmc.errors import InputError
from bnnmcmc.exported import input_scales

LOAD = """
import sys, jax, numpy as np
import jax.export
call = jax.export.deserialize(open(sys.argv[1], "rb").read()).call
found = [call(np.load(sys.argv[2]).astype("float32")[:n]) for n in (7, 60)]
assert "bnnmcmc" not in sys.modules
np.savez(sys.argv[3], few=found[0]["mean"], **found[1])
"""


def in_own_units(encoding, frame):
    centre, scale = input_scales(encoding)
    return encode_features(encoding, bnnmcmc.data.as_table(encoding, frame)) * scale + centre


def test_a_fresh_process_predicts_the_same_without_the_library(finished, tmp_path):
    run = bnnmcmc.Run.open(finished / "run")
    frame = pd.read_csv(finished / "table.csv").drop(columns="y")
    rows = in_own_units(run.encoding, frame)
    np.testing.assert_allclose(rows[:, 0], frame["a"], rtol=1e-6)
    np.testing.assert_array_equal(rows[:, 2:].sum(axis=1), 1)
    np.save(tmp_path / "rows.npy", rows)
    bnnmcmc.export(tmp_path / "model.jax", run, draws=None)
    subprocess.run(
        [sys.executable, "-c", LOAD, "model.jax", "rows.npy", "found.npz"],
        check=True,
        cwd=tmp_path,
    )
    expected = run.predict(frame)
    with np.load(tmp_path / "found.npz") as found:
        for name in ("mean", "sd", "epistemic_sd"):
            np.testing.assert_allclose(found[name], getattr(expected, name), rtol=1e-3)
        np.testing.assert_allclose(found["few"], expected.mean[:7], rtol=1e-4)


def test_classes_and_weights_of_chains(tmp_path):
    import jax.export

    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    model = bnnmcmc.BNNClassifier(
        hidden=(4,),
        chains=2,
        warmup=100,
        draws=20,
        ensemble={"max_epochs": 20},
        weights="stacking",
        validation_fraction=0.3,
    ).fit(x, x[:, 0] > 0)
    bnnmcmc.export(tmp_path / "model.jax", model.run_, draws=None)
    call = jax.export.deserialize((tmp_path / "model.jax").read_bytes()).call
    found = call(x.astype(np.float32))["probabilities"]
    np.testing.assert_allclose(found, model.predict_proba(x), rtol=1e-4, atol=1e-6)
    assert model.run_.weights.std() > 0
    with pytest.raises(InputError, match=r'export run.calibrated\("none"\)'):
        bnnmcmc.export(tmp_path / "model.jax", replace(model.run_, calibration="temperature"))
    with pytest.raises(InputError, match="there is no folder"):
        bnnmcmc.export(tmp_path / "no" / "model.jax", model.run_)


def test_missing_numbers_are_filled_as_in_training(tmp_path):
    import jax.export

    rng = np.random.default_rng(1)
    frame = pd.DataFrame({"a": rng.normal(5, 2, 60), "b": rng.normal(size=60)})
    frame.loc[::7, "a"] = np.nan
    y = frame["a"].fillna(9.0) + frame["b"]
    model = bnnmcmc.BNNRegressor(
        hidden=(4,), chains=2, warmup=100, draws=20, ensemble={"max_epochs": 20}
    ).fit(frame, y)
    assert model.run_.encoding.feature_names == ("a", "a is missing", "b")
    rows = np.column_stack([frame["a"], np.zeros(60), frame["b"]]).astype(np.float32)
    bnnmcmc.export(tmp_path / "model.jax", model.run_, draws=None)
    call = jax.export.deserialize((tmp_path / "model.jax").read_bytes()).call
    found, expected = call(rows), model.predict_distribution(frame)
    np.testing.assert_allclose(found["mean"], expected.mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["sd"], expected.sd, rtol=1e-3)
    # No gaps in training, but a median; a column of categories has none.
    rows[3, 2] = np.nan
    assert np.isfinite(call(rows)["mean"]).all()
    rows[3, 1] = np.nan
    assert np.isnan(call(rows)["mean"]).ravel().tolist() == [i == 3 for i in range(60)]
