"""Whole processes: wall clock and peak memory of a child, and functions run in a fresh one."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple


class Ended(NamedTuple):
    """How a child process ended: wall and processor seconds, peak resident bytes, what it said."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    out: str


def run(
    words: Sequence[str | Path],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    watch: Callable[[float, int], None] | None = None,
) -> Ended:
    """Run a command to its end.

    Parameters
    ----------
    words : sequence
        The command.
    log : Path
        Where its standard error goes; standard output goes beside it.
    environment : dict, optional
        Added to this process's own.
    watch : callable, optional
        ``watch(seconds since start, process id)``, called every 50 ms.

    Raises
    ------
    RuntimeError
        The command failed: with the end of its standard error.

    Notes
    -----
    Linux counts what the parent held at the fork as the child's own peak: call this from a
    process that is small.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    out_path = log.with_suffix(".out")
    with open(log, "wb") as err, open(out_path, "wb") as out:
        begun = time.monotonic()
        process = subprocess.Popen(
            [str(word) for word in words],
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        if watch is None:
            _, status, usage = os.wait4(process.pid, 0)
        else:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                watch(time.monotonic() - begun, process.pid)
                time.sleep(0.05)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, words))}\nended with {process.returncode}:\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Ended(seconds, cpu_seconds, usage.ru_maxrss * unit, out_path.read_text(errors="replace"))


def bnnmcmc(*words: str | Path) -> list[str | Path]:
    """Return the command ``bnnmcmc WORDS`` of this Python."""
    return [sys.executable, "-m", "bnnmcmc", *words]


def in_fresh_process(module: str, function: str, *arguments: Any, jax: bool = False) -> Any:
    """Call a module's function in a new process, which takes its JAX, and GPU, with it.

    With ``jax``, every CPU core is a JAX device there, as under the command line.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_call, module, function, arguments, jax).result()


def _call(module: str, function: str, arguments: tuple, jax: bool) -> Any:
    if jax:  # before the module: blackjax and numpyro wake JAX up when they are imported
        from bnnmcmc.placement import use_all_cores

        use_all_cores()
    return getattr(importlib.import_module(module), function)(*arguments)
