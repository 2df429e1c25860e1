"""What all benchmarks are told, and the airfoil problem they share."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EXPERIMENTS = Path(__file__).parent.parent
CONFIG = EXPERIMENTS / "airfoil.toml"


class Settings(NamedTuple):
    """How to measure.

    Parameters
    ----------
    folder : Path
        Scratch space; large runs go there.
    data : Path or None
        Folder with airfoil.data; the table is fetched from OpenML without it.
    peer : Path or None
        Python of an environment with sklearn-contrib-bde; without it, benchmarks beside the peer
        measure this library only.
    repeats : int
        How often each measure is taken; the smallest time counts, the spread is given.
    quick : bool
        Tiny sizes, to see that everything runs. The figures mean nothing.
    """

    folder: Path
    data: Path | None = None
    peer: Path | None = None
    repeats: int = 3
    quick: bool = False


def airfoil(settings: Settings) -> dict[str, np.ndarray]:
    """Return x, y (the rows sampled on: train and validation) and x_test, y_test, scaled.

    The split and the scaling are those of ``bnnmcmc run experiments/airfoil.toml``.
    """
    from bnnmcmc.config import read_config
    from bnnmcmc.inputs import read_dataset

    dataset = read_dataset(read_config(CONFIG), settings.data or CONFIG.parent)
    rows = np.concatenate([dataset.train, dataset.validation])
    return {
        "x": dataset.x[rows],
        "y": dataset.y[rows],
        "x_test": dataset.x[dataset.test],
        "y_test": dataset.y[dataset.test],
    }


def setting_words(changes: dict[str, Any]) -> list[str]:
    """Return ``--set a.b=1 ...`` for the command line."""
    if not changes:
        return []
    shown = {True: "true", False: "false"}
    values = [shown.get(v, str(v)) if isinstance(v, bool) else str(v) for v in changes.values()]
    return ["--set", *(f"{name}={value}" for name, value in zip(changes, values, strict=True))]
