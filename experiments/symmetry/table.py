"""The study's table: what the parts that are there come to, beside the paper."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.symmetry.study import PAPER


def pooled(log_likelihood: np.ndarray) -> float:
    """Return the LPPD of draws (draw, row)."""
    values = log_likelihood.astype(np.float64)
    return float((np.logaddexp.reduce(values, axis=0) - np.log(len(values))).mean())


def of_many(log_likelihood: np.ndarray) -> float:
    r"""Return the LPPD that more and more draws would have, from that of all and of all but one.

    .. math:: G L_G - (G - 1) \overline{L_{G-1}}

    A pool of G draws has a lower LPPD than one of many, by about c / G; this takes that part away
    (Quenouille's jackknife).

    Parameters
    ----------
    log_likelihood : array (draw, row)
        Independent draws, at least 2.
    """
    count = len(log_likelihood)
    fewer = [pooled(np.delete(log_likelihood, i, axis=0)) for i in range(count)]
    return count * pooled(log_likelihood) - (count - 1) * float(np.mean(fewer))


def errors(log_likelihood: np.ndarray, seed: int = 0, times: int = 200) -> tuple[float, float]:
    """Return standard errors of an LPPD: of the choice of draws, and of test rows.

    Both by the bootstrap; draws of one chain depend on each other, so for these the first is too
    small.
    """
    rng, (draws, rows) = np.random.default_rng(seed), log_likelihood.shape
    values = log_likelihood.astype(np.float64)
    pointwise = np.logaddexp.reduce(values, axis=0) - np.log(draws)
    over_draws = [pooled(values[rng.integers(draws, size=draws)]) for _ in range(times)]
    over_rows = [pointwise[rng.integers(rows, size=rows)].mean() for _ in range(times)]
    return float(np.std(over_draws)), float(np.std(over_rows))


def read_parts(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Return the chains of one draw, part by part, and the longest chain."""
    parts, long = [], None
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            found = {name: file[name] for name in file.files}
        if path.name.startswith("chains"):
            parts.append(found)
        elif long is None or found["flat"].shape[1] > long["flat"].shape[1]:
            long = found
    # Parts of another size may hold the same chains once more.
    seen: set[int] = set()
    for part in parts:
        new = [i for i, chain in enumerate(part["chains"].tolist()) if chain not in seen]
        seen |= set(part["chains"].tolist())
        for name, value in part.items():
            if np.ndim(value) and len(value) == len(part["chains"]) and name != "chains":
                part[name] = value[new]
        part["chains"] = part["chains"][new]
    return parts, long


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row for each network, table, length of warm-up and seed that has parts."""
    found = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        network, table, warmup, seed = path.name.rsplit("-", 3)
        parts, long = read_parts(path)
        if not parts:
            continue
        values = np.concatenate([part["log_likelihood"][:, 0] for part in parts])
        of_draws, of_rows = errors(values)
        gradients = np.concatenate(
            [part["warmup_gradients"] + part["gradients"].sum(axis=1) for part in parts]
        )
        row: dict[str, Any] = {
            "network": network,
            "table": table,
            "warm-up": int(warmup),
            "seed": int(seed),
            "chains": len(values),
            "LPPD, chains": pooled(values),
            "of many chains": of_many(values) if len(values) > 1 else float("nan"),
            "se, chains": of_draws,
            "se, rows": of_rows,
            "mean of single chains": float(values.mean()),
            "paper, chains": PAPER[network, table][0],
            "draws": None,
            "LPPD, one chain": None,
            "paper, one chain": PAPER[network, table][1],
            "gradients per chain": float(gradients.mean()),
            "seconds": float(sum(part["seconds"] for part in parts)),
        }
        if long is not None:
            row["draws"] = long["log_likelihood"].shape[1]
            row["LPPD, one chain"] = pooled(long["log_likelihood"][0])
        found.append(row)
    return found


def as_markdown(found: list[dict[str, Any]]) -> str:
    """Write the rows as a table in Markdown."""
    columns = list(found[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in found:
        lines.append("| " + " | ".join(_text(row[name]) for name in columns) + " |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"
    return "" if value is None else str(value)
