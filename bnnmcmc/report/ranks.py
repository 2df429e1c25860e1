"""Whether chains have log-densities of one distribution: ArviZ's rank plot, on axes of the page."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from bnnmcmc.report.drawing import COLOURS, Plot
from bnnmcmc.report.figures import MAX_LINES
from bnnmcmc.report.text import listed, number, plural

# Ranks of fewer draws of a chain say little; more are not told apart in a picture.
MIN_DRAWS, MAX_DRAWS = 20, 300
# Chains that are of one distribution are called different as seldom as this.
UNLIKELY = 0.01


def ranks(values: np.ndarray, failed: Sequence[int], worth: float | None) -> Plot | None:
    """Draw the ranks of each chain's log-densities among those of all chains.

    Draws are thinned to as many as they are worth, for the test takes them as independent.

    Parameters
    ----------
    values : numpy array (chain, draw)
    failed : sequence of int
        Chains that are left out, as are those with values that are not finite.
    worth : float or None
        Effective draws of a chain; if not known, all are taken as independent.

    Returns
    -------
    Plot or None
        None with fewer than two chains, or too few draws.
    """
    fine = np.isfinite(values).all(axis=1)
    fine[list(failed)] = False
    chains = np.flatnonzero(fine)
    if len(chains) > MAX_LINES:
        chains = chains[np.linspace(0, len(chains) - 1, MAX_LINES).astype(int)]
    known = worth is not None and np.isfinite(worth)
    count = min(values.shape[1], MAX_DRAWS, int(worth) if known and worth else MAX_DRAWS)
    if len(chains) < 2 or count < MIN_DRAWS:
        return None
    some = values[chains][:, np.linspace(0, values.shape[1] - 1, count).astype(int)]
    tree, p = _tested(some)
    centre = some.mean(axis=1)
    low, high = int(chains[centre.argmin()]), int(chains[centre.argmax()])
    of = f"{plural(len(chains), 'chain')}" + (" of all" if fine.sum() > len(chains) else "")
    if p < UNLIKELY:
        takeaway = (
            f"The log-densities of {of} are not of one distribution (p = {number(p)}): lowest is "
            f"chain {low}, highest chain {high}. Chains in modes of their own, or with step sizes "
            "of their own, need not agree."
        )
    else:
        takeaway = (
            f"Nothing speaks against one distribution of the log-density in {of} (p = {number(p)})."
        )
    alt = (
        f"Of each of {plural(len(chains), 'chain')} the distribution of the ranks of "
        f"{count} log-densities among those of all, less the uniform one; where it differs most "
        f"the line is marked. Chains: {listed(chains.tolist())}."
    )
    draw = partial(_draw, tree=tree, p=p)
    return Plot("Ranks of the log-density", takeaway, alt, "ranks", draw)


def _tested(values: np.ndarray) -> tuple[Any, float]:
    """Return the values as ArviZ takes them, and the p-value of its test of equal chains."""
    import arviz_base
    import arviz_stats  # noqa: F401  (gives data sets their methods)

    tree = arviz_base.from_dict({"posterior": {"log_density": values}})
    relative = tree["posterior"].dataset.azstats.compute_ranks(dim=["chain", "draw"], relative=True)
    found = relative.azstats.mchain_uniformity_test(dim=["chain", "draw"])[0]
    return tree, float(found["log_density"])


def _draw(ax, tree, p: float) -> None:
    import arviz_plots
    import xarray as xr

    axes = xr.Dataset({"log_density": xr.DataArray(np.array(ax, dtype=object))})
    arviz_plots.plot_rank(
        tree,
        plot_collection=arviz_plots.PlotCollection(
            tree["posterior"].dataset,
            xr.DataTree.from_dict({"/plot": axes}),
            aes={"overlay": ["chain"]},
            backend="matplotlib",
        ),
        visuals={
            "ecdf_lines": {"color": COLOURS["posterior"], "alpha": 0.6, "width": 1},
            "title": False,
            "xlabel": False,
            "remove_axis": False,
        },
    )
    for text in list(ax.texts):
        text.remove()  # the takeaway says it
    for marks in ax.collections:
        marks.set(color=COLOURS["bad"], sizes=[6], visible=p < UNLIKELY)
    ax.set(xlabel="rank, as a share", ylabel="draws below, less the share", xlim=(0, 1))
