"""The report's section on modes: how far chains are from each other, and what more would bring."""

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from bnnmcmc.modes import Unseen, say_unseen
from bnnmcmc.report.drawing import COLOURS, Plot
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.text import number, percent, plural

# Modes listed one by one, largest first.
MAX_MODES = 20
WHICH = ("median", "max")
EXPLAINED = (
    Explanation(
        "Functional mode",
        "Chains whose predictions for held-out inputs differ on average by no more than the limit, "
        "Monte Carlo error taken off (average linkage). Weights play no part in it.",
        "",
        "Yao, Vehtari and Gelman (2022), JMLR 23, on chains that do not mix",
    ),
    Explanation(
        "Unseen share",
        "How much of the posterior no chain has been in, from how many modes were seen once; a "
        "mode's share is that of the chains that end in it.",
        "f₁ / n (Good and Turing); modes ≥ S + f₁(f₁ − 1) / (2 (f₂ + 1)) (Chao1)",
        "Good (1953), Biometrika 40; Chao (1984), Scandinavian Journal of Statistics 11",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None for a run that has nothing to show.

    Parameters
    ----------
    run : RunFolder
        Its diagnostics have the entry "exploration" (`exploration.as_json`).
    """
    found = (run.diagnostics or {}).get("exploration")
    if not found:
        return None
    plots = []
    modes, running = found.get("modes"), found.get("running_lppd")
    if modes and len(modes["chains"]) > 1:
        plots.append(distances(modes))
    if running and len(running["draws"]) + len(running["chains"]) > 2:
        plots.append(running_scores(running))
    if not plots:
        return None
    return Section(
        "modes",
        "Modes",
        takeaways=[Sentence("info", say_unseen(Unseen(**modes["unseen"])))] if modes else (),
        plots=plots,
        tables=[*_table(modes), *_weights_table(found.get("weights"))],
        explained=EXPLAINED,
    )


def _table(modes: dict[str, Any] | None) -> list[Table]:
    """Return the table of modes: chains, share, ESS, and which chains."""
    if not modes or len(modes["chains"]) < 2:
        return []
    chains, labels = np.array(modes["chains"]), np.array(modes["labels"])
    total, rows = sum(modes["counts"]), []
    shown = zip(modes["counts"][:MAX_MODES], modes["ess"], strict=False)
    for mode, (count, worth) in enumerate(shown):
        members = chains[labels == mode]
        listed = ", ".join(map(str, members[:12])) + (", ..." if len(members) > 12 else "")
        rows.append(
            [
                Cell(str(mode + 1)),
                Cell(f"{count:,}"),
                Cell(percent(count / total)),
                Cell(number(round(worth, 1))),
                Cell(listed, classes="text"),
            ]
        )
    rest = modes["counts"][MAX_MODES:]
    if rest:
        rows.append([Cell(f"{len(rest):,} more"), Cell(f"{sum(rest):,}"), *[Cell("")] * 3])
    columns = [Column(label) for label in ("Mode", "Chains", "Share", "ESS")]
    note = (
        "Chains are in one functional mode if their predictions for held-out inputs differ on "
        f"average by less than {modes['limit']:.2f} standard deviations within a chain (an R-hat "
        "of 1.1), Monte Carlo error taken off."
    )
    return [Table([*columns, Column("Which", text=True)], rows, note=note, headed=True)]


def _weights_table(weights: dict[str, Any] | None) -> list[Table]:
    """Return the table of R-hat across chains in weight space, before and after alignment."""
    if not weights:
        return []
    rows = [
        [Cell(what), *(Cell(number(round(weights[f"{when}_{which}"], 2))) for which in WHICH)]
        for what, when in (("as they are", "before"), ("aligned", "after"))
    ]
    of = "the largest mode" if weights["mode"] else "the run"
    note = (
        f"R-hat of the weights across {plural(weights['chains'], 'chain')} of {of}; aligned: units "
        "permuted and signs flipped so that networks which are equal lie on each other."
    )
    columns = [Column("Weights"), Column("R-hat, median"), Column("largest")]
    return [Table(columns, rows, title="Weights and symmetry", note=note, headed=True)]


def distances(modes: dict[str, Any]) -> Plot:
    """Draw the matrix of distances between chains, sorted by mode.

    Parameters
    ----------
    modes : dict
        As in `exploration.as_json`.
    """
    values = np.array(modes["distances"], float)
    labels = np.array(modes["shown_labels"])
    limit, chains = float(modes["limit"]), len(values)
    finite = values[np.isfinite(values)]
    high = max(3 * limit, float(finite.max(initial=0.0)))
    edges = np.flatnonzero(np.diff(labels)) + 0.5

    def draw(ax):
        shades = LinearSegmentedColormap.from_list(
            "distance", ["#ffffff00", COLOURS["ensemble"], COLOURS["bad"]]
        ).with_extremes(bad="#80808080")
        drawn = ax.imshow(
            np.ma.masked_invalid(values), cmap=shades, vmin=0, vmax=high, interpolation="nearest"
        )
        for edge in edges:
            ax.axhline(edge, color=COLOURS["ink"], lw=0.8)
            ax.axvline(edge, color=COLOURS["ink"], lw=0.8)
        places = np.arange(chains) if chains <= 20 else np.linspace(0, chains - 1, 5).astype(int)
        ax.set_xticks(places, [str(modes["shown"][i]) for i in places])
        ax.set_yticks(places, [str(modes["shown"][i]) for i in places])
        ax.grid(False)
        ax.set(xlabel="chain, sorted by mode", ylabel="chain")
        ax.figure.colorbar(drawn, ax=ax, label="distance (sd within a chain)")

    count = len(modes["counts"])
    apart = values[labels[:, None] != labels[None]]
    together = values[(labels[:, None] == labels[None]) & ~np.eye(chains, dtype=bool)]
    takeaway = f"{plural(len(modes['chains']), 'chain')} in {plural(count, 'mode')}"
    for name, some in (("within modes", together), ("between modes", apart)):
        some = some[np.isfinite(some)]
        if len(some):
            takeaway += f"; {name} chains are {number(round(float(np.median(some)), 2))} apart"
    takeaway += f" (median; limit {limit:.2f})."
    if len(modes["chains"]) > chains:
        takeaway += f" {chains} of them are shown."
    alt = f"Matrix of distances between the predictions of {plural(chains, 'chain')}, by mode."
    return Plot("Distances between chains", takeaway, alt, "distances", draw)


def running_scores(running: dict[str, Any]) -> Plot:
    """Draw the LPPD of the pool against its size, by draws and by chains.

    Parameters
    ----------
    running : dict
        As in `exploration.as_json`.
    """
    curves = (
        ("all chains, their first draws", "draws", "by_draws", "posterior", "o"),
        ("all draws of some chains", "chains", "by_chains", "ensemble", "s"),
    )

    def draw(ax):
        for label, size, score, colour, mark in curves:
            x = np.array(running[size], float)
            ax.plot(
                x / x.max(),
                np.array(running[score], float),
                mark + "-",
                ms=4.5,
                mew=0,
                lw=1.4,
                color=COLOURS[colour],
                label=label,
            )
        scores = np.array([*running["by_draws"], *running["by_chains"]], float)
        scores = scores[np.isfinite(scores)]
        if len(scores):
            # The first few draws score far below all that is of interest.
            low = max(
                scores.min(), np.median(scores) - 4 * (scores.max() - np.median(scores)) - 0.01
            )
            margin = 0.06 * (scores.max() - low) + 1e-3
            ax.set_ylim(low - margin, scores.max() + margin)
        ax.set_xscale("log", base=2)
        ticks = [x for x in (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1) if x >= 0.5 / max(
            running["draws"][-1], running["chains"][-1])]  # fmt: skip
        ax.set_xticks(ticks, ["all" if x == 1 else f"1/{1 / x:.0f}" for x in ticks])
        ax.minorticks_off()
        ax.set(xlabel="part of the pool", ylabel="LPPD, nats per row")
        ax.legend()

    said = []
    for name, gain in (("draws", running["gain_draws"]), ("chains", running["gain_chains"])):
        if np.isfinite(gain):
            said.append(f"of {name} {'+' if gain > 0 else ''}{number(round(gain, 4))}")
    takeaway = (
        f"The last doubling {' and '.join(said)} nats per held-out row."
        if said
        else "The LPPD of the pool is not finite, or there is nothing to compare."
    )
    alt = (
        "LPPD of the pooled posterior against the part of it that is used, by draws and by chains."
    )
    return Plot("What a larger pool gains", takeaway, alt, "running-lppd", draw)
