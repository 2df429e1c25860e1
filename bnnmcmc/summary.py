"""What the command line prints when a run ends: read from the run folder, no JAX."""

import json
import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnmcmc.health import STATUSES
from bnnmcmc.metrics import LEVELS
from bnnmcmc.progress import count, duration
from bnnmcmc.store import read_manifest
from bnnmcmc.targets import is_met, say_outcome, target_of

STAGES = {
    "ensemble": "ensemble",
    "warmup": "warm-up",
    "sampling": "sampling",
    "results": "scores and report",
}
COLUMNS = {
    "best_member": "best member",
    "ensemble": "deep ensemble",
    "posterior": "posterior",
}
SCORES = {
    "lppd": ("LPPD", "higher is better"),
    "nll_gaussian": ("NLL (Gaussian)", "lower"),
    "rmse": ("RMSE", "lower"),
    "crps": ("CRPS", "lower"),
    **{f"coverage_{level}": (f"coverage {level} %", f"near {level} %") for level in LEVELS},
    "accuracy": ("accuracy", "higher"),
    "brier": ("Brier score", "lower"),
    "ece": ("calibration error", "lower"),
}
# More chains than this: the terminal shows the worst ten, and quantiles over all.
MAX_CHAINS, WORST = 30, 10


def print_summary(console: Console, folder: Path) -> None:
    """Print what was run, how long it took, the scores, the chains and where things are.

    Parameters
    ----------
    console : Console
    folder : Path
        A run folder, finished or not.
    """
    manifest = read_manifest(folder)
    data = manifest["data"]
    classes = f" ({len(data['classes'])} classes)" if data["classes"] else ""
    console.print()
    console.rule(f"[bold]{escape(manifest['name'])}", align="left")
    lines = {
        "data": f"{data['name']}: {data['rows']} rows, {data['features']} features, "
        f"{manifest['task']} of {', '.join(data['targets'])}{classes}",
        "split": f"{data['train']} train, {data['validation']} validation, {data['test']} test; "
        f"the posterior conditions on {_sampled_on(data)}",
        "chains": f"{manifest['placement']}; {_parameters(manifest)}",
        "sampler": f"{manifest['kernel']}, {manifest['warmup']} warm-up steps, "
        f"{_draws_done(manifest)} draws per chain"
        + (f" (one every {manifest['thin']} steps)" if manifest["thin"] > 1 else ""),
        "time": _times(manifest["seconds"]),
    }
    outcome = say_outcome(manifest)
    if outcome:
        lines["target"] = outcome
    _print_pairs(console, lines)
    notes = list(manifest["notes"])
    if manifest["stopped"] == "time budget":
        notes.append(f"sampling was ended by the time budget after {_draws_done(manifest)} draws")
    for note in notes:
        console.print(f"[yellow]note[/]      {escape(note)}", highlight=False, soft_wrap=True)
    _print_scores(console, folder)
    _print_pool(console, folder)
    _print_calibration(console, folder)
    _print_status(console, manifest["status"])
    _print_verdict(console, folder)
    more = f"--draws {manifest['draws']}"
    target, checks = target_of(manifest)
    if is_met(target, checks):
        more = f"--ess {2 * target.ess:g}" if target.ess else f"--lppd {target.lppd / 2:g}"
    files = {
        "report": str(folder / "report.html"),
        "folder": str(folder),
        "more": f"bnnmcmc resume {shlex.quote(str(folder))} {more}",
    }
    console.print()
    _print_pairs(console, {k: v for k, v in files.items() if k != "report" or Path(v).exists()})


def _parameters(manifest: dict[str, Any]) -> str:
    size, sampled = manifest["parameters"], manifest.get("sampled", manifest["parameters"])
    return f"{size} parameters each" + (f", {sampled} of them sampled" if sampled < size else "")


def print_diagnostics(
    console: Console, rows: list[dict[str, Any]], summary: dict[str, Any]
) -> None:
    """Print the table of chains, the verdict, and what is wrong with which chain.

    Of many chains, the worst ten, and quantiles over all.

    Parameters
    ----------
    console : Console
    rows : list of dict
        As `diagnostics.chain_table` returns it.
    summary : dict
        As `diagnostics.run_summary` returns it.
    """
    titles = {
        "chain": "chain",
        "status": "status",
        "log_density": "log-\ndensity",
        "log_density_drift": "drift\n(sd)",
        "acceptance_rate": "accept-\nance",
        "energy_error": "EEVPD",
        "divergences": "diver-\ngent",
        "step_size": "step\nsize",
        "ess_log_density": "ESS\ndensity",
        "ess_function_median": "ESS pre-\ndictions",
        "rhat_function_median": "R-hat pre-\ndictions",
        "rhat_weights_max": "R-hat\nweights",
    }
    used = [name for name in titles if any(row[name] is not None for row in rows)]
    if console.is_terminal and console.width < 105:
        # The rest is in diagnostics.csv; cut numbers would be of no use.
        less = ("log_density_drift", "energy_error", "step_size", "ess_log_density")
        used = [name for name in used if name not in less]
    elif not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table(title="Chains", title_justify="left", title_style="bold", box=None)
    for name in used:
        table.add_column(titles[name], justify="left" if name == "status" else "right")
    shown = _readable(rows)
    for row in shown:
        table.add_row(*(escape(_short(row[name])) for name in used))
    console.print(table)
    if len(rows) > len(shown):
        console.print(
            f"[dim]the worst {len(shown)} of {len(rows)} chains: those that are not ok first, then "
            "by ESS; all are in diagnostics.csv[/]"
        )
        numeric = [name for name in used if name not in ("chain", "status")]
        _print_quantiles(console, {titles[n]: [row[n] for row in rows] for n in numeric})
    console.print()
    for sentence in summary["verdict"]:
        console.print(f"• {escape(sentence)}", highlight=False)
    _print_status(console, rows)


def _print_verdict(console: Console, folder: Path) -> None:
    """Print what R-hat and ESS say: chains without a fault can still be far from agreeing."""
    path = folder / "diagnostics.json"
    if path.is_file():
        for sentence in json.loads(path.read_text())["verdict"]:
            if "have status ok" not in sentence:  # said just above
                console.print(f"• {escape(sentence)}", highlight=False)


def _readable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows, or of many the worst ten: by status, then by ESS of the predictions."""
    if len(rows) <= MAX_CHAINS:
        return rows

    def badness(row):
        worth = row["ess_function_median"]
        # What cannot be computed is worse than any number.
        return _severity(row), -math.inf if worth is None or math.isnan(worth) else worth

    return sorted(rows, key=badness)[:WORST]


def _severity(chain: dict[str, Any]) -> int:
    return STATUSES.index(chain["status"])


def _print_quantiles(console: Console, columns: dict[str, list[Any]]) -> None:
    """Print quantiles over all chains, a line for each quantity."""
    title = f"All {len(next(iter(columns.values())))} chains"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("")
    for name in ("min", "5 %", "median", "95 %", "max", "not finite"):
        table.add_column(name, justify="right")
    for name, values in columns.items():
        numbers = np.array([math.nan if v is None else v for v in values], float)
        finite = numbers[np.isfinite(numbers)]
        cells = ["-"] * 5
        if len(finite):
            cells = [_short(float(q)) for q in np.quantile(finite, (0, 0.05, 0.5, 0.95, 1))]
        label = name.replace("-\n", "").replace("\n", " ")
        table.add_row(label, *cells, str(len(numbers) - len(finite)))
    console.print()
    console.print(table)


def _short(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "-" if cell is None else str(cell)


def _print_pairs(console: Console, pairs: dict[str, str]) -> None:
    for name, text in pairs.items():
        console.print(f"[dim]{name:<9}[/] {escape(text)}", highlight=False, soft_wrap=True)


def _sampled_on(data: dict[str, Any]) -> str:
    if data["sampled_on"] == "train":
        return f"the {data['train']} training rows"
    return f"train + validation ({data['train'] + data['validation']} rows)"


def _draws_done(manifest: dict[str, Any]) -> str:
    done, planned = sum(b["count"] for b in manifest["blocks"]), manifest["draws"]
    return f"{done}" if done == planned else f"{done} of {planned}"


def _times(seconds: dict[str, float]) -> str:
    parts = [f"{title} {duration(seconds[s])}" for s, title in STAGES.items() if s in seconds]
    return f"{', '.join(parts)}; together {duration(sum(seconds.values()))}"


def _print_scores(console: Console, folder: Path) -> None:
    path = folder / "metrics.json"
    if not path.is_file():
        console.print("[dim]scores    [/]none: the run has no test part, or is not finished")
        return
    metrics = json.loads(path.read_text())
    test, units = metrics["test"], metrics.get("test_target_units")
    rows = [name for name in SCORES if name in test["posterior"]]
    table = Table(
        title=f"Scores on {metrics['rows']} held-out rows"
        + (" (standardised target; in its own units below)" if units else ""),
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("")
    for name, title in COLUMNS.items():
        table.add_column(title, justify="right", style="bold" if name == "posterior" else "")
    table.add_column("", style="dim")
    for name in rows:
        table.add_row(
            SCORES[name][0], *(_score(name, test[c][name]) for c in COLUMNS), SCORES[name][1]
        )
    if units:
        table.add_section()
        for name in ("lppd", "rmse", "crps"):
            cells = (_score(name, units[c][name]) for c in COLUMNS)
            table.add_row(f"{SCORES[name][0]}, units", *cells, "")
    console.print()
    console.print(table)


def _print_pool(console: Console, folder: Path) -> None:
    """Say how chains are weighted, unless all count the same."""
    path = folder / "metrics.json"
    pool = json.loads(path.read_text()).get("pool") if path.is_file() else None
    if pool and pool["weights"] != "equal":
        largest = sorted(enumerate(pool["of_chains"]), key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"chain {chain} {100 * weight:.0f} %" for chain, weight in largest)
        console.print(
            f"\n[dim]pool     [/] {pool['weights'].replace('_', '-')} weights from the validation "
            f"rows: worth {pool['effective_chains']:.1f} of {len(pool['of_chains'])} chains "
            f"({listed})",
            highlight=False,
            soft_wrap=True,
        )


def _print_calibration(console: Console, folder: Path) -> None:
    """Say what a correction of intervals or probabilities changed, if there is one."""
    path = folder / "metrics.json"
    found = json.loads(path.read_text()).get("calibrated") if path.is_file() else None
    if found:
        console.print(
            f"\n[dim]corrected[/] {say_calibration(found)}", highlight=False, soft_wrap=True
        )


def say_calibration(found: dict[str, Any]) -> str:
    """Say what a correction changed of the scores on the test rows."""
    if "missing" in found:
        return f"nothing: {found['missing']}"
    said = []
    for part in found["parts"]:
        own, corrected = part["posterior"], part["corrected"]
        of = f"{part['name']}, " if len(found["parts"]) > 1 else ""
        if "coverage_90" in own:
            said.append(
                f"{of}the 90 % interval covers {100 * corrected['coverage_90']:.1f} % of the test "
                f"rows, the posterior's own {100 * own['coverage_90']:.1f} %; "
                f"{corrected['width_90']:.3g} wide instead of {own['width_90']:.3g}"
            )
        else:
            said.append(
                f"calibration error {corrected['ece']:.3f} instead of {own['ece']:.3f}, LPPD "
                f"{corrected['lppd']:.3f} instead of {own['lppd']:.3f}"
            )
    return f"{found['said']}: {'; '.join(said)}"


def _score(name: str, value: float) -> str:
    if name.startswith("coverage") or name == "accuracy":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) < 1000 else count(value)


def _print_status(console: Console, status: list[dict[str, Any]]) -> None:
    if not status:
        return
    ok = sum(chain["status"] == "ok" for chain in status)
    color = "green" if ok == len(status) else "yellow"
    console.print()
    console.print(f"[{color}]{ok} of {len(status)} chains ok[/]", highlight=False)
    others = sorted((chain for chain in status if chain["status"] != "ok"), key=_severity)
    if len(others) > WORST:
        counts = Counter(chain["status"] for chain in others)
        console.print(
            "  " + ", ".join(f"{n} {name}" for name, n in counts.items()), highlight=False
        )
    for chain in others[:WORST]:
        console.print(
            f"  chain {chain['chain']}: {chain['status']}: {escape(chain['sentence'])}",
            highlight=False,
        )
    if len(others) > WORST:
        console.print(f"  and {len(others) - WORST} more; see diagnostics.csv", highlight=False)
