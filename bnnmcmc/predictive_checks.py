"""Whether data like those observed are what the model predicts: statistics of whole data sets."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# Of all statistics of a run together, the chance that one is called unusual although the model is
# right.
ALARM = 0.05
# The quantile function of a data set is looked at in these.
LEVELS = np.round(np.linspace(0.01, 0.99, 50), 4)
BAND = (0.05, 0.5, 0.95)
# Targets, and classes, that are looked at.
MAX_TARGETS, MAX_CLASSES = 4, 20


class Statistic(NamedTuple):
    """A statistic of the observed data, and of data sets drawn from a model.

    Parameters
    ----------
    observed : float
        T(y).
    low, median, high : float
        Quantiles (5, 50, 95 %) of T over the data sets.
    p : float
        Share of data sets with a larger T, half of those with the same; near 0 or 1 the model does
        not predict what was observed.
    tail : float
        Twice the share of the sets beyond the observed value, on its side; never 0, as the observed
        one counts too.
    """

    observed: float
    low: float
    median: float
    high: float
    p: float
    tail: float


def statistics(y: np.ndarray, support: str = "real") -> dict[str, np.ndarray]:
    r"""Return statistics of numeric data sets.

    Mean, standard deviation, skewness :math:`\frac1n \sum_i ((y_i - \bar y) / s)^3`, smallest and
    largest; of counts the share of zeros too. Shares (``"unit"``) and real numbers have the same.

    Parameters
    ----------
    y : array (..., rows)
    support : str
        As in `Likelihood`.

    Returns
    -------
    dict
        name -> array (...); NaN if any row is.
    """
    y = np.asarray(y, np.float64)
    with np.errstate(all="ignore"):
        mean, sd = y.mean(axis=-1), y.std(axis=-1)
        found = {"mean": mean, "standard deviation": sd}
        # Of rows that are all the same there is no skew.
        z = (y - mean[..., None]) / np.where(sd == 0, 1.0, sd)[..., None]
        found["skewness"] = (z**3).mean(axis=-1)
        found |= {"smallest": y.min(axis=-1), "largest": y.max(axis=-1)}
        if support == "count":
            found["share of zeros"] = np.where(np.isnan(mean), np.nan, (y == 0).mean(axis=-1))
    return found


def judged(observed: float, replicated: np.ndarray) -> Statistic:
    r"""Compare a statistic of the observed data with that of data sets drawn from the model.

    .. math:: p = \Pr\left( T(y^\text{rep}) > T(y) \right)
              + \tfrac12 \Pr\left( T(y^\text{rep}) = T(y) \right)

    Over data sets from the posterior this is the posterior predictive p-value. On rows that the
    posterior does not condition on it is close to uniform if the model is right; on rows that it
    does, it is nearer to one half.

    Parameters
    ----------
    observed : float
    replicated : array (sets,)

    Returns
    -------
    Statistic
        NaN if one of the values is.

    References
    ----------
    Rubin (1984), Annals of Statistics 12; Gelman, Meng and Stern (1996), Statistica Sinica 6.
    """
    replicated = np.asarray(replicated, np.float64)
    if np.isnan(replicated).any() or math.isnan(observed):
        return Statistic(float(observed), *[math.nan] * 5)
    # To rounding, so that what was computed in another order is the same.
    same = np.isclose(replicated, observed, rtol=1e-9, atol=0)
    above = (replicated > observed) & ~same
    sets, equal = len(replicated), int(same.sum())
    beyond = min(int(above.sum()), sets - int(above.sum()) - equal) + equal
    low, median, high = _quantiles(replicated, BAND)
    return Statistic(
        float(observed),
        float(low),
        float(median),
        float(high),
        float(above.mean() + same.mean() / 2),
        min(1.0, 2 * (beyond + 1) / (sets + 1)),
    )


def _quantiles(values: np.ndarray, levels, axis: int = 0) -> np.ndarray:
    # The value next to it, not one between two: that of two infinities would be NaN.
    return np.quantile(values, levels, axis=axis, method="closest_observation")


def check_numbers(
    y: np.ndarray,
    posterior: np.ndarray,
    prior: np.ndarray | None,
    names: list[str],
    support: str = "real",
) -> dict[str, Any]:
    """Check numeric targets.

    Parameters
    ----------
    y : array (rows, targets)
        Observed, in the targets' own units.
    posterior : array (sets, rows, targets)
        Data sets drawn from the posterior.
    prior : array (sets, rows, targets) or None
        From the prior; None if it cannot be drawn from.
    names : list of str
        Of the targets.
    support : str
        As in `Likelihood`.

    Returns
    -------
    dict
        JSON values. "targets": a dict each of the first `MAX_TARGETS`, of "name", "observed" (its
        quantiles at "levels"), "posterior" and "prior" (the same of the data sets: "low", "median",
        "high"), "statistics" and "prior_statistics" (name -> `Statistic` as a dict), and
        "prior_range" (see `prior_range`).
    """
    targets = []
    for k, name in enumerate(names[:MAX_TARGETS]):
        own = y[:, k].astype(np.float64)
        found: dict[str, Any] = {
            "name": name,
            "rows": [float(own.min()), float(own.max())],
            "observed": _quantiles(own, LEVELS).tolist(),
        }
        of_data = statistics(own, support)
        for kind, key, sets in (
            ("posterior", "statistics", posterior),
            ("prior", "prior_statistics", prior),
        ):
            if sets is None:
                continue
            drawn = sets[:, :, k].astype(np.float64)
            found[kind] = _bands(drawn)
            of_sets = statistics(drawn, support)
            found[key] = {
                each: judged(float(value), of_sets[each])._asdict()
                for each, value in of_data.items()
            }
        if prior is not None:
            found["prior_range"] = prior_range(own, prior[:, :, k])
        targets.append(found)
    return {"levels": LEVELS.tolist(), "targets": targets}


def check_classes(
    y: np.ndarray, posterior: np.ndarray, prior: np.ndarray | None, names: list[str]
) -> dict[str, Any]:
    """Check classes by how frequent each is.

    Parameters
    ----------
    y : integer array (rows,)
    posterior, prior : array (sets, rows), or None
        Class indices of data sets, NaN where unknown.
    names : list of str
        Of the classes; the `MAX_CLASSES` most frequent are looked at.

    Returns
    -------
    dict
        JSON values: "classes", a dict each of "name", "statistics" and "prior_statistics", each
        with one `Statistic` called "frequency".
    """
    counts = np.bincount(y, minlength=len(names))
    chosen = np.sort(np.argsort(-counts, kind="stable")[:MAX_CLASSES])
    classes = []
    for c in chosen:
        found: dict[str, Any] = {"name": names[c]}
        for kind, sets in (("", posterior), ("prior_", prior)):
            if sets is None:
                continue
            share = np.where(np.isnan(sets).any(axis=1), np.nan, (sets == c).mean(axis=1))
            checked = judged(float((y == c).mean()), share)
            found[f"{kind}statistics"] = {"frequency": checked._asdict()}
        classes.append(found)
    return {"classes": classes}


def _bands(sets: np.ndarray) -> dict[str, list[float]]:
    """Return the band of the quantile functions of data sets (sets, rows), at `LEVELS`."""
    if np.isnan(sets).any():
        return {name: [math.nan] * len(LEVELS) for name in ("low", "median", "high")}
    each = _quantiles(sets, LEVELS, axis=1)
    bands = _quantiles(each, BAND, axis=1)
    return dict(zip(("low", "median", "high"), bands.tolist(), strict=True))


def prior_range(y: np.ndarray, prior: np.ndarray) -> dict[str, float]:
    """Return what range of targets a prior allows, and how much of the data is outside.

    Parameters
    ----------
    y : array (rows,)
    prior : array (sets, rows)

    Returns
    -------
    dict
        "low" and "high", which hold 90 % of what the prior draws, and "outside": the share of
        observed rows that are outside of what holds 99 % of it.
    """
    if np.isnan(prior).any():
        return dict.fromkeys(("low", "high", "outside"), math.nan)
    low, high, lowest, highest = _quantiles(prior.ravel(), (0.05, 0.95, 0.005, 0.995))
    outside = ((y < lowest) | (y > highest)).mean()
    outside = math.nan if np.isnan(y).any() else outside
    return {"low": float(low), "high": float(high), "outside": float(outside)}


def can_tell(sets: int, statistics: int) -> bool:
    """Tell whether one of so many statistics could be found unusual by so many data sets."""
    return 2 / (sets + 1) < ALARM / statistics


def unusual(found: Mapping[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """Return which statistics of the data the posterior does not predict.

    Parameters
    ----------
    found : mapping
        From `check_numbers` or `check_classes`.

    Returns
    -------
    list of (target or class, statistic, values of its `Statistic`)
        Those whose "tail" is below ALARM over the number of statistics (Bonferroni), or NaN.
    """
    every = [
        (part["name"], name, values)
        for part in found.get("targets") or found.get("classes") or ()
        for name, values in part["statistics"].items()
    ]
    return [each for each in every if not each[2]["tail"] >= ALARM / len(every)]
