"""A compact predictor: what predicts new rows, in one file without code and training rows.

The file is a zip archive, which NumPy reads as an npz:

====================  ==============================================================
``predictor.json``    format, network, likelihood, encoding and scaling, names and
                      shapes of the parameters, seed, how many draws were kept
``draws.npy``         (chain, draw, size) of the network's and likelihood's parameters
``weights.npy``       (chain,) what each chain counts in the pool
``calibration_*.npy`` of a calibrated run only: the held-out rows, as the network
                      sees them, that intervals or probabilities are corrected on
====================  ==============================================================
"""

import json
import os
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import build, priors, trees
from bnnmcmc.config import parse
from bnnmcmc.data import Encoding, FeatureColumn, TargetColumn, as_table, encode_features
from bnnmcmc.errors import InputError
from bnnmcmc.posterior import Posterior, position_shapes
from bnnmcmc.prediction import Prediction, in_target_units
from bnnmcmc.predictive import MAX_SAMPLED_ROWS, Draws, pool, thinned_to
from bnnmcmc.recalibration import Conformal, Correction, Temperature, correction_of
from bnnmcmc.store import disk_errors

if TYPE_CHECKING:
    from bnnmcmc.run import Run

FORMAT, VERSION = "bnnmcmc predictor", 2
DESCRIPTION = "predictor.json"


@dataclass(frozen=True, eq=False, repr=False)
class Predictor:
    """Draws of a network's parameters, and how to encode the rows that it sees.

    Parameters
    ----------
    posterior : Posterior
        Network and likelihood; the prior is of no use here.
    draws : Draws
        In memory.
    encoding : Encoding
    seed : int
        Of predictive samples.
    calibration : "none", "split", "cqr" or "temperature"
        How predictions are corrected.
    calibration_rows : tuple of arrays, optional
        Inputs and targets, as the network sees them, that the correction is fitted on.
    """

    posterior: Posterior
    draws: Draws
    encoding: Encoding
    seed: int
    calibration: Literal["none"] | Correction = "none"
    calibration_rows: tuple[np.ndarray, np.ndarray] | None = None

    def __repr__(self) -> str:
        return (
            f"<Predictor: {self.draws.chains} chains x {self.draws.draws} draws of "
            f"{self.draws.layout.size} parameters, {self.encoding.task} of "
            f"{', '.join(target.name for target in self.encoding.targets)}>"
        )

    @property
    def pooled_draws(self) -> Draws:
        """All draws, under the name that they have in a `Run`."""
        return self.draws

    @cached_property
    def correction(self) -> Conformal | Temperature | None:
        """What corrects intervals or class probabilities; None for the posterior's own."""
        if self.calibration == "none":
            return None
        assert self.calibration_rows is not None
        x, y = self.calibration_rows
        pooled = pool(self.posterior, self.draws, x, seed=self.seed, samples=False)
        return correction_of(self.calibration, pooled, y, self.encoding)

    def predict(self, rows: Any, *, samples: bool | None = None) -> Prediction:
        """Predict new rows, as `Run.predict` does.

        Parameters
        ----------
        rows : DataFrame, Table or array (rows, features)
        samples : bool, optional

        Returns
        -------
        Prediction
            In target units.

        Raises
        ------
        InputError
            Rows that cannot be encoded: the message names column and row.
        """
        x = encode_features(self.encoding, as_table(self.encoding, rows))
        drawn = len(x) <= MAX_SAMPLED_ROWS if samples is None else samples
        pooled = pool(self.posterior, self.draws, x, seed=self.seed, samples=drawn)
        prediction = in_target_units(pooled, self.encoding)
        return prediction if self.correction is None else self.correction.correct(prediction)


def save(file: str | Path, run: "Run", described: dict[str, Any], draws: int | None) -> None:
    """Write the predictor of a run (see `Run.save`).

    Parameters
    ----------
    file : path
    run : Run
    described : dict
        "model" and "likelihood", as in a config.
    draws : int, optional
        About so many of all chains together (see `predictive.thinned_to`); all if None.
    """
    file = Path(file)
    missing = [name for name in ("model", "likelihood") if name not in described]
    if missing:
        raise InputError(
            f"save: the run was made in Python and does not say how to build its "
            f"{' and '.join(missing)} again; give {' and '.join(f'{n}=...' for n in missing)}, the "
            "keys of a config's sections, such as model={'hidden': [16, 16]}"
        )
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}; make it first")
    encoding = run.encoding or _bare(run)
    posterior = _build(described, encoding, "save")
    whole = run.pooled_draws
    kept = whole if draws is None else thinned_to(whole, draws)
    flat = np.concatenate(list(kept.blocks()), axis=1)
    flat = _plain_parameters(run.posterior, kept.layout, flat)
    of = trees.layout(position_shapes(posterior))
    found = trees.layout(jax.eval_shape(run.posterior.init, jax.random.key(0)))
    if of != found or not _same_density(run, posterior, flat[0, 0], of):
        raise InputError(
            f"save: {described} does not describe this run's network; its parameters are "
            f"{_shapes(found)}, those of the description {_shapes(of)}"
        )
    document = {
        "format": FORMAT,
        # Older readers would leave a correction out.
        "version": 1 if run.calibration == "none" else VERSION,
        **described,
        "encoding": encoding.to_json(),
        "leaves": dict(zip(of.names, map(list, of.shapes), strict=True)),
        "seed": run.seed,
        "kept": {"chains": whole.chains, "draws": kept.draws, "of": whole.draws},
    }
    arrays = {"draws": flat}
    if run.calibration != "none":
        document["calibration"] = run.calibration
        arrays["calibration_x"], arrays["calibration_y"] = map(np.asarray, run.calibrated_on)
    if kept.weights is not None:
        arrays["weights"] = np.asarray(kept.weights, np.float64)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with disk_errors(file.parent), zipfile.ZipFile(partial, "w") as archive:
            archive.writestr(DESCRIPTION, json.dumps(document, indent=1, ensure_ascii=False))
            for name, values in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, values, allow_pickle=False)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load(file: str | Path) -> Predictor:
    """Read what `Run.save` wrote. Nothing in the file is run as code.

    A network of the user's own is imported by its name, ``module:function``, as in a config.

    Parameters
    ----------
    file : path

    Returns
    -------
    Predictor

    Raises
    ------
    InputError
        No such file, not a predictor, of a later version, damaged, or the network cannot be built.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected one written by Run.save")
    try:
        with zipfile.ZipFile(file) as archive:
            document = json.loads(archive.read(DESCRIPTION))
            arrays = {}
            for name in archive.namelist():
                if name.endswith(".npy"):
                    with archive.open(name) as member:
                        arrays[name[:-4]] = np.lib.format.read_array(member, allow_pickle=False)
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        version = int(document["version"])
        if version > VERSION:
            raise InputError(
                f"{file}: written by a later version of bnnmcmc (format {version}, this one reads "
                f"up to {VERSION}); update bnnmcmc"
            )
        flat = arrays["draws"]
        described = {name: document[name] for name in ("model", "likelihood")}
        leaves = {name: tuple(shape) for name, shape in document["leaves"].items()}
        encoding, seed = Encoding.from_json(document["encoding"]), int(document["seed"])
        correction: tuple[Any, ...] = ()
        if "calibration" in document:
            correction = (
                document["calibration"],
                (arrays["calibration_x"], arrays["calibration_y"]),
            )
    except InputError:
        raise
    except Exception as error:  # zip, JSON and npy errors have no common base
        raise InputError(
            f"{file}: not a predictor written by Run.save, or damaged: "
            f"{type(error).__name__}: {error}"
        ) from error
    posterior = _build(described, encoding, str(file))
    of = trees.layout(position_shapes(posterior))
    if dict(zip(of.names, of.shapes, strict=True)) != leaves or flat.shape[2:] != (of.size,):
        raise InputError(
            f"{file}: the network has parameters {_shapes(of)}, but the file holds {leaves}; "
            "the network's code has changed since it was written"
        )
    draws = Draws(of, flat.shape[0], flat.shape[1], lambda: [flat], arrays.get("weights"))
    return Predictor(posterior, draws, encoding, seed, *correction)


def _build(described: dict[str, Any], encoding: Encoding, name: str) -> Posterior:
    config = parse({"data": {"source": "memory"}, **described}, name)
    likelihood = build.make_likelihood(config, encoding)
    network = build.make_network(config, len(encoding.feature_names), likelihood.num_outputs)
    return Posterior(network, likelihood, priors.normal())


def _plain_parameters(posterior: Posterior, of: trees.Layout, flat: np.ndarray) -> np.ndarray:
    """Return draws without parameters of the prior, the network's as it computes with them."""
    if posterior.prior.hierarchy is None:
        return flat

    def plain(flat):
        position = trees.unflatten(flat, of)
        network = posterior.network_params(position)
        return trees.flatten_stacked(
            {"likelihood": position["likelihood"], "network": network}, leading=0
        )

    return np.asarray(jax.jit(jax.vmap(jax.vmap(plain)))(flat))


def _same_density(run: "Run", posterior: Posterior, flat: np.ndarray, of: trees.Layout) -> bool:
    """Tell whether the described network and likelihood are the run's, by a few rows of it."""
    position = trees.unflatten(jnp.asarray(flat), of)
    x, y = (jnp.asarray(np.asarray(part)[:5]) for part in (run.x, run.y))
    x, densities = x.astype(jnp.result_type(float)), []
    for each in (run.posterior, posterior):
        outputs = each.network.apply(position["network"], x)
        if outputs.shape[1] != posterior.likelihood.num_outputs:
            return False
        distribution = each.likelihood.distribution(position["likelihood"], outputs)
        densities.append(np.asarray(distribution.log_prob(y)))
    first, second = densities
    return np.allclose(first, second, rtol=1e-4, atol=1e-5, equal_nan=True)


def _bare(run: "Run") -> Encoding:
    """Return the encoding of rows that are taken as they are."""
    features = tuple(FeatureColumn(f"x{i}", None, 0.0, 1.0) for i in range(1, run.x.shape[1] + 1))
    columns = tuple(feature.name for feature in features)
    if run.posterior.likelihood.task == "classification":
        count = max(2, run.posterior.likelihood.num_outputs)
        target = (TargetColumn("y", 0.0, 1.0),)
        return Encoding(
            "classification", features, target, tuple(range(count)), False, (*columns, "y")
        )
    count = run.y.shape[1]
    names = ("y",) if count == 1 else tuple(f"y{i}" for i in range(1, count + 1))
    support = run.posterior.likelihood.support
    targets = tuple(TargetColumn(name, 0.0, 1.0, support) for name in names)
    return Encoding("regression", features, targets, None, False, (*columns, *names))


def _shapes(of: trees.Layout) -> str:
    return ", ".join(f"{n} {s}" for n, s in zip(of.names, of.shapes, strict=True))
