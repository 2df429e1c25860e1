"""Fit the peer, sklearn-contrib-bde, in one process: run by the peer's own Python.

    PYTHON peer.py DATA.npz SETTINGS.json OUT.json

DATA holds x, y (fit) and x_test, y_test, scaled. SETTINGS are keyword arguments of
``BdeRegressor``; what they leave out has the peer's default. OUT gets the scores and the seconds of
each part, counted from the start of this script. The process's own wall clock is the caller's to
take.
"""

import importlib.metadata
import json
import os
import sys
import time

STARTED = time.monotonic()
# As the peer's README says: one JAX device per core, set before JAX is imported.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
FLAGS = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={CORES}"


def main(data: str, settings: str, out: str) -> None:
    os.environ["XLA_FLAGS"] = FLAGS.strip()
    import jax
    import numpy as np
    from bde import BdeRegressor

    seconds = {"imports": time.monotonic() - STARTED}
    with np.load(data) as arrays:
        x, y, x_test, y_test = (arrays[name] for name in ("x", "y", "x_test", "y_test"))
    with open(settings) as file:
        regressor = BdeRegressor(**json.load(file))
    regressor.fit(x, y.ravel())
    jax.block_until_ready(regressor.positions_eT_)
    seconds["fit"] = time.monotonic() - STARTED
    # (member, draw, row, 2): the mean, and the scale before the peer's softplus.
    raw = np.asarray(regressor.predict(x_test, raw=True), np.float64)
    mean, scale = raw[..., 0], np.logaddexp(0.0, raw[..., 1]) + 1e-6
    log_density = -0.5 * ((y_test.ravel() - mean) / scale) ** 2 - np.log(scale)
    log_density -= 0.5 * np.log(2 * np.pi)
    flat = log_density.reshape(-1, log_density.shape[-1])
    pooled = np.logaddexp.reduce(flat, axis=0) - np.log(len(flat))
    seconds["scored"] = time.monotonic() - STARTED
    result = {
        "lppd": float(pooled.mean()),
        "rmse": float(np.sqrt(np.mean((mean.mean(axis=(0, 1)) - y_test.ravel()) ** 2))),
        "version": importlib.metadata.version("sklearn-contrib-bde"),
        "members": raw.shape[0],
        "kept_draws": raw.shape[1],
        "finite": bool(np.isfinite(raw).all()),
        "settings": {k: v for k, v in regressor.get_params().items() if k != "loss"},
        "devices": [device.device_kind for device in jax.devices()],
        "jax": jax.__version__,
        "seconds": seconds,
    }
    with open(out, "w") as file:
        json.dump(result, file, indent=1, default=str)


if __name__ == "__main__":
    main(*sys.argv[1:])
