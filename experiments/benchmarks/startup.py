"""How long a user waits: for --help, and for the first signs of life of a run.

``bnnmcmc run`` is started on a pseudo-terminal, as a user sees it, and stopped once its first
progress bar has moved.
"""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.processes import bnnmcmc, run
from experiments.benchmarks.settings import CONFIG, Settings
from experiments.benchmarks.timing import summary
from experiments.benchmarks.whole_fit import our_environment

# What is waited for, in this order: any output; the ensemble's bar; its first trained epochs.
SIGNS = {
    "first output of run": rb"\S",
    "first progress bar of run": rb"Ensemble",
    "first epochs of run": rb"best loss",
}
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]")
PATIENCE = 300.0


def measure(settings: Settings) -> dict[str, Any]:
    """Measure --help, and a run's first signs of life, compilation cache empty and filled."""
    folder = settings.folder / "startup"
    helped = [
        run(bnnmcmc("--help"), folder / f"help-{i}.log").seconds for i in range(settings.repeats)
    ]
    rows = [{"what": "--help", "cache": ""} | _brief(helped)]
    for cache in ("empty", "filled"):
        found = []
        for i in range(settings.repeats):
            where = folder / (f"cache-{i}" if cache == "empty" else "cache-0")
            found.append(_first_signs(folder / f"{cache}-{i}", our_environment(settings, where)))
        rows += [
            {"what": sign, "cache": cache} | _brief([each[sign] for each in found])
            for sign in SIGNS
        ]
    return {"rows": rows}


def _brief(seconds: list[float]) -> dict[str, float]:
    found = summary(seconds)
    return {"seconds": found["seconds"], "spread": found["spread"]}


def _first_signs(out: Path, environment: dict[str, str]) -> dict[str, float]:
    """Start a run on a terminal 120 wide; return when each sign was seen, in seconds."""
    ours, theirs = pty.openpty()
    begun = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in bnnmcmc("run", CONFIG, "--out", out)],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **environment, "COLUMNS": "120", "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(theirs)
    seen: dict[str, float] = {}
    said = b""
    try:
        while len(seen) < len(SIGNS) and time.monotonic() - begun < PATIENCE:
            if not select.select([ours], [], [], 1.0)[0]:
                continue
            with contextlib.suppress(OSError):  # Linux: the other end has closed
                said += os.read(ours, 65536)
            now, text = time.monotonic() - begun, ESCAPES.sub(b"", said)
            for sign, pattern in SIGNS.items():
                if sign not in seen and re.search(pattern, text):
                    seen[sign] = now
            if process.poll() is not None:
                break
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        os.close(ours)
    if len(seen) < len(SIGNS):
        tail = ESCAPES.sub(b"", said)[-1500:].decode(errors="replace")
        raise RuntimeError(f"saw {list(seen)} only, in {PATIENCE:.0f} s; the run said:\n{tail}")
    return seen
