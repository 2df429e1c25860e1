"""A run: the draws of a posterior with all that is needed to use them."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from bnnmcmc import health, metrics, store, trees
from bnnmcmc.build import make_posterior, sampling_rows
from bnnmcmc.calibration import choose
from bnnmcmc.config import Config, read_config
from bnnmcmc.data import (
    Dataset,
    Encoding,
    as_table,
    encode_features,
    encode_targets,
    fingerprint,
    load_dataset,
    target_to_units,
)
from bnnmcmc.diagnostics import Diagnostics
from bnnmcmc.errors import InputError
from bnnmcmc.mixture import Mixture
from bnnmcmc.pooling import Weighting, chain_weights
from bnnmcmc.posterior import Posterior, activation_bytes, chain_starts, position_shapes
from bnnmcmc.prediction import Prediction, in_target_units
from bnnmcmc.predictive import (
    BATCH,
    MAX_SAMPLED_ROWS,
    Draws,
    Pooled,
    chain_log_densities,
    draws_in_memory,
    per_draw,
    pool,
    thinned,
    thinned_to,
)
from bnnmcmc.recalibration import Conformal, Correction, Temperature, correction_of
from bnnmcmc.samplers.kernel import RowDensity
from bnnmcmc.samplers.table import kernel_named
from bnnmcmc.sampling import sample_density
from bnnmcmc.targets import (
    MAX_SCORED_ROWS,
    Checks,
    Target,
    check_target,
    few_rows,
    target_of,
)

# The ArviZ tree is thinned to about this size: its log-likelihoods grow with rows x draws.
ARVIZ_BYTES = 64 * 2**20
MAX_FUNCTION_ROWS = 50
NO_TARGET = Target()
# Stored draws are handed on in pieces of about this size, however large the stored blocks are.
PIECE_BYTES = 8 * 2**20


class HeldOut(NamedTuple):
    """What every draw says of a few rows.

    Parameters
    ----------
    values : numpy array (chain, draw, n)
        Predictive means, or class probabilities.
    noise : numpy array (chain, n)
        Variance of the outcome about them, mean over draws.
    log_density : numpy array (chain, draw, row) or None
        Log-density of the targets; None if the rows are not held out.
    """

    values: np.ndarray
    noise: np.ndarray
    log_density: np.ndarray | None


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The draws of all chains, the model they belong to, and the data they condition on.

    Parameters
    ----------
    posterior : Posterior
    draws : Draws
        Of all chains, in memory or on disk.
    stats : dict
        name -> numpy array (chain, draw): "log_density" and the kernel's statistics.
    x, y : arrays
        The rows that the posterior conditions on, as the network sees them.
    status : tuple of ChainStatus
        One per chain, with a sentence. Chains that are "nonfinite" or "stopped" do not enter the
        pool.
    seed : int
        Of the run; also of the predictive samples.
    dataset : Dataset, optional
        With the encoding of rows, the scaling and the split; without it, predictions take and
        give numbers on the scale of ``x`` and ``y``.
    warmup_stats : dict, optional
        name -> numpy array (chain, record), evenly spaced over the warm-up.
    members : pytree, optional
        Weights of the ensemble that started the chains, (member, *leaf).
    validation_loss : numpy array (member,), optional
        What the best member is chosen by.
    folder : Path, optional
        The run folder.
    target : Target
        What was sampled until, besides a number of draws (see `bnnmcmc.targets`).
    checks : tuple of dict
        How near that was, check by check: "draw", "ess", "lppd", ...
    stopped : mapping
        Chain -> after how many draws it was stopped, because it failed repeatedly
        (`health.look`). What comes after that is NaN (0 in statistics of whole numbers).
    pooling : "equal", "stacking" or "pseudo_bma"
        What chains count in the pool (`weighted`).
    held_out : tuple of arrays, optional
        Inputs and targets, as the network sees them, that weights are fitted on; the validation
        part if not given.
    pool_size : int
        Predict with about so many draws (see `predictive.thinned_to`); 0 for all.
    calibration : "none", "split", "cqr" or "temperature"
        How intervals or class probabilities of predictions are corrected (`calibrated`).
    calibration_rows : tuple of arrays, optional
        Inputs and targets, as the network sees them, that it is fitted on; the validation part if
        not given.
    described : dict, optional
        The config's [model] and [likelihood], by which `save` describes the network.
    sampled : tuple of bool, optional
        Which leaves of a position were sampled (`trees.chosen_leaves`); all if not given.

    Examples
    --------
    >>> run = Run.open("runs/diabetes")  # doctest: +SKIP
    >>> run.predict(new_rows).interval(0.9)  # doctest: +SKIP
    """

    posterior: Posterior
    draws: Draws
    stats: dict[str, np.ndarray]
    x: Any
    y: Any
    status: tuple[health.ChainStatus, ...]
    seed: int = 0
    dataset: Dataset | None = None
    warmup_stats: dict[str, np.ndarray] | None = None
    members: Any = None
    validation_loss: np.ndarray | None = None
    folder: Path | None = None
    target: Target = NO_TARGET
    checks: tuple[dict[str, Any], ...] = ()
    stopped: Mapping[int, int] = MappingProxyType({})
    pooling: Weighting = "equal"
    held_out: tuple[Any, Any] | None = None
    pool_size: int = 0
    calibration: Literal["none"] | Correction = "none"
    calibration_rows: tuple[Any, Any] | None = None
    described: dict[str, Any] | None = None
    sampled: tuple[bool, ...] | None = None

    @property
    def encoding(self) -> Encoding | None:
        """How rows are encoded and scaled, None for a run on bare arrays."""
        return None if self.dataset is None else self.dataset.encoding

    @property
    def pooled_chains(self) -> list[int]:
        """The chains that enter the pool: all but those not finite, or stopped."""
        return [i for i, chain in enumerate(self.status) if chain.status not in health.LEFT_OUT]

    @property
    def pooled_draws(self) -> Draws:
        """The draws of the chains that enter the pool."""
        chains = self.pooled_chains
        if not chains:
            raise InputError(
                "every chain is non-finite or was stopped: there is nothing to predict with"
            )
        draws = self._chosen_draws(chains)
        if self.pooling != "equal":
            draws = draws._replace(weights=self.weights[chains])
        return thinned_to(draws, self.pool_size) if self.pool_size else draws

    def _chosen_draws(self, chains: list[int]) -> Draws:
        if len(chains) == self.draws.chains:
            return self.draws
        return self.draws._replace(
            chains=len(chains), blocks=lambda: (b[chains] for b in self.draws.blocks())
        )

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """What each chain counts in the pool, (chain,); 0 for those that do not enter it.

        Raises
        ------
        InputError
            They are to be fitted, but there are no held-out rows, or the posterior conditions on
            them.
        """
        chains = self.pooled_chains
        weights = np.zeros(self.draws.chains)
        if self.pooling == "equal":
            weights[chains] = 1 / len(chains)
            return weights
        x, y = self._held_out_rows(self.pooling) if self.held_out is None else self.held_out
        scored = chain_log_densities(self.posterior, self._chosen_draws(chains), x, y)
        weights[chains] = chain_weights(self.pooling, scored, self.seed)
        return weights

    def _held_out_rows(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        dataset = self.dataset
        if dataset is None or not len(dataset.validation):
            raise InputError(
                f"{what}: it is fitted on validation rows, but the run has none; give rows, and "
                "their targets, that the posterior does not condition on"
            )
        if len(self.x) != len(dataset.train):
            raise InputError(
                f"{what}: it is fitted on the validation rows, but the posterior conditions on "
                'them; sample with sampler.rows = "train"'
            )
        return dataset.x[dataset.validation], dataset.y[dataset.validation]

    def weighted(self, pooling: Weighting, rows: Any = None, y: Any = None) -> "Run":
        """Return the run with other weights of chains in its pool.

        Parameters
        ----------
        pooling : "equal", "stacking" or "pseudo_bma"
            By the chains' log scores on held-out rows (see `bnnmcmc.pooling`).
        rows : DataFrame, Table or array (rows, features), optional
            Rows that the chains have not seen, and that are not those of the test; the validation
            part if not given.
        y : array, optional
            Targets of ``rows``, if they are not among its columns.

        Returns
        -------
        Run
            Weights are fitted when they are first needed (``run.weights``).

        Raises
        ------
        InputError
            An unknown word, or no held-out rows.
        """
        if pooling not in get_args(Weighting):
            raise InputError(
                f"pooling: found {pooling!r}, expected one of {', '.join(get_args(Weighting))}"
            )
        held_out = None
        if rows is not None:
            x, target = self._encode(rows, y)
            if target is None:
                raise InputError("weighted: the rows have no target column; give y")
            held_out = (x, target)
        chosen = replace(self, pooling=pooling, held_out=held_out)
        if pooling != "equal" and held_out is None:
            chosen._held_out_rows(pooling)
        chosen._check_spent()
        return chosen

    def _check_spent(self) -> None:
        """Refuse weights of chains and a correction that are fitted on the same rows."""
        both = self.pooling != "equal" and self.calibration != "none"
        if both and self.held_out is None and self.calibration_rows is None:
            raise InputError(
                f"{self.calibration}: the weights of chains ({self.pooling}) are fitted on the "
                "validation rows, which are then not held out any more; give other rows for one "
                'of them, or take run.weighted("equal") or run.calibrated("none")'
            )

    def calibrated(
        self, method: Literal["none"] | Correction, rows: Any = None, y: Any = None
    ) -> "Run":
        """Return the run with predictions corrected on held-out rows, and marked as such.

        Parameters
        ----------
        method : "split", "cqr", "temperature" or "none"
            Conformal intervals, conformalised quantile intervals, or a temperature for classes
            (see `bnnmcmc.recalibration`); or the posterior's own predictions again.
        rows, y
            As in `weighted`: the validation part if not given, never the test part. The validation
            part also chose where training ended, and so where chains start: for a strict guarantee
            give rows that nothing has seen.

        Returns
        -------
        Run

        Raises
        ------
        InputError
            No held-out rows, rows the posterior conditions on or the weights of chains are fitted
            on, or a method that does not go with the target.
        """
        given = None if rows is None else self._encode(rows, y)
        if given is not None and given[1] is None:
            raise InputError("calibrated: the rows have no target column; give y")
        chosen = replace(self, calibration=method, calibration_rows=given)
        chosen._check_spent()
        _ = chosen.correction  # what cannot be fitted is said now
        return chosen

    @property
    def calibrated_on(self) -> tuple[Any, Any]:
        """Inputs and targets, as the network sees them, that the correction is fitted on."""
        given = self.calibration_rows
        return self._held_out_rows(self.calibration) if given is None else given

    @functools.cached_property
    def correction(self) -> Conformal | Temperature | None:
        """What corrects intervals or class probabilities; None for the posterior's own.

        Raises
        ------
        InputError
            As `calibrated` does.
        """
        if self.calibration == "none":
            return None
        x, y = self.calibrated_on
        pooled = pool(self.posterior, self.pooled_draws, x, seed=self.seed, samples=False)
        return correction_of(self.calibration, pooled, np.asarray(y), self.encoding)

    @staticmethod
    def open(folder: str | Path) -> "Run":
        """Open a run folder that holds at least one committed draw, finished or not.

        Parameters
        ----------
        folder : path

        Returns
        -------
        Run
            Draws stay on disk and are checked against their checksums as they are read.

        Raises
        ------
        InputError
            Not a run folder, no draws yet, or something in it is missing, damaged or changed.
        """
        folder = Path(folder)
        manifest = store.read_manifest(folder)
        config, dataset = open_inputs(folder, manifest)
        check_precision(config)
        if not manifest["blocks"]:
            raise InputError(
                f"{folder}: the run holds no draws yet (its stage is {manifest['stage']!r}); go on "
                f"with: bnnmcmc resume {folder}"
            )
        posterior = make_posterior(config, dataset.encoding)
        of = position_layout(posterior)
        members, losses = read_members(folder, manifest, posterior)
        x, y = sampling_rows(config, dataset)
        draws = stored_draws(folder, manifest, of)
        stats = stored_stats(folder, manifest)
        target, checks = target_of(manifest)
        # As the run was begun: a kernel of the user's own need not be there to look at its draws.
        wanted, stopped = manifest.get("wanted", {}), stopped_of(manifest)
        return Run(
            posterior,
            draws,
            stats,
            x,
            y,
            tuple(chain_status(draws, stats, manifest["thin"], wanted, stopped)),
            manifest["seed"],
            dataset,
            store.read_arrays(folder / "warmup.npz"),
            members,
            losses,
            folder,
            target,
            tuple(checks),
            stopped,
            config.pool.weights,
            pool_size=config.pool.draws,
            calibration=config.calibration.method,
            described=describe(config),
            sampled=trees.chosen_leaves(config.sampler.leaves, of),
        )

    def __repr__(self) -> str:
        ok = sum(chain.status == "ok" for chain in self.status)
        where = "in memory" if self.folder is None else f"in {self.folder}"
        return (
            f"<Run: {self.draws.chains} chains ({ok} ok) x {self.draws.draws} draws of "
            f"{self.draws.layout.size} parameters, {where}>"
        )

    def _repr_html_(self) -> str:
        """Show what the run is, its chains by status, and its verdict if it has one."""
        from bnnmcmc.notebook import html_table

        counts = Counter(chain.status for chain in self.status)
        rows = [
            ("chains", ", ".join(f"{count} {name}" for name, count in counts.items())),
            ("draws", f"{self.draws.draws} from each chain"),
            ("parameters", self.draws.layout.size),
            ("sampled on", f"{len(self.x)} rows"),
            ("folder", self.folder or "in memory"),
        ]
        said = ""
        if self.folder is not None and (self.folder / "diagnostics.json").is_file():
            found = json.loads((self.folder / "diagnostics.json").read_text())
            said = (found.get("verdict") or [""])[0]
        return html_table("Run", ("", ""), rows, said)

    def diagnose(self) -> Diagnostics:
        """Diagnose the draws: chain by chain, over chains, and what modes they found.

        Nothing is written; ``bnnmcmc diagnose`` writes it to the run folder.

        Returns
        -------
        Diagnostics
            ``chains``, a row each, and ``summary`` with the verdict.
        """
        from bnnmcmc.results import diagnose

        return Diagnostics(*diagnose(self))

    def report(self) -> Path:
        """Write the report of a run folder, ``report.html``.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        InputError
            A run in memory has no folder to report on.
        """
        from bnnmcmc.report.page import write_report

        if self.folder is None:
            raise InputError(
                "report: a run in memory has no folder; make one with the command line, or look at "
                "score() and to_arviz()"
            )
        return write_report(self.folder)

    def load_draws(self) -> Any:
        """Return all draws in memory: a pytree with numpy leaves (chain, draw, *leaf)."""
        flat = np.concatenate(list(self.draws.blocks()), axis=1)
        return trees.unflatten(flat, self.draws.layout)

    def predict(self, rows: Any, *, samples: bool | None = None) -> Prediction:
        """Predict new rows with all pooled draws.

        Parameters
        ----------
        rows : DataFrame, Table or array (rows, features)
            In the table's own units and labels if the run has an encoding (columns are matched
            by name where there are names); else as the network sees them.
        samples : bool, optional
            Whether to fill ``Prediction.samples``, which takes most of the time; only for up to
            5000 rows if not given.

        Returns
        -------
        Prediction
            In target units. Samples take up to 40 kB per row; ``sample(n)`` draws n of them.

        Raises
        ------
        InputError
            Rows that cannot be encoded: the message names column and row.
        """
        x, draws = self._encode(rows)[0], self.pooled_draws
        drawn = len(x) <= MAX_SAMPLED_ROWS if samples is None else samples
        pooled = pool(self.posterior, draws, x, seed=self.seed, samples=drawn)
        prediction = in_target_units(pooled, self.encoding)
        return prediction if self.correction is None else self.correction.correct(prediction)

    def save(
        self,
        file: str | Path,
        draws: int | None = 1000,
        *,
        model: Mapping[str, Any] | None = None,
        likelihood: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a compact predictor, all in one file and without code (see `bnnmcmc.predictor`).

        Parameters
        ----------
        file : path
            Written anew if it is there.
        draws : int, optional
            About so many draws are kept, as many of each pooled chain, evenly spaced; all if None.
        model, likelihood : dict, optional
            How to build network and likelihood again, as in a config's [model] and [likelihood]:
            ``{"hidden": [16, 16], "activation": "silu"}`` and ``{"kind": "gaussian"}``. Needed for
            runs that were made of functions in Python.

        Raises
        ------
        InputError
            The network or the likelihood is not described, or the description gives another one.
        """
        from bnnmcmc.predictor import save

        given = {"model": model, "likelihood": likelihood}
        given = {name: dict(part) for name, part in given.items() if part is not None}
        save(file, self, {**(self.described or {}), **given}, draws)

    def score(
        self,
        rows: Any = None,
        y: Any = None,
        *,
        units: Literal["target", "standardised"] = "target",
    ) -> dict[str, float]:
        """Score the pooled posterior predictive.

        Parameters
        ----------
        rows : DataFrame, Table or array (rows, features), optional
            The test part of the run's data set if not given.
        y : array, optional
            Targets of ``rows``, if they are not among its columns.
        units : "target" or "standardised"
            Units of a numeric target; lppd and NLL differ by ``ln sd(y)``.

        Returns
        -------
        dict
            See `bnnmcmc.metrics`.

        Raises
        ------
        InputError
            No rows to score, or rows that cannot be encoded.
        """
        if units not in ("target", "standardised"):
            raise InputError(f"units: found {units!r}, expected 'target' or 'standardised'")
        if rows is None:
            if self.dataset is None or not len(self.dataset.test):
                raise InputError("score: the run has no test part; give rows and their targets")
            x, target = self.dataset.x[self.dataset.test], self.dataset.y[self.dataset.test]
        else:
            x, target = self._encode(rows, y)
            if target is None:
                raise InputError("score: the rows have no target column; give y")
        pooled = pool(self.posterior, self.pooled_draws, x, target, seed=self.seed)
        return scores(pooled, target, self.encoding)[units]

    def function_draws(self, every: int = 1) -> np.ndarray:
        """Return each draw's predictions at a few held-out rows, for diagnostics.

        Parameters
        ----------
        every : int
            Keep every so many draws.

        Returns
        -------
        numpy array (chain, draw, values)
            Predictive means (regression) or class probabilities, at most 50 rows, evenly spaced
            over the test part, else over the rows sampled on. All chains. No targets are used.
        """
        return self.held_out_draws(every).values

    def held_out_draws(self, every: int = 1) -> HeldOut:
        """Return what each draw says of a few held-out rows, for diagnostics.

        Parameters
        ----------
        every : int
            Keep every so many draws.

        Returns
        -------
        HeldOut
            ``values`` as `function_draws` returns them.
        """
        x, y = self.x, None
        if self.dataset is not None and len(self.dataset.test):
            x, y = (part[self.dataset.test] for part in (self.dataset.x, self.dataset.y))
        stride = max(1, -(-len(x) // MAX_FUNCTION_ROWS))
        few = None if y is None else y[::stride]
        found = per_draw(self.posterior, thinned(self.draws, every), x[::stride], few)
        if "mean" in found:
            values = found["mean"]
            variance = found["variance"].reshape(*values.shape[:2], -1)
            with np.errstate(invalid="ignore"):
                noise = variance.mean(axis=1, dtype=np.float64)
        else:
            values = found["probabilities"][..., 1:]
            share = values.mean(axis=1, dtype=np.float64)
            noise = (share * (1 - share)).reshape(len(values), -1)
        values = values.reshape(*values.shape[:2], -1)
        return HeldOut(values, noise, found.get("log_density"))

    def input_scales(self, every: int = 1) -> dict[str, np.ndarray]:
        """Return the scales of the inputs' weights under a horseshoe prior, of all chains.

        Parameters
        ----------
        every : int
            Keep every so many draws.

        Returns
        -------
        dict
            Feature -> numpy array (chain, draw). An input with a scale near zero does nothing.

        Raises
        ------
        InputError
            The prior has no such scales.
        """
        hierarchy = self.posterior.prior.hierarchy
        if hierarchy is None or hierarchy.input_scales is None:
            raise InputError('input_scales: the prior has none; use [prior] inputs = "horseshoe"')
        of = jax.vmap(jax.vmap(hierarchy.input_scales))
        found = np.concatenate(
            [
                np.asarray(of(trees.unflatten(block, self.draws.layout)["prior"]))
                for block in thinned(self.draws, every).blocks()
            ],
            axis=1,
        )
        names = [f"x{i}" for i in range(1, found.shape[-1] + 1)]
        if self.encoding is not None and len(self.encoding.feature_names) == len(names):
            names = list(self.encoding.feature_names)
        return {name: found[..., i] for i, name in enumerate(names)}

    def to_arviz(self, every: int | None = None):
        """Return an ArviZ DataTree of all chains but those that were stopped.

        Parameters
        ----------
        every : int
            Keep every so many draws; by default as few as keep the tree below about 64 MiB, and
            of more chains than fit with one draw each, one in so many. The tree's attributes say
            how many.

        Returns
        -------
        xarray.DataTree
            Groups posterior, sample_stats, log_likelihood and posterior_predictive (at the rows
            sampled on), observed_data. Numeric targets are in their own units;
            log-likelihoods are densities on the standardised scale. The tree is rectangular, so
            that a chain that was stopped cannot be in it; the attribute ``stopped_chains`` says
            after how many draws which ones were.

        Raises
        ------
        InputError
            Every chain was stopped, or ``every`` is below 1.
        """
        from bnnmcmc import diagnostics

        per_row = 2 if self.y.ndim == 1 else 1 + self.y.shape[1]
        values = self.draws.layout.size + len(self.stats) + per_row * len(self.x)
        item = jnp.result_type(float).itemsize
        draw_bytes, one_in, records = item * self.draws.chains * values, 1, 1
        warmup = self.warmup_stats or {}
        if every is None:
            every = max(1, -(-self.draws.draws * draw_bytes // ARVIZ_BYTES))
            # Of so many chains that not even one draw of each fits, some; and of long statistics
            # of the warm-up a part.
            one_in = max(1, -(-draw_bytes // ARVIZ_BYTES))
            size = sum(v.nbytes for v in warmup.values()) // one_in
            records = max(1, -(-size // (ARVIZ_BYTES // 8)))
        if every < 1:
            raise InputError(f"every: found {every}, expected at least 1")
        going = [chain for chain in range(self.draws.chains) if chain not in self.stopped]
        if not going:
            raise InputError("every chain was stopped: there is no whole chain for ArviZ")
        draws, chains = thinned(self.draws, every), np.array(going)[::one_in]
        if len(chains) < self.draws.chains:
            blocks = draws.blocks
            draws = draws._replace(chains=len(chains), blocks=lambda: (b[chains] for b in blocks()))
        found = per_draw(self.posterior, draws, self.x, self.y, seed=self.seed)
        encoding, classes = self.encoding, None
        if "samples" in found:
            predicted, observed = found["samples"], np.asarray(self.y)
            if encoding is not None:
                predicted = target_to_units(encoding, predicted)
                observed = target_to_units(encoding, observed)
                targets = tuple(target.name for target in encoding.targets)
            else:
                targets = tuple(f"y{i}" for i in range(1, observed.shape[1] + 1))
        else:
            # One label per draw and row, by inversion of the cumulative probabilities.
            below = np.cumsum(found["probabilities"], axis=-1)[..., :-1]
            uniform = np.random.default_rng(self.seed).random((*below.shape[:-1], 1))
            predicted, observed = (uniform > below).sum(axis=-1), np.asarray(self.y)
            targets = (encoding.targets[0].name,) if encoding else ("y",)
            classes = encoding.classes if encoding else None
        flat = np.concatenate(list(draws.blocks()), axis=1)
        names = self.draws.layout.names
        return diagnostics.to_datatree(
            draws=dict(zip(names, trees.split_flat(flat, self.draws.layout), strict=True)),
            stats={name: values[chains, ::every] for name, values in self.stats.items()},
            warmup_stats={n: v[chains, ::records] for n, v in warmup.items()} or None,
            chains=chains,
            log_likelihood=found["log_density"],
            posterior_predictive=predicted,
            observed=observed,
            row_ids=self._sampled_row_ids(),
            targets=targets,
            classes=classes,
            attrs={
                "thinned_by": every,
                "one_chain_in": one_in,
                "stopped_chains": {str(chain): draw for chain, draw in self.stopped.items()},
                "warmup_records_thinned_by": records,
                "seed": self.seed,
            },
        )

    def _sampled_row_ids(self) -> np.ndarray:
        if self.dataset is None:
            return np.arange(len(self.x))
        rows = np.concatenate([self.dataset.train, self.dataset.validation])
        if len(self.x) not in (len(self.dataset.train), len(rows)):
            return np.arange(len(self.x))
        return rows[: len(self.x)]  # train comes first (see `sampling_rows`)

    def _encode(self, rows: Any, y: Any = None) -> tuple[np.ndarray, np.ndarray | None]:
        encoding = self.encoding
        if encoding is None:
            x = np.asarray(rows)
            if x.ndim != 2 or x.shape[1] != self.x.shape[1]:
                raise InputError(
                    f"rows: found shape {x.shape}, expected (rows, {self.x.shape[1]}) as sampled on"
                )
            target = None if y is None else np.asarray(y)
            if target is not None and self.posterior.likelihood.task == "regression":
                target = target.reshape(len(x), -1)
            return x, target
        table = as_table(encoding, rows, y)
        return encode_features(encoding, table), encode_targets(encoding, table)


def watch(
    target: Target,
    posterior: Posterior,
    of: trees.Layout,
    chains: int,
    inputs: np.ndarray,
    held_out: tuple[Any, Any] | None = None,
    **options: Any,
) -> Checks:
    """Return the checks of a target on the predictions of a network.

    Parameters
    ----------
    target : Target
    posterior : Posterior
    of : trees.Layout
        Of one position.
    chains : int
        Of all processes.
    inputs : array (rows, features)
        Predictions at a few of these are followed for the ESS.
    held_out : tuple of arrays, optional
        Inputs and targets of validation rows, for the LPPD: at most 500 of them, evenly spaced.
    **options
        ``share`` and ``history`` of `Checks`.
    """
    few = inputs[few_rows(len(inputs), chains)]
    scored = None
    if target.lppd and held_out is not None:
        stride = max(1, -(-len(held_out[0]) // MAX_SCORED_ROWS))
        scored = [part[::stride] for part in held_out]

    def evaluate(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        draws = Draws(of, flat.shape[0], flat.shape[1], lambda: [flat])
        found = per_draw(posterior, draws, few, batch=BATCH)
        values = found["mean"] if "mean" in found else found["probabilities"][..., 1:]
        values = values.reshape(*values.shape[:2], -1)
        if scored is None:
            return values, None
        return values, per_draw(posterior, draws, *scored, batch=BATCH)["log_density"]

    return Checks(target, evaluate, chains, **options)


def sample(
    posterior: Posterior,
    positions: Any,
    x,
    y,
    *,
    dataset: Dataset | None = None,
    until: Target | None = None,
    held_out: tuple[Any, Any] | None = None,
    weights: Any = None,
    **options,
) -> Run:
    """Sample a neural network's posterior with one chain per start position.

    Parameters
    ----------
    posterior : Posterior
    positions : pytree
        Start positions (chain, *leaf), for example ``fit_ensemble(...).positions``; those of a
        prior with parameters of its own are found from the network's (see `Posterior.start`).
    x : array (rows, features)
    y : array (rows, targets), or (rows,) class indices
    dataset : Dataset, optional
        Where x and y come from: predictions then take rows in the table's own units and labels
        and give target units, and ``score()`` has a test part.
    until : Target, optional
        Sample until this is met (``bnnmcmc.Target(ess=400)``); ``draws`` is then the most per
        chain.
    held_out : tuple of arrays, optional
        Inputs and targets of rows that are not among x: predictions there are followed for
        ``until.ess``, those of x if not given; ``until.lppd`` needs them. Not the test rows.
    weights : array (rows,), optional
        What each row counts for in the likelihood (`Posterior.log_likelihood`); 1 if not given.
    **options
        As in `sample_density`: kernel ("mclmc" if not given), warmup, draws, thin, seed,
        placement (chosen by the sizes of the problem if not given, see `calibration.choose`),
        on_block, leaves.

    Returns
    -------
    Run
        Draws in memory.

    Raises
    ------
    InputError
        Data that do not fit the model, or as `sample_density`.
    """
    x, y = posterior.arrays(x, y)
    options.setdefault("kernel", "mclmc")
    at_work, starts = posterior, chain_starts(posterior, positions)
    if options.get("placement") is None:
        chains = len(jax.tree.leaves(positions)[0])
        options["placement"] = choose(
            chains, len(x), activation_bytes(posterior, x, y), row_chunk=posterior.row_chunk
        )
    if posterior.row_chunk is None:
        at_work = replace(posterior, row_chunk=options["placement"].row_chunk)
    checks = None
    if until is not None and until.wanted:
        rows = None if held_out is None else posterior.arrays(*held_out)
        check_target(until, rows="train", validation=0 if rows is None else len(rows[0]))
        of, chains = trees.layout(trees.first(starts)), options["placement"].chains
        inputs = np.asarray(x if rows is None else rows[0])
        checks = watch(until, posterior, of, chains, inputs, rows)
        options["on_block"] = _checked(checks, options.get("on_block"), options.get("draws", 1000))
        options["block_end"] = checks.next
    density = RowDensity(at_work.log_prior, at_work.log_likelihood)
    data = (x, y) if weights is None else (x, y, jnp.asarray(weights, x.dtype))
    samples = sample_density(density, starts, data=data, **options)
    draws = draws_in_memory(samples.draws)
    wanted = kernel_named(options["kernel"]).wanted
    thin, stopped = options.get("thin", 1), samples.stopped
    status = chain_status(draws, samples.stats, thin, wanted, stopped)
    return Run(
        posterior,
        draws,
        samples.stats,
        x,
        y,
        tuple(status),
        options.get("seed", 0),
        dataset,
        warmup_stats=samples.warmup_stats,
        members=positions,
        target=until or NO_TARGET,
        checks=() if checks is None else tuple(checks.history),
        stopped=stopped,
        sampled=trees.chosen_leaves(options.get("leaves", ()), draws.layout),
    )


def _checked(checks: Checks, on_block, most: int):
    """Return an ``on_block`` that also looks whether the target is met."""

    def look(stage, block, schedule):
        if on_block:
            on_block(stage, block, schedule)
        if stage != "sampling":
            return False
        checks.add(block.draws)
        if checks.due or checks.done == most:
            checks.check()
        return checks.met

    return look


def scores(
    pooled: Pooled, y: np.ndarray, encoding: Encoding | None, errors: bool = False
) -> dict[str, dict[str, float]]:
    """Score a pooled predictive in both units.

    Parameters
    ----------
    pooled : Pooled
        With the log-density of ``y``.
    y : array
        Targets as the network sees them.
    encoding : Encoding or None
    errors : bool
        Return the scores' standard errors instead.

    Returns
    -------
    dict
        "standardised" and "target": scores by name; the same for classes, counts and shares.
    """
    assert pooled.log_density is not None
    if pooled.probabilities is not None:
        of_classes = metrics.classification_errors if errors else metrics.classification_scores
        found = of_classes(y, pooled.probabilities, pooled.log_density)
        return {"standardised": found, "target": found}
    assert pooled.mean is not None and pooled.variance is not None and pooled.samples is not None
    of_numbers = metrics.regression_errors if errors else metrics.regression_scores
    y, cdf = np.asarray(y), _cdf_values(pooled, y)
    found = of_numbers(y, pooled.mean, pooled.variance, pooled.samples, pooled.log_density, *cdf)
    scale = np.ones(y.shape[1]) if encoding is None else encoding.target_scale
    if np.all(scale == 1):
        return {"standardised": found, "target": found}
    # Densities change by the Jacobian, sum over targets of ln scale; centres cancel in all scores.
    in_units = of_numbers(
        y * scale,
        pooled.mean * scale,
        pooled.variance * scale**2,
        pooled.samples * scale,
        pooled.log_density - np.log(scale).sum(),
        *cdf,
    )
    return {"standardised": found, "target": in_units}


def _cdf_values(pooled: Pooled, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return P(Y <= y) and P(Y < y) of the mixture, (rows, targets), or nothing."""
    mixture = None if pooled.components is None else Mixture(pooled.components)
    if mixture is None or not mixture.computable:
        return ()
    upto = mixture.cdf(y)
    return upto, mixture.cdf(y - 1) if mixture.likelihood.support == "count" else upto


def position_layout(posterior: Posterior) -> trees.Layout:
    """Return the layout of one position, without computing one."""
    return trees.layout(position_shapes(posterior))


def describe(config: Config) -> dict[str, Any]:
    """Return what a config says of network and likelihood, as JSON types."""
    return {
        "model": config.model.model_dump(mode="json"),
        "likelihood": config.likelihood.model_dump(mode="json"),
    }


def check_precision(config: Config) -> None:
    """Raise InputError if JAX does not compute in the run's precision."""
    wanted, enabled = config.run.precision, bool(jax.config.jax_enable_x64)
    if (wanted == "float64") != enabled:
        raise InputError(
            f"run.precision: the run is in {wanted}, but JAX is not; begin with "
            f'bnnmcmc.use_precision("{wanted}") (JAX\'s jax_enable_x64)'
        )


def config_fingerprint(text: bytes) -> str:
    """Return a checksum of the bytes of a config.toml."""
    return hashlib.sha256(text).hexdigest()


def open_inputs(folder: Path, manifest: dict[str, Any]) -> tuple[Config, Dataset]:
    """Read config and data set of a run folder, checked against the manifest.

    Raises
    ------
    InputError
        One of them is missing, damaged, or was changed after the run began.
    """
    config = read_config(folder / "config.toml")
    text = (folder / "config.toml").read_bytes()
    advice = "put the original back, or start a new run with the changed one in another folder"
    if config_fingerprint(text) != manifest["config"]:
        raise InputError(
            f"{folder / 'config.toml'}: changed since the run began; its draws would no longer fit "
            f"it; {advice}"
        )
    dataset = load_dataset(folder)
    if fingerprint(dataset) != manifest["data"]["fingerprint"]:
        raise InputError(
            f"{folder / 'data.npz'} or scaling.json: changed since the run began; {advice}"
        )
    return config, dataset


def read_members(
    folder: Path, manifest: dict[str, Any], posterior: Posterior
) -> tuple[Any, np.ndarray]:
    """Return the ensemble's weights (member, *leaf) and its validation losses (member,)."""
    entry = manifest["ensemble"]
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype),
        jax.eval_shape(posterior.init, jax.random.key(0)),
    )
    positions = store.load_tree(folder / "ensemble" / "members.npz", template, entry["sha256"])
    return positions, np.asarray(entry["validation_loss"])


def stored_draws(folder: Path, manifest: dict[str, Any], of: trees.Layout) -> Draws:
    """Return the committed draws of a run folder, read block by block, handed on in pieces."""
    blocks = manifest["blocks"]

    def read():
        for arrays in store.read_blocks(folder / "draws", of.names, blocks):
            chains, count = arrays[of.names[0]].shape[:2]
            few = max(1, PIECE_BYTES * count // sum(a.nbytes for a in arrays.values()))
            for low in range(0, count, few):
                leaves = [arrays[name][:, low : low + few] for name in of.names]
                yield np.concatenate([a.reshape(chains, a.shape[1], -1) for a in leaves], axis=-1)
            del arrays, leaves  # before the next block is read

    return Draws(of, manifest["chains"], sum(block["count"] for block in blocks), read)


def stored_stats(folder: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the committed statistics of a run folder, name -> (chain, draw)."""
    names = manifest["statistics"]
    blocks = list(store.read_blocks(folder / "stats", names, manifest["blocks"]))
    return {name: np.concatenate([block[name] for block in blocks], axis=1) for name in names}


def stopped_of(manifest: dict[str, Any]) -> dict[int, int]:
    """Return chain -> after how many draws it was stopped, from a run's manifest."""
    return {int(chain): draw for chain, draw in (manifest.get("stopped_chains") or {}).items()}


def chain_status(
    draws: Draws,
    stats: dict[str, np.ndarray],
    thin: int,
    wanted: Mapping[str, float] | None = None,
    stopped: Mapping[int, int] | None = None,
) -> list[health.ChainStatus]:
    """Return the status of every chain, from its draws and statistics alone.

    ``wanted`` and ``stopped`` are as in `health.chain_statuses`.
    """
    finite = np.ones(draws.chains, dtype=bool)
    for block in draws.blocks():
        finite &= np.isfinite(block).all(axis=(1, 2))
    return health.chain_statuses(stats, finite, thin, wanted=wanted, stopped=stopped)
