"""How the ensemble trained, and how the chains warmed up."""

from bnnmcmc.report import figures
from bnnmcmc.report.folder import RunFolder
from bnnmcmc.report.parts import Explanation, Section

EXPLAINED = (
    Explanation(
        "Deep ensemble",
        "Each member is trained from its own random start; the weights kept are those with the "
        "smallest validation loss. Each then starts a chain.",
        source="Lakshminarayanan et al. (2017), arXiv 1612.01474; "
        "Sommer et al. (2024), arXiv 2402.01484",
    ),
)
WARMED_UP = (
    Explanation(
        "Step size",
        "Tuned while warming up: as long as the energy error (or the acceptance rate) allows. It "
        "should have settled before the draws begin.",
        source="Hoffman and Gelman (2014), JMLR 15 (dual averaging); "
        "Robnik and Seljak (2023), arXiv 2303.18221; Sommer et al. (2025), arXiv 2502.06335",
    ),
)


def section(run: RunFolder) -> Section | None:
    """Return the section on training, None without a history."""
    if run.history is None:
        return None
    history = run.history["history"]
    if history.ndim != 3 or history.shape[2] != 2:
        raise ValueError(f"history has shape {history.shape}, expected (member, epoch, 2)")
    if history.size == 0:
        return None
    plot = figures.training(history, run.history["epochs"], run.history["best_epoch"])
    return Section("training", "Training", plots=[plot], explained=EXPLAINED)


def warmup(run: RunFolder) -> Section | None:
    """Return the section on the warm-up, None if there was none."""
    if run.warmup is None or "step_size" not in run.warmup:
        return None
    values = run.warmup["step_size"]
    if values.size == 0:  # a run without warm-up
        return None
    plots = [figures.step_size(values, run.failed, run.manifest["warmup"])]
    for name in figures.WARMUP_STATISTICS:
        found = run.warmup.get(name)
        if found is not None and found.size and found.shape == values.shape:
            plots.append(figures.warmup_statistic(name, found, run.failed, run.manifest["warmup"]))
    return Section("warmup", "Warm-up", plots=plots, explained=WARMED_UP)
