"""scikit-learn estimators: a Bayesian neural network in one line."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import narwhals as nw
import numpy as np
import pandas as pd
from rich.console import Console
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from bnnmcmc.config import Config, parse
from bnnmcmc.data import Split, Table, prepare, table_from_arrays
from bnnmcmc.errors import InputError
from bnnmcmc.fitting import Fit, fit, more_draws
from bnnmcmc.placement import use_cores_if_new
from bnnmcmc.prediction import Prediction
from bnnmcmc.run import Run

PARAMETERS = """
    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers; ``()`` is a linear model.
    activation : str
        "silu", "tanh", "relu", ... (`bnnmcmc.models.mlp.ACTIVATIONS`).
    prior : str or dict
        Of the weights: "normal", "laplace" or "student_t", or the keys of a config's [prior], such
        as ``{"scale": 0.5, "hierarchical": True}``.
    likelihood : str or dict, optional
        What the network's outputs mean, or the keys of a config's [likelihood], such as
        ``{"kind": "gaussian", "scale": "sampled"}``; "{likelihood}" if not given.
    chains : int
        Members of the ensemble, each of which starts a chain.
    sampler : str or dict
        "mclmc", "mams", "nuts", ..., or the keys of a config's [sampler], such as
        ``{"kernel": "nuts", "max_depth": 8}``.
    warmup, draws, thin : int, optional
        Warm-up steps, kept draws and steps per kept draw of each chain; the sampler's defaults if
        not given.
    ensemble : dict, optional
        Keys of a config's [ensemble], such as ``{"max_epochs": 500}``.
    validation_fraction : float
        Share of the rows by which the ensemble's training is stopped. The posterior conditions on
        them too, unless the sampler's ``rows`` are "train".
    categorical : sequence, optional
        Columns to treat as categories whatever they hold: names, or numbers from 0 for an array.
        Text, truth values and pandas' categories are treated so anyway.
    weights : {"equal", "stacking", "pseudo_bma"}
        What chains count in the pool: all the same, or by their log score on the validation rows,
        which the posterior then does not condition on.
    calibration : {"none", "split", "cqr", "temperature"}
        How predictions are corrected on the validation rows, which the posterior then does not
        condition on: split-conformal or conformalised quantile intervals, or a temperature for
        classes (`bnnmcmc.recalibration`). Intervals (`predict_interval`), or class probabilities,
        are corrected; mean, sd, quantiles, samples and densities of numbers stay the posterior's.
    time_budget : float, optional
        Seconds for `fit`, and for each `more_draws`; fewer steps and draws are made if needed.
    random_state : int, RandomState or None
        An int gives the same draws each time (on the same devices).
    verbose : bool
        Show progress.

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : numpy array of str
        If X came with names.
    fit_ : bnnmcmc.fitting.Fit
        Draws and statistics.
    run_ : bnnmcmc.Run
        The same as a run: diagnostics, ArviZ, status of the chains.
"""

ROWS = """
    Notes
    -----
    X is an array or a DataFrame (pandas, polars or what else narwhals knows). Columns of a frame
    are matched by name, in any order; others than in training are refused. Numbers are scaled
    by the training rows. Categories become 0/1 columns. A missing number becomes the median, a
    missing category none of the categories, and a column with missing values in training gets one
    more 0/1 column that says where. A category that was not there in training, or a missing value
    in a column that had none, is encoded by the same rule, with a `bnnmcmc.UnseenWarning`.
"""


class _BNN(BaseEstimator):
    """What regressor and classifier share."""

    fit_: Fit
    classes_: np.ndarray
    _one_target: bool

    def __init__(
        self,
        hidden: Sequence[int] = (16, 16, 16),
        activation: str = "silu",
        prior: str | Mapping[str, Any] = "normal",
        likelihood: str | Mapping[str, Any] | None = None,
        chains: int = 10,
        sampler: str | Mapping[str, Any] = "mclmc",
        warmup: int | None = None,
        draws: int | None = None,
        thin: int | None = None,
        ensemble: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.1,
        categorical: Sequence[str | int] | None = None,
        weights: str = "equal",
        calibration: str = "none",
        time_budget: float | None = None,
        random_state: Any = 0,
        verbose: bool = False,
    ):
        self.hidden = hidden
        self.activation = activation
        self.prior = prior
        self.likelihood = likelihood
        self.chains = chains
        self.sampler = sampler
        self.warmup = warmup
        self.draws = draws
        self.thin = thin
        self.ensemble = ensemble
        self.validation_fraction = validation_fraction
        self.categorical = categorical
        self.weights = weights
        self.calibration = calibration
        self.time_budget = time_budget
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        return tags

    @property
    def run_(self) -> Run:
        """The draws as a `Run`."""
        check_is_fitted(self)
        return self.fit_.run

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train and sample.

        Parameters
        ----------
        X : array or DataFrame (rows, features)
        y : array, Series or DataFrame (rows,)
            Numbers, of a regression also (rows, targets); or labels: text, whole numbers or truth
            values.
        sample_weight : array (rows,), optional
            What a row counts for in the likelihood: 2 as two equal rows, 0 as none. Scales,
            medians and the validation part go by rows, not by weights.

        Returns
        -------
        self

        Raises
        ------
        InputError
            Data or parameters cannot be used; the message says which, and why.
        """
        table = self._table(X, reset=True)
        targets, classes = self._checked(y)
        return self._fit(table, targets, classes, sample_weight)

    def more_draws(self, draws: int):
        """Add draws to every chain: the same as one longer fit.

        Parameters
        ----------
        draws : int
            Draws per chain to add.

        Returns
        -------
        self
        """
        check_is_fitted(self)
        if draws < 1:
            raise InputError(f"draws: found {draws}, expected at least 1")
        console = self._console()
        self.fit_ = more_draws(self.fit_, int(draws), budget=self.time_budget, console=console)
        return self

    def predict_distribution(self, X: Any) -> Prediction:
        """Return the predictive distribution of every row.

        Parameters
        ----------
        X : array or DataFrame (rows, features)

        Returns
        -------
        Prediction
        """
        return self._predict(X, samples=None)

    def _predict(self, X: Any, samples: bool | None = False) -> Prediction:
        check_is_fitted(self)
        return self.run_.predict(self._table(X, reset=False), samples=samples)

    def save(self, file: str | Path, draws: int | None = 1000) -> None:
        """Write a compact predictor, without code and training data; `bnnmcmc.load` reads it.

        Parameters
        ----------
        file : path
        draws : int, optional
            About so many draws are kept, as many of each chain, evenly spaced; all if None.
        """
        self.run_.save(file, draws)

    def sample(self, X: Any, n: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw from the predictive distribution.

        Parameters
        ----------
        X : array or DataFrame (rows, features)
        n : int
            Samples of each row.
        random_state : int, RandomState or None

        Returns
        -------
        numpy array (n, rows) or (n, rows, targets)
            Of a regression, a sample has the same posterior draw in all rows.
        """
        found = self._predict(X).sample(n, _seed(random_state))
        return found[..., 0] if found.ndim == 3 and self._one_target else found

    def log_prob(self, X: Any, y: Any) -> np.ndarray:
        """Return the log predictive density (of classes: probability) of observed targets.

        Parameters
        ----------
        X : array or DataFrame (rows, features)
        y : array, Series or DataFrame (rows,) or (rows, targets)
            In target units, or labels.

        Returns
        -------
        numpy array (rows,)
            Joint over targets; its mean is the LPPD.

        Raises
        ------
        InputError
            A label that was not there in training, or another number of rows or targets.
        """
        prediction = self._predict(X)
        y = np.asarray(_as_array(y))
        return prediction.log_prob(y.reshape(-1) if self._one_target else y)

    # ------------------------------------------------------------------------------ the fit

    def _fit(self, table: Table, targets: pd.DataFrame, classes, sample_weight):
        """Fit on checked columns; ``classes`` are the labels that the target's codes stand for."""
        frame, weights = table.frame, None
        check_consistent_length(frame, targets)
        if sample_weight is not None:
            weights = _check_sample_weight(
                sample_weight, frame, dtype=np.float64, ensure_non_negative=True
            )
            # A row of weight zero is as good as absent: also for scales, medians and the split.
            kept = np.flatnonzero(weights)
            frame, targets = (part.iloc[kept].reset_index(drop=True) for part in (frame, targets))
            weights = weights[kept]
        if len(frame) < 2:
            raise InputError("found 1 sample with a positive weight, expected at least 2")
        codes = None
        if classes is not None:
            present, codes = np.unique(targets.iloc[:, 0].to_numpy(), return_inverse=True)
            classes = np.asarray(classes)[present]
            if len(classes) < 2:
                only = classes.tolist()[0]
                raise InputError(
                    f"y: found only one class, {only!r}, expected at least two classes"
                )
            targets = targets.assign(**{targets.columns[0]: codes})
            self.classes_ = classes
        twice = {name: f"{name} (target)" for name in targets if name in set(frame.columns)}
        targets = targets.rename(columns=twice)
        names = tuple(targets.columns)
        whole = pd.concat([frame, targets], axis=1)
        seed = _seed(self.random_state)
        validation = _validation_rows(len(whole), self.validation_fraction, codes, seed)
        config = self._config(classes is None, len(whole) - len(validation), seed)
        dataset = prepare(
            replace(table, frame=whole, default_target=names),
            task="regression" if classes is None else "classification",
            categorical=self._categorical(list(frame.columns)),
            split=Split(validation=0.0, validation_rows=validation.tolist(), test_rows=[]),
            support=config.support,
            tolerant=True,
        )
        if classes is not None:
            encoding = replace(dataset.encoding, classes=tuple(classes.tolist()))
            dataset = replace(dataset, encoding=encoding)
        use_cores_if_new()
        self.fit_ = fit(config, dataset, weights, budget=self.time_budget, console=self._console())
        return self

    def _table(self, X: Any, reset: bool) -> Table:
        """Check X and return it as a table, columns named as in training."""
        if not nw.dependencies.is_into_dataframe(X):
            array = validate_data(
                self,
                X,
                reset=reset,
                dtype=None,
                ensure_all_finite="allow-nan",
                ensure_min_samples=2 if reset else 1,
            )
            named = getattr(self, "feature_names_in_", None)
            return table_from_arrays(array, feature_names=None if named is None else list(named))
        frame = nw.from_native(X, eager_only=True).to_pandas().reset_index(drop=True)
        if not reset and hasattr(self, "feature_names_in_"):
            wanted = list(self.feature_names_in_)
            if set(frame.columns) == set(wanted) and len(wanted) == frame.shape[1]:
                frame = frame[wanted]
        validate_data(self, frame, reset=reset, skip_check_array=True)
        least = 2 if reset else 1
        if len(frame) < least:
            raise InputError(
                f"X: found {len(frame)} sample{'' if len(frame) == 1 else 's'}, expected at "
                f"least {least}"
            )
        named = hasattr(self, "feature_names_in_")
        names = self.feature_names_in_ if named else [f"x{i + 1}" for i in range(frame.shape[1])]
        frame.columns = pd.Index([str(name) for name in names])
        return Table(frame, "X", has_header=named, row_offset=1, default_target=())

    def _categorical(self, columns: list[str]) -> list[str]:
        found = []
        for column in self.categorical if self.categorical is not None else ():
            if not isinstance(column, str):
                if not 0 <= column < len(columns):
                    raise InputError(
                        f"categorical: found {column}, expected a number from 0 to "
                        f"{len(columns) - 1}, or a name"
                    )
                column = columns[column]
            found.append(column)
        return found

    def _config(self, numeric: bool, rows: int, seed: int) -> Config:
        """Return the parameters as a config, checked."""
        sampler = _section("kernel", self.sampler)
        for name in ("warmup", "draws", "thin"):
            if getattr(self, name) is not None:
                sampler[name] = getattr(self, name)
        if self.weights != "equal" or self.calibration != "none":
            sampler.setdefault("rows", "train")
        likelihood = self.likelihood
        if likelihood is None:
            likelihood = "gaussian" if numeric else "categorical"
        tables: dict[str, Any] = {
            "data": {"source": "memory"},
            "model": {"hidden": list(self.hidden), "activation": self.activation},
            "likelihood": _section("kind", likelihood),
            "prior": _section("family", self.prior),
            "ensemble": {"batch_size": min(32, rows), **(self.ensemble or {})},
            "sampler": sampler,
            "pool": {"weights": self.weights},
            "calibration": {"method": self.calibration},
            "run": {"seed": seed},
        }
        if "members" in tables["ensemble"]:
            raise InputError("ensemble.members: the parameter chains says how many; remove it")
        tables["ensemble"]["members"] = self.chains
        config = parse(_plain(tables), type(self).__name__)
        if (config.task == "regression") != numeric:
            raise InputError(
                f"likelihood.kind: found {config.likelihood.kind!r}, which is for "
                f"{config.task}, not for {type(self).__name__}"
            )
        return config

    def _console(self) -> Console:
        return Console(stderr=True, quiet=not self.verbose, highlight=False)


class BNNRegressor(RegressorMixin, _BNN):
    """A Bayesian neural network for numeric targets.

    A deep ensemble is trained, each member starts an MCMC chain, and the pooled draws predict.

    Examples
    --------
    >>> model = BNNRegressor(time_budget=60).fit(X, y)  # doctest: +SKIP
    >>> model.predict_interval(X_new, level=0.9)  # doctest: +SKIP
    """

    __doc__ = f"{__doc__}{PARAMETERS.replace('{likelihood}', 'gaussian')}{ROWS}"

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _checked(self, y: Any) -> tuple[pd.DataFrame, None]:
        targets = _targets(self, y)
        values = check_array(
            targets.to_numpy(), dtype=np.float64, input_name="y", estimator=self, copy=True
        )
        self._one_target = np.asarray(_as_array(y)).ndim == 1
        return pd.DataFrame(values, columns=targets.columns), None

    def predict(
        self, X: Any, return_std: bool = False, quantiles: float | Sequence[float] | None = None
    ) -> Any:
        """Predict the mean of every row; with its standard deviation, or quantiles instead.

        Parameters
        ----------
        X : array or DataFrame (rows, features)
        return_std : bool
            Also return the standard deviation of the predictive distribution.
        quantiles : float or sequence of float, optional
            Return these quantiles of the predictive distribution instead of the mean.

        Returns
        -------
        numpy array (rows,) or (rows, targets)
            With ``return_std`` two of them. With ``quantiles`` (rows, [targets,] levels), without
            the last axis for a single level.

        Raises
        ------
        InputError
            ``return_std`` and ``quantiles`` together.
        """
        if return_std and quantiles is not None:
            raise InputError("predict: give return_std or quantiles, not both")
        prediction = self._predict(X)
        if quantiles is not None:
            found = np.moveaxis(np.asarray(prediction.quantile(np.atleast_1d(quantiles))), 0, -1)
            found = found[..., 0] if np.ndim(quantiles) == 0 else found
            return found[:, 0] if self._one_target else found
        assert prediction.mean is not None and prediction.sd is not None
        if return_std:
            return self._squeezed(prediction.mean), self._squeezed(prediction.sd)
        return self._squeezed(prediction.mean)

    def predict_interval(self, X: Any, level: float = 0.9) -> np.ndarray:
        """Return the central interval that holds ``level`` of the predictive mass.

        With ``calibration`` "split" or "cqr" the corrected one, which held this share of the
        validation rows.

        Parameters
        ----------
        X : array or DataFrame (rows, features)
        level : float
            0 < level < 1.

        Returns
        -------
        numpy array (rows, 2) or (rows, targets, 2)
            Lower and upper end.
        """
        low, high = self._predict(X).interval(level)
        return np.stack([self._squeezed(low), self._squeezed(high)], axis=-1)

    def _squeezed(self, values: np.ndarray) -> np.ndarray:
        return values[..., 0] if self._one_target else values


class BNNClassifier(ClassifierMixin, _BNN):
    """A Bayesian neural network for classes; ``classes_`` are the labels, sorted.

    A deep ensemble is trained, each member starts an MCMC chain, and the pooled draws predict.

    Examples
    --------
    >>> model = BNNClassifier(time_budget=60).fit(X, y)  # doctest: +SKIP
    >>> model.predict_proba(X_new)  # doctest: +SKIP
    """

    __doc__ = f"{__doc__}{PARAMETERS.replace('{likelihood}', 'categorical')}{ROWS}"

    def _checked(self, y: Any) -> tuple[pd.DataFrame, np.ndarray]:
        name = _targets(self, y).columns[0]
        self._one_target = True
        labels = column_or_1d(np.asarray(_as_array(y)), warn=True)
        finite = np.isfinite(labels) if labels.dtype.kind == "f" else ~pd.isna(labels)
        if not finite.all():
            row = int(np.argmin(finite))
            raise InputError(f"y, row {row + 1}: found {labels[row]}, expected a label")
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
        return pd.DataFrame({name: codes}), classes

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of every class.

        Parameters
        ----------
        X : array or DataFrame (rows, features)

        Returns
        -------
        numpy array (rows, classes)
            In the order of ``classes_``.
        """
        probabilities = self._predict(X).probabilities
        assert probabilities is not None
        # Sums of float32 are 1 to seven digits only.
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of every row.

        Parameters
        ----------
        X : array or DataFrame (rows, features)

        Returns
        -------
        numpy array (rows,)
            In the labels' own type.
        """
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


# -------------------------------------------------------------------------------------- parts


def _as_array(y: Any) -> Any:
    """Return a Series or one-column frame of any library as a NumPy array."""
    if nw.dependencies.is_into_series(y):
        return nw.from_native(y, series_only=True).to_numpy()
    if nw.dependencies.is_into_dataframe(y):
        return nw.from_native(y, eager_only=True).to_numpy()
    return y


def _targets(estimator: Any, y: Any) -> pd.DataFrame:
    """Return y as a frame with names, its cells unchecked."""
    if y is None:
        raise InputError(
            f"This {type(estimator).__name__} estimator requires y to be passed, but the target y "
            "is None."
        )
    names = None
    if nw.dependencies.is_into_series(y):
        names = [getattr(y, "name", None)]
    elif nw.dependencies.is_into_dataframe(y):
        names = list(nw.from_native(y, eager_only=True).columns)
    array = np.asarray(_as_array(y))
    if array.ndim not in (1, 2):
        raise InputError(f"y: found shape {array.shape}, expected (rows,) or (rows, targets)")
    array = array.reshape(len(array), -1)
    count = array.shape[1]
    if names is None or any(name in (None, "") for name in names):
        names = ["y"] if count == 1 else [f"y{i}" for i in range(1, count + 1)]
    return pd.DataFrame(array, columns=[str(name) for name in names])


def _section(key: str, value: Any) -> dict[str, Any]:
    """Return a section of a config: as given, or of one word."""
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        raise InputError(
            f"found {value!r} for the {key}, expected its name, or a dict of settings with "
            f"{key!r} among them"
        )
    return {key: value}


def _plain(value: Any) -> Any:
    """Turn NumPy's scalars and arrays, and tuples, into Python's numbers and lists."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(each) for each in value]
    return value.item() if isinstance(value, np.generic) else value


def _seed(random_state: Any) -> int:
    if isinstance(random_state, int | np.integer) and 0 <= random_state < 2**32:
        return int(random_state)
    return int(check_random_state(random_state).randint(2**31))


def _validation_rows(rows: int, fraction: float, codes: np.ndarray | None, seed: int) -> np.ndarray:
    """Choose the validation rows at random, evenly over classes; the first of each class trains.

    Parameters
    ----------
    rows : int
    fraction : float
        0 <= fraction < 1; a table so small that this is less than half a row has none.
    codes : numpy array (rows,) or None
        Class indices.
    seed : int
    """
    if not 0 <= fraction < 1:
        raise InputError(f"validation_fraction: found {fraction}, expected 0 <= fraction < 1")
    count = min(round(fraction * rows), rows - 1)
    order = np.random.default_rng(seed).permutation(rows)
    if codes is None:
        return np.sort(order[:count])
    # Sorted by class, every so many rows: each class gives its share.
    order = order[np.argsort(codes[order], kind="stable")]
    chosen = order[((np.arange(count) + 0.5) * rows / max(count, 1)).astype(int)]
    first = order[np.unique(codes[order], return_index=True)[1]]
    return np.sort(np.setdiff1d(chosen, first))
