"""Predictions for rows, in the target's own units."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bnnmcmc.data import Encoding, Label, target_to_units
from bnnmcmc.errors import InputError
from bnnmcmc.mixture import Mixture
from bnnmcmc.predictive import Pooled, entropy

if TYPE_CHECKING:
    import pandas
    import xarray


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    r"""The pooled predictive distribution of some rows.

    Of a numeric target it is a mixture over draws, :math:`F(y) = \sum_s w_s F_s(y)`, and its
    variance has two parts that add up,

    .. math:: \mathrm{Var}[y] = \underbrace{\sum_s w_s \mathrm{Var}_s[y]}_\text{aleatoric}
              + \underbrace{\sum_s w_s (\mathrm E_s[y] - \mathrm E[y])^2}_\text{epistemic}.

    Quantiles, densities and further samples are computed when they are asked for, a part of the
    rows at a time: memory does not grow with the number of draws.

    Parameters
    ----------
    targets : tuple of str
        Names of the targets.
    mean, sd : numpy array (rows, targets) or None
        Of the predictive distribution (regression), in target units.
    epistemic_sd : numpy array (rows, targets) or None
        Standard deviation over draws of the draws' means: what more data would shrink.
    samples : numpy array (samples, rows, targets) or None
        Draws from the predictive distribution (regression).
    probabilities : numpy array (rows, classes) or None
        Pooled class probabilities (classification).
    classes : tuple or None
        The labels, in the order of ``probabilities``.
    expected_entropy : numpy array (rows,) or None
        Mean over draws of the entropy of a draw's class probabilities, in nats.
    mixture : Mixture or None
        Of the draws, on the scale the model was trained on.
    center, scale : numpy array (targets,) or None
        A number y of the mixture is ``center + scale * y`` in target units; 0 and 1 if not given.
    adjusted : callable or None
        ``adjusted(prediction, level) -> (low, high)`` gives the intervals instead of the mixture,
        such as those of `bnnmcmc.conformal`.
    calibration : str
        How intervals or probabilities were calibrated on held-out rows; "" for the posterior's own.

    References
    ----------
    Depeweg et al. (2018), 1710.07283, section 3 (the parts of variance and entropy).
    """

    targets: tuple[str, ...]
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None
    epistemic_sd: np.ndarray | None = None
    samples: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    classes: tuple[Label, ...] | None = None
    expected_entropy: np.ndarray | None = None
    mixture: Mixture | None = None
    center: np.ndarray | None = None
    scale: np.ndarray | None = None
    adjusted: Callable[["Prediction", float], tuple[np.ndarray, np.ndarray]] | None = None
    calibration: str = ""

    def __repr__(self) -> str:
        found = self.mean if self.probabilities is None else self.probabilities
        rows = 0 if found is None else len(found)
        what = "mean, sd and samples" if self.probabilities is None else "class probabilities"
        marked = f", {self.calibration}" if self.calibration else ""
        return f"<Prediction: {what} of {', '.join(self.targets)} for {rows} rows{marked}>"

    # ------------------------------------------------------------------------------- the parts

    @property
    def variance(self) -> np.ndarray:
        """Variance, (rows, targets), in squared target units."""
        return self._numeric("variance", self.sd) ** 2

    @property
    def epistemic_variance(self) -> np.ndarray:
        """Variance over draws of the draws' means, (rows, targets)."""
        return self._numeric("epistemic_variance", self.epistemic_sd) ** 2

    @property
    def aleatoric_variance(self) -> np.ndarray:
        """Mean over draws of the draws' variances, (rows, targets): noise, however much data."""
        return self.variance - self.epistemic_variance

    @property
    def aleatoric_sd(self) -> np.ndarray:
        """Root of `aleatoric_variance`, (rows, targets), in target units."""
        return np.sqrt(np.maximum(self.aleatoric_variance, 0.0))

    @property
    def entropy(self) -> np.ndarray:
        r"""Entropy of the class probabilities, :math:`-\sum_c p_c \log p_c`, (rows,) in nats."""
        return entropy(np.asarray(self._of_classes("entropy", self.probabilities), np.float64))

    @property
    def mutual_information(self) -> np.ndarray:
        r"""Entropy that more data would take away, (rows,) in nats.

        .. math:: H\left[\sum_s w_s p_s\right] - \sum_s w_s H[p_s]

        Zero where all draws agree, however unsure each of them is.

        References
        ----------
        Houlsby et al. (2011), 1112.5745.
        """
        expected = self._of_classes("mutual_information", self.expected_entropy)
        return np.maximum(self.entropy - expected, 0.0)

    def _numeric(self, what: str, value):
        if self.probabilities is not None or value is None:
            raise InputError(f"{what} needs a numeric target; use probabilities for classes")
        return value

    def _of_classes(self, what: str, value):
        if self.probabilities is None or value is None:
            raise InputError(f"{what} needs a classification; use sd or quantile for numbers")
        return value

    # ------------------------------------------------------------------------ the distribution

    @functools.cached_property
    def _mixture(self) -> Mixture | None:
        """The mixture, if its distribution functions can be computed."""
        return self.mixture if self.mixture is not None and self.mixture.computable else None

    @functools.cached_property
    def _units(self) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.targets)
        center = np.zeros(count) if self.center is None else np.asarray(self.center)
        return center, np.ones(count) if self.scale is None else np.asarray(self.scale)

    def _scaled(self, y: Any) -> np.ndarray:
        """Return targets in units, (rows, targets), on the scale of the mixture."""
        mean = self._numeric("cdf and log_prob", self.mean)
        y = np.asarray(y, np.float64)
        if y.ndim == 1 and mean.shape[1] == 1:
            y = y[:, None]
        if y.shape != mean.shape:
            raise InputError(f"y: found shape {y.shape}, expected {mean.shape}, as mean has")
        center, scale = self._units
        return (y - center) / scale

    def quantile(self, levels) -> np.ndarray:
        r"""Return quantiles of the predictive distribution.

        The root of :math:`F(y) = p`, to six digits of the standard deviation; of counts the
        smallest y with :math:`F(y) \ge p`. Where there is no distribution function, for a joint
        likelihood of the user's own, those of the samples.

        Parameters
        ----------
        levels : float or sequence of float
            Between 0 and 1.

        Returns
        -------
        numpy array ([levels,] rows, targets)

        Raises
        ------
        InputError
            For classes, which have no order, or a level that is not between 0 and 1.
        """
        self._numeric("quantile", self.mean)
        wanted = np.atleast_1d(np.asarray(levels, np.float64))
        if wanted.ndim > 1 or not np.all((wanted > 0) & (wanted < 1)):
            raise InputError(
                f"levels: found {levels}, expected numbers between 0 and 1, such as 0.9"
            )
        if self._mixture is None:
            if self.samples is None:
                raise InputError(
                    "quantile: the likelihood has no distribution function, and there are too many "
                    "rows for samples; predict fewer rows at a time"
                )
            found = np.quantile(self.samples, wanted, axis=0)
        else:
            center, scale = self._units
            found = self._mixture.quantiles(wanted) * scale + center
        return found[0] if np.ndim(levels) == 0 else found

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the central interval that holds ``level`` of the predictive mass.

        Parameters
        ----------
        level : float
            0 < level < 1.

        Returns
        -------
        tuple of two numpy arrays (rows, targets)
            Lower and upper end. Of a calibrated prediction (see ``calibration``) the interval that
            was calibrated.

        Raises
        ------
        InputError
            A level outside (0, 1), or classes.
        """
        if not 0 < level < 1:
            raise InputError(f"level: found {level}, expected between 0 and 1, such as 0.9")
        if self.adjusted is not None:
            return self.adjusted(self, level)
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

    def cdf(self, y: Any) -> np.ndarray:
        r"""Return :math:`P(Y \le y)` of each target.

        Parameters
        ----------
        y : array (rows, targets), or (rows,) for one target
            In target units.

        Returns
        -------
        numpy array (rows, targets)

        Raises
        ------
        InputError
            For classes, a wrong shape, or a joint likelihood of the user's own.
        """
        scaled = self._scaled(y)
        if self._mixture is None:
            raise InputError("cdf: this prediction has no distribution function")
        return self._mixture.cdf(scaled)

    def pit(self, y: Any, seed: int = 0) -> np.ndarray:
        r"""Return the probability integral transform of observed targets.

        .. math:: u = F(y), \qquad \text{of counts } u = F(y - 1) + v \, (F(y) - F(y - 1)),
                  \quad v \sim U(0, 1)

        Uniform for calibrated predictions.

        Parameters
        ----------
        y : array (rows, targets), or (rows,) for one target
            In target units.
        seed : int
            For v.

        Returns
        -------
        numpy array (rows, targets)

        Raises
        ------
        InputError
            As `cdf`.

        References
        ----------
        Czado, Gneiting and Held (2009), Biometrics 65 (for counts).
        """
        upper = self.cdf(y)
        assert self._mixture is not None
        if self._mixture.likelihood.support != "count":
            return upper
        lower = self._mixture.cdf(self._scaled(y) - 1)
        return lower + np.random.default_rng(seed).random(upper.shape) * (upper - lower)

    def log_prob(self, y: Any) -> np.ndarray:
        r"""Return the log predictive density (or probability) of observed targets or classes.

        .. math:: \log \sum_s w_s \, p_s(y)

        Parameters
        ----------
        y : array (rows, targets), (rows,) for one target, or (rows,) labels
            In target units.

        Returns
        -------
        numpy array (rows,)
            Joint over targets, per target unit.

        Raises
        ------
        InputError
            A wrong shape, an unknown label, or a prediction without its mixture.
        """
        if self.probabilities is not None:
            index = {label: i for i, label in enumerate(self.classes or ())}
            if np.ndim(y) != 1:
                raise InputError(f"y: found shape {np.shape(y)}, expected labels of shape (rows,)")
            labels = np.asarray(y).tolist()
            unknown = [label for label in labels if label not in index]
            if unknown or len(labels) != len(self.probabilities):
                found = f"the label {unknown[0]!r}" if unknown else f"{len(labels)} labels"
                raise InputError(
                    f"y: found {found}, expected {len(self.probabilities)} of "
                    f"{', '.join(map(repr, index))}"
                )
            chosen = [index[label] for label in labels]
            with np.errstate(divide="ignore"):
                return np.log(self.probabilities[np.arange(len(labels)), chosen])
        scaled = self._scaled(y)
        if self.mixture is None:
            raise InputError("log_prob: this prediction has no density")
        return self.mixture.log_density(scaled) - np.log(self._units[1]).sum()

    def sample(self, n: int = 1, seed: int = 0) -> np.ndarray:
        """Draw from the predictive distribution.

        Parameters
        ----------
        n : int
            How many samples of each row.
        seed : int

        Returns
        -------
        numpy array (n, rows, targets), or (n, rows) labels
            In target units. Numbers: a sample has the same posterior draw in all rows, so that it
            is a function with noise. Labels: independent over rows.

        Raises
        ------
        InputError
            ``n`` below 1, a prediction without its mixture, or class probabilities that are NaN.
        """
        if n < 1:
            raise InputError(f"n: found {n}, expected at least 1")
        if self.probabilities is not None:
            unknown = np.isnan(self.probabilities).any(axis=1)
            if unknown.any():
                raise InputError(
                    f"sample: row {int(unknown.argmax()) + 1} has class probabilities that are not "
                    "finite, as a chain in the pool is"
                )
            ends = np.cumsum(self.probabilities, axis=1)
            uniform = np.random.default_rng(seed).random((n, len(ends), 1))
            chosen = (uniform * ends[:, -1:] > ends[:, :-1]).sum(axis=-1)
            return self._label_array()[chosen]
        if self.mixture is None:
            raise InputError("sample: this prediction has no mixture to draw from")
        center, scale = self._units
        return self.mixture.sample(n, seed).astype(np.float64) * scale + center

    def _repr_html_(self) -> str:
        """Show the first rows: mean, spread and 90 % interval, or label and probabilities."""
        from bnnmcmc.notebook import MAX_ROWS, html_table

        found = self.mean if self.probabilities is None else self.probabilities
        rows = 0 if found is None else len(found)
        frame = self.to_frame()
        shown = [(i, *frame.iloc[i]) for i in range(min(rows, MAX_ROWS))]
        more = f"the first {MAX_ROWS} of {rows} rows" if rows > MAX_ROWS else ""
        caption = f"Prediction of {', '.join(self.targets)}"
        return html_table(caption, ("row", *frame.columns), shown, more)

    def labels(self) -> np.ndarray:
        """Return the most probable class of every row, (rows,), in the labels' own type."""
        if self.probabilities is None or self.classes is None:
            raise InputError("labels need a classification; use mean for numeric targets")
        return self._label_array()[self.probabilities.argmax(axis=1)]

    def _label_array(self) -> np.ndarray:
        classes = self.classes or ()
        return np.array(classes, dtype=None if _same_type(classes) else object)

    # ----------------------------------------------------------------------------------- tables

    def to_frame(self, level: float = 0.9) -> "pandas.DataFrame":
        """Return one line per row: mean, sd and interval per target, or label and probabilities.

        Parameters
        ----------
        level : float
            Of the interval.

        Returns
        -------
        pandas.DataFrame
            With ``calibration`` among its ``attrs``.
        """
        import pandas as pd

        columns: dict[str, Any] = {}
        if self.probabilities is not None:
            columns[self.targets[0]] = self.labels()
            for i, label in enumerate(self.classes or ()):
                columns[f"p({label})"] = self.probabilities[:, i]
        else:
            assert self.mean is not None and self.sd is not None and self.epistemic_sd is not None
            low, high = self.interval(level)
            percent = f"{100 * level:g}"
            for i, name in enumerate(self.targets):
                columns[f"{name}_mean"] = self.mean[:, i]
                columns[f"{name}_sd"] = self.sd[:, i]
                columns[f"{name}_epistemic_sd"] = self.epistemic_sd[:, i]
                columns[f"{name}_lower_{percent}"] = low[:, i]
                columns[f"{name}_upper_{percent}"] = high[:, i]
        frame = pd.DataFrame(columns)
        frame.attrs["calibration"] = self.calibration
        return frame

    def to_xarray(self, level: float = 0.9) -> "xarray.Dataset":
        """Return a Dataset over (row, target), or (row, class), with the parts of the uncertainty.

        Parameters
        ----------
        level : float
            Of the interval.

        Returns
        -------
        xarray.Dataset
            Numbers: mean, sd, epistemic_sd, aleatoric_sd, lower, upper. Classes: probability,
            label, entropy, mutual_information.
        """
        import xarray

        attrs = {"calibration": self.calibration}
        if self.probabilities is not None:
            rows = {"label": self.labels(), "entropy": self.entropy}
            if self.expected_entropy is not None:
                rows["mutual_information"] = self.mutual_information
            return xarray.Dataset(
                {
                    "probability": (("row", "class"), self.probabilities),
                    **{name: ("row", value) for name, value in rows.items()},
                },
                coords={"class": self._label_array()},
                attrs={**attrs, "target": self.targets[0]},
            )
        low, high = self.interval(level)
        values = {
            "mean": self.mean,
            "sd": self.sd,
            "epistemic_sd": self.epistemic_sd,
            "aleatoric_sd": self.aleatoric_sd,
            "lower": low,
            "upper": high,
        }
        return xarray.Dataset(
            {name: (("row", "target"), value) for name, value in values.items()},
            coords={"target": list(self.targets)},
            attrs={**attrs, "level": level},
        )


def _same_type(values) -> bool:
    return len({type(value) for value in values}) == 1


def in_target_units(pooled: Pooled, encoding: Encoding | None) -> Prediction:
    """Turn a pooled predictive on the training scale into a `Prediction`.

    Parameters
    ----------
    pooled : Pooled
    encoding : Encoding or None
        Of the training data; None if the model was trained on the data as they are.

    Returns
    -------
    Prediction
    """
    mixture = None if pooled.components is None else Mixture(pooled.components)
    if pooled.probabilities is not None:
        classes = encoding.classes if encoding else tuple(range(pooled.probabilities.shape[1]))
        target = encoding.targets[0].name if encoding else "y"
        return Prediction(
            (target,),
            probabilities=pooled.probabilities,
            classes=classes,
            expected_entropy=pooled.expected_entropy,
            mixture=mixture,
        )
    assert pooled.mean is not None and pooled.variance is not None
    assert pooled.epistemic is not None
    mean, samples = pooled.mean, pooled.samples
    count = mean.shape[1]
    names = ("y",) if count == 1 else tuple(f"y{i}" for i in range(1, count + 1))
    center, scale = np.zeros(count), np.ones(count)
    if encoding is not None:
        names, scale = tuple(target.name for target in encoding.targets), encoding.target_scale
        center = np.array([target.center for target in encoding.targets])
        mean = target_to_units(encoding, mean)
        samples = None if samples is None else target_to_units(encoding, samples)
    return Prediction(
        names,
        mean=mean,
        sd=np.sqrt(pooled.variance) * scale,
        epistemic_sd=np.sqrt(pooled.epistemic) * scale,
        samples=samples,
        mixture=mixture,
        center=center,
        scale=scale,
    )
