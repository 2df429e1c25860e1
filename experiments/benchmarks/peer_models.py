"""Fit one peer on one split, in one process: run by the peers' own Python.

    PYTHON peer_models.py METHOD DATA.npz OUT.npz

DATA holds x, y (fit), x_validation, y_validation and x_test, scaled (classes as integers), and
"classes", 0 for a regression. OUT gets the predictions of x_test, and the seconds of fit and
prediction: mean, sd, low and high (90 %), samples and log_density of y_test where the method has
a density; or probabilities. Every method sees training and validation rows; those that need rows to
stop on or to calibrate with take the validation rows for that.
"""

import json
import os
import sys
import time

import numpy as np

LEVEL, SAMPLES = 0.9, 1000
# bde as its benchmarks set it: ten members, long chains. Its own defaults are for a demonstration.
BDE = {
    "n_members": 10,
    "activation": "relu",
    "epochs": 1000,
    "patience": 20,
    "warmup_steps": 50_000,
    "n_samples": 10_000,
    "n_thinning": 10,
    "seed": 0,
}
HIDDEN = {"airfoil": [16] * 4, "ionosphere": [16] * 2, "breast_cancer": [16] * 2}


def gaussian(mean, sd, y) -> dict:
    """Return what a Gaussian predictive gives."""
    z = 1.6448536269514722
    noise = np.random.default_rng(0).normal(size=(SAMPLES, len(mean)))
    return {
        "mean": mean,
        "sd": sd,
        "low": mean - z * sd,
        "high": mean + z * sd,
        "samples": mean + sd * noise,
        "log_density": -0.5 * ((y - mean) / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi)),
    }


def bde(data: dict, name: str):
    settings = BDE | {"hidden_layers": HIDDEN.get(name, [16] * 3)}
    settings |= json.loads(os.environ.get("PEERS_BDE", "{}"))
    cores = len(os.sched_getaffinity(0))
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={cores}"
    import bde as peer

    make = peer.BdeClassifier if data["classes"] else peer.BdeRegressor
    model = make(**settings)
    x, y = both(data)
    begun = time.monotonic()
    model.fit(x, y)
    if data["classes"]:
        return begun, lambda: {"probabilities": np.asarray(model.predict_proba(data["x_test"]))}

    def predict():
        raw = np.asarray(model.predict(data["x_test"], raw=True), np.float64)
        mean, scale = raw[..., 0], np.logaddexp(0.0, raw[..., 1]) + 1e-6
        mean, scale = (part.reshape(-1, part.shape[-1]) for part in (mean, scale))
        y = data["y_test"].ravel()
        each = -0.5 * ((y - mean) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
        chosen = np.linspace(0, len(mean) - 1, min(SAMPLES * 4, len(mean))).astype(int)
        noise = np.random.default_rng(0).normal(size=(len(chosen), mean.shape[1]))
        samples = mean[chosen] + scale[chosen] * noise
        low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return {
            "mean": mean.mean(axis=0),
            "sd": np.sqrt((scale**2).mean(axis=0) + mean.var(axis=0)),
            "low": low,
            "high": high,
            "samples": samples,
            "log_density": np.logaddexp.reduce(each, axis=0) - np.log(len(each)),
        }

    return begun, predict


def ngboost(data: dict, name: str):
    from ngboost import NGBClassifier, NGBRegressor

    model = (NGBClassifier if data["classes"] else NGBRegressor)(
        n_estimators=2000, learning_rate=0.05, random_state=0, verbose=False
    )
    begun = time.monotonic()
    model.fit(
        data["x"],
        data["y"].ravel(),
        X_val=data["x_validation"],
        Y_val=data["y_validation"].ravel(),
        early_stopping_rounds=50,
    )

    def predict():
        if data["classes"]:
            return {"probabilities": model.predict_proba(data["x_test"])}
        found = model.pred_dist(data["x_test"])
        return gaussian(found.loc, found.scale, data["y_test"].ravel())

    return begun, predict


def catboost(data: dict, name: str):
    from catboost import CatBoostClassifier, CatBoostRegressor

    common = {"iterations": 3000, "random_seed": 0, "verbose": False, "allow_writing_files": False}
    if data["classes"]:
        model = CatBoostClassifier(**common)
    else:
        model = CatBoostRegressor(loss_function="RMSEWithUncertainty", **common)
    begun = time.monotonic()
    held_out = (data["x_validation"], data["y_validation"].ravel())
    model.fit(data["x"], data["y"].ravel(), eval_set=held_out, early_stopping_rounds=100)

    def predict():
        if data["classes"]:
            return {"probabilities": model.predict_proba(data["x_test"])}
        mean, variance = model.predict(data["x_test"]).T
        return gaussian(mean, np.sqrt(variance), data["y_test"].ravel())

    return begun, predict


def gaussian_process(data: dict, name: str):
    from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    x, y = both(data)
    smooth = ConstantKernel(1.0) * RBF(np.ones(x.shape[1]), (1e-2, 1e3))
    begun = time.monotonic()
    if data["classes"]:
        model = GaussianProcessClassifier(smooth, random_state=0).fit(x, y)
        return begun, lambda: {"probabilities": model.predict_proba(data["x_test"])}
    kernel = smooth + WhiteKernel(0.1, (1e-5, 10.0))
    model = GaussianProcessRegressor(kernel, n_restarts_optimizer=1, random_state=0).fit(x, y)

    def predict():
        mean, sd = model.predict(data["x_test"], return_std=True)
        return gaussian(mean, sd, data["y_test"].ravel())

    return begun, predict


def conformal_forest(data: dict, name: str):
    """A random forest; intervals by split-conformal residuals, scaled by the trees' spread."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    begun = time.monotonic()
    if data["classes"]:
        model = RandomForestClassifier(500, min_samples_leaf=2, random_state=0).fit(*both(data))
        return begun, lambda: {"probabilities": model.predict_proba(data["x_test"])}
    model = RandomForestRegressor(500, min_samples_leaf=2, random_state=0)
    model.fit(data["x"], data["y"].ravel())

    def spread(x):
        trees = np.stack([tree.predict(x) for tree in model.estimators_])
        return trees.mean(axis=0), trees.std(axis=0) + 1e-3

    mean, sd = spread(data["x_validation"])
    scores = np.sort(np.abs(data["y_validation"].ravel() - mean) / sd)
    rank = int(np.ceil(round((len(scores) + 1) * LEVEL, 6)))
    margin = scores[min(rank, len(scores)) - 1]

    def predict():
        mean, sd = spread(data["x_test"])
        return {"mean": mean, "low": mean - margin * sd, "high": mean + margin * sd}

    return begun, predict


def both(data: dict):
    x = np.concatenate([data["x"], data["x_validation"]])
    return x, np.concatenate([data["y"], data["y_validation"]]).ravel()


METHODS = {
    "bde": bde,
    "ngboost": ngboost,
    "catboost": catboost,
    "gaussian_process": gaussian_process,
    "conformal_forest": conformal_forest,
}


def main(method: str, path: str, out: str) -> None:
    with np.load(path) as arrays:
        data = {name: arrays[name] for name in arrays.files}
    data["classes"] = int(data["classes"])
    begun, predict = METHODS[method](data, str(data["name"]))
    fitted = time.monotonic()
    found = predict()
    seconds = [fitted - begun, time.monotonic() - fitted]
    np.savez(out, seconds=seconds, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
