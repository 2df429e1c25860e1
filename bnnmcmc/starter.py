"""The commented starter config that `bnnmcmc init` writes."""

from collections.abc import Sequence
from pathlib import Path

from bnnmcmc.data import Table, read_table
from bnnmcmc.errors import InputError

# Whole numbers with at most this many different values are taken as class labels.
MAX_CLASS_NUMBERS = 10

TEMPLATE = """\
# An experiment for bnnmcmc. Every line has a default but [data]; unknown keys are refused.
#   bnnmcmc check {name}    checks everything and says what it will cost
#   bnnmcmc run {name}      trains, samples, scores, writes the report

[data]
{source}
target = {target}{features}
# drop = ["id"]                # columns to leave out
# categorical = ["zip"]        # numbers that are categories; text always is

[data.split]
test = 0.2                     # held out for the scores
validation = 0.1               # stops the ensemble's training early; sampled on afterwards
seed = 0

[model]
hidden = [16, 16, 16]          # widths of the hidden layers; [] is a linear model
activation = "silu"            # tanh, relu, silu, gelu, ...
# skip = true                  # residual connections between equal widths

[likelihood]
{likelihood}

[prior]
family = "normal"              # or laplace, student_t
scale = 1.0
# fan_in = true                # divide the scale by sqrt(fan-in)
# hierarchical = true          # sample a scale for each layer
# inputs = "horseshoe"         # a scale for each input: most are shrunk to zero

[ensemble]
members = 10                   # one chain starts from each
learning_rate = 0.005
batch_size = {batch_size}
patience = 200                 # epochs without a better validation loss

[sampler]
kernel = "mclmc"               # or mams, nuts, hmc: exact, and many times dearer
warmup = 20000                 # steps per chain
draws = 1000                   # kept per chain
thin = 10                      # steps per kept draw

# [stop]
# ess = 400                    # stop earlier: when the draws are worth so many independent ones

# [pool]
# weights = "stacking"         # chains by their validation score; needs sampler.rows = "train"

[run]
seed = 0
"""

GAUSSIAN = """\
kind = "gaussian"
scale = "predicted"            # noise that depends on the row; "sampled": one sigma
# kind = "student_t"           # outliers; laplace, gaussian_mixture: other shapes of noise
# kind = "negative_binomial"   # counts; poisson, zero_inflated_poisson; shares of 0 to 1: beta"""
CLASSES = """\
kind = "categorical"           # {count} classes"""


def write_starter(path: Path, data: Path | None, target: Sequence[str] | None) -> str:
    """Write a starter config for a table.

    Parameters
    ----------
    path : Path
        The file to write.
    data : Path or None
        The table; scikit-learn's diabetes data if None.
    target : sequence of str or None
        Columns to predict; the last one if None.

    Returns
    -------
    str
        What was found, in a sentence.

    Raises
    ------
    InputError
        The file exists, the table cannot be read, or has no such column.
    """
    if path.exists():
        raise InputError(f"{path}: exists already; remove it first, or write to another file")
    if data is None:
        if target:
            raise InputError("--target: give --data too, the table that has the column")
        source, names = 'source = "sklearn:diabetes"    # or path = "table.csv"', ["progression"]
        task, count, rows, features = "regression", 0, 442, ""
        said = "scikit-learn's diabetes data, regression of progression"
    else:
        table = read_table(data)
        names = list(target or table.default_target)
        missing = [name for name in names if name not in table.frame.columns]
        if missing:
            known = ", ".join(map(repr, table.frame.columns))
            raise InputError(f"--target: {data} has no column {missing[0]!r}; it has {known}")
        task, count = _task(table, names)
        rows = len(table.frame)
        others = [name for name in table.frame.columns if name not in names]
        source = f"path = {_quoted(_relative(data, path))}"
        features = f"\n# features = [{', '.join(map(_quoted, others[:8]))}]  # use only these"
        if not others:
            raise InputError(f"{data}: has only the column {names[0]!r}; expected features too")
        said = f"{rows} rows, {len(others)} further columns, {task} of {', '.join(names)}"
    likelihood = GAUSSIAN if task == "regression" else CLASSES.format(count=count)
    quoted = [_quoted(name) for name in names]
    text = TEMPLATE.format(
        name=path.name,
        source=source,
        target=quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]",
        features=features,
        likelihood=likelihood,
        # An epoch of at least a few steps, also for a small table.
        batch_size=min(32, max(1, rows // 4)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return said


def _task(table: Table, names: Sequence[str]) -> tuple[str, int]:
    """Guess the task: classes are text, truth values, or a few different whole numbers."""
    if len(names) > 1:
        return "regression", 0
    column = table.frame[names[0]]
    count = int(column.nunique())
    whole = column.dtype.kind in "iu" and count <= MAX_CLASS_NUMBERS
    if whole or column.dtype.kind not in "iuf":
        return "classification", count
    return "regression", 0


def _relative(data: Path, config: Path) -> str:
    """Write the table's path as the config file, in its own folder, will find it."""
    try:
        return str(data.resolve().relative_to(config.resolve().parent))
    except ValueError:
        return str(data.resolve())


def _quoted(text: str) -> str:
    import json

    return json.dumps(str(text), ensure_ascii=False)
