"""Run benchmarks: ``uv run python -m experiments.benchmarks [NAMES] [OPTIONS]``."""

import importlib.util
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import machine
from experiments.benchmarks.processes import in_fresh_process
from experiments.benchmarks.settings import Settings
from experiments.benchmarks.whole_fit import make_peer

# Name -> what it measures. Each is a module with ``measure(settings) -> dict``, whose "rows" are
# the table; it runs in a process of its own.
BENCHMARKS = {
    "gradients": "gradient throughput over the GEMM peak, beside vmap of a row-major MLP",
    "steps": "MCLMC and HMC steps over their gradients",
    "nuts_lockstep": "NUTS beside jax.vmap(blackjax.nuts)",
    "nuts_warmup": "trees of NUTS on a network after our warm-ups and after that of blackjax",
    "kernels": "what gradients buy: every kernel on three tables",
    "startup": "time to --help and to the first line of progress",
    "compilation": "seconds of compilation per stage, cold and from the cache",
    "predict_rows": "rows per second and peak memory of predicting a long CSV to Parquet",
    "memory": "peak memory against the number of kept draws",
    "whole_fit": "a whole fit beside sklearn-contrib-bde, same work",
    "time_to_lppd": "time until the peer's final LPPD is reached",
}
# These compute in their own process; the others start processes, and do without JAX themselves.
COMPUTING = ("gradients", "steps", "nuts_lockstep", "nuts_warmup")
PACKAGE = "experiments.benchmarks"

app = cyclopts.App(name="python -m experiments.benchmarks", result_action="return_value")


@app.default
def main(
    names: Annotated[list[str] | None, Parameter(negative=())] = None,
    *,
    data: Path | None = None,
    peer: str | None = None,
    out: Path = Path("benchmarks.json"),
    repeats: int = 3,
    quick: Annotated[bool, Parameter(negative=())] = False,
    folder: Path | None = None,
) -> int:
    """Run benchmarks, print a table of each and write all figures as JSON.

    Parameters
    ----------
    names
        Which benchmarks: gradients, steps, nuts_lockstep, nuts_warmup, kernels, startup,
        compilation, predict_rows, memory, whole_fit, time_to_lppd. All if not given.
    data
        Folder with airfoil.data; without it the table is fetched from OpenML.
    peer
        Python of an environment with sklearn-contrib-bde, or "install" to make one with uv.
        Without it, this library is measured alone.
    out
        The JSON file.
    repeats
        How often each measure is taken. The smallest time counts; the spread is given.
    quick
        Tiny sizes, to see that everything runs; the figures mean nothing.
    folder
        Where to make the temporary folder (5 GB for the memory benchmark); the system's if not
        given.
    """
    # In a log there is room for a whole row of a table.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 180)
    chosen = names or list(BENCHMARKS)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown or repeats < 1:
        what = f"no benchmark {', '.join(unknown)}" if unknown else f"--repeats {repeats}"
        console.print(f"{what}; expected some of {', '.join(BENCHMARKS)}, and at least 1 repeat")
        return 2
    result: dict[str, Any] = {"machine": machine.describe(), "quick": quick, "repeats": repeats}
    console.print_json(json.dumps(result["machine"]))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bnnmcmc-benchmarks-", dir=folder) as temporary:
        scratch = Path(temporary).resolve()
        # The interpreter of an environment is a link: following it would leave the environment.
        python = make_peer(scratch) if peer == "install" else peer and Path(peer).absolute()
        settings = Settings(scratch, data and data.resolve(), python or None, repeats, quick)
        failed = [name for name in chosen if not _run(name, settings, result, out, console)]
    console.print(f"wrote {out}")
    return 1 if failed else 0


def _run(name: str, settings: Settings, result: dict, out: Path, console: Console) -> bool:
    console.rule(f"{name}: {BENCHMARKS[name]}")
    if importlib.util.find_spec(f"{PACKAGE}.{name}") is None:
        console.print("not there in this version")
        return True
    arguments: tuple = (settings,)
    if name == "nuts_lockstep":  # which is a script of its own, too, and takes the table
        if settings.data is None or settings.quick:
            console.print("not measured: needs --data, and has no quick sizes")
            return True
        arguments = (settings.data / "airfoil.data",)
    try:
        found = in_fresh_process(f"{PACKAGE}.{name}", "measure", *arguments, jax=name in COMPUTING)
        result[name] = {"about": BENCHMARKS[name], **found}
    except Exception as error:  # one benchmark that fails shall not cost the others' figures
        traceback.print_exc()
        result[name] = {"about": BENCHMARKS[name], "failed": f"{type(error).__name__}: {error}"}
    else:
        show(name, result[name], console)
    out.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return "failed" not in result[name]


def show(name: str, found: dict[str, Any], console: Console) -> None:
    """Print a benchmark's rows as a table, and what else it says below."""
    parts = {key: value for key, value in found.items() if isinstance(value, dict)}
    rows = found.get("rows") or [{"what": key, **value} for key, value in parts.items()]
    table = Table()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    if rows:
        console.print(table)
    for key, value in found.items():
        if key not in ("rows", "about") and not isinstance(value, list | dict):
            console.print(f"{key.replace('_', ' ')}: {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(app())
