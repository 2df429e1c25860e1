"""How the report writes numbers and lists."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def number(value: Any) -> str:
    """Write a number for reading: four digits, a true minus sign, NaN as NaN."""
    if value is None:
        return "–"
    if not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    value = float(value)
    if not np.isfinite(value):
        text = "NaN" if np.isnan(value) else f"{value:g}"
    elif value.is_integer() and abs(value) < 1e9:
        text = f"{int(value):,}"
    else:
        text = f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("-", "−")


def percent(share: float) -> str:
    """Write a share as per cent with one decimal."""
    return f"{100 * share:.1f} %"


def plural(count: int, word: str) -> str:
    """Write a count and its noun."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return ("+" if value > 0 else "") + number(round(value, 4))


def with_error(value: float, error: float) -> str:
    """Write a value and its standard error, both to the error's second digit."""
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return number(value)
    decimals = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Write a time span: 3.2 s, 4 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def same_decimals(values: Sequence[Any]) -> Callable[[Any], str]:
    """Return how to write the numbers of a row so that they line up: four digits of the largest."""
    sizes = [abs(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    largest = max(sizes, default=0.0)
    if not 1e-3 <= largest < 1e5:
        return number
    decimals = min(4, max(0, 3 - math.floor(math.log10(largest))))
    return lambda v: (
        f"{v:,.{decimals}f}".replace("-", "−")
        if isinstance(v, int | float) and math.isfinite(v)
        else number(v)
    )


def listed(names: Sequence[Any], most: int = 20) -> str:
    """Write names with commas, a long list cut short."""
    text = ", ".join(str(name) for name in names[:most])
    return text + (f" and {len(names) - most:,} more" if len(names) > most else "")
