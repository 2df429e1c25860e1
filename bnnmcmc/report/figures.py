"""The figures of the report: NumPy arrays in, a `Plot` out."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter
from scipy.stats import binomtest

from bnnmcmc.report.drawing import COLOURS, MAX_VECTOR_POINTS, Plot, log_axis
from bnnmcmc.report.text import number, percent, plural

# Up to so many chains each gets its own line; more are shown as quantile bands.
MAX_LINES = 20
MAX_BAND_POINTS = 400
# Of many chains, so many that failed are drawn too.
MAX_FAILED = 5
# A longer trace shows every so many of its points: it is an image a few hundred pixels wide.
MAX_TRACE_POINTS = 5000
# As in `bnnmcmc.sampling`, which needs JAX: the warm-up is recorded about so many times.
WARMUP_RECORDS = 200


def training(history: np.ndarray, epochs: np.ndarray, best_epoch: np.ndarray) -> Plot:
    """Draw training and validation loss of the ensemble.

    Parameters
    ----------
    history : numpy array (member, epoch, 2)
        Training and validation loss.
    epochs : numpy array (member,)
        Epochs that each member trained; what comes after is not drawn.
    best_epoch : numpy array (member,)
        Epoch whose weights were kept, counted from 1; 0 if no loss was finite.
    """
    members = len(history)
    losses = [
        np.concatenate([h[:e, k] for h, e in zip(history, epochs, strict=True)]) for k in (0, 1)
    ]
    validated = bool(np.isfinite(losses[1]).any())
    kinds = [(0, "training", "member")] + ([(1, "validation", "ensemble")] if validated else [])
    best = [
        h[b - 1, 1 if validated else 0] if 1 <= b <= h.shape[0] else np.nan
        for h, b in zip(history, best_epoch, strict=True)
    ]
    points = int(np.sum(epochs)) * len(kinds)

    def draw(ax):
        for k, label, colour in kinds:
            if members <= MAX_LINES:
                for member, (curve, stop) in enumerate(zip(history, epochs, strict=True)):
                    ax.plot(
                        np.arange(1, stop + 1),
                        curve[:stop, k],
                        color=COLOURS[colour],
                        lw=0.9,
                        alpha=0.55,
                        label=None if member else label,
                        rasterized=points > MAX_VECTOR_POINTS,
                    )
            else:
                running = [history[epochs > e, e, k] for e in range(history.shape[1])]
                running = [values for values in running if len(values) >= 5]
                low, middle, high = np.array(
                    [np.quantile(values, [0.05, 0.5, 0.95]) for values in running]
                ).T
                _band(ax, np.arange(1, len(running) + 1), low, middle, high, colour, label)
        if members <= MAX_LINES:
            ax.plot(
                best_epoch,
                best,
                "o",
                ms=4.5,
                mew=0,
                color=COLOURS["posterior"],
                label="weights kept",
            )
        shown = np.concatenate([losses[k] for k, _, _ in kinds])
        shown = shown[np.isfinite(shown)]
        if len(shown):
            # The first epochs, or a validation loss that explodes later, would flatten the rest.
            first = history[:, 0, : len(kinds)]
            low, high = shown.min(), np.quantile(shown, 0.97)
            if np.isfinite(first).all() and np.isfinite(best).all():
                high = max(min(high, first.max()), max(best))
            ax.set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
        ax.set(xlabel="epoch", ylabel="loss")
        ax.legend()

    spread = f"{number(min(epochs))} to {number(max(epochs))} epochs"
    if min(epochs) == max(epochs):
        spread = plural(int(max(epochs)), "epoch")
    takeaway = f"{plural(members, 'member')} trained {spread}"
    takeaway += f"; the weights kept are from epoch {number(int(np.median(best_epoch)))} (median)"
    if np.isfinite(best).all():
        kind = "validation" if validated else "training"
        takeaway += f", with a {kind} loss from {number(min(best))} to {number(max(best))}."
        last = np.array([h[e - 1, 1] for h, e in zip(history, epochs, strict=True)])
        if validated and np.median(last) > max(best):
            takeaway += f" Later it rises to {number(float(np.median(last)))} (median)."
    else:
        broken = int(np.sum(~np.isfinite(best)))
        takeaway += f". {plural(broken, 'member')} never had a finite loss."
    how = (
        "one line per member"
        if members <= MAX_LINES
        else ("median and 5 to 95 % band over the members still training")
    )
    alt = f"Loss against epoch, {' and '.join(label for _, label, _ in kinds)}: {how}."
    return Plot("Training of the ensemble", takeaway, alt, "training", draw)


def step_size(values: np.ndarray, failed: Sequence[int], steps: int) -> Plot:
    """Draw how the step size was tuned.

    Parameters
    ----------
    values : numpy array (chain, record)
    failed : sequence of int
        Chains whose status is not ok.
    steps : int
        Warm-up steps that were planned; a time budget may have ended it before.
    """
    chains, records = values.shape
    x = np.minimum(np.arange(1, records + 1) * max(1, steps // WARMUP_RECORDS), steps)

    def draw(ax):
        _chains(ax, x, values, failed)
        log_axis(ax, values)
        ax.set(xlabel="warm-up step", ylabel="step size")

    last, before = values[:, -1], values[:, max(0, records - 1 - max(1, records // 10))]
    takeaway = _not_finite(last, "step size")
    if not takeaway:
        change = float(np.median(np.abs(last / before - 1)))
        takeaway = (
            f"The step sizes end at {number(np.median(last))} (median; {number(last.min())} to "
            f"{number(last.max())} over {plural(chains, 'chain')}); over the last tenth of the "
            f"warm-up they change by {percent(change)} (median)."
        )
    alt = f"Step size on a log axis against the warm-up, {_how(chains)}."
    return Plot("Warm-up: step size", takeaway, alt, "step-size", draw)


WARMUP_STATISTICS = {
    "energy_error_squared": ("Energy error", "EEVPD: squared energy error of a step per dimension"),
    "acceptance_rate": ("Acceptance", "acceptance rate"),
    "decoherence_length": ("Decoherence length", "L: length over which momentum is forgotten"),
    "trajectory_length": ("Trajectory length", "length of a trajectory"),
}


def warmup_statistic(name: str, values: np.ndarray, failed: Sequence[int], steps: int) -> Plot:
    """Draw another statistic of the warm-up.

    Parameters
    ----------
    name : str
        One of `WARMUP_STATISTICS`.
    values : numpy array (chain, record)
    failed : sequence of int
        Chains whose status is not ok.
    steps : int
        Warm-up steps that were planned.
    """
    title, label = WARMUP_STATISTICS[name]
    chains, records = values.shape
    x = np.minimum(np.arange(1, records + 1) * max(1, steps // WARMUP_RECORDS), steps)

    def draw(ax):
        _chains(ax, x, values, failed)
        shown = values[np.isfinite(values) & (values > 0)]
        if name != "acceptance_rate" and len(shown):
            log_axis(ax, shown)
            # The first steps, which are far off, would flatten the rest.
            ax.set_ylim(*(np.quantile(shown, [0.01, 0.99]) * [0.5, 2]))
        ax.set(xlabel="warm-up step", ylabel=label.partition(":")[0])

    last = values[:, -max(1, records // 10) :].mean(axis=1)
    takeaway = _not_finite(values, label.partition(":")[0])
    if not takeaway:
        takeaway = (
            f"{label[0].upper()}{label[1:]}; over the last tenth {number(float(np.median(last)))} "
            f"(median; {number(float(last.min()))} to {number(float(last.max()))} over "
            f"{plural(chains, 'chain')})."
        )
    alt = f"{label} against the warm-up, {_how(chains)}."
    return Plot(f"Warm-up: {title.lower()}", takeaway, alt, f"warmup-{name}", draw)


def log_density(values: np.ndarray, failed: Sequence[int], wide: bool = False) -> Plot:
    """Draw the traces of the unnormalised log-posterior.

    Parameters
    ----------
    values : numpy array (chain, draw)
    failed : sequence of int
        Chains whose status is not ok.
    wide : bool
        Draw it over the width of the page.
    """
    chains, draws = values.shape
    fine = [c for c in range(chains) if c not in set(failed) and np.isfinite(values[c]).all()]
    off = []
    limits = None
    if fine:
        # A chain lost far below must not flatten the others; the takeaway names it instead.
        low, high = float(values[fine].min()), float(values[fine].max())
        margin = 0.05 * (high - low) + 1e-6
        limits = (low - margin, high + margin)
        others = sorted(set(range(chains)) - set(fine))
        drawn = others if chains <= MAX_LINES else list(failed)[:MAX_FAILED]
        off = [c for c in drawn if not (values[c] > limits[0]).any()]

    def draw(ax):
        _chains(ax, np.arange(1, draws + 1), values, failed)
        if limits:
            ax.set_ylim(*limits)
        ax.set(xlabel="draw", ylabel="log-density")

    used = values[fine]
    takeaway = _not_finite(values, "log-density")
    if draws >= 8 and fine:
        quarter = draws // 4
        first, last = used[:, :quarter], used[:, -quarter:]
        change = last.mean(axis=1) - first.mean(axis=1)
        # Within one chain's last quarter: what a chain's log-density varies by when it is settled.
        ratio = float(np.median(change / np.maximum(last.std(axis=1), 1e-12)))
        sentence = (
            f"From the first to the last quarter of the draws the log-density changes by "
            f"{number(float(np.median(change)))} (median over {plural(len(fine), 'chain')}), "
            f"{abs(ratio):.1f} times its standard deviation in the last quarter: "
        )
        moving = "still rising" if ratio > 0 else "still falling"
        sentence += "no lasting trend." if abs(ratio) < 1 else f"the chains are {moving}."
        takeaway = f"{sentence} {takeaway}".strip()
    if off:
        names = ", ".join(map(str, off))
        takeaway += f" Outside the figure: chain{'s' if len(off) > 1 else ''} {names}."
    takeaway = takeaway.strip() or f"{plural(draws, 'draw')} so far, too few to judge a trend."
    alt = f"Log-density against draw, {_how(chains)}."
    return Plot("Sampling: log-density", takeaway, alt, "log-density", draw, wide)


def predicted(
    target: str,
    y: np.ndarray,
    mean: np.ndarray,
    low: np.ndarray | None,
    high: np.ndarray | None,
) -> Plot:
    """Draw predictions with 90 % intervals against what was observed, one target.

    Parameters
    ----------
    target : str
    y, mean : numpy array (rows,)
        Observed value and predictive mean, in target units.
    low, high : numpy array (rows,) or None
        The 5 % and 95 % quantiles of the predictive.
    """
    rows = len(y)
    inside = np.ones(rows, bool)
    if low is not None and high is not None:
        inside = (low <= y) & (y <= high)
    faint = float(np.clip(60 / max(rows, 1), 0.12, 0.5))
    raster = rows * (1 if low is None else 3) > MAX_VECTOR_POINTS

    def draw(ax):
        ends = [float(np.min(y)), float(np.max(y))]
        ax.plot(ends, ends, color=COLOURS["ink"], lw=1, ls=(0, (4, 3)), zorder=3)
        for where, colour, label in (
            (inside, "posterior", "observed value inside its 90 % interval"),
            (~inside, "bad", "outside"),
        ):
            if not where.any():
                continue
            if low is not None and high is not None:
                # One path with gaps: a path per row would be ten times the size.
                xs = np.repeat(y[where], 3)
                ys = np.stack(
                    [low[where], high[where], np.full(where.sum(), np.nan)], axis=1
                ).reshape(-1)
                ax.plot(xs, ys, color=COLOURS[colour], lw=1, alpha=faint, rasterized=raster)
            ax.plot(
                y[where],
                mean[where],
                "o",
                ms=3.2,
                mew=0,
                alpha=min(1.0, faint + 0.4),
                color=COLOURS[colour],
                label=label,
                rasterized=raster,
            )
        ax.set(xlabel=f"observed {target}", ylabel=f"predicted {target}")
        if low is not None:
            ax.figure.legend(loc="outside upper left", ncols=2)

    if not np.isfinite(mean).all():
        takeaway = f"{plural(int(np.sum(~np.isfinite(mean))), 'prediction')} not finite."
    elif low is None or high is None:
        takeaway = f"Predictive means for {plural(rows, 'test row')}; no intervals were stored."
    else:
        takeaway = (
            f"{number(int(inside.sum()))} of {plural(rows, 'test row')} "
            f"({percent(float(inside.mean()))}) lie inside their 90 % interval; a typical interval "
            f"is {number(float(np.median(high - low)))} wide, the observed values have a standard "
            f"deviation of {number(float(np.std(y)))}."
        )
    alt = (
        f"Predictive mean{'' if low is None else ' and 90 % interval'} against the observed value, "
        f"{plural(rows, 'test row')}, with the diagonal."
    )
    title = f"Predicted against observed: {target}"
    return Plot(title, takeaway, alt, f"predicted-{target}", draw)


def reliability(y: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> Plot:
    """Draw how often the most probable class is right, against its probability.

    Parameters
    ----------
    y : numpy array (rows,) of int
        Observed class.
    probabilities : numpy array (rows, classes)
        Pooled class probabilities.
    bins : int
        Bins of equal width on [0, 1].
    """
    rows = len(y)
    broken = int(np.sum(~np.isfinite(probabilities).all(axis=1)))
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    index = np.where(
        np.isfinite(confidence), np.minimum((confidence * bins).astype(int), bins - 1), -1
    )
    used = [b for b in range(bins) if (index == b).any()]
    counts = np.array([np.sum(index == b) for b in used])
    x = np.array([confidence[index == b].mean() for b in used])
    share = np.array([right[index == b].mean() for b in used])
    ends = [
        binomtest(int(right[index == b].sum()), int(n)).proportion_ci(0.95, method="wilson")
        for b, n in zip(used, counts, strict=True)
    ]

    def draw(ax):
        ax.plot([0, 1], [0, 1], color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        for b, n in zip(used, counts, strict=True):
            ax.bar(
                (b + 0.5) / bins,
                0.25 * n / counts.max(),
                width=0.9 / bins,
                color=COLOURS["member"],
                alpha=0.3,
                lw=0,
            )
            ax.text((b + 0.5) / bins, 0.25 * n / counts.max() + 0.01, n, ha="center", fontsize=8)
        for place, end in zip(x, ends, strict=True):
            ax.plot([place, place], [end.low, end.high], color=COLOURS["posterior"], alpha=0.5)
        ax.plot(x, share, "o-", ms=5, mew=0, lw=1.2, color=COLOURS["posterior"])
        left = 0.0 if not used else max(0.0, min(used) / bins - 0.05)
        ax.set(xlim=(left, 1.02), ylim=(0, 1.04))
        ax.set(xlabel="probability of the predicted class", ylabel="share correct")

    if broken:
        takeaway = f"{plural(broken, 'row')} of {rows:,} have a probability that is not finite."
    else:
        gap = float(confidence.mean() - right.mean())
        word = "over" if gap > 0 else "under"
        error = 2 * np.sqrt(max(right.mean() * (1 - right.mean()), 1e-12) / rows)
        judged = f"{word}confident" if abs(gap) > error else "a gap within the sampling error"
        takeaway = (
            f"The predicted class has probability {percent(float(confidence.mean()))} on average "
            f"and is right for {percent(float(right.mean()))} of {plural(rows, 'test row')}: "
            f"{judged}."
        )
    alt = (
        "Share of correct predictions against the probability of the predicted class, in "
        f"{plural(len(used), 'bin')} with 95 % intervals, with the diagonal and the count per bin."
    )
    return Plot("Reliability", takeaway, alt, "reliability", draw)


def coverage(scores: Mapping[str, Mapping[str, float]], rows: int) -> Plot:
    """Draw observed against nominal coverage of the central intervals.

    Parameters
    ----------
    scores : mapping
        "best_member", "ensemble", "posterior" -> "coverage_50", ... -> share of test rows.
    rows : int
        Test rows, for the sampling error.
    """
    labels = {"posterior": "posterior", "ensemble": "deep ensemble", "best_member": "best member"}
    colours = {"posterior": "posterior", "ensemble": "ensemble", "best_member": "member"}
    marks = {"posterior": "o", "ensemble": "s", "best_member": "D"}
    levels = coverage_levels(scores["posterior"])

    def draw(ax):
        nominal = np.linspace(0.001, 0.999, 120)
        error = 2 * np.sqrt(nominal * (1 - nominal) / rows)
        ax.fill_between(
            nominal,
            np.maximum(nominal - error, 0),
            np.minimum(nominal + error, 1),
            color=COLOURS["grid"],
            alpha=0.35,
            lw=0,
            label=f"sampling error, {rows:,} rows",
        )
        ax.plot([0, 1], [0, 1], color=COLOURS["ink"], lw=1, ls=(0, (4, 3)))
        drawn = []
        for name in ("best_member", "ensemble", "posterior"):
            if name in scores:
                shares = [scores[name].get(f"coverage_{level}", np.nan) for level in levels]
                drawn += shares
                ax.plot(
                    np.array(levels) / 100,
                    shares,
                    marks[name] + "-",
                    ms=5,
                    mew=0,
                    lw=1.4,
                    color=COLOURS[colours[name]],
                    label=labels[name],
                )
        start = min([s for s in drawn if np.isfinite(s)] + [levels[0] / 100]) - 0.08
        ax.set(xlim=(levels[0] / 100 - 0.05, 1.0), ylim=(max(0.0, start), 1.01))
        ax.set(xlabel="nominal", ylabel="observed")
        ax.set_xticks(np.array(levels) / 100)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
        ax.legend(loc="lower right")

    shares = {level: scores["posterior"][f"coverage_{level}"] for level in levels}
    far = max(levels, key=lambda level: abs(shares[level] - level / 100))
    error = 2 * np.sqrt(far / 100 * (1 - far / 100) / rows)
    takeaway = (
        f"Farthest from nominal is the posterior's {far} % interval, which covers "
        f"{percent(shares[far])} of {plural(rows, 'test row')}; sampling error alone is "
        f"± {100 * error:.1f} points (2 standard errors)."
    )
    alt = (
        "Observed against nominal coverage of the central intervals, with the diagonal: "
        + ", ".join(labels[name] for name in scores if name in labels)
    )
    return Plot("Coverage of the intervals", takeaway, alt + ".", "coverage", draw)


def coverage_levels(scores: Mapping[str, float]) -> list[int]:
    """Return the nominal levels (per cent) that have a "coverage_NN" score."""
    names = [name.removeprefix("coverage_") for name in scores if name.startswith("coverage_")]
    return sorted(int(name) for name in names if name.isdigit())


def _chains(ax, x: np.ndarray, values: np.ndarray, failed: Sequence[int]) -> None:
    """Draw one line per chain, or quantile bands when there are many."""
    chains, points = values.shape
    if chains <= MAX_LINES:
        every = -(-points // MAX_TRACE_POINTS)
        x, values = x[::every], values[:, ::every]
        raster = values.size > MAX_VECTOR_POINTS
        for chain in range(chains):
            bad = chain in set(failed)
            ax.plot(
                x,
                values[chain],
                color=COLOURS["bad" if bad else "posterior"],
                lw=1.1 if bad else 0.7,
                alpha=0.9 if bad else float(np.clip(5 / chains, 0.45, 0.9)),
                zorder=3 if bad else 2,
                label=f"chain {chain}" if bad else None,
                rasterized=raster,
            )
        if len(failed):
            ax.legend()
        return
    finite = np.isfinite(values).all(axis=1)
    if finite.any():
        size = -(-points // MAX_BAND_POINTS)
        edges = range(0, points, size)
        quantiles = np.array(
            [
                np.quantile(values[finite, e : e + size], [0.05, 0.25, 0.5, 0.75, 0.95])
                for e in edges
            ]
        ).T
        middle = np.array([x[e : e + size].mean() for e in edges])
        low, lower, median, upper, high = quantiles
        ax.fill_between(middle, lower, upper, color=COLOURS["posterior"], alpha=0.25, lw=0)
        _band(ax, middle, low, median, high, "posterior", "median; bands 50 % and 90 %")
    every = -(-points // MAX_BAND_POINTS)
    for chain in list(failed)[:MAX_FAILED]:
        ax.plot(
            x[::every],
            values[chain, ::every],
            color=COLOURS["bad"],
            lw=0.9,
            alpha=0.8,
            zorder=3,
            label=f"chain {chain}",
        )
    if finite.any() or len(failed):
        ax.legend()


def _band(ax, x, low, middle, high, colour: str, label: str) -> None:
    ax.fill_between(x, low, high, color=COLOURS[colour], alpha=0.22, lw=0)
    ax.plot(x, middle, color=COLOURS[colour], lw=1.3, label=label)


def _how(chains: int) -> str:
    if chains <= MAX_LINES:
        return "one line per chain, chains that failed in red"
    return (
        f"median, 50 % and 90 % band over {chains:,} chains, and at most {MAX_FAILED} chains that "
        "failed in red"
    )


def _not_finite(values: np.ndarray, name: str) -> str:
    """Say which chains hold something that is not finite; empty if none."""
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if not len(bad):
        return ""
    listed = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    left_out = ", left out of the bands" if len(values) > MAX_LINES else ""
    return f"{plural(len(bad), 'chain')} with a {name} that is not finite ({listed}){left_out}."
