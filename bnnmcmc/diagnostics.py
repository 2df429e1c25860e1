"""ArviZ: the run as a DataTree, and R-hat and effective sample sizes of its chains.

Chains of a neural network sit in different modes, many of them copies of each other under the
network's symmetries. Weights are therefore compared within a chain only; predictions and the
log-density, which symmetries leave alone, are compared across chains too.

None stands for a quantity the run does not have (no acceptance rate, no held-out predictions);
NaN for one that cannot be computed: too few draws, draws that never change, or values that are
not finite. ArviZ is imported on first use (it takes seconds), JAX for the DataTree only.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bnnmcmc import convergence
from bnnmcmc.convergence import bulk_ess, rank_rhat, tail_ess
from bnnmcmc.errors import InputError
from bnnmcmc.store import disk_errors, write_atomic

if TYPE_CHECKING:
    import pandas
    import xarray

    from bnnmcmc.health import ChainStatus

# Above this, a chain (or the set of chains) has not settled: the limit of Sommer et al. (2024).
RHAT_LIMIT = 1.1
# R-hat halves every sequence once more; a variance needs two values.
MIN_RHAT_DRAWS = 4
# With fewer draws the estimate cannot use a single lag: it is n log10(n) for any data.
MIN_ESS_DRAWS = 10
# For some seconds of work at the most.
MAX_COORDINATES = 200
MAX_SEQUENCES = 2000
MIN_COORDINATES = 20
# About so many bytes of draws are worked on at a time.
CHUNK_BYTES = 4 * 2**20
TAILS = (0.05, 0.95)

# ArviZ's names for statistics that it knows; others keep ours.
ARVIZ_NAMES = {"log_density": "lp", "gradients": "n_steps"}
TEXT_COLUMNS = ("status", "sentence")
# Columns of the table of chains that a notebook shows, and their headings.
SHOWN = {
    "chain": "chain",
    "status": "status",
    "rhat_function_median": "R-hat (predictions)",
    "rhat_function_max": "largest",
    "rhat_log_density": "R-hat (log-density)",
    "ess_function_median": "ESS (predictions)",
    "ess_function_min": "smallest",
    "divergences": "divergences",
    "step_size": "step size",
    "lppd": "LPPD",
    "sentence": "what happened",
}


def to_datatree(
    *,
    draws: Any,
    stats: Mapping[str, np.ndarray],
    warmup_stats: Mapping[str, np.ndarray] | None = None,
    log_likelihood: np.ndarray | None = None,
    posterior_predictive: np.ndarray | None = None,
    observed: np.ndarray | None = None,
    row_ids: Sequence | np.ndarray | None = None,
    targets: Sequence[str] = (),
    classes: Sequence | np.ndarray | None = None,
    chains: Sequence | np.ndarray | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> "xarray.DataTree":
    """Put a run into ArviZ's format.

    Parameters
    ----------
    draws : pytree
        Leaves (chain, draw, *leaf). Variables are named by the leaves' paths, such as
        ``network.layer0.weight``.
    stats : mapping
        Name -> (chain, draw), as `Samples.stats`. ``log_density`` becomes ``lp``, ``gradients``
        ``n_steps``, and ``diverging`` a bool (any of the draw's steps diverged).
    warmup_stats : mapping, optional
        Name -> (chain, record).
    log_likelihood : array (chain, draw, row), optional
    posterior_predictive : array, optional
        (chain, draw, row, target) for regression, (chain, draw, row) class indices for
        classification.
    observed : array, optional
        (row, target) or (row,) for regression, (row,) class indices for classification.
    row_ids : sequence, optional
        Labels of the rows; 0, 1, ... if not given.
    targets : sequence of str
        Names of the targets.
    classes : sequence, optional
        Class labels by index, for classification. They become the coordinate ``class``.
    chains : sequence of int, optional
        Numbers of the chains; 0, 1, ... if not given.
    attrs : mapping, optional
        What to note about the run. Values other than text and numbers are stored as JSON.

    Returns
    -------
    xarray.DataTree
        Groups posterior, sample_stats and, where given, warmup_sample_stats, log_likelihood,
        posterior_predictive, observed_data (variable ``y``). Dimensions are chain, draw, row,
        target, and per leaf ``NAME_in``, ``NAME_out`` (last two axes) and ``NAME_dim0``, ...
        (axes before them).

    Raises
    ------
    InputError
        Two leaves with the same name.

    References
    ----------
    ArviZ's InferenceData schema, https://python.arviz.org/en/stable/schema.html.
    """
    import jax
    import xarray

    from bnnmcmc import trees

    posterior: dict[str, np.ndarray] = {}
    dims: dict[str, list[str]] = {}
    for path, leaf in zip(trees.leaf_names(draws), jax.tree.leaves(draws), strict=True):
        # A slash separates groups on disk.
        name, values = path.replace("/", "."), np.asarray(leaf)
        if name in posterior:
            raise InputError(f"draws: two leaves are named {name!r}; rename one of them")
        posterior[name] = values
        dims[name] = _leaf_dims(name, values.shape[2:], len(targets))
    coords: dict[str, np.ndarray] = {}
    if row_ids is not None:
        coords["row"] = _labels(row_ids)
    if targets:
        coords["target"] = _labels(targets)

    event = ["row", "target"]
    groups = {
        "posterior": _dataset(posterior, dims, coords),
        "sample_stats": _dataset(_arviz_stats(stats), {}, {}),
    }
    if warmup_stats:
        groups["warmup_sample_stats"] = _dataset(_arviz_stats(warmup_stats), {}, {})
    if log_likelihood is not None:
        groups["log_likelihood"] = _dataset({"y": log_likelihood}, {"y": ["row"]}, coords)
    if posterior_predictive is not None:
        dims_y = event[: np.ndim(posterior_predictive) - 2]
        groups["posterior_predictive"] = _dataset(
            {"y": posterior_predictive}, {"y": dims_y}, coords
        )
    if observed is not None:
        y = np.asarray(observed)
        if y.ndim == 1 and posterior_predictive is not None and np.ndim(posterior_predictive) == 4:
            y = y[:, None]  # ArviZ compares y with its predictions axis by axis
        groups["observed_data"] = _dataset({"y": y}, {"y": event[: y.ndim]}, coords, sample_dims=[])
    if classes is not None:
        for name in groups.keys() & {"posterior_predictive", "observed_data"}:
            groups[name] = groups[name].assign_coords({"class": _labels(classes)})
    if chains is not None:
        for name, group in groups.items():
            if "chain" in group.dims:
                groups[name] = group.assign_coords({"chain": np.asarray(chains)})
    tree = xarray.DataTree.from_dict(groups)
    tree.attrs = {name: _attribute(value) for name, value in (attrs or {}).items()}
    return tree


def _leaf_dims(name: str, shape: tuple[int, ...], targets: int) -> list[str]:
    # The likelihood's own parameters (a sampled scale) are one per target.
    if name.startswith("likelihood.") and shape == (targets,):
        return ["target"]
    leading = [f"{name}_dim{i}" for i in range(len(shape) - 2)]
    return leading + [f"{name}_in", f"{name}_out"][2 - min(len(shape), 2) :]


def _labels(values) -> np.ndarray:
    labels = np.asarray(list(values))
    return labels if labels.dtype.kind in "iufU" else labels.astype(str)


def _attribute(value: Any) -> str | int | float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return value
    return json.dumps(value, default=str)


class Diagnostics(NamedTuple):
    """What a run's chains did, chain by chain and together; shows itself in a notebook.

    Parameters
    ----------
    chains : list of dict
        A row per chain (see `chain_table`).
    summary : dict
        Of the run as a whole (see `run_summary`), with the "verdict" in sentences.
    """

    chains: list[dict[str, Any]]
    summary: dict[str, Any]

    def to_frame(self) -> "pandas.DataFrame":
        """Return the table of chains."""
        import pandas

        return pandas.DataFrame(self.chains)

    def _repr_html_(self) -> str:
        """Show the verdict and the chains, those with a problem first."""
        from bnnmcmc.notebook import MAX_ROWS, html_table, paragraphs

        def badness(row):
            worst = row.get("rhat_function_median")
            worst = row.get("rhat_log_density") if worst is None else worst
            unknown = worst is None or np.isnan(worst)
            return row["status"] == "ok", -np.inf if unknown else -worst

        shown = sorted(self.chains, key=badness)[:MAX_ROWS]
        names = [n for n in SHOWN if any(row.get(n) is not None for row in shown)]
        rows = [["–" if row.get(n) is None else row[n] for n in names] for row in shown]
        more = ""
        if len(self.chains) > len(shown):
            more = f"The {len(shown)} chains to look at first, of {len(self.chains)}."
        table = html_table("Chains", [SHOWN[n] for n in names], rows, more)
        return paragraphs(self.summary.get("verdict") or ()) + table


def load() -> None:
    """Import ArviZ, which takes seconds, before it is first used."""
    import arviz_base  # noqa: F401
    import arviz_stats.base  # noqa: F401


def _arviz_stats(stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    named = {ARVIZ_NAMES.get(name, name): np.asarray(values) for name, values in stats.items()}
    if "diverging" in named:
        named["diverging"] = named["diverging"] > 0
    return named


def _dataset(data, dims, coords, sample_dims: Sequence[str] = ("chain", "draw")):
    from arviz_base import dict_to_dataset

    # check_conventions warns of more chains than draws, which a short run may well have.
    return dict_to_dataset(
        {name: np.asarray(values) for name, values in data.items()},
        dims=dims,
        coords=coords,
        sample_dims=list(sample_dims),
        check_conventions=False,
    )


def write_datatree(tree: "xarray.DataTree", path: Path, kind: str) -> None:
    """Write a DataTree so that it is there whole or not at all.

    Parameters
    ----------
    tree : xarray.DataTree
    path : Path
        A file (netCDF) or a folder (Zarr); what is there already is replaced.
    kind : str
        ``"netcdf"`` or ``"zarr"``. Read it with ``xarray.open_datatree(path, engine=...)`` and
        the engine ``"h5netcdf"`` or ``"zarr"``.

    Raises
    ------
    InputError
        Another kind, or a disk that cannot be written.
    """
    if kind not in ("netcdf", "zarr"):
        raise InputError(f"kind: found {kind!r}, expected 'netcdf' or 'zarr'")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if kind == "netcdf":
                tree.to_netcdf(temporary, engine="h5netcdf")
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            else:
                # Format 2: in format 3, zarr and xarray warn with and without consolidated
                # metadata, one at writing, the other at reading.
                tree.to_zarr(temporary, mode="w", zarr_format=2, consolidated=True)
                _replace_folder(temporary, path)
        finally:
            _remove(temporary)


def _replace_folder(new: Path, path: Path) -> None:
    # A folder cannot be renamed over a full one: the old one steps aside first.
    old = path.with_name(f"{new.name}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def chainwise_rhat(values: np.ndarray, parts: int = 4) -> np.ndarray:
    r"""Compare the parts of each chain with each other: R-hat without a second chain.

    Each chain is cut into ``parts`` equal parts (what is left over is dropped at the start), and
    R-hat is taken over them as if they were chains. A chain that still drifts has parts in
    different places; whether other chains sit elsewhere does not matter. R-hat is the
    rank-normalised one, the larger of location and scale (folded), which halves every part once
    more:

    .. math:: \hat R = \sqrt{\frac{B / W + n - 1}{n}}

    with n draws in a half, and B and W the variances between (times n) and within halves.

    Parameters
    ----------
    values : array (chain, draw, n)
    parts : int
        At least 2.

    Returns
    -------
    numpy array (chain, n)
        Near 1 for a chain that has settled. NaN with fewer than 4 draws in a part, for a
        coordinate that never changes within the chain, and where a draw is not finite. Infinite
        if every part stands still, but not all at the same value.

    Raises
    ------
    InputError
        Fewer than 2 parts.

    References
    ----------
    Sommer et al. (2024), 2402.01484 (chain-wise R-hat); Vehtari et al. (2021), 1903.08008.
    """
    if parts < 2:
        raise InputError(f"parts: found {parts}, expected at least 2")
    chains, draws, n = np.shape(values)
    length = draws // parts
    kept = np.asarray(values)[:, draws - parts * length :]
    # A few chains at a time: the axes' new order costs a copy.
    few = max(1, CHUNK_BYTES * chains // max(1, kept.nbytes))
    found = [
        _rhat(np.swapaxes(some, 1, 2).reshape(len(some), n, parts, length))
        for some in (kept[low : low + few] for low in range(0, chains, few))
    ]
    return np.concatenate(found) if found else np.empty((0, n))


def ess(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate how many independent draws each chain is worth, one by one.

    Parameters
    ----------
    values : array (chain, draw, n)

    Returns
    -------
    bulk, tail : numpy arrays (chain, n)
        Rank-normalised bulk ESS, and the smaller ESS of the 5 % and 95 % quantiles. NaN
        with fewer than 10 draws, for a coordinate that never changes within the chain (the tail:
        for 95 % of the draws), and where a draw is not finite.

    References
    ----------
    Vehtari et al. (2021), 1903.08008.
    """
    return _bulk_ess(values), _tail_ess(values)


def _tail_ess(values: np.ndarray) -> np.ndarray:
    sequences = np.moveaxis(np.asarray(values), 1, 2)[:, :, None]
    tail = _over_sequences(tail_ess, sequences, MIN_ESS_DRAWS, TAILS)
    # If even the lower quantile is the maximum, the indicator is constant, and the ESS counts
    # every draw as independent.
    with np.errstate(invalid="ignore"):
        low = np.quantile(sequences, TAILS[0], axis=(-2, -1))
    some_above = low < sequences.max(axis=(-2, -1))
    return np.where(some_above, tail, np.nan)


def nested_rhat(values: np.ndarray, superchains: np.ndarray) -> np.ndarray:
    r"""Compare superchains: groups of chains that started at the same place, such as one member.

    .. math:: \hat R_\nu = \sqrt{1 + B_\nu / W_\nu}

    as in `convergence.nested_rhat`: it sees whether where a chain starts still matters, however
    short the chains are.

    Parameters
    ----------
    values : array (chain, draw, n)
    superchains : int array (chain,)
        Which superchain each chain is of.

    Returns
    -------
    numpy array (n,)
        NaN with fewer than 4 draws, for what never changes, and where a draw is not finite.

    Raises
    ------
    InputError
        Fewer than two superchains, or another number of chains in one of them.

    References
    ----------
    Margossian et al. (2024), 2110.13017.
    """
    superchains = np.asarray(superchains)
    counts = np.unique(superchains, return_counts=True)[1]
    if len(superchains) != len(values) or len(counts) < 2 or len(set(counts.tolist())) > 1:
        raise InputError(
            f"superchains: found groups of {counts.tolist()} for {len(values)} chains, expected "
            "at least two groups, with as many chains in each"
        )
    sequences = np.moveaxis(np.asarray(values), 2, 0)
    return _over_sequences(convergence.nested_rhat, sequences, MIN_RHAT_DRAWS, superchains)


def rhat_across(values: np.ndarray) -> np.ndarray:
    """Return the rank-normalised R-hat (n,) across chains of values (chain, draw, n)."""
    return _rhat(np.moveaxis(np.asarray(values), 2, 0))


def _rhat(sequences: np.ndarray) -> np.ndarray:
    """Return R-hat (...) over sequences (..., sequence, draw)."""
    if sequences.shape[-2] < 2:
        return np.full(sequences.shape[:-2], np.nan)
    return _over_sequences(rank_rhat, sequences, MIN_RHAT_DRAWS)


def _bulk_ess(values: np.ndarray) -> np.ndarray:
    """Return the bulk ESS (chain, n) of values (chain, draw, n)."""
    sequences = np.moveaxis(np.asarray(values), 1, 2)[:, :, None]
    return _over_sequences(bulk_ess, sequences, MIN_ESS_DRAWS)


def prediction_ess(values: np.ndarray) -> np.ndarray:
    """Return what the draws of each chain are worth for each prediction: bulk ESS (chain, n).

    A prediction that never changes within a chain learns nothing from it: 0. NaN with fewer than
    10 draws, and where a draw is not finite.

    Parameters
    ----------
    values : array (chain, draw, n)
    """
    # A few equal draws are no evidence that the chain does not move.
    stands = _constant(values) & (values.shape[1] >= MIN_ESS_DRAWS)
    return np.where(stands, 0.0, _bulk_ess(values))


def _over_sequences(
    statistic: Callable[..., np.ndarray], sequences: np.ndarray, least: int, *options: Any
) -> np.ndarray:
    """Apply a statistic where it has a meaning, NaN elsewhere: (..., k, draw) -> (...)."""
    # A few at a time: each takes several copies.
    few = max(1, CHUNK_BYTES * len(sequences) // max(1, sequences.nbytes))
    if sequences.ndim > 2 and len(sequences) > few:
        return np.concatenate(
            [
                _over_sequences(statistic, sequences[low : low + few], least, *options)
                for low in range(0, len(sequences), few)
            ]
        )
    sequences = np.asarray(sequences, np.float64)
    result = np.full(sequences.shape[:-2], np.nan)
    if sequences.shape[-1] < least:
        return result
    low, high = sequences.min(axis=(-2, -1)), sequences.max(axis=(-2, -1))
    # Of equal draws, the statistics divide rounding errors (R-hat) or count every draw (ESS).
    usable = np.isfinite(low) & np.isfinite(high) & (low < high)
    if usable.any():
        result[usable] = statistic(sequences[usable], *options)
    return result


def _constant(values: np.ndarray) -> np.ndarray:
    """Return (chain, n): whether a coordinate is finite and the same in all draws of a chain."""
    return np.isfinite(values).all(axis=1) & (values == values[:, :1]).all(axis=1)


def _evenly_spaced(values: np.ndarray) -> np.ndarray:
    """Return (chain, draw, m): the coordinates that are evaluated (see `chain_table`)."""
    chains, _, n = values.shape
    most = int(np.clip(MAX_SEQUENCES // chains, MIN_COORDINATES, MAX_COORDINATES))
    chosen = np.linspace(0, n - 1, min(n, most)).round().astype(int)
    return values[:, :, chosen]


def _over_moving(
    reduce: Callable[..., Any], found: np.ndarray, constant: np.ndarray
) -> list[float]:
    """Reduce (chain, n) to one number per chain over the coordinates that move."""
    return [
        float(reduce(row[~still])) if not still.all() else float("nan")
        for row, still in zip(found, constant, strict=True)
    ]


def chain_table(
    *,
    log_density: np.ndarray,
    positions: np.ndarray,
    functions: np.ndarray | None,
    stats: Mapping[str, np.ndarray],
    statuses: "Sequence[ChainStatus]",
    stopped: Mapping[int, int] | None = None,
    parts: int = 4,
) -> list[dict[str, Any]]:
    """Describe every chain by itself.

    R-hat and ESS are evaluated for evenly spaced coordinates of the positions and evenly spaced
    predictions: at most 200, and with more than 10 chains 2000 divided by the number of chains,
    but not fewer than 20. Coordinates that never change within a chain (a class probability of
    exactly one, a dead unit) say nothing about it and are left out of its medians, minima and
    maxima; where nothing changes, these are NaN.

    Parameters
    ----------
    log_density : array (chain, draw)
    positions : array (chain, draw, n)
        Flat weights, or a fixed subset of them.
    functions : array (chain, draw, m) or None
        Predictions at held-out inputs.
    stats : mapping
        Name -> (chain, draw), as `Samples.stats`.
    statuses : sequence of ChainStatus
        One per chain.
    stopped : mapping, optional
        Chain -> after how many draws it was stopped: its numbers are of these draws alone, and its
        R-hat and ESS, which would describe a failure, are NaN.
    parts : int
        Parts of a chain for the chain-wise R-hat.

    Returns
    -------
    list of dict
        One per chain, with the keys

        - chain, status, sentence, draws;
        - log_density (mean), log_density_drift: mean of the last quarter of the draws minus mean
          of the first, in standard deviations within the chain (a straight climb gives 2.6; NaN
          with fewer than 4 draws);
        - acceptance_rate (mean), energy_error (mean squared energy error per dimension, EEVPD),
          divergences (sum), tree_depth_max, step_size (of the last draw), gradients (sum), rows
          (looked at, sum): None if the kernel has no such statistic;
        - ess_log_density, ess_function_median, ess_function_min: bulk ESS; ess_function_tail: tail
          ESS, median over every fourth of the predictions; ess_per_gradient: ess_function_median
          (without predictions, ess_log_density) by gradients, warm-up not counted, None if the
          kernel does not count gradients;
        - rhat_log_density, rhat_function_median, rhat_function_max, rhat_weights_max: chain-wise
          R-hat. The function columns are None without predictions.

    References
    ----------
    Sommer et al. (2024), 2402.01484 (chain-wise R-hat); Robnik and Seljak (2023), 2303.18221
    (EEVPD); Vehtari et al. (2021), 1903.08008 (ESS).
    """
    log_density = np.asarray(log_density, np.float64)
    weights = _evenly_spaced(positions)
    rhat_weights = _over_moving(np.max, chainwise_rhat(weights, parts), _constant(weights))
    density = log_density[:, :, None]
    rhat_density, ess_density = chainwise_rhat(density, parts)[:, 0], _bulk_ess(density)[:, 0]
    none: list[Any] = [None] * len(log_density)
    ess_median = ess_least = ess_tail = rhat_median = rhat_worst = none
    if functions is not None:
        chosen = _evenly_spaced(functions)
        constant, sizes, rhats = _constant(chosen), _bulk_ess(chosen), chainwise_rhat(chosen, parts)
        ess_median = _over_moving(np.median, sizes, constant)
        ess_least = _over_moving(np.min, sizes, constant)
        few = slice(None, None, 4)
        ess_tail = _over_moving(np.median, _tail_ess(chosen[..., few]), constant[:, few])
        rhat_median = _over_moving(np.median, rhats, constant)
        rhat_worst = _over_moving(np.max, rhats, constant)

    def made(values: np.ndarray, chain: int) -> np.ndarray:
        return np.asarray(values[chain])[: (stopped or {}).get(chain)]

    def of_chain(name: str, reduce: Callable[..., Any], chain: int) -> Any:
        return reduce(made(stats[name], chain)).item() if name in stats else None

    def total(values: np.ndarray) -> Any:
        return np.sum(values, dtype=np.int64)

    def per_gradient(chain: int) -> float | None:
        gradients = of_chain("gradients", total, chain)
        worth = ess_density[chain] if functions is None else ess_median[chain]
        return float(worth) / gradients if gradients else None

    return [
        {
            "chain": chain,
            "status": status.status,
            "sentence": status.sentence,
            "draws": len(made(log_density, chain)),
            "log_density": _mean(made(log_density, chain)).item(),
            "log_density_drift": _drift(made(log_density, chain)),
            "acceptance_rate": of_chain("acceptance_rate", _mean, chain),
            "energy_error": of_chain("energy_error_squared", _mean, chain),
            "divergences": of_chain("diverging", total, chain),
            "tree_depth_max": of_chain("tree_depth", np.max, chain),
            "step_size": of_chain("step_size", lambda values: values[-1], chain),
            "gradients": of_chain("gradients", total, chain),
            "rows": of_chain("rows", total, chain),
            "ess_log_density": float(ess_density[chain]),
            "ess_function_median": ess_median[chain],
            "ess_function_min": ess_least[chain],
            "ess_function_tail": ess_tail[chain],
            "ess_per_gradient": per_gradient(chain),
            "rhat_log_density": float(rhat_density[chain]),
            "rhat_function_median": rhat_median[chain],
            "rhat_function_max": rhat_worst[chain],
            "rhat_weights_max": rhat_weights[chain],
        }
        for chain, status in zip(range(len(log_density)), statuses, strict=True)
    ]


def _mean(values: np.ndarray) -> np.float64:
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, as it should be
        return np.mean(values, dtype=np.float64)


def _drift(values: np.ndarray) -> float:
    quarter = len(values) // 4
    if quarter == 0 or not np.isfinite(values).all() or (values == values[0]).all():
        return float("nan")
    rise = values[-quarter:].mean() - values[:quarter].mean()
    return float(rise / values.std(ddof=1))


def run_summary(
    functions: np.ndarray | None, log_density: np.ndarray, table: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Describe the run as a whole.

    There is no R-hat of the weights across chains: chains that agree on every prediction still
    differ in their weights by the network's symmetries (units in another order, signs flipped),
    so it would be large whatever the chains do. Predictions and the log-density are invariant.

    Parameters
    ----------
    functions : array (chain, draw, m) or None
        Predictions at held-out inputs; evaluated as in `chain_table`. Those that never change in
        any chain are left out.
    log_density : array (chain, draw)
    table : sequence of dict
        From `chain_table`.

    Returns
    -------
    dict
        - chains, draws (per chain), share_ok (of the chains);
        - chains_stopped: chains that failed repeatedly and made no more draws. They are left out
          of everything below;
        - chains_drifting, chains_undefined: chains whose chain-wise R-hat (median over
          predictions; of the log-density without predictions) is above 1.1, or NaN;
        - rhat_function_across_median, rhat_function_across_max, rhat_log_density_across:
          rank-normalised R-hat over chains; NaN for a single chain;
        - ess_function_total_median: bulk ESS of a prediction summed over chains, median over
          predictions. A chain in which the prediction never changes adds nothing;
        - verdict: one to five sentences with these numbers.

        Entries named ``function`` are None without predictions.

    References
    ----------
    Vehtari et al. (2021), 1903.08008.
    """
    log_density = np.asarray(log_density, np.float64)
    chains, draws = log_density.shape
    stopped = [row["chain"] for row in table if row["status"] == "stopped"]
    going = np.setdiff1d(np.arange(chains), stopped)
    if stopped and len(going):
        log_density = log_density[going]
        functions = None if functions is None else functions[going]
    criterion = "rhat_log_density" if functions is None else "rhat_function_median"
    # Of chains that were stopped these are NaN, but that is no news.
    rhats = np.array([row[criterion] for row in table], np.float64)
    undefined = np.isnan(rhats)
    undefined[stopped] = False
    summary: dict[str, Any] = {
        "chains": chains,
        "draws": draws,
        "share_ok": sum(row["status"] == "ok" for row in table) / chains,
        "chains_drifting": np.flatnonzero(rhats > RHAT_LIMIT).tolist(),
        "chains_undefined": np.flatnonzero(undefined).tolist(),
        "chains_stopped": stopped,
        "rhat_function_across_median": None,
        "rhat_function_across_max": None,
        "rhat_log_density_across": float(_rhat(log_density)),
        "ess_function_total_median": None,
    }
    if functions is not None:
        chosen = _evenly_spaced(functions)
        across = _rhat(np.moveaxis(chosen, 2, 0))
        never = _constant(chosen).all(axis=0) & (chosen == chosen[:1, :1]).all(axis=(0, 1))
        sizes = prediction_ess(chosen).sum(axis=0)

        def over_functions(reduce: Callable[..., Any], found: np.ndarray) -> float:
            return _over_moving(reduce, found[None], never[None])[0]

        summary |= {
            "rhat_function_across_median": over_functions(np.median, across),
            "rhat_function_across_max": over_functions(np.max, across),
            "ess_function_total_median": over_functions(np.median, sizes),
        }
    verdict = [_say_status(table)]
    if stopped:
        verdict.append(_say_stopped(summary, table))
    if len(going):
        verdict.append(_say_within(summary, rhats[going], functions is not None))
        if len(going) > 1:
            verdict.append(_say_across(summary))
        if functions is not None:
            verdict.append(_say_ess(summary))
    return {**summary, "verdict": verdict}


def _name_chains(chains: Sequence[int]) -> str:
    shown = ", ".join(str(chain) for chain in chains[:8])
    more = f" and {len(chains) - 8} more" if len(chains) > 8 else ""
    return f"chain{'s' if len(chains) > 1 else ''} {shown}{more}"


def _say_status(table) -> str:
    by_status: dict[str, list[int]] = {}
    for row in table:
        by_status.setdefault(row["status"], []).append(row["chain"])
    ok = len(by_status.pop("ok", []))
    others = "; ".join(f"{status}: {_name_chains(which)}" for status, which in by_status.items())
    counted = f"{ok} of {len(table)} chains have status ok"
    return f"{counted} ({others})." if others else f"{counted}."


def _say_stopped(summary, table) -> str:
    stopped = summary["chains_stopped"]
    each = ", ".join(f"chain {c} after draw {table[c]['draws']}" for c in stopped[:8])
    more = f" and {len(stopped) - 8} more" if len(stopped) > 8 else ""
    return (
        f"{len(stopped)} of {summary['chains']} chains failed repeatedly and were stopped ({each}"
        f"{more}); they are left out of predictions, scores and all that is said of the others."
    )


def _say_within(summary, rhats: np.ndarray, of_predictions: bool) -> str:
    what = "predictions (median over held-out inputs)" if of_predictions else "the log-density"
    drifting, undefined = summary["chains_drifting"], summary["chains_undefined"]
    parts = []
    if drifting:
        parts.append(
            f"{len(drifting)} of {len(rhats)} chains still drift ({_name_chains(drifting)}): "
            f"chain-wise R-hat of {what} above {RHAT_LIMIT}, at worst {np.nanmax(rhats):.2f}"
        )
    elif len(undefined) < len(rhats):
        parts.append(
            f"no sign of drift: chain-wise R-hat of {what} is at most {np.nanmax(rhats):.2f} "
            f"(limit {RHAT_LIMIT})"
        )
    if undefined:
        parts.append(
            f"the chain-wise R-hat of {what} cannot be computed for {_name_chains(undefined)}: "
            "too few draws, draws that never change, or values that are not finite"
        )
    sentence = "; ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def _say_across(summary) -> str:
    if summary["rhat_function_across_median"] is None:
        what, typical = "the log-density", summary["rhat_log_density_across"]
        numbers = f"{typical:.2f}"
    else:
        what, typical = "predictions", summary["rhat_function_across_median"]
        numbers = f"{typical:.2f} (median), {summary['rhat_function_across_max']:.2f} (worst)"
    if np.isnan(typical):
        return (
            f"Whether the chains agree cannot be said: R-hat of {what} across chains needs at "
            f"least {MIN_RHAT_DRAWS} finite draws that change."
        )
    if typical <= RHAT_LIMIT:
        return f"The chains agree with each other: R-hat of {what} across chains is {numbers}."
    return (
        f"The chains differ from each other: R-hat of {what} across chains is {numbers}. They sit "
        "in different modes or have not settled, and pooled results depend on how many there are."
    )


def _say_ess(summary) -> str:
    going = summary["chains"] - len(summary["chains_stopped"])
    total, worth = going * summary["draws"], summary["ess_function_total_median"]
    if np.isnan(worth):
        return (
            f"What the {total:,} draws are worth cannot be estimated: it needs at least "
            f"{MIN_ESS_DRAWS} finite draws per chain that change."
        )
    return (
        f"For a typical held-out prediction the {total:,} draws are worth about {worth:,.0f} "
        "independent ones, each chain within its own mode."
    )


def write_table(path: Path, table: Sequence[Mapping[str, Any]]) -> None:
    """Write a chain table as CSV, atomically.

    Parameters
    ----------
    path : Path
    table : sequence of dict
        From `chain_table`. None becomes an empty cell, NaN ``nan``; numbers keep every digit.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomic(Path(path), text.getvalue().encode())


def read_table(path: Path) -> list[dict[str, Any]]:
    """Read a chain table written by `write_table`.

    Parameters
    ----------
    path : Path

    Returns
    -------
    list of dict
        As from `chain_table`.

    Raises
    ------
    InputError
        The file is missing or not a chain table.
    """
    folder = Path(path).parent
    try:
        content = Path(path).read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(content)))
        table = [{name: _cell(name, text) for name, text in row.items()} for row in rows]
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file. Write it with: bnnmcmc diagnose {folder}"
        ) from error
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged: {error}; expected numbers in all columns but "
            f"{', '.join(TEXT_COLUMNS)}. Write it anew with: bnnmcmc diagnose {folder}"
        ) from error
    if not table or "chain" not in table[0]:
        raise InputError(
            f"{path}: holds no chains, expected one line per chain and a column 'chain'. "
            f"Write it anew with: bnnmcmc diagnose {folder}"
        )
    return table


def _cell(name: str, text: str) -> str | int | float | None:
    if name in TEXT_COLUMNS:
        return text
    if text == "":
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
