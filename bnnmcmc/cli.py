"""The command line. JAX loads only in the commands that compute."""

import importlib
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

import cyclopts
from cyclopts import Parameter
from rich.console import Console
from rich.markup import escape

from bnnmcmc.errors import InputError
from bnnmcmc.processes import Group, LostProcessError, launched_processes, together

# A time budget counts from here, not from when JAX has loaded.
STARTED = time.monotonic()

app = cyclopts.App(
    name="bnnmcmc",
    help="Sampling-based inference for Bayesian neural networks: one chain per deep-ensemble "
    "member, all chains at once.\n\n"
    "Start with: bnnmcmc init my.toml --data table.csv --target price, then: bnnmcmc run my.toml",
    version_flags=["--version"],
    result_action="return_value",
)

Set = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        consume_multiple=True,
        negative=(),
        help="Change settings, after CONFIG: --set sampler.draws=500 run.seed=3 (values as in "
        "TOML).",
    ),
]
Budget = Annotated[
    str | None,
    Parameter(
        help="Stop in time with everything usable: 90s, 10m, 1h30m. Plans fewer steps if needed."
    ),
]
Quiet = Annotated[bool, Parameter(negative=(), help="Show no progress.")]
Coordinator = Annotated[
    str | None,
    Parameter(
        help="HOST:PORT at which process 0 meets the others, when several work on one run. SLURM, "
        "Kubernetes and MPI say it by themselves."
    ),
]
NumProcesses = Annotated[int | None, Parameter(help="How many processes work on the run together.")]
ProcessId = Annotated[int | None, Parameter(help="Number of this process, from 0.")]


@app.command
def init(
    path: Path = Path("experiment.toml"),
    *,
    data: Path | None = None,
    target: Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())] = None,
):
    """Write a commented starter config.

    Parameters
    ----------
    path
        The file to write; never overwritten.
    data
        The table to learn from; scikit-learn's diabetes data if not given.
    target
        The column(s) to predict; the last one if not given.
    """
    from bnnmcmc.config import read_config
    from bnnmcmc.inputs import read_dataset
    from bnnmcmc.starter import write_starter

    said = write_starter(path, data, target)
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"wrote {escape(str(path))}: {escape(said)}")
    try:
        read_dataset(read_config(path), path.parent)
    except InputError as error:
        out.print(f"[yellow]the table cannot be used as it is:[/] {escape(str(error))}")
    out.print(f"next: bnnmcmc check {escape(str(path))}, then bnnmcmc run {escape(str(path))}")


@app.command
def check(config: Path, *, set: Set = None):
    """Check an experiment before it runs: config, data, shapes, finite density, cost. No sampling.

    Parameters
    ----------
    config
        The experiment file.
    """
    experiment, dataset = _experiment(config, set, _console(False))
    from bnnmcmc.preflight import check_model, estimate, print_estimate
    from bnnmcmc.progress import working

    with working(_console(False), "Checking model and density"):
        posterior, placement = check_model(experiment, dataset)
    with working(_console(False), "Measuring one epoch and one gradient"):
        cost = estimate(experiment, dataset, posterior, placement)
    print_estimate(Console(highlight=False, soft_wrap=True), experiment, dataset, placement, cost)


@app.command
def run(
    config: Path,
    *,
    out: Path | None = None,
    set: Set = None,
    time_budget: Budget = None,
    quiet: Quiet = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
):
    """Run an experiment: train the ensemble, sample, score, write the report.

    Parameters
    ----------
    config
        The experiment file.
    out
        The run folder, which must be new; by default runs/NAME, runs/NAME-2, ...
    """
    _budget(time_budget)  # a mistake in it shows before anything loads
    with together(coordinator, num_processes, process_id) as group:
        if not group.lead:
            return _follow(group)
        experiment, dataset = _experiment(config, set, _console(quiet), group)
        from bnnmcmc.pipeline import start_run

        folder = out or _new_folder(Path("runs") / config.stem)
        done = start_run(
            experiment,
            dataset,
            folder,
            name=config.stem,
            command=shlex.join(["bnnmcmc", *sys.argv[1:]]),
            console=_console(quiet),
            budget=_budget(time_budget),
            group=group,
        )
    return _end(folder, done)


@app.command
def resume(
    folder: Path,
    *,
    draws: int = 0,
    ess: float | None = None,
    lppd: float | None = None,
    time_budget: Budget = None,
    other_versions: Annotated[bool, Parameter(negative=())] = False,
    quiet: Quiet = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
):
    """Go on with a run after an interruption, or add draws to it.

    Parameters
    ----------
    folder
        The run folder.
    draws
        Add this many draws per chain to those planned.
    ess
        Sample until this function-space ESS, instead of stop.ess of the config; 0 for no such
        target.
    lppd
        Sample until the LPPD on the validation rows has settled to this many nats per row, instead
        of stop.lppd.
    other_versions
        Go on although package versions have changed; the draws are then not bit for bit those
        of an undisturbed run.
    """
    _budget(time_budget)  # a mistake in it shows before anything loads
    with together(coordinator, num_processes, process_id) as group:
        if not group.lead:
            return _follow(group)
        _configure_for(folder, group)
        from bnnmcmc.pipeline import resume_run
        from bnnmcmc.store import read_manifest

        before = read_manifest(folder)
        done = resume_run(
            folder,
            console=_console(quiet),
            draws=draws,
            ess=ess,
            lppd=lppd,
            budget=_budget(time_budget),
            other_versions=other_versions,
            group=group,
        )
    after = read_manifest(folder)
    if after["blocks"] == before["blocks"] and before["stage"] == "done":
        from bnnmcmc.targets import is_met, target_of

        more = "--ess or --lppd" if is_met(*target_of(after)) else "--draws N"
        Console().print(f"This run was complete already; add draws with {more}.")
    return _end(folder, done)


@app.command
def predict(source: Path, table: Path, *, out: Path | None = None, level: float = 0.9):
    """Predict the rows of a table, with intervals, or with class probabilities.

    Columns are matched by name. If the table holds the target too, scores are printed. Rows are
    read, predicted and written in pieces, so that a table of any length fits.

    Parameters
    ----------
    source
        The run folder, or a predictor written by Run.save or an estimator's save.
    table
        CSV, space-separated text, Parquet or npz.
    out
        A .csv or .parquet file to write; CSV goes to the terminal if not given.
    level
        Of the intervals.
    """
    if out is not None and out.suffix.lower() not in (".csv", ".parquet"):
        raise InputError(f"--out {out}: expected a name that ends in .csv or .parquet")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}; make it first")
    if not 0 < level < 1:
        raise InputError(f"--level {level}: expected between 0 and 1, such as 0.9")
    if not table.is_file():
        from bnnmcmc.data import read_table

        read_table(table)  # says what is wrong before anything loads
    if source.is_file():
        _configure_jax("float32", 0, Group())
    else:
        _configure_for(source)
    from bnnmcmc.rows import predict_file

    begun = time.monotonic()
    done = predict_file(source, table, out, level, _console(False))
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    if out is not None:
        rate = done.rows / max(time.monotonic() - begun, 1e-9)
        said.print(f"wrote {escape(str(out))}: {done.rows} rows, {rate:.4g} rows/s")
    if done.calibration:
        said.print(done.calibration, markup=False)
    if done.scores is not None:
        said.print("scores: " + ", ".join(f"{k} {v:.4g}" for k, v in done.scores.items()))


@app.command
def diagnose(folder: Path):
    """Show how well the chains of a run did: status, R-hat, ESS, divergences.

    Parameters
    ----------
    folder
        The run folder, finished or not.
    """
    _configure_for(folder)
    from bnnmcmc.progress import working
    from bnnmcmc.results import diagnose_folder
    from bnnmcmc.summary import print_diagnostics

    with working(_console(False), "Reading draws, computing R-hat and ESS"):
        table, summary = diagnose_folder(folder)
    print_diagnostics(Console(), table, summary)


@app.command
def report(
    folder: Path,
    *,
    format: Literal["html", "md"] = "html",
    watch: Annotated[bool, Parameter(negative=())] = False,
    every: float = 5.0,
):
    """Write report.html into a run folder, finished or not.

    Parameters
    ----------
    folder
        The run folder.
    format
        html: one file, report.html. md: report.md, with figures as PNG files.
    watch
        Write the page again and again while the run goes on; the open page loads itself again.
    every
        Seconds between two pages.
    """
    from bnnmcmc.store import read_manifest

    manifest = read_manifest(folder)
    out = Console(highlight=False, soft_wrap=True)
    if watch:
        if format != "html" or every <= 0:
            raise InputError("--watch: works with --format html, and --every above 0 seconds")
        from bnnmcmc.report.watch import watch_report
        from bnnmcmc.stopping import at_work

        watch_report(folder, every, lambda: at_work(folder), lambda t: out.print(escape(t)))
        return
    if manifest["stage"] != "done" and manifest["blocks"]:
        _configure_for(folder)
        from bnnmcmc.progress import working
        from bnnmcmc.results import refresh_results
        from bnnmcmc.stopping import FolderInUseError

        try:
            with working(_console(False), "Scores and diagnostics of the draws so far"):
                refresh_results(folder)
        except FolderInUseError:
            out.print("the run is going on: a report without scores; follow it with --watch")
    from bnnmcmc.report.page import write_markdown, write_report

    path = write_markdown(folder) if format == "md" else write_report(folder)
    out.print(f"wrote {escape(str(path))}")


@app.command
def compare(folders: list[Path], *, out: Path = Path("compare.html")):
    """Put runs side by side: scores with standard errors, paired differences, cost, convergence.

    Parameters
    ----------
    folders
        Two or more run folders of the same table.
    out
        The page to write.
    """
    from bnnmcmc.comparison import compare as compare_runs
    from bnnmcmc.comparison import print_comparison
    from bnnmcmc.report.compare import write_comparison

    console = Console(highlight=False, soft_wrap=True)
    comparison = compare_runs(folders)
    print_comparison(Console(highlight=False), comparison)
    console.print(f"wrote {escape(str(write_comparison(comparison, out)))}")


@app.command
def sweep(
    config: Path,
    *,
    grid: Annotated[
        list[str] | None,
        Parameter(
            consume_multiple=True,
            negative=(),
            help="Values to try: --grid sampler.draws=100,1000 model.hidden=[16],[16,16].",
        ),
    ] = None,
    seeds: Annotated[int, Parameter(help="Runs per grid point: run.seed, run.seed + 1, ...")] = 1,
    out: Path | None = None,
    set: Set = None,
):
    """Run a grid of settings, several seeds each, and put the results in one table.

    A sweep that was interrupted goes on where it stopped when it is called again with the same
    ``--out``.

    Parameters
    ----------
    config
        The experiment file.
    out
        The folder for all runs and sweep.csv; by default runs/NAME-sweep.
    """
    from bnnmcmc.sweep import run_sweep

    if launched_processes() > 1:
        raise InputError(
            "sweep: this is one of several processes of a job, but a sweep is made by one; start "
            "it as a single task (such as srun --ntasks=1)"
        )
    folder = out or Path("runs") / f"{config.stem}-sweep"
    return run_sweep(config, grid or [], seeds, folder, set or [])


def _budget(text: str | None) -> float | None:
    """Return what is left of a time budget by now, in seconds."""
    return None if text is None else seconds(text) - (time.monotonic() - STARTED)


def seconds(text: str) -> float:
    """Read a time span such as 90, 90s, 10m or 1h30m.

    Raises
    ------
    InputError
        Not a time span, or zero.
    """
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+(?:\.\d*)?)s?)?", text.strip())
    total = 0.0
    if match:
        hours, minutes, rest = match.groups()
        total = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(rest or 0)
    if not total:
        raise InputError(f"--time-budget {text}: expected a time such as 90s, 10m or 1h30m")
    return total


def _follow(group: Group) -> int:
    """Take part in process 0's run; return the exit status."""
    precision, devices = group.first()
    _configure_jax(precision, devices, group)
    from bnnmcmc.pipeline import follow_run

    return 0 if follow_run(group, console=_console(True)) else 130


def _experiment(
    path: Path, settings: list[str] | None, console: Console, group: Group | None = None
):
    """Read config and data, then configure JAX: mistakes in files show before JAX loads."""
    from bnnmcmc.config import read_config
    from bnnmcmc.inputs import read_dataset
    from bnnmcmc.progress import working

    config, group = read_config(path, settings or []), group or Group()
    group.first([config.run.precision, config.run.devices])
    with working(console, f"Reading {config.data.path or config.data.source}"):
        dataset = read_dataset(config, path.parent)
    with working(console, "Starting JAX"):
        _configure_jax(config.run.precision, config.run.devices, group)
    return config, dataset


def _configure_for(folder: Path, group: Group | None = None) -> None:
    from bnnmcmc.config import read_config
    from bnnmcmc.store import read_manifest

    read_manifest(folder)
    chosen, group = read_config(folder / "config.toml").run, group or Group()
    group.first([chosen.precision, chosen.devices])
    _configure_jax(chosen.precision, chosen.devices, group)


def _configure_jax(precision: Literal["float32", "float64"], devices: int, group: Group) -> None:
    # Before anything that imports blackjax or numpyro: they wake JAX up.
    from bnnmcmc.placement import use_all_cores, use_gpus, use_precision

    use_all_cores(devices or group.cores)
    if group.gpus is not None:
        use_gpus(group.gpus)
    use_precision(precision)
    _use_cache()
    importlib.import_module("bnnmcmc.run")


def _use_cache() -> None:
    from bnnmcmc.compilation import use_compilation_cache

    # A program that cannot be read or written, say on a full disk, is compiled: no reason to worry.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    use_compilation_cache()


def _new_folder(base: Path) -> Path:
    folder, number = base, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def _console(quiet: bool) -> Console:
    return Console(stderr=True, quiet=quiet, highlight=False)


def _end(folder: Path, done: bool) -> int:
    out = Console(highlight=False)
    if done:
        from bnnmcmc.summary import print_summary

        print_summary(out, folder)
        return 0
    where = shlex.quote(str(folder))
    out.print(
        f"Stopped. Everything up to here is saved in {escape(where)}; go on with:\n"
        f"  bnnmcmc resume {escape(where)}",
        soft_wrap=True,
    )
    return 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit.

    The status is 0 when done, 2 for a mistake in the input, 3 when another process of the run was
    lost, 130 when interrupted.
    """
    try:
        code = app(arguments)
    except (InputError, LostProcessError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(str(error))}"
        )
        code = getattr(error, "code", 2)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted.")
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
