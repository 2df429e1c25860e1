"""What a run says of itself while it goes on: progress.json, small, written after each block.

For a page that is looked at while chains are drawn; nothing is ever computed from it.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bnnmcmc.store import write_json

FILE = "progress.json"
# Of a stage with more blocks than this every second point is dropped, again and again.
MAX_POINTS = 200
QUANTILES = (0.05, 0.5, 0.95)


class Live:
    """The progress of a run's stages.

    Parameters
    ----------
    folder : Path
        Of the run; what an earlier sitting wrote there is kept.
    """

    def __init__(self, folder: Path):
        self.path, self.begun = folder / FILE, time.time()
        self.stages: dict[str, dict[str, Any]] = read_progress(folder)

    def add(
        self, stage: str, done: int, total: int, unit: str, values: Mapping[str, np.ndarray]
    ) -> None:
        """Note a block, and write the file.

        Parameters
        ----------
        stage : str
        done, total : int
            In ``unit``.
        unit : str
            What is counted, in the plural.
        values : mapping
            Name -> array (chain,): of each, three quantiles over chains are kept.
        """
        points = [p for p in self.stages.get(stage, {}).get("points", []) if p["done"] < done]
        points.append(
            {"done": done, "time": time.time(), **{n: _band(v) for n, v in values.items()}}
        )
        if len(points) > MAX_POINTS:
            points = [*points[-3::-2][::-1], points[-1]]
        self.stages[stage] = {
            "done": done,
            "total": total,
            "unit": unit,
            "since": self.begun,
            "points": points,
        }
        write_json(self.path, self.stages)


def _band(values: np.ndarray) -> list[float | None]:
    """Return three quantiles over the finite values."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    return [float(q) for q in np.quantile(finite, QUANTILES)] if len(finite) else [None] * 3


def read_progress(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a run's progress.json says, stage by stage; empty if there is none to read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
