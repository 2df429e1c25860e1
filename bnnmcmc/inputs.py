"""From a config to its data set. No JAX: mistakes in a table show before anything heavy loads."""

import os
from pathlib import Path

from bnnmcmc.config import Config
from bnnmcmc.data import Dataset, Split, load_table, prepare


def read_dataset(config: Config, folder: Path | None = None) -> Dataset:
    """Read the table that a config names; split, encode and scale it.

    Parameters
    ----------
    config : Config
    folder : Path, optional
        Where ``data.path`` is looked for besides the working folder and $BNNMCMC_DATA: the
        folder of the config file.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        The table is nowhere, or cannot be used (see `bnnmcmc.data.prepare`).
    """
    data = config.data
    folders = [] if folder is None else [folder]
    if os.environ.get("BNNMCMC_DATA"):
        folders.append(Path(os.environ["BNNMCMC_DATA"]))
    table = load_table(path=data.path, source=data.source, folders=folders, target=data.target)
    return prepare(
        table,
        task=config.task,
        target=data.target,
        features=data.features,
        drop=data.drop,
        categorical=data.categorical,
        split=Split(**data.split.model_dump()),
        batch_size=config.ensemble.batch_size or None,
        support=config.support,
    )
