"""Predictions for rows, in the target's own units."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnnmcmc.data import Encoding, Label, target_to_units
from bnnmcmc.errors import InputError
from bnnmcmc.predictive import Pooled

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The pooled predictive distribution of some rows.

    Parameters
    ----------
    targets : tuple of str
        Names of the targets.
    mean, sd : numpy array (rows, targets) or None
        Of the predictive distribution (regression), in target units.
    epistemic_sd : numpy array (rows, targets) or None
        Standard deviation over draws of the draws' means: what more data would shrink. The rest,
        ``sqrt(sd^2 - epistemic_sd^2)``, is noise.
    samples : numpy array (samples, rows, targets) or None
        Draws from the predictive distribution (regression).
    probabilities : numpy array (rows, classes) or None
        Pooled class probabilities (classification).
    classes : tuple or None
        The labels, in the order of ``probabilities``.
    """

    targets: tuple[str, ...]
    mean: np.ndarray | None = None
    sd: np.ndarray | None = None
    epistemic_sd: np.ndarray | None = None
    samples: np.ndarray | None = None
    probabilities: np.ndarray | None = None
    classes: tuple[Label, ...] | None = None

    def __repr__(self) -> str:
        found = self.mean if self.probabilities is None else self.probabilities
        rows = 0 if found is None else len(found)
        what = "mean, sd and samples" if self.probabilities is None else "class probabilities"
        return f"<Prediction: {what} of {', '.join(self.targets)} for {rows} rows>"

    def quantile(self, levels) -> np.ndarray:
        """Return quantiles of the predictive distribution, from its samples.

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
            For classes, which have no order.
        """
        if self.samples is None:
            raise InputError("quantiles need a numeric target; use probabilities for classes")
        return np.quantile(self.samples, levels, axis=0)

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Return the central interval that holds ``level`` of the predictive mass.

        Parameters
        ----------
        level : float
            0 < level < 1.

        Returns
        -------
        tuple of two numpy arrays (rows, targets)
            Lower and upper end.

        Raises
        ------
        InputError
            A level outside (0, 1), or classes.
        """
        if not 0 < level < 1:
            raise InputError(f"level: found {level}, expected between 0 and 1, such as 0.9")
        low, high = self.quantile([(1 - level) / 2, (1 + level) / 2])
        return low, high

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
        labels = np.array(self.classes, dtype=None if _same_type(self.classes) else object)
        return labels[self.probabilities.argmax(axis=1)]

    def to_frame(self, level: float = 0.9) -> "pandas.DataFrame":
        """Return one line per row: mean, sd and interval per target, or label and probabilities.

        Parameters
        ----------
        level : float
            Of the interval.

        Returns
        -------
        pandas.DataFrame
        """
        import pandas as pd

        if self.probabilities is not None:
            columns = {self.targets[0]: self.labels()}
            for i, label in enumerate(self.classes or ()):
                columns[f"p({label})"] = self.probabilities[:, i]
            return pd.DataFrame(columns)
        assert self.mean is not None and self.sd is not None and self.epistemic_sd is not None
        low, high = self.interval(level)
        percent = f"{100 * level:g}"
        columns = {}
        for i, name in enumerate(self.targets):
            columns[f"{name}_mean"] = self.mean[:, i]
            columns[f"{name}_sd"] = self.sd[:, i]
            columns[f"{name}_epistemic_sd"] = self.epistemic_sd[:, i]
            columns[f"{name}_lower_{percent}"] = low[:, i]
            columns[f"{name}_upper_{percent}"] = high[:, i]
        return pd.DataFrame(columns)


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
    if pooled.probabilities is not None:
        classes = encoding.classes if encoding else tuple(range(pooled.probabilities.shape[1]))
        target = encoding.targets[0].name if encoding else "y"
        return Prediction((target,), probabilities=pooled.probabilities, classes=classes)
    assert pooled.mean is not None and pooled.variance is not None
    assert pooled.epistemic is not None and pooled.samples is not None
    mean, samples = pooled.mean, pooled.samples
    count = mean.shape[1]
    names = ("y",) if count == 1 else tuple(f"y{i}" for i in range(1, count + 1))
    scale = np.ones(count)
    if encoding is not None:
        names, scale = tuple(target.name for target in encoding.targets), encoding.target_scale
        mean, samples = target_to_units(encoding, mean), target_to_units(encoding, samples)
    return Prediction(
        names,
        mean=mean,
        sd=np.sqrt(pooled.variance) * scale,
        epistemic_sd=np.sqrt(pooled.epistemic) * scale,
        samples=samples,
    )
