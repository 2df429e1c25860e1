"""The chains: their status, how they mixed, the log-density as they went."""

import math
from typing import Any

import numpy as np

from bnnmcmc.report import figures
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Cell, Column, Explanation, Section, Sentence, Table
from bnnmcmc.report.ranks import ranks
from bnnmcmc.report.text import number, plural

# More chains than this: the table shows the worst ten, and quantiles over all.
MAX_CHAIN_ROWS = 30
WORST_CHAINS = 10
# Sommer et al. (2024) call a chain's R-hat acceptable up to here.
RHAT_LIMIT = 1.1
# A typical prediction's mean and spread want so many independent draws.
ENOUGH_ESS = 100
# Column of diagnostics.csv -> heading, meaning.
COLUMNS = {
    "chain": ("chain", "number of the chain, and of the ensemble member it started from"),
    "status": ("status", "ok, or what went wrong"),
    "draws": ("draws", "kept draws of the chain"),
    "log_density": ("log-density", "unnormalised log-posterior, mean over draws"),
    "log_density_drift": (
        "drift",
        "mean log-density of the last quarter of the draws minus that of the first, in standard "
        "deviations within the chain; a straight climb gives 2.6",
    ),
    "acceptance_rate": ("accepted", "mean acceptance rate of the kernel"),
    "energy_error": ("EEVPD", "mean squared energy error of a step, per dimension"),
    "divergences": ("diverged", "steps that left the finite numbers or lost the energy"),
    "tree_depth_max": ("max depth", "deepest NUTS tree, in doublings"),
    "step_size": ("step size", "step size after the warm-up"),
    "gradients": ("gradients", "gradient evaluations while sampling"),
    "seconds": (
        "seconds",
        "its part of the seconds of sampling, by gradients: all chains together took them all",
    ),
    "rows": ("rows", "rows looked at while sampling, each as often as it was (minibatch kernels)"),
    "ess_log_density": ("ESS log-density", "effective sample size of the log-density"),
    "ess_function_median": (
        "ESS function",
        "effective sample size of the predictions, median over predictions",
    ),
    "ess_function_min": ("ESS function min", "the same, smallest over predictions"),
    "ess_function_tail": (
        "tail ESS",
        "the smaller effective sample size of the predictions' 5 % and 95 % quantiles, median over "
        "predictions",
    ),
    "ess_per_gradient": (
        "ESS per gradient",
        "effective sample size of the predictions by gradients while sampling",
    ),
    "rhat_function_median": (
        "R-hat function",
        "chain-wise R-hat of the predictions (the chain split into parts), median over "
        f"predictions; 1 when the parts agree, coloured above {RHAT_LIMIT}",
    ),
    "rhat_function_max": ("R-hat function max", "the same, largest over predictions"),
    "rhat_weights_max": (
        "R-hat weights max",
        "chain-wise R-hat of the weights, largest over weights; mixing in the weights is not "
        "needed for good predictions",
    ),
    "rhat_log_density": ("R-hat log-density", "chain-wise R-hat of the log-density"),
    "lppd": (
        "LPPD",
        "log predictive density of at most 50 test rows, pooled over the chain's own draws, nats "
        "per row of the standardised target; no chain is left out by it",
    ),
    "sentence": ("what happened", "the chain's status in words"),
}


EXPLAINED = (
    Explanation(
        "Chain-wise R-hat",
        "One chain is split into parts; R-hat compares the spread between the parts with that "
        "within them, after replacing values by normal scores of their ranks. Chains in different "
        "modes need not agree with each other, but each must agree with itself.",
        "R̂ = √( ((n−1)/n · W + B/n) / W )",
        "Vehtari et al. (2021), arXiv 1903.08008; Sommer et al. (2024), arXiv 2402.01484",
    ),
    Explanation(
        "Effective sample size (ESS)",
        "How many independent draws would tell the mean as well. Of the predictions (function), "
        "what matters; of the weights it would say little.",
        "ESS = N / (1 + 2 Σₖ ρₖ)",
        "Geyer (1992), Statistical Science 7; Vehtari et al. (2021)",
    ),
    Explanation(
        "Ranks",
        "Where each log-density stands among those of all chains. If all chains are of one "
        "distribution, the ranks of each are uniform and its line stays near zero; that of a chain "
        "higher than the others lies below. The p-value is that of ArviZ's test of all chains "
        "together.",
        source="Säilynoja, Bürkner and Vehtari (2022), Statistics and Computing 32; Vehtari et al. "
        "(2021)",
    ),
    Explanation(
        "EEVPD",
        "Energy error variance per dimension: how well the steps follow the dynamics; the bias "
        "of an unadjusted kernel grows with it.",
        "E[ΔE²] / d",
        "Robnik and Seljak (2023), arXiv 2303.18221",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section, None if there is neither a table nor a trace."""
    tables, listed = chain_tables(run)
    plots = []
    if run.log_density is not None:
        plots = [figures.log_density(run.log_density, run.failed, wide=True)]
        known = [c["ess_log_density"] for c in run.chains or [] if c.get("ess_log_density")]
        worth = float(np.nanmedian(known)) if np.isfinite(known).any() else None
        plots += [plot for plot in [ranks(run.log_density, run.failed, worth)] if plot]
    if not tables and not plots:
        return None
    return Section(
        "chains",
        "Chains",
        takeaways=_takeaways(run),
        plots=plots,
        tables=tables,
        listed=listed,
        explained=[*_columns_explained(tables), *EXPLAINED],
    )


def _columns_explained(tables: list[Table]) -> list[Explanation]:
    return [Explanation(c.label, c.meaning) for c in (tables[0].columns if tables else ())]


def _takeaways(run: RunFolder) -> list[Sentence]:
    """Say how many chains agree with themselves, and what the draws are worth."""
    chains = run.chains or []
    rhats = [c.get("rhat_function_median") for c in chains]
    known = [r for r in rhats if r is not None]
    said = []
    if known:
        mixed = sum(r <= RHAT_LIMIT for r in known)
        level = "good" if mixed == len(rhats) else "note" if mixed >= len(rhats) / 2 else "bad"
        finite = [r for r in known if math.isfinite(r)]
        worst = f"; the largest is {max(finite):.3f}" if finite else ""
        said.append(
            Sentence(
                level,
                f"{mixed:,} of {plural(len(rhats), 'chain')} have an R-hat of the predictions of "
                f"at most {RHAT_LIMIT} (median over predictions){worst}.",
            )
        )
    total = (run.diagnostics or {}).get("ess_function_total_median")
    if total is not None and math.isfinite(total) and run.draws and chains:
        drawn = run.draws * run.going
        said.append(
            Sentence(
                "good" if total >= ENOUGH_ESS else "note",
                f"All {drawn:,} draws together are worth {number(round(total))} independent ones "
                f"for a typical prediction, {'enough' if total >= ENOUGH_ESS else 'few'} for its "
                "mean and spread.",
            )
        )
    return said


def with_seconds(chains: list[dict[str, Any]], seconds: float | None) -> list[dict[str, Any]]:
    r"""Return the rows with each chain's part of the seconds of sampling.

    .. math:: t_i = T g_i / \sum_j g_j

    Chains share devices and advance in groups: nothing measures one alone.

    Parameters
    ----------
    chains : list of dict
        With "gradients" :math:`g_i`; as they are if one has none.
    seconds : float, optional
        T, of the stage.
    """
    gradients = [chain.get("gradients") or 0 for chain in chains]
    if not seconds or not all(gradients):
        return chains
    each = seconds / sum(gradients)
    return [{**chain, "seconds": each * own} for chain, own in zip(chains, gradients, strict=True)]


def chain_tables(run: RunFolder) -> tuple[list[Table], list[str]]:
    """Return the table of chains, quantiles over all if there are many, and what happened to some.

    Parameters
    ----------
    run : RunFolder
        Without diagnostics.csv the status in the manifest takes its place.
    """
    chains = run.chains or run.manifest.get("status")
    if not chains:
        return [], []
    chains = with_seconds(chains, (run.manifest.get("seconds") or {}).get("sampling"))
    filled = [n for n in chains[0] if any(c.get(n) not in (None, "") for c in chains)]
    ordered = [n for n in COLUMNS if n in filled] + [n for n in filled if n not in COLUMNS]
    # What is the same in all chains needs no column, and what happened to one needs a line.
    constant = [
        n
        for n in ordered
        if n not in ("chain", "status", "sentence")
        and len(chains) > 1
        and all(c.get(n) == chains[0][n] for c in chains)
    ]
    ordered = [n for n in ordered if n not in (*constant, "sentence")]
    many = len(chains) > MAX_CHAIN_ROWS
    shown = sorted(chains, key=_badness, reverse=True)[:WORST_CHAINS] if many else chains
    notes = ["Click a heading to sort by it; hover for its meaning."]
    if many:
        notes.insert(
            0,
            f"The worst {WORST_CHAINS} of {len(chains):,} chains: those that are not ok first, "
            f"then by R-hat. All of them are in diagnostics.csv.",
        )
    if constant:
        same = [f"{_heading(n)} {number(chains[0][n])}" for n in constant]
        notes.append(f"The same in all chains: {', '.join(same)}.")
    columns = [
        Column(_heading(name), COLUMNS.get(name, ("", ""))[1], name == "status") for name in ordered
    ]
    rows = [[_chain_cell(name, chain.get(name)) for name in ordered] for chain in shown]
    tables = [Table(columns, rows, note=" ".join(notes), sortable=True)]
    if many:
        labels = ["min", "5 %", "median", "95 %", "max", "not finite", "missing"]
        numeric = [n for n in ordered if n not in ("chain", "status")]
        quantiles = [_quantiles(n, [c.get(n) for c in chains]) for n in numeric]
        note = "All chains: quantiles of the finite values of each column."
        heads = [Column(label) for label in ("Column", *labels)]
        tables.append(Table(heads, quantiles, note=note, headed=True))
    happened = [
        f"Chain {c['chain']}: {c['sentence']}"
        for c in shown
        if c["status"] != "ok" and c.get("sentence")
    ]
    return tables, happened


def _badness(chain: dict[str, Any]) -> tuple[bool, float]:
    """Sort key: not ok is worse than ok, a NaN worse than any number, then R-hat decides."""
    names = ("rhat_function_max", "rhat_function_median", "rhat_weights_max", "rhat_log_density")
    value = next((chain[n] for n in names if chain.get(n) is not None), -math.inf)
    return chain["status"] != "ok", math.inf if math.isnan(value) else value


def _quantiles(name: str, values: list[Any]) -> list[Cell]:
    given = np.array([v for v in values if v is not None], float)
    finite = given[np.isfinite(given)]
    at = (0, 0.05, 0.5, 0.95, 1)
    cells = ["–"] * len(at)
    if len(finite):
        cells = [_diagnostic(name, float(q)) for q in np.quantile(finite, at)]
    cells += [number(len(given) - len(finite)), number(len(values) - len(given))]
    return [Cell(text) for text in (_heading(name), *cells)]


def _heading(name: str) -> str:
    return COLUMNS.get(name, (name, ""))[0]


def _chain_cell(name: str, value: Any) -> Cell:
    classes = []
    if name == "status":
        classes += ["text", "good" if value == "ok" else "bad"]
    is_number = isinstance(value, int | float)
    # Weights need not mix for the predictions to do so: no warning for them.
    judged = name.startswith("rhat_") and name != "rhat_weights_max"
    if judged and is_number and not value <= RHAT_LIMIT:
        classes.append("note")
    if name == "divergences" and is_number and value != 0:
        classes.append("bad")
    return Cell(_diagnostic(name, value), "" if value is None else str(value), " ".join(classes))


# Digits after the point of the columns whose names begin so; the first that fits.
DECIMALS = {
    "rhat_": 3,
    "lppd": 3,
    "ess_per_gradient": 4,
    "ess_": 0,
    "log_density_drift": 2,
    "log_density": 1,
    "acceptance_rate": 3,
}


def _diagnostic(name: str, value: Any) -> str:
    """Write a diagnostic so that a column lines up."""
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) < 1e6:
        for start, decimals in DECIMALS.items():
            if name.startswith(start):
                # What is rounded to nothing has no sign.
                return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "−")
        if name in ("energy_error", "step_size") and 1e-4 <= abs(value) < 1e3:
            return f"{value:#.3g}".removesuffix(".")
    return number(value)
