"""What the spread of the predictions is made of, and which rows the model is least sure of."""

import numpy as np
from scipy.stats import spearmanr

from bnnmcmc.report.drawing import COLOURS, MAX_VECTOR_POINTS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.sections.predictions import MAX_TARGETS, UNLIKELY, table_rows, target_names
from bnnmcmc.report.text import percent, plural

LEAST_SURE = 10
# A share of the variance from which more data of the same kind would clearly narrow predictions.
MUCH = 0.25
VARIANCE = Explanation(
    "Aleatoric and epistemic",
    "The variance of a prediction is the noise that a draw expects, mean over draws (aleatoric), "
    "and the variance between the draws' means (epistemic): what more data would shrink.",
    "Var(y) = E[Var(y | θ)] + Var(E[y | θ])",
    "Depeweg et al. (2018), arXiv 1710.07283",
)
ENTROPY = Explanation(
    "Aleatoric and epistemic",
    "The entropy of a prediction is that of a draw, mean over draws (aleatoric), and the mutual "
    "information of class and weights (epistemic): how much draws disagree.",
    "H(E[p]) = E[H(p)] + I(y; θ)",
    "Depeweg et al. (2018), arXiv 1710.07283; Houlsby et al. (2011), arXiv 1112.5745",
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None without predictions."""
    found = run.predictions
    if found is None:
        return None
    if "probabilities" in found:
        return _of_classes(found)
    names = target_names(run)
    takeaways, plots, tables = [], [], []
    for k, name in enumerate(names[:MAX_TARGETS]):
        y, mean, sd, epistemic = (found[key][:, k] for key in ("y", "mean", "sd", "epistemic_sd"))
        aleatoric = np.sqrt(np.maximum(sd**2 - epistemic**2, 0))
        share = epistemic**2 / sd**2
        plots.append(parts(name, aleatoric, epistemic, say_share(share).text, "standard deviation"))
        said = honest(sd, np.abs(y - mean))
        takeaways.append(said if len(names) == 1 else said._replace(text=f"{name}: {said.text}"))
        values = {
            "predicted": mean,
            "sd": sd,
            "aleatoric sd": aleatoric,
            "epistemic sd": epistemic,
            "observed": y,
        }
        title = "Rows the model is least sure of"
        title += f": {name}" if len(names) > 1 else ""
        tables.append(least_sure(title, found["row"], sd, values))
    return Section(
        "uncertainty",
        "Uncertainty",
        takeaways=takeaways,
        plots=plots,
        tables=tables,
        explained=[VARIANCE],
    )


def _of_classes(found: dict[str, np.ndarray]) -> Section:
    p, y = np.asarray(found["probabilities"], np.float64), found["y"]
    total = -np.where(p == 0, 0.0, p * np.log(p)).sum(axis=1)
    names = [str(name) for name in found["classes"]]
    chosen = p.argmax(axis=1)
    plots, values = [], {"entropy": total}
    if "expected_entropy" in found:
        inner = np.minimum(found["expected_entropy"], total)
        share = (total - inner) / np.maximum(total, 1e-12)
        takeaway = say_share(share, "entropy").text
        plots.append(parts("class", inner, total - inner, takeaway, "entropy, nats"))
        values |= {"aleatoric": inner, "epistemic": total - inner}
    values["probability"] = p.max(axis=1)
    words = {
        "predicted": [names[c] for c in chosen],
        "observed": [names[int(c)] for c in y],
    }
    table = least_sure("Rows the model is least sure of", found["row"], total, values, words)
    wrong = (chosen != y).astype(float)
    return Section(
        "uncertainty",
        "Uncertainty",
        takeaways=[honest(total, wrong)],
        plots=plots,
        tables=[table],
        explained=[ENTROPY] if plots else [],
    )


def say_share(share: np.ndarray, what: str = "variance") -> Sentence:
    """Say whether more data would narrow the predictions.

    Parameters
    ----------
    share : numpy array (rows,)
        The epistemic part of the variance (or entropy), between 0 and 1.
    what : str
    """
    if not np.isfinite(share).all():
        broken = int(np.sum(~np.isfinite(share)))
        return Sentence("bad", f"{plural(broken, 'row')} with a {what} that is not finite.")
    middle = float(np.median(share))
    shown = (
        f"of the {what} {percent(middle)} is epistemic (median over {plural(len(share), 'row')})"
    )
    if middle >= MUCH:
        return Sentence("note", f"More data would narrow the predictions: {shown}.")
    return Sentence(
        "info", f"Noise is most of it, and more data of this kind would help little: {shown}."
    )


def honest(spread: np.ndarray, error: np.ndarray) -> Sentence:
    """Say whether rows that the model is less sure of are those it errs more in.

    Parameters
    ----------
    spread, error : numpy array (rows,)
        Predictive standard deviation or entropy; absolute error, or whether the class is wrong.
    """
    usable = np.isfinite(spread).all() and np.isfinite(error).all()
    if len(spread) < 10 or not usable or np.ptp(spread) == 0 or np.ptp(error) == 0:
        return Sentence("info", "Too little to say whether errors grow with the spread.")
    found = spearmanr(spread, error)
    shown = f"rank correlation {found.statistic:.2f}, p = {found.pvalue:.2g}".replace("-", "−")
    if found.pvalue < UNLIKELY and found.statistic > 0:
        return Sentence("good", f"Where the model is less sure, it errs more ({shown}).")
    if found.pvalue < UNLIKELY:
        return Sentence("bad", f"Where the model is less sure, it errs less ({shown}).")
    return Sentence(
        "note",
        f"Errors are not seen to grow with the model's own spread ({shown}): which rows to trust "
        "more, it hardly says.",
    )


def parts(name: str, aleatoric, epistemic, takeaway: str, unit: str) -> Plot:
    """Draw the epistemic against the aleatoric part of each row.

    Parameters
    ----------
    name : str
        Of the target.
    aleatoric, epistemic : numpy array (rows,)
    takeaway, unit : str
    """
    n = len(aleatoric)

    def draw(ax):
        ax.plot(
            aleatoric,
            epistemic,
            "o",
            ms=3.4,
            mew=0,
            alpha=float(np.clip(200 / max(n, 1), 0.15, 0.8)),
            color=COLOURS["posterior"],
            rasterized=n > MAX_VECTOR_POINTS,
        )
        top = float(np.nanmax([*aleatoric, *epistemic, 1e-12]))
        ax.plot([0, top], [0, top], color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        high = float(np.nanmax(epistemic)) if n else 1.0
        ax.set_ylim(0, 1.08 * max(high, 1e-12))
        low = float(np.nanmin(aleatoric)) if n else 0.0
        ax.set_xlim(max(0.0, low - 0.08 * (top - low)) if low > 0 else -0.02 * top, 1.03 * top)
        ax.set(xlabel=f"aleatoric {unit}", ylabel=f"epistemic {unit}")

    alt = (
        f"Epistemic against aleatoric {unit} of {plural(n, 'test row')}; on the dashed line both "
        "are equal."
    )
    return Plot(f"Aleatoric and epistemic: {name}", takeaway, alt, f"parts-{name}", draw)


def least_sure(title: str, rows, spread, values, words=None) -> Table:
    """Return the rows with the largest spread.

    Parameters
    ----------
    title : str
    rows, spread : numpy array (rows,)
    values : dict
        Heading -> numpy array (rows,).
    words : dict, optional
        Heading -> list of str.
    """
    words = words or {}
    order = np.argsort(-np.where(np.isnan(spread), np.inf, spread), kind="stable")[:LEAST_SURE]
    columns = [Column("row", "number of the row in the table, from 0")]
    columns += [Column(name, text=True) for name in words] + [Column(name) for name in values]
    found = [
        [first, *(Cell(texts[i], classes="text") for texts in words.values()), *rest]
        for i, (first, *rest) in zip(
            order, table_rows(rows, list(values.values()), order), strict=True
        )
    ]
    return Table(columns, found, title=title, sortable=True)
