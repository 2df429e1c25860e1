"""A grid of runs, several seeds each, and one table of their results."""

import csv
import io
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnmcmc.comparison import compare, print_comparison
from bnnmcmc.config import read_config, with_placement
from bnnmcmc.errors import InputError
from bnnmcmc.store import read_manifest, write_atomic


def parse_grid(axes: list[str]) -> dict[str, list[str]]:
    """Read ``key=v1,v2`` settings.

    Parameters
    ----------
    axes : list of str
        Values as in TOML, with commas between: ``model.hidden=[16],[16,16]``.

    Returns
    -------
    dict
        key -> values, each as text for ``--set``.

    Raises
    ------
    InputError
        Not of that form, or a key twice.
    """
    grid: dict[str, list[str]] = {}
    for axis in axes:
        key, equals, text = axis.partition("=")
        if not equals or not key.strip() or not text.strip():
            raise InputError(f"--grid {axis}: expected section.key=value,value,...")
        if key.strip() in grid:
            raise InputError(f"--grid {axis}: {key.strip()} is given twice")
        try:
            values = tomllib.loads(f"v = [{text}]")["v"]
            grid[key.strip()] = [_as_toml(value) for value in values]
        except tomllib.TOMLDecodeError:  # bare words
            grid[key.strip()] = [word.strip() for word in text.split(",")]
    return grid


def _as_toml(value: Any) -> str:
    """Write a value in one line, as ``--set`` takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_as_toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    return json.dumps(value)


def run_sweep(config: Path, axes: list[str], seeds: int, folder: Path, settings: list[str]) -> int:
    """Run every point of a grid with every seed; print and write a table.

    Each run is a process of its own, so that one that fails takes no other with it.

    Parameters
    ----------
    config : Path
        The experiment file.
    axes : list of str
        See `parse_grid`.
    seeds : int
        ``run.seed`` and the next ``seeds - 1`` numbers.
    folder : Path
        Holds one run folder per run, and ``sweep.csv``.
    settings : list of str
        ``--set`` settings for all runs.

    Returns
    -------
    int
        0, 2 if a run failed, or 130 if interrupted.

    Raises
    ------
    InputError
        A grid point whose config is wrong: before the first run.
    """
    grid = parse_grid(axes)
    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected at least 1")
    runs = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        chosen = [*settings, *(f"{key}={value}" for key, value in point.items())]
        first = read_config(config, chosen).run.seed
        for seed in range(first, first + seeds):
            runs.append((point, seed, [*chosen, f"run.seed={seed}"]))
    if seeds > 1 and "run.seed" in grid:
        raise InputError("--grid run.seed=... and --seeds: give one of them")
    out = Console(highlight=False, soft_wrap=True)
    results: list[dict[str, Any]] = []
    for number, (point, seed, chosen) in enumerate(runs, start=1):
        name = _folder_name(point, seed)
        title = ", ".join(f"{key}={value}" for key, value in point.items()) or config.stem
        out.rule(f"{number} of {len(runs)}: {escape(title)}, seed {seed}", align="left")
        code = _run_one(config, folder / name, chosen)
        if code == 130:
            out.print(f"Stopped; call the same command again to go on in {escape(str(folder))}")
            return 130
        results.append(_result(folder / name, point, seed, code))
        _write_csv(folder / "sweep.csv", results)
    _print(out, results, list(grid))
    _compare(out, folder, [r["folder"] for r in results if not r["failed"]])
    out.print(f"[dim]all runs: {escape(str(folder / 'sweep.csv'))}[/]")
    return 2 if any(result["failed"] for result in results) else 0


def _compare(out: Console, folder: Path, names: list[str]) -> None:
    """Write the runs side by side, with paired differences, into compare.html."""
    from bnnmcmc.report.compare import write_comparison

    try:
        comparison = compare([folder / name for name in names])
    except InputError as error:  # such as a grid over tables: the means above are all there is
        out.print(f"[yellow]not compared row by row:[/] {escape(str(error))}")
        return
    print_comparison(Console(highlight=False), comparison)
    page = write_comparison(comparison, folder / "compare.html", f"Sweep {folder.name}")
    out.print(f"[dim]side by side: {escape(str(page))}[/]")


def _folder_name(point: dict[str, str], seed: int) -> str:
    parts = [f"{key.split('.')[-1]}={value}" for key, value in point.items()]
    return re.sub(r"[^\w.=,\[\]-]+", "", "_".join([*parts, f"seed={seed}"]))


def _run_one(config: Path, folder: Path, settings: list[str]) -> int:
    """Run, resume or skip one run; return its exit status, 130 after Ctrl-C."""
    command = [sys.executable, "-m", "bnnmcmc"]
    if (folder / "manifest.json").is_file():
        stored = read_config(folder / "config.toml")
        # The run holds the placement as it was chosen, which the sweep may leave open.
        wanted = with_placement(read_config(config, settings), stored.run.model_dump())
        if stored != wanted:
            raise InputError(
                f"{folder}: holds a run with other settings than those asked for now; give another "
                "folder with --out, or remove that one"
            )
        if read_manifest(folder)["stage"] == "done":
            return 0
        command += ["resume", str(folder)]
    else:
        command += ["run", str(config), "--out", str(folder), "--set", *settings]
    # The summary of a single run would drown the table; progress and errors go to stderr.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    interrupted = False
    while True:
        try:
            code = process.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:
            interrupted = True  # the run got it too, and ends after its block


def _result(folder: Path, point: dict[str, str], seed: int, code: int) -> dict[str, Any]:
    result: dict[str, Any] = {**point, "seed": seed, "folder": folder.name, "failed": code != 0}
    path = folder / "metrics.json"
    if code == 0 and path.is_file():
        test = json.loads(path.read_text())["test"]
        result |= {f"{source}_{k}": v for source in test for k, v in test[source].items()}
        manifest = read_manifest(folder)
        result["seconds"] = sum(manifest["seconds"].values())
        result["chains_ok"] = sum(chain["status"] == "ok" for chain in manifest["status"])
    return result


def _write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for result in results for name in result))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_atomic(path, text.getvalue().encode())


def _print(out: Console, results: list[dict[str, Any]], keys: list[str]) -> None:
    """Print one line per grid point: mean and standard deviation over seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys), []).append(result)
    classes = any("posterior_accuracy" in result for result in results)
    error = "posterior_accuracy" if classes else "posterior_rmse"
    columns = {
        "posterior_lppd": "LPPD posterior",
        "ensemble_lppd": "LPPD ensemble",
        error: error.removeprefix("posterior_"),
        "seconds": "seconds",
    }
    table = Table(title="Mean over seeds (standard deviation)", title_justify="left", box=None)
    for key in keys:
        table.add_column(key)
    table.add_column("runs", justify="right")
    for title in columns.values():
        table.add_column(title, justify="right")
    best = _best(groups)
    for values, members in groups.items():
        cells = [_mean(members, name) for name in columns]
        failed = sum(member["failed"] for member in members)
        runs = f"{len(members)}" + (f" ({failed} failed)" if failed else "")
        style = "bold" if values == best else ""
        table.add_row(*map(escape, (*map(str, values), runs, *cells)), style=style)
    out.print()
    out.print(table)


def _best(groups: dict[tuple, list[dict[str, Any]]]) -> tuple | None:
    means = {
        values: np.mean([m["posterior_lppd"] for m in members if "posterior_lppd" in m] or [np.nan])
        for values, members in groups.items()
    }
    finite = {values: mean for values, mean in means.items() if np.isfinite(mean)}
    return max(finite, key=lambda values: finite[values]) if finite else None


def _mean(members: list[dict[str, Any]], name: str) -> str:
    values = [member[name] for member in members if name in member]
    if not values:
        return "-"
    spread = f" ({np.std(values, ddof=1):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}" if name != "seconds" else f"{np.mean(values):.0f}"
