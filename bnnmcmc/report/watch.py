"""A report that is written again and again while its run goes on."""

import time
from collections.abc import Callable
from pathlib import Path

from bnnmcmc.report.folder import read_run
from bnnmcmc.report.page import render
from bnnmcmc.store import write_atomic


def watch_report(
    folder: Path,
    seconds: float,
    at_work: Callable[[], bool],
    said: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Write a run's report every few seconds, until the run ends or Ctrl-C.

    Parameters
    ----------
    folder : Path
        The run folder.
    seconds : float
        Between two reports; the page loads itself again as often.
    at_work : callable
        Whether a process is working on the run.
    said : callable
        Gets a line on what happens.
    sleep : callable
        Waits for so many seconds.

    Returns
    -------
    Path
        ``folder/report.html``; the last one written does not load itself again.
    """
    path = folder / "report.html"
    refresh = max(1, round(seconds))
    said(f"open {path.absolute()}; it loads itself again every {refresh} s (Ctrl-C ends this)")
    try:
        while True:
            # Asked first: a run that ends just after is then written once more, whole.
            going = at_work()
            run = read_run(folder)
            ended = run.manifest.get("stage") == "done" or not going
            write_atomic(path, render(run, 0 if ended else refresh).encode())
            if ended:
                break
            sleep(seconds)
    except KeyboardInterrupt:
        run = read_run(folder)
        write_atomic(path, render(run).encode())
    stage = run.manifest.get("stage")
    said("the run is done" if stage == "done" else f"no longer watched, in the stage {stage}")
    return path
