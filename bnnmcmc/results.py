"""What a run comes to: scores, predictions, diagnostics and the ArviZ file, from its draws."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnnmcmc import diagnostics, exploration, metrics, store, trees
from bnnmcmc.data import target_to_units
from bnnmcmc.errors import InputError
from bnnmcmc.pooling import effective_chains
from bnnmcmc.prediction import Prediction, in_target_units
from bnnmcmc.predictive import Pooled, draws_in_memory, pool, thinned
from bnnmcmc.predictive_checks import check_classes, check_numbers
from bnnmcmc.replicates import from_posterior, from_prior
from bnnmcmc.run import Run, open_inputs, scores
from bnnmcmc.stopping import FolderInUseError, locked
from bnnmcmc.verdict import verdict

# Diagnostics look at so many draws of a chain at the most, fewer of each if there are many chains,
# and at so many weights.
MAX_DIAGNOSED_DRAWS, MIN_DIAGNOSED_DRAWS, TOTAL_DIAGNOSED = 4000, 100, 200_000
MAX_DIAGNOSED_WEIGHTS = 200
# Weights are aligned in so many draws in all, and in so many of a chain at least.
ALIGNED_DRAWS, MIN_ALIGNED_DRAWS = 200, 20
# Numbers in these draws; more are not aligned.
MAX_ALIGNED_SIZE = 2e7
# The scales of inputs are summed up from so many draws in all.
MAX_SCALE_DRAWS = 20_000
# Rows of data sets drawn for predictive checks, over the targets.
MAX_CHECKED_ROWS = 2000
QUANTILES = (0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975)


def write_results(run: Run, run_store: store.Store, kind: str) -> None:
    """Score, diagnose and write all result files.

    metrics.json, predictions.npz, predictive_checks.json, inputs.npz, diagnostics.* and the ArviZ
    file.

    Parameters
    ----------
    run : Run
        Opened from the store's folder; it may be unfinished.
    run_store : Store
    kind : str
        ``run.arviz`` of the config.
    """
    folder, dataset = run_store.folder, run.dataset
    assert dataset is not None
    write_diagnostics(run, run_store, *diagnose(run))
    pooled = _write_scores(run, folder) if len(dataset.test) else None
    _write_checks(run, folder, pooled)
    _write_inputs(run, folder)
    if kind != "none" and len(run.stopped) < run.draws.chains:
        every = None if kind == "auto" else 1
        chosen = "zarr" if kind == "zarr" else "netcdf"
        path = folder / ("arviz.zarr" if chosen == "zarr" else "arviz.nc")
        with store.disk_errors(folder):
            diagnostics.write_datatree(run.to_arviz(every=every), path, chosen)


def write_diagnostics(run: Run, run_store: store.Store, table, summary) -> None:
    """Write the chains' status, diagnostics.csv and diagnostics.json; the run must be locked."""
    diagnostics.write_table(run_store.folder / "diagnostics.csv", table)
    store.write_json(run_store.folder / "diagnostics.json", summary)
    run_store.commit(status=[{"chain": i, **s._asdict()} for i, s in enumerate(run.status)])


def diagnose_folder(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Diagnose the draws so far; write the tables too, unless the run is still at work."""
    run = Run.open(folder)
    table, summary = diagnose(run)
    with suppress(FolderInUseError), locked(folder):
        # The manifest of now, not the one the draws were read by.
        write_diagnostics(run, store.Store(folder, store.read_manifest(folder)), table, summary)
    return table, summary


def refresh_results(folder: Path) -> None:
    """Score and diagnose the draws so far of a run that has not finished.

    Raises
    ------
    InputError
        Another process is working on the run.
    """
    with locked(folder):
        run_store = store.Store(folder, store.read_manifest(folder))
        run = Run.open(folder)
        write_results(run, run_store, open_inputs(folder, run_store.manifest)[0].run.arviz)


def diagnose(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the table of chains and the summary of a run (see `bnnmcmc.diagnostics`).

    Of long chains, predictions and weights are looked at in evenly spaced draws, so that the
    cost is bounded; their ESS is then a lower bound.
    """
    stats = run.stats
    most = max(MIN_DIAGNOSED_DRAWS, min(MAX_DIAGNOSED_DRAWS, TOTAL_DIAGNOSED // run.draws.chains))
    every = max(1, -(-run.draws.draws // most))
    held_out = run.held_out_draws(every)
    functions = held_out.values
    stride = max(1, -(-run.draws.layout.size // MAX_DIAGNOSED_WEIGHTS))
    # Copies: views would keep all draws in memory.
    weights = [block[..., ::stride].copy() for block in thinned(run.draws, every).blocks()]
    table = diagnostics.chain_table(
        log_density=stats["log_density"],
        positions=np.concatenate(weights, axis=1),
        functions=functions,
        stats=stats,
        statuses=list(run.status),
        stopped=run.stopped,
    )
    if held_out.log_density is not None:
        # Of its own draws alone; a number to look at, by which no chain is left out.
        with np.errstate(invalid="ignore", over="ignore"):
            pooled = np.logaddexp.reduce(held_out.log_density.astype(np.float64), axis=1)
            own = (pooled - np.log(held_out.log_density.shape[1])).mean(axis=-1)
        table = [
            {**{k: v for k, v in row.items() if k != "sentence"}, "lppd": float(value)}
            | {"sentence": row["sentence"]}
            for row, value in zip(table, own, strict=True)
        ]
    summary = diagnostics.run_summary(functions, stats["log_density"], table)
    stopped = summary["chains_stopped"]
    superchains = None
    if run.members is not None:
        superchains = exploration.superchains_of(np.asarray(trees.flatten_stacked(run.members)))
    found = exploration.explore(
        functions,
        held_out.noise,
        log_density=held_out.log_density,
        stopped=stopped,
        superchains=superchains,
        seed=run.seed,
    )
    found = found._replace(weights=_weight_agreement(run, found))
    said = exploration.as_json(found)
    first, *rest = verdict(summary, table, said)
    return table, {
        **summary,
        "verdict": [first, *summary["verdict"], *rest],
        "exploration": said,
    }


def _weight_agreement(
    run: Run, found: exploration.Exploration
) -> exploration.WeightAgreement | None:
    """Compare weights across the chains of the largest mode, or all; None if it cannot be done."""
    network = run.posterior.network
    if network.layers is None or found.modes is None or len(found.chains) < 2:
        return None
    mode = found.modes.counts[0] > 1
    chains = found.chains[found.modes.labels == 0] if mode else found.chains
    most = max(2, ALIGNED_DRAWS // MIN_ALIGNED_DRAWS)
    chains = chains[np.linspace(0, len(chains) - 1, min(len(chains), most)).astype(int)]
    every = max(1, run.draws.draws // (ALIGNED_DRAWS // len(chains)))
    draws = -(-run.draws.draws // every)
    work = exploration.alignment_work(network, len(chains), draws)
    size = len(chains) * draws * run.draws.layout.size
    if draws < MIN_ALIGNED_DRAWS or work > exploration.MAX_ASSIGNMENT or size > MAX_ALIGNED_SIZE:
        return None
    flat = np.concatenate([b[chains].copy() for b in thinned(run.draws, every).blocks()], axis=1)
    if not np.isfinite(flat).all():
        return None
    params = trees.unflatten(flat, run.draws.layout)["network"]
    return exploration.weight_agreement(network, params, bool(mode))


def _write_scores(run: Run, folder: Path) -> Pooled:
    """Write metrics.json and predictions.npz; return what the posterior predicts."""
    dataset, encoding = run.dataset, run.encoding
    assert dataset is not None and encoding is not None
    x, y = dataset.x[dataset.test], dataset.y[dataset.test]
    best = int(np.argmin(np.nan_to_num(np.asarray(run.validation_loss), nan=np.inf)))
    members = jax.tree.map(lambda leaf: leaf[:, None], run.members)
    sources = {
        "best_member": draws_in_memory(jax.tree.map(lambda leaf: leaf[best : best + 1], members)),
        "ensemble": draws_in_memory(members),
        # Without a single finite chain the scores are NaN, as the draws are.
        "posterior": run.pooled_draws if run.pooled_chains else run.draws,
    }
    found = {
        name: pool(run.posterior, draws, x, y, seed=run.seed) for name, draws in sources.items()
    }
    both = {name: scores(pooled, y, encoding) for name, pooled in found.items()}
    errors = scores(found["posterior"], y, encoding, errors=True)
    result: dict[str, Any] = {"test": {n: s["standardised"] for n, s in both.items()}}
    if encoding.task == "regression":
        result["test_target_units"] = {name: s["target"] for name, s in both.items()}
    result |= {"rows": len(x), "best_member": best, "pooled_chains": run.pooled_chains}
    result["standard_errors"] = {"standardised": errors["standardised"], "target": errors["target"]}
    if run.pooled_chains and run.calibration != "none":
        result["calibrated"] = _calibrated(run, found["posterior"], y)
    if run.pooled_chains:
        result["pool"] = {
            "weights": run.pooling,
            "of_chains": run.weights.tolist(),
            "effective_chains": effective_chains(run.weights),
            "draws": run.pooled_draws.chains * run.pooled_draws.draws,
        }
    store.write_json(folder / "metrics.json", result)
    prediction = in_target_units(found["posterior"], encoding)
    log_scale = 0.0 if encoding.task != "regression" else np.log(encoding.target_scale).sum()
    arrays: dict[str, Any] = {"row": dataset.test}
    for name, pooled in found.items():
        assert pooled.log_density is not None
        arrays[f"log_density_{name}"] = pooled.log_density - log_scale
    if prediction.probabilities is not None:
        arrays |= {
            "y": y,
            "probabilities": prediction.probabilities,
            "classes": np.array([str(label) for label in encoding.classes or ()]),
            "expected_entropy": found["posterior"].expected_entropy,
        }
    else:
        arrays |= {
            "y": target_to_units(encoding, y),
            "mean": prediction.mean,
            "sd": prediction.sd,
            "epistemic_sd": prediction.epistemic_sd,
            "levels": np.array(QUANTILES),
            "quantiles": prediction.quantile(QUANTILES),
            "pit": _pit(prediction, found["posterior"], target_to_units(encoding, y), y),
        }
    store.write_arrays(folder / "predictions.npz", arrays)
    return found["posterior"]


def _write_checks(run: Run, folder: Path, pooled: Pooled | None) -> None:
    """Write predictive_checks.json: the test rows, else those sampled on, against data sets drawn.

    Parameters
    ----------
    run : Run
    folder : Path
    pooled : Pooled or None
        Of the test rows.
    """
    dataset, encoding = run.dataset, run.encoding
    assert dataset is not None and encoding is not None
    draws = run.pooled_draws if run.pooled_chains else run.draws
    x, y = np.asarray(run.x), np.asarray(run.y)
    if pooled is not None:
        x, y = dataset.x[dataset.test], dataset.y[dataset.test]
    width = 1 if y.ndim == 1 else y.shape[1]
    most = min(len(x), max(1, MAX_CHECKED_ROWS // width))
    rows = np.linspace(0, len(x) - 1, most).astype(int)
    if pooled is not None and pooled.samples is not None:
        pooled = replace(pooled, samples=pooled.samples[:, rows])
    x, y = x[rows], y[rows]
    posterior = from_posterior(run, draws, x, y, pooled)
    prior, missing = None, ""
    try:
        prior = from_prior(run, draws, x, y)
    except InputError as error:
        missing = str(error)
    if run.posterior.likelihood.task == "classification":
        names = [str(label) for label in encoding.classes or ()]
        found = check_classes(y, posterior, prior, names)
    else:
        found = check_numbers(
            target_to_units(encoding, y),
            target_to_units(encoding, posterior),
            None if prior is None else target_to_units(encoding, prior),
            [target.name for target in encoding.targets],
            run.posterior.likelihood.support,
        )
    of = "sampled on" if pooled is None else "test"
    about = {"rows": len(rows), "of": of, "posterior_sets": len(posterior)}
    about |= {"prior_sets": 0 if prior is None else len(prior), "prior_missing": missing}
    about["prior_of_some"] = run.sampled is not None
    store.write_json(folder / "predictive_checks.json", {**about, **found})


def _calibrated(run: Run, pooled: Pooled, y: np.ndarray) -> dict[str, Any]:
    """Return the scores that a correction changes, of the posterior's own and corrected.

    "parts": of each target the share of rows covered and the mean width, in its units, by level; of
    classes their scores. "missing" instead if the correction could not be fitted.
    """
    own, encoding = in_target_units(pooled, run.encoding), run.encoding
    assert encoding is not None
    try:
        correction = run.correction
    except InputError as error:  # what was computed stays of use
        return {"method": run.calibration, "missing": str(error)}
    assert correction is not None
    corrected = correction.correct(own)
    about = {"method": run.calibration, "said": corrected.calibration}
    both = {"posterior": own, "corrected": corrected}
    if own.probabilities is not None:
        assert own.classes is not None
        labels = np.array(own.classes, dtype=object)[y]
        scored = {
            name: metrics.classification_scores(y, each.probabilities, each.log_prob(labels))
            for name, each in both.items()
        }
        return {**about, "parts": [{"name": own.targets[0], **scored}]}
    observed = target_to_units(encoding, y)
    parts: list[dict[str, Any]] = [
        {"name": target, "posterior": {}, "corrected": {}} for target in own.targets
    ]
    for level in metrics.LEVELS:
        for name, each in both.items():
            low, high = each.interval(level / 100)
            covered = ((low <= observed) & (observed <= high)).mean(axis=0)
            for k, part in enumerate(parts):
                part[name][f"coverage_{level}"] = float(covered[k])
                part[name][f"width_{level}"] = float((high - low)[:, k].mean())
    return {**about, "parts": parts}


def _pit(prediction: Prediction, pooled: Pooled, in_units: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return F(y) of the pooled predictive, (rows, targets); NaN stays NaN."""
    try:
        return prediction.pit(in_units)
    except InputError:
        # A joint likelihood of the user's own has no distribution function, but samples.
        assert pooled.samples is not None
        return _pit_of_samples(pooled.samples, y)


def _pit_of_samples(samples: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the share of samples (samples, rows, targets) below y, half of those equal to it."""
    below, same = (np.zeros(y.shape) for _ in range(2))
    for sample in samples:
        below += sample < y
        same += sample == y
    unknown = np.isnan(y) | np.isnan(samples).any(axis=0)
    return np.where(unknown, np.nan, (below + same / 2) / len(samples))


def _write_inputs(run: Run, folder: Path) -> None:
    """Write inputs.npz, the quantiles of the inputs' scales, if the prior has such scales."""
    hierarchy = run.posterior.prior.hierarchy
    if hierarchy is None or hierarchy.input_scales is None or not run.pooled_chains:
        return
    total = run.draws.chains * run.draws.draws
    scales = run.input_scales(max(1, -(-total // MAX_SCALE_DRAWS)))
    values = np.stack([scale[run.pooled_chains].ravel() for scale in scales.values()])
    arrays = {
        "names": np.array([str(name) for name in scales]),
        "levels": np.array(QUANTILES),
        "quantiles": np.quantile(values, QUANTILES, axis=1),
    }
    store.write_arrays(folder / "inputs.npz", arrays)
