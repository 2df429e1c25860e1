"""What a run folder holds, as the report reads it: finished or not, whole or damaged."""

import csv
import json
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from bnnmcmc.live import read_progress
from bnnmcmc.store import read_arrays, read_manifest

STAGE_NAMES = {
    "compile": "compiling",
    "ensemble": "ensemble training",
    "warmup": "warm-up",
    "sampling": "sampling",
    "results": "prediction and scores",
}


@dataclass(frozen=True)
class RunFolder:
    """What a run folder holds; None for what is missing.

    Parameters
    ----------
    folder : Path
    manifest : dict
    config_text : str or None
    config : dict
        Empty if config.toml is missing.
    metrics, diagnostics : dict or None
    chains : list of dict or None
        Rows of diagnostics.csv; an empty cell is None.
    history, warmup, predictions, inputs : dict of numpy arrays or None
        ``inputs`` are the scales of inputs, of a prior that has some.
    predictive_checks : dict or None
        Data sets drawn from prior and posterior against the one observed.
    log_density : numpy array (chain, draw) or None
        The committed draws' statistics.
    progress : dict
        Of a run that goes on: stage -> what `bnnmcmc.live` wrote.
    missing : list of str
        What a finished run has and this one lacks, or has damaged.
    """

    folder: Path
    manifest: dict[str, Any]
    config_text: str | None
    config: dict[str, Any]
    metrics: dict[str, Any] | None
    diagnostics: dict[str, Any] | None
    chains: list[dict[str, Any]] | None
    history: dict[str, np.ndarray] | None
    warmup: dict[str, np.ndarray] | None
    predictions: dict[str, np.ndarray] | None
    inputs: dict[str, np.ndarray] | None
    predictive_checks: dict[str, Any] | None
    log_density: np.ndarray | None
    progress: dict[str, dict[str, Any]]
    missing: list[str]

    @property
    def draws(self) -> int:
        """Draws per chain on disk."""
        return sum(block["count"] for block in self.manifest.get("blocks") or [])

    @property
    def test_rows(self) -> int:
        """How many test rows were scored."""
        data = self.manifest.get("data") or {}
        return int((self.metrics or {}).get("rows") or data.get("test") or 0)

    @property
    def going(self) -> int:
        """How many chains were not stopped."""
        status = self.manifest.get("status") or self.chains or []
        stopped = sum(c["status"] == "stopped" for c in status)
        return (len(status) or int(self.manifest.get("chains") or 0)) - stopped

    @property
    def failed(self) -> list[int]:
        """Chains whose status is not ok."""
        status = self.manifest.get("status") or self.chains or []
        return [int(c["chain"]) for c in status if c["status"] != "ok"]


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises
    ------
    InputError
        Not a run folder, or a damaged manifest.
    """
    manifest = read_manifest(folder)
    missing: list[str] = []
    unwanted: set[str] = set()
    if manifest.get("warmup") == 0:
        unwanted |= {"warmup.npz"}
    if (manifest.get("data") or {}).get("test") == 0:
        unwanted |= {"metrics.json", "predictions.npz"}

    def read(name: str, what: str, reader: Callable[[Path], Any]) -> Any:
        path = folder / name
        if name in unwanted:
            return None
        if not path.exists():
            missing.append(f"{name} ({what})")
            return None
        try:
            return reader(path)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            missing.append(f"{name} ({what}; damaged: {error})")
            return None

    # Only some runs have the first; older ones have no second.
    for name in ("inputs.npz", "predictive_checks.json"):
        if not (folder / name).exists():
            unwanted |= {name}
    text = read("config.toml", "settings", lambda path: path.read_text(encoding="utf-8"))
    config = read("config.toml", "settings", lambda path: tomllib.loads(text)) if text else None
    draws = sum(block["count"] for block in manifest.get("blocks") or [])
    return RunFolder(
        folder=folder,
        manifest=manifest,
        config_text=text,
        config=config or {},
        history=read("ensemble/history.npz", "training curves", read_arrays),
        warmup=read("warmup.npz", "warm-up statistics", read_arrays),
        log_density=read("stats", "statistics of the draws", lambda path: _trace(path, draws)),
        predictions=read("predictions.npz", "test predictions", read_arrays),
        predictive_checks=read("predictive_checks.json", "predictive checks", _read_object),
        inputs=read("inputs.npz", "scales of the inputs", read_arrays),
        metrics=read("metrics.json", "scores", _read_object),
        chains=read("diagnostics.csv", "diagnostics per chain", _read_chains),
        diagnostics=read("diagnostics.json", "diagnostics", _read_object),
        progress=read_progress(folder),
        missing=missing,
    )


def _read_object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"found a {type(found).__name__}, expected an object")
    return found


def _trace(path: Path, draws: int) -> np.ndarray | None:
    """Read the log-density of the committed draws."""
    stored: Any = zarr.open_group(path, mode="r")["log_density"]
    return np.asarray(stored[:, :draws]) if draws else None


def _read_chains(path: Path) -> list[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: _cell(name, text) for name, text in row.items()} for row in csv.DictReader(file)
        ]


def _cell(name: str, text: str | None) -> Any:
    if name in ("status", "sentence"):
        return text or ""
    if not text:
        return None
    value = float(text)
    return int(value) if value.is_integer() else value
