"""Estimators as scikit-learn's users call them; its own checks are in test_sklearn_checks.py."""

import pickle
import warnings

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import bnnmcmc
from bnnmcmc import trees

TINY = {
    "hidden": (4,),
    "chains": 1,
    "sampler": {"kernel": "tests.still:jitter"},
    "warmup": 2,
    "draws": 20,
    "ensemble": {"max_epochs": 300, "batch_size": 0, "learning_rate": 0.02},
}


def houses(rows=60, seed=0):
    """A number with gaps, one without, categories with gaps, a truth value; and a price."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "size": rng.uniform(50, 150, rows),
            "age": rng.integers(0, 80, rows),
            "city": np.array(["Bonn", "Ulm", "Jena"], dtype=object)[np.arange(rows) % 3],
            "new": np.arange(rows) % 2 == 0,
        }
    )
    price = 3000 * frame["size"] + 50_000 * (frame["city"] == "Ulm") - 500 * frame["age"]
    frame.loc[::7, "size"] = np.nan
    frame.loc[::11, "city"] = None
    return frame, price.rename("price")


@pytest.fixture(scope="module")
def model():
    return bnnmcmc.BNNRegressor(**TINY).fit(*houses())


@pytest.fixture(scope="module")
def classifier():
    frame, price = houses()
    return bnnmcmc.BNNClassifier(**TINY).fit(
        frame, np.where(price > price.median(), "dear", "cheap")
    )


def test_regressor_predicts_in_units(model):
    frame, price = houses()
    mean, sd = model.predict(frame, return_std=True)
    assert mean.shape == sd.shape == (60,)
    assert np.corrcoef(mean, price)[0, 1] > 0.6
    prediction = model.predict_distribution(frame)
    assert prediction.targets == ("price",)
    np.testing.assert_allclose(mean, prediction.mean[:, 0], rtol=1e-6)
    np.testing.assert_allclose(sd, prediction.sd[:, 0], rtol=1e-6)
    assert len(prediction.samples) >= 1000
    interval = model.predict_interval(frame, level=0.8)
    quantiles = model.predict(frame, quantiles=[0.1, 0.5, 0.9])
    np.testing.assert_allclose(interval, quantiles[:, [0, 2]], rtol=1e-6)
    np.testing.assert_allclose(model.predict(frame, quantiles=0.5), quantiles[:, 1], rtol=1e-6)
    samples = model.sample(frame, 7)
    assert samples.shape == (7, 60)
    log_prob = model.log_prob(frame, price)
    np.testing.assert_allclose(log_prob, prediction.log_prob(price.to_numpy()), rtol=1e-5)
    assert model.score(frame, price) == pytest.approx(
        1 - np.mean((mean - price) ** 2) / price.var(ddof=0), rel=1e-6
    )
    with pytest.raises(bnnmcmc.InputError, match="return_std or quantiles"):
        model.predict(frame, return_std=True, quantiles=0.5)


def test_how_a_frame_is_encoded(model):
    encoding = model.fit_.dataset.encoding
    assert encoding.feature_names == (
        *("size", "size is missing", "age"),
        *("city=Bonn", "city=Jena", "city=Ulm", "city is missing", "new=False", "new=True"),
    )
    frame, _ = houses()
    kept = frame["size"].iloc[model.fit_.dataset.train]
    assert encoding.features[0].fill == pytest.approx(kept.median())
    x = model.fit_.dataset.x
    filled = (kept.median() - encoding.features[0].center) / encoding.features[0].scale
    np.testing.assert_allclose(x[0, :2], [filled, 1])
    np.testing.assert_array_equal(x[0, 3:7], [0, 0, 0, 1])  # row 0 has no city
    assert x[kept.index, 0].mean() == pytest.approx(0, abs=1e-12)


def test_columns_go_by_name(model):
    frame, _ = houses()
    expected = model.predict(frame)
    assert list(model.feature_names_in_) == list(frame.columns)
    np.testing.assert_array_equal(model.predict(frame[["new", "city", "age", "size"]]), expected)
    with pytest.raises(ValueError, match="unseen at fit time:\n- garden"):
        model.predict(frame.assign(garden=1))
    with pytest.raises(ValueError, match="now missing:\n- age"):
        model.predict(frame.drop(columns="age"))
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        np.testing.assert_array_equal(model.predict(frame.to_numpy()), expected)
    with (
        pytest.raises(ValueError, match="3 features, but BNNRegressor is expecting 4"),
        pytest.warns(UserWarning, match="valid feature names"),
    ):
        model.predict(frame.to_numpy()[:, :3])


def test_polars_as_pandas(model):
    frame, price = houses()
    other = pl.from_pandas(frame)
    np.testing.assert_array_equal(model.predict(other), model.predict(frame))
    again = bnnmcmc.BNNRegressor(**TINY).fit(other, pl.Series("price", price.to_numpy()))
    np.testing.assert_array_equal(again.predict(other), model.predict(frame))
    assert again.predict_distribution(other).targets == ("price",)


def test_unseen_categories_and_gaps_are_encoded_with_a_warning(model):
    frame, _ = houses()
    rows = frame.iloc[[1, 2]].copy()
    rows.loc[1, "city"] = "Rom"
    found = r"X, row 1, column 'city': found the category 'Rom', which the training table did not"
    with pytest.warns(bnnmcmc.UnseenWarning, match=found):
        unseen = model.run_._encode(model._table(rows, reset=False))[0]
    np.testing.assert_array_equal(unseen[0, 3:7], 0)
    rows = frame.iloc[[1, 2]].astype({"age": float})
    rows.loc[2, "age"] = np.nan
    with pytest.warns(bnnmcmc.UnseenWarning, match="row 2, column 'age': found a missing value"):
        gap = model.predict(rows)
    rows.loc[2, "age"] = model.fit_.dataset.encoding.features[1].fill
    np.testing.assert_array_equal(gap, model.predict(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(frame.assign(size=np.nan, city=None))  # both had gaps in training
        with pytest.raises(bnnmcmc.UnseenWarning):  # an error, if wanted
            model.predict(frame.assign(city="Rom"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": np.inf}, "column 'size': found the infinite value inf"),
        ({"age": "old"}, "column 'age': found 'old' .*expected a number"),
        ({"size": "1,5"}, "write a decimal point"),
    ],
)
def test_cells_that_cannot_be_used(model, change, message):
    frame, _ = houses()
    with pytest.raises(bnnmcmc.InputError, match=message):
        model.predict(frame.assign(**change))


def test_few_rows(model):
    frame, price = houses()
    assert model.predict(frame.iloc[:1]).shape == (1,)
    for wrong in (frame.iloc[:0], frame.to_numpy()[:0]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(ValueError, match="0 sample"):
                model.predict(wrong)
    tiny = bnnmcmc.BNNRegressor(**TINY)
    with pytest.raises(ValueError, match="1 sample"):
        tiny.fit(frame.iloc[:1], price.iloc[:1])
    with pytest.raises(ValueError, match="0 sample"):
        tiny.fit(frame.iloc[:0], price.iloc[:0])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        tiny.fit(frame, price.iloc[:5])
    with pytest.raises(bnnmcmc.InputError, match="found no value in the"):
        tiny.fit(frame.assign(size=np.nan), price)


def test_targets_that_cannot_be_used(classifier):
    frame, price = houses()
    tiny = bnnmcmc.BNNRegressor(**TINY)
    with pytest.raises(ValueError, match="y contains NaN"):
        tiny.fit(frame, price.where(price.index != 3))
    with pytest.raises(ValueError, match="could not convert"):
        tiny.fit(frame, np.repeat("dear", 60))
    with pytest.raises(bnnmcmc.InputError, match="all 54 rows of the training part"):
        tiny.fit(frame, np.ones(60))
    with pytest.raises(bnnmcmc.InputError, match="only one class, 'dear'"):
        clone(classifier).fit(frame, np.repeat("dear", 60))
    with pytest.raises(ValueError, match="continuous"):
        clone(classifier).fit(frame, price)
    with pytest.raises(bnnmcmc.InputError, match="found the label 'free'"):
        classifier.log_prob(frame, np.repeat("free", 60))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"draws": 0}, "sampler.draws: found 0"),
        ({"sampler": "metropolis"}, "sampler.kernel: found 'metropolis'"),
        ({"activation": "cube"}, "model.activation: found 'cube'"),
        ({"prior": {"sacle": 2.0}}, "prior.sacle: unknown key; did you mean 'scale'"),
        ({"likelihood": "categorical"}, "which is for classification, not for BNNRegressor"),
        ({"ensemble": {"members": 3}}, "the parameter chains says how many"),
        ({"validation_fraction": 1.0}, "validation_fraction: found 1.0"),
        ({"weights": "stacking", "validation_fraction": 0.0}, "hold some out for validation"),
        ({"sampler": {"kernel": "mclmc", "leaves": ["layer9"]}}, "sampler.leaves"),
        ({"sampler": {"kernel": "smile", "batch_size": 500}}, "sampler.batch_size: found 500"),
        ({"categorical": ["town"]}, "data.categorical: X has no column 'town'"),
        ({"likelihood": "poisson"}, "expected whole numbers from 0"),
    ],
)
def test_parameters_that_cannot_be_used(parameters, message):
    with pytest.raises(bnnmcmc.InputError, match=message):
        bnnmcmc.BNNRegressor(**{**TINY, "sampler": "mclmc", **parameters}).fit(*houses())


def test_classifier_with_text_labels(classifier):
    frame, price = houses()
    labels = np.where(price > price.median(), "dear", "cheap")
    assert list(classifier.classes_) == ["cheap", "dear"]
    probabilities = classifier.predict_proba(frame)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(
        classifier.predict(frame), classifier.classes_[probabilities.argmax(axis=1)]
    )
    assert classifier.score(frame, labels) > 0.7
    chosen = probabilities[np.arange(60), (labels == "dear").astype(int)]
    np.testing.assert_allclose(classifier.log_prob(frame, labels), np.log(chosen), atol=1e-6)
    assert set(np.unique(classifier.sample(frame, 3))) == {"cheap", "dear"}


def test_labels_that_look_alike_stay_apart():
    x = np.arange(40.0)[:, None]
    y = np.array(["1", "01"] * 20)
    found = bnnmcmc.BNNClassifier(**TINY).fit(x, y)
    assert list(found.classes_) == ["01", "1"]
    assert set(found.predict(x)) <= {"01", "1"}


def test_pickle_joblib_and_clone(model, tmp_path):
    frame, _ = houses()
    expected = model.predict(frame)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).predict(frame), expected)
    joblib.dump(model, tmp_path / "model.joblib")
    np.testing.assert_array_equal(joblib.load(tmp_path / "model.joblib").predict(frame), expected)
    assert clone(model).get_params() == model.get_params()
    assert not hasattr(clone(model), "fit_")


def test_more_draws_are_those_of_a_longer_fit():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 2))
    y = x[:, 0] + 0.1 * rng.normal(size=40)
    options = {**TINY, "chains": 2, "sampler": {"kernel": "hmc", "num_leapfrog": 3}, "warmup": 20}
    short = bnnmcmc.BNNRegressor(**{**options, "draws": 6}).fit(x, y)
    short = pickle.loads(pickle.dumps(short)).more_draws(9)  # also after a pickle
    long = bnnmcmc.BNNRegressor(**{**options, "draws": 15}).fit(x, y)
    assert long.fit_.flat.shape[:2] == (2, 15)
    np.testing.assert_array_equal(short.fit_.flat, long.fit_.flat)
    for name, values in long.fit_.stats.items():
        np.testing.assert_array_equal(short.fit_.stats[name], values)
    np.testing.assert_array_equal(short.predict(x), long.predict(x))
    with pytest.raises(bnnmcmc.InputError, match="draws: found 0"):
        short.more_draws(0)


def test_the_density_is_that_of_the_weighted_rows():
    """Also with the rows that fill up the programs, and those of the validation part."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(40, 2)), rng.integers(1, 4, 40).astype(float)
    options = {**TINY, "sampler": {"kernel": "hmc", "num_leapfrog": 2}, "draws": 3}
    model = bnnmcmc.BNNRegressor(**options).fit(x, x[:, 0] + x[:, 1], sample_weight=weights)
    run, data = model.run_, model.fit_.dataset
    rows = np.concatenate([data.train, data.validation])
    position = trees.unflatten(model.fit_.flat[0, -1], run.draws.layout)
    arrays = run.posterior.arrays(run.x, run.y)
    expected = float(run.posterior.log_density(position, *arrays, weights[rows]))
    assert abs(expected - float(run.posterior.log_density(position, *arrays))) > 1
    assert model.fit_.stats["log_density"][0, -1] == pytest.approx(expected, rel=1e-4)


def test_more_draws_within_a_budget_say_what_is_missing():
    x = np.random.default_rng(1).normal(size=(40, 2))
    model = bnnmcmc.BNNRegressor(**TINY).fit(x, x[:, 0])
    model.time_budget = 1e-3
    model.more_draws(100_000)
    made = model.fit_.flat.shape[1]
    assert 20 < made < 100_020
    assert model.fit_.notes[-1].endswith(f"after {made} of 100020 draws")


def test_rows_of_weight_zero_are_absent():
    frame, price = houses()
    weights = np.ones(60)
    weights[[3, 40, 41]] = 0
    with_zeros = bnnmcmc.BNNRegressor(**TINY).fit(frame, price, sample_weight=weights)
    kept = weights > 0
    without = bnnmcmc.BNNRegressor(**TINY).fit(
        frame[kept], price[kept], sample_weight=weights[kept]
    )
    np.testing.assert_array_equal(with_zeros.predict(frame), without.predict(frame))
    with pytest.raises(ValueError, match=r"[Nn]egative"):
        without.fit(frame, price, sample_weight=weights - 1)


def test_weights_move_the_fit():
    x = np.zeros((40, 1))
    y = np.repeat([0.0, 1.0], 20)
    weights = np.where(y > 0, 3.0, 1.0)
    x[:, 0] = np.tile(np.arange(20), 2)
    found = bnnmcmc.BNNRegressor(**{**TINY, "hidden": (), "validation_fraction": 0.0})
    assert found.fit(x, y).predict(x).mean() == pytest.approx(0.5, abs=0.03)
    weighted = found.fit(x, y, sample_weight=weights).predict(x).mean()
    assert weighted == pytest.approx(0.75, abs=0.03)


def test_two_targets_at_once():
    frame, price = houses()
    both = pd.DataFrame({"price": price, "size": 2.0 * price})  # a name of a feature's, too
    model = bnnmcmc.BNNRegressor(**TINY).fit(frame, both)
    assert model.predict_distribution(frame).targets == ("price", "size (target)")
    mean, sd = model.predict(frame, return_std=True)
    assert mean.shape == sd.shape == (60, 2)
    assert model.predict_interval(frame).shape == (60, 2, 2)
    assert model.predict(frame, quantiles=[0.1, 0.5, 0.9]).shape == (60, 2, 3)
    assert model.sample(frame, 4).shape == (4, 60, 2)
    assert model.log_prob(frame, both).shape == (60,)
    assert np.isfinite(model.score(frame, both))


def test_counts_keep_their_units():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(60, 1))
    y = rng.poisson(np.exp(1 + x[:, 0]))
    model = bnnmcmc.BNNRegressor(**TINY, likelihood="poisson").fit(x, y)
    quantiles = model.predict(x, quantiles=[0.05, 0.95])
    np.testing.assert_array_equal(quantiles, np.round(quantiles))
    assert np.all(model.predict(x) > 0)


def test_in_pipelines_and_searches():
    frame, price = houses()
    numbers = frame[["age"]].assign(size=frame["size"].fillna(100.0))
    scaled = make_pipeline(StandardScaler(), bnnmcmc.BNNRegressor(**TINY))
    scaled.set_output(transform="pandas")
    scaled.fit(numbers, price)
    assert list(scaled[-1].feature_names_in_) == ["age", "size"]
    assert np.all(np.isfinite(cross_val_score(scaled, numbers, price, cv=2)))
    grid = {"bnnregressor__prior": ["normal", {"family": "normal", "scale": 0.5}]}
    search = GridSearchCV(scaled, grid, cv=2).fit(numbers, price)
    assert search.best_estimator_.predict(numbers).shape == (60,)


def test_categories_by_number_and_by_name():
    rng = np.random.default_rng(0)
    x = np.column_stack([rng.normal(size=60), np.arange(60) % 3])
    by_number = bnnmcmc.BNNRegressor(**TINY, categorical=[1]).fit(x, x[:, 1])
    assert by_number.fit_.dataset.encoding.feature_names == ("x1", "x2=0", "x2=1", "x2=2")
    with pytest.raises(bnnmcmc.InputError, match="expected a number from 0 to 1"):
        clone(by_number).set_params(categorical=[2]).fit(x, x[:, 1])


def test_chains_by_weight():
    frame, price = houses()
    options = {**TINY, "chains": 2, "weights": "stacking", "validation_fraction": 0.3}
    model = bnnmcmc.BNNRegressor(**options).fit(frame, price)
    run = model.run_
    assert len(run.x) == len(model.fit_.dataset.train) == 42  # validation rows are held out
    assert run.weights.sum() == pytest.approx(1)
    each = [
        model.run_.draws._replace(chains=1, blocks=lambda c=c: [model.fit_.flat[[c]]])
        for c in range(2)
    ]
    from bnnmcmc.predictive import pool

    x = run._encode(model._table(frame, reset=False))[0]
    means = [pool(run.posterior, d, x, samples=False).mean for d in each]
    scale, center = run.encoding.targets[0].scale, run.encoding.targets[0].center
    expected = np.tensordot(run.weights, np.array(means), axes=1)[:, 0] * scale + center
    np.testing.assert_allclose(model.predict(frame), expected, rtol=1e-5)


@pytest.mark.slow
def test_time_budget_plans_fewer_steps():
    import time

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    model = bnnmcmc.BNNRegressor(
        chains=2, sampler="mclmc", warmup=10_000_000, draws=1000, time_budget=60
    )
    begun = time.monotonic()
    model.fit(x, x[:, 0])
    assert time.monotonic() - begun < 90
    assert any("planned for the time budget" in note for note in model.fit_.notes)
    assert model.fit_.steps.warmup < 10_000_000
    assert model.predict(x).shape == (300,)


def test_progress_if_wanted(capsys):
    frame, price = houses()
    bnnmcmc.BNNRegressor(**TINY).fit(frame, price)
    assert capsys.readouterr().err == ""
    bnnmcmc.BNNRegressor(**TINY, verbose=True).fit(frame, price)
    assert "Sampling: 20 steps" in capsys.readouterr().err


def test_a_fit_that_was_cut_off_leaves_the_next_one_whole(monkeypatch):
    x = np.random.default_rng(5).normal(size=(40, 3))
    options = {**TINY, "hidden": (5, 3), "warmup": 37}
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr("bnnmcmc.fitting.run_epochs", stop)
        with pytest.raises(KeyboardInterrupt):
            bnnmcmc.BNNRegressor(**options).fit(x, x[:, 0])
    # What compiled meanwhile was given up.
    assert bnnmcmc.BNNRegressor(**options).fit(x, x[:, 0]).predict(x).shape == (40,)
