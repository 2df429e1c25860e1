"""Tables and data sets: reading, checking, splitting, encoding and scaling.

A `Table` is what was read, a `Dataset` is what a network sees, and an `Encoding` leads from one
to the other: categories become 0/1 columns, numbers are scaled by the mean and the standard
deviation of the training part. No JAX here, and pandas and scikit-learn load on first use.
"""

import csv
import difflib
import hashlib
import itertools
import json
import math
import operator
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TextIO

import numpy as np

from bnnmcmc.errors import InputError, UnseenWarning

if TYPE_CHECKING:
    import pandas

Task = Literal["regression", "classification"]
# What a numeric target can be: any number, a whole number from 0, a share between 0 and 1.
Support = Literal["real", "count", "unit"]
Label = str | int | float | bool

MAX_CATEGORIES = 100
PARTS = ("train", "validation", "test")
SKLEARN_TABLES = ("diabetes", "breast_cancer", "wine", "iris", "digits", "linnerud")
# In a numeric column these words mean "no value". In a categorical one only the empty cell does.
MISSING_WORDS = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
# Whole numbers up to here are exact in float64.
MAX_EXACT = 2**53
# How many lines decide what separates the cells of a text file.
SNIFFED_LINES = 20
# How many columns or names a message lists.
MAX_LISTED = 10


@dataclass(frozen=True)
class Table:
    """A table as read, before any encoding.

    Parameters
    ----------
    frame : pandas.DataFrame
        (rows, columns), columns named; a table without names has ``x1 .. xp`` and ``y``.
    name : str
        Where it comes from, for messages: the path, ``"sklearn:diabetes"``, or ``"X"``.
    has_header : bool
        Whether the names of the columns were given.
    row_offset : int
        Row ``i`` of the frame, counted from 0, is ``i + row_offset`` in messages.
    default_target : tuple of str
        The columns to predict if the user names none.
    unit : {"row", "line"}
        What ``row_offset`` leads to: a line of a text file, or a row counted from 1.
    """

    frame: "pandas.DataFrame"
    name: str
    has_header: bool
    row_offset: int
    default_target: tuple[str, ...]
    unit: Literal["row", "line"] = "row"


@dataclass(frozen=True)
class FeatureColumn:
    """A feature column of the table.

    Parameters
    ----------
    name : str
        Its name in the table.
    categories : tuple of str or None
        One 0/1 column for each of them; None for a numeric column.
    center, scale : float
        A numeric value ``v`` becomes ``(v - center) / scale``.
    fill : float or None
        What stands for a missing number: the median of the training part. None where a missing
        value is an error.
    gaps : bool
        Whether values were missing in the training table: then one more 0/1 column says where.
    """

    name: str
    categories: tuple[str, ...] | None
    center: float
    scale: float
    fill: float | None = None
    gaps: bool = False


@dataclass(frozen=True)
class TargetColumn:
    """A target column of the table.

    Parameters
    ----------
    name : str
        Its name in the table.
    center, scale : float
        A value ``v`` becomes ``(v - center) / scale``; 0 and 1 for classes, counts and shares.
    support : {"real", "count", "unit"}
        What the likelihood takes it for.
    level : float
        Of a count or a share: its mean in the training part.
    """

    name: str
    center: float
    scale: float
    support: Support = "real"
    level: float = 1.0


@dataclass(frozen=True)
class Encoding:
    """All that is needed to encode new rows and to undo the scaling.

    Parameters
    ----------
    task : {"regression", "classification"}
        What the target is.
    features : tuple of FeatureColumn
        In the order of the table.
    targets : tuple of TargetColumn
        One for classification.
    classes : tuple of labels or None
        The labels in their own type, sorted; None for regression.
    has_header : bool
        Whether new rows are matched by column name (True) or by position (False).
    columns : tuple of str
        All columns of the training table, used or not, in its order: what positions mean.
    tolerant : bool
        Whether missing values and unseen categories of new rows are encoded, with a warning where
        the training table had none in that column (see `prepare`), or are errors.
    """

    task: Task
    features: tuple[FeatureColumn, ...]
    targets: tuple[TargetColumn, ...]
    classes: tuple[Label, ...] | None
    has_header: bool
    columns: tuple[str, ...] = ()
    tolerant: bool = False

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the encoded columns: ``"age"``, ``"color=red"``, ``"age is missing"``."""
        return tuple(
            name
            for feature in self.features
            for name in (
                *(
                    [feature.name]
                    if feature.categories is None
                    else [f"{feature.name}={category}" for category in feature.categories]
                ),
                *([f"{feature.name} is missing"] if feature.gaps else []),
            )
        )

    @property
    def target_scale(self) -> np.ndarray:
        """What a scaled target is multiplied by, (targets,)."""
        return np.array([target.scale for target in self.targets])

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON types.

        Returns
        -------
        dict
        """
        fields = asdict(self)
        for target in fields["targets"]:
            if target["support"] == "real":  # as in files from before there were others
                del target["support"], target["level"]
        if not self.tolerant:  # as before there was a choice: fingerprints of runs stay as they are
            del fields["tolerant"]
            for feature in fields["features"]:
                del feature["fill"], feature["gaps"]
        return json.loads(json.dumps(fields, allow_nan=False))

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Encoding":
        """Undo `to_json`.

        Parameters
        ----------
        fields : dict
            What `to_json` returned.

        Returns
        -------
        Encoding

        Raises
        ------
        InputError
            A field is missing or unknown.
        """
        try:
            return Encoding(
                task=fields["task"],
                features=tuple(
                    FeatureColumn(
                        name=f["name"],
                        categories=None if f["categories"] is None else tuple(f["categories"]),
                        center=f["center"],
                        scale=f["scale"],
                        fill=f.get("fill"),
                        gaps=f.get("gaps", False),
                    )
                    for f in fields["features"]
                ),
                targets=tuple(TargetColumn(**t) for t in fields["targets"]),
                classes=None if fields["classes"] is None else tuple(fields["classes"]),
                has_header=fields["has_header"],
                columns=tuple(fields["columns"]),
                tolerant=fields.get("tolerant", False),
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"not an encoding as written by bnnmcmc: {type(error).__name__}: {error}; "
                "expected the contents of a scaling.json"
            ) from error


@dataclass(frozen=True, eq=False)
class Dataset:
    """Arrays ready for a network, and how they came about.

    Parameters
    ----------
    x : numpy array (rows, encoded features), float64
        Scaled by the training part.
    y : numpy array
        Regression: (rows, targets) float64, scaled by the training part. Classification:
        (rows,) int64, index into ``encoding.classes``.
    train, validation, test : numpy array of int64
        Row indices, disjoint, sorted.
    encoding : Encoding
        Leads from a table to ``x`` and ``y``.
    name : str
        Where the table came from.
    """

    x: np.ndarray
    y: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    encoding: Encoding
    name: str


@dataclass(frozen=True)
class Split:
    """Which rows train, validate and test: by share, by a column, or by given rows.

    Parameters
    ----------
    test, validation : float
        Shares of all rows; 0 for an empty part. ``validation`` also counts where a column or
        rows give no validation part: it is then taken out of the training part.
    column : str, optional
        A column with the words train, validation, test; it is then no feature.
    train_rows, validation_rows, test_rows : sequence of int, optional
        Row indices counted from 0. Without ``train_rows``, all other rows train.
    seed : int
        Of the random parts, 0 <= seed < 2**32.
    """

    test: float = 0.2
    validation: float = 0.1
    column: str | None = None
    train_rows: Sequence[int] | None = None
    validation_rows: Sequence[int] | None = None
    test_rows: Sequence[int] | None = None
    seed: int = 0


# ---------------------------------------------------------------------------------- messages


def _fail(name: str, problems: Sequence[str]) -> None:
    """Raise one error for all problems, if there are any."""
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        listed = [f"  {problem}" for problem in problems[:MAX_LISTED]]
        if len(problems) > MAX_LISTED:
            listed.append(f"  and {len(problems) - MAX_LISTED} more")
        raise InputError(f"{name}: {len(problems)} mistakes\n" + "\n".join(listed))


def _listed(names: Sequence[Any]) -> str:
    text = ", ".join(repr(name) for name in names[:MAX_LISTED])
    return text + (f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else "")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def _more(mask: np.ndarray, what: str) -> str:
    others = int(mask.sum()) - 1
    return f" (and {others} more such {what if others == 1 else what + 's'})" if others else ""


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _at(table: Table, row: int, column: str) -> str:
    return f"{table.name}, {table.unit} {row + table.row_offset}, column {column!r}"


# ------------------------------------------------------------------------------------ reading


def read_table(path: str | Path, header: bool | None = None) -> Table:
    """Read a file: CSV, space-separated text, Parquet or npz.

    Cells of text files are separated by commas, semicolons, tabs or blanks, whichever fits the
    first lines. The file is read into memory as a whole.

    Parameters
    ----------
    path : path
        ``.parquet`` and ``.npz`` by their ending, anything else as text. An npz holds ``X`` or
        ``x``, ``y`` or ``Y`` and, if wanted, ``feature_names`` and ``target_names``.
    header : bool, optional
        Whether a text file's first line holds names; by default it does unless every field in
        it is a number.

    Returns
    -------
    Table
        (rows, columns); the last column is the default target.

    Raises
    ------
    InputError
        The file cannot be read, is empty, has no rows under its header, has lines of unequal
        length, or a first line that could be names or data.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; expected CSV, space-separated text, Parquet or npz")
    try:
        match path.suffix.lower():
            case ".parquet" | ".pq":
                return _read_parquet(path)
            case ".npz":
                return _read_npz(path)
            case _:
                return _read_text(path, header)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _read_parquet(path: Path) -> Table:
    import pandas as pd
    import pyarrow as pa

    try:
        frame = pd.read_parquet(path)
    except (pa.ArrowException, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    return _named_table(frame, str(path))


def _named_table(frame: "pandas.DataFrame", name: str) -> Table:
    """Make a table of a frame with column names; the last column is the default target."""
    frame = frame.reset_index(drop=True)
    frame.columns = [str(column) for column in frame.columns]
    return Table(frame, name, has_header=True, row_offset=1, default_target=_last(frame))


def _last(frame: "pandas.DataFrame") -> tuple[str, ...]:
    return tuple(frame.columns[-1:])


def _read_npz(path: Path) -> Table:
    try:
        # np.load leaves a damaged file open if it opens it itself.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not a readable npz file: {error}; labels must be arrays of strings or "
            "numbers, not of objects"
        ) from error
    except Exception as error:  # zipfile.BadZipFile and zlib.error have no common base
        raise InputError(f"{path}: not a readable npz file: {error}") from error
    x = next((arrays[key] for key in ("X", "x") if key in arrays), None)
    y = next((arrays[key] for key in ("y", "Y") if key in arrays), None)
    if x is None:
        raise InputError(
            f"{path}: no array 'X' or 'x' for the features; found {_listed(sorted(arrays))}"
        )
    names = [
        [str(name) for name in np.atleast_1d(arrays[key])] if key in arrays else None
        for key in ("feature_names", "target_names")
    ]
    return _array_table(x, y, names[0], names[1], str(path))


def _read_text(path: Path, header: bool | None) -> Table:
    import pandas as pd

    lines = _text_lines(path)
    first = next((i for i, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise InputError(f"{path}: the file is empty; expected one row per line")
    while not lines[-1].strip():
        lines.pop()
    delimiter = _delimiter(lines[first : first + SNIFFED_LINES])
    rows = []
    for number, line in enumerate(lines[first:], start=first + 1):
        try:
            rows.append(_fields(line, delimiter))
        except csv.Error as error:
            raise InputError(_unmatched_quotes(path, number, error)) from error
    _check_ragged(path, rows, lines[first:], first + 1)
    if header is None:
        header = _looks_like_header(path, rows[0], first + 1)
    names = rows[0] if header else _default_names(len(rows[0]))
    cells = rows[1:] if header else rows
    if not cells:
        raise InputError(
            f"{path}: a header (line {first + 1}) but no rows; expected one row per line under it"
        )
    columns = [_typed(column) for column in zip(*cells, strict=True)]
    frame = pd.DataFrame(dict(enumerate(columns)))
    frame.columns = names
    offset = first + 2 if header else first + 1
    return Table(frame, str(path), header, offset, _last(frame), unit="line")


def read_pieces(path: str | Path, rows: int, header: bool | None = None) -> Iterator[Table]:
    """Read a file as `read_table` does, some rows at a time, whatever its length.

    Parameters
    ----------
    path : path
    rows : int
        Most rows of a piece.
    header : bool, optional
        As in `read_table`.

    Yields
    ------
    Table
        (rows, columns), in the order of the file. Whether a column holds numbers or text is found
        piece by piece. An npz file is read as a whole.

    Raises
    ------
    InputError
        As `read_table`, when the piece is reached.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if not path.is_file() or suffix == ".npz":
            yield from _cut_pieces(read_table(path, header), rows)
        elif suffix in (".parquet", ".pq"):
            yield from _parquet_pieces(path, rows)
        else:
            yield from _text_pieces(path, rows, header)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def count_rows(path: str | Path) -> int:
    """Return about how many rows a file holds (lines of a text, a header included), for progress.

    Parameters
    ----------
    path : path
    """
    path = Path(path)
    if not path.is_file():
        return 0  # `read_pieces` says so
    if path.suffix.lower() in (".parquet", ".pq"):
        import pyarrow as pa
        from pyarrow import parquet

        try:
            return parquet.ParquetFile(path).metadata.num_rows
        except (pa.ArrowException, OSError, ValueError):
            return 0
    try:
        with path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b""))
    except OSError:
        return 0


def _cut_pieces(table: Table, rows: int) -> Iterator[Table]:
    for low in range(0, len(table.frame), rows):
        frame = table.frame.iloc[low : low + rows].reset_index(drop=True)
        yield replace(table, frame=frame, row_offset=table.row_offset + low)


def _parquet_pieces(path: Path, rows: int) -> Iterator[Table]:
    import pyarrow as pa
    from pyarrow import parquet

    done = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):
                table = _named_table(batch.to_pandas(), str(path))
                yield replace(table, row_offset=1 + done)
                done += len(table.frame)
    except (pa.ArrowException, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    if not done:
        raise InputError(f"{path}: the table has no rows; expected at least one")


def _text_pieces(path: Path, rows: int, header: bool | None) -> Iterator[Table]:
    import pandas as pd

    with path.open(encoding="utf-8-sig") as file:
        lines = _numbered_lines(path, file)
        head = list(itertools.islice(lines, SNIFFED_LINES))
        if not head:
            raise InputError(f"{path}: the file is empty; expected one row per line")
        delimiter = _delimiter([line for _, line in head])
        first, line = head[0]
        top = _fields(line, delimiter)
        if header is None:
            header = _looks_like_header(path, top, first)
        names = top if header else _default_names(len(top))
        rest = itertools.chain(head[1:] if header else head, lines)
        while piece := list(itertools.islice(rest, rows)):
            cells = []
            for number, line in piece:
                try:
                    cells.append(_fields(line, delimiter))
                except csv.Error as error:
                    raise InputError(_unmatched_quotes(path, number, error)) from error
                if len(cells[-1]) != len(names):
                    raise InputError(
                        f"{path}, line {number}: found {len(cells[-1])} fields, expected "
                        f"{len(names)} fields as in line {first}; correct or remove the line"
                    )
            frame = pd.DataFrame(dict(enumerate(_typed(c) for c in zip(*cells, strict=True))))
            frame.columns = names
            yield Table(frame, str(path), header, piece[0][0], _last(frame), unit="line")
            del frame, cells
        if header and len(head) == 1:
            raise InputError(
                f"{path}: a header (line {first}) but no rows; expected one row per line under it"
            )


def _numbered_lines(path: Path, file: TextIO) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, without empty ones at both ends."""
    empty, begun = 0, False
    try:
        for number, text in enumerate(file, start=1):
            line = text.rstrip("\n")
            if not line.strip():
                empty = empty or number
                continue
            if "\0" in line:
                raise InputError(_not_text(path))
            if empty and begun:
                raise InputError(
                    f"{path}, line {empty}: found an empty line, expected fields as in the first "
                    "one; correct or remove the line"
                )
            empty, begun = 0, True
            yield number, line
    except UnicodeDecodeError as error:
        raise InputError(_not_text(path)) from error


def _not_text(path: Path) -> str:
    return (
        f"{path}: not UTF-8 text; expected CSV or space-separated text in UTF-8, or a file "
        "ending in .parquet or .npz"
    )


def _unmatched_quotes(path: Path, number: int, error: csv.Error) -> str:
    return (
        f"{path}, line {number}: the quotes do not match ({error}); a quoted cell must "
        "end in the line in which it starts, with nothing after the quote"
    )


def _text_lines(path: Path) -> list[str]:
    try:
        # utf-8-sig: spreadsheets write a byte-order mark that would stick to the first name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(_not_text(path))
    return text.split("\n")


def _fields(line: str, delimiter: str | None) -> list[str]:
    """Return the cells of a line; ``delimiter`` None stands for any run of blanks."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(delimiter)]
    line = line if delimiter else " ".join(line.split())
    reader = csv.reader([line], delimiter=delimiter or " ", skipinitialspace=True, strict=True)
    return [cell.strip() for cell in next(reader)]


def _delimiter(lines: Sequence[str]) -> str | None:
    """Return what separates the cells: the first candidate that gives all lines alike."""
    # The comma comes late: it may be a decimal comma. Blanks come last: names may hold them.
    candidates = (";", "\t", ",", None)
    longest: tuple[int, str | None] = (1, ",")
    for delimiter in candidates:
        try:
            counts = [len(_fields(line, delimiter)) for line in lines]
        except csv.Error:
            continue
        if counts[0] > 1 and len(set(counts)) == 1:
            return delimiter
        if counts[0] > longest[0]:
            longest = (counts[0], delimiter)
    return longest[1]


def _check_ragged(path: Path, rows: Sequence[list[str]], lines: Sequence[str], first: int) -> None:
    expected = len(rows[0])
    bad = [i for i, row in enumerate(rows) if len(row) != expected or not lines[i].strip()]
    if not bad:
        return
    found = f"{len(rows[bad[0]])} fields" if lines[bad[0]].strip() else "an empty line"
    more = f" ({len(bad) - 1} more such lines)" if len(bad) > 1 else ""
    raise InputError(
        f"{path}, line {first + bad[0]}: found {found}{more}, expected {expected} fields as in "
        f"line {first}; correct or remove the line"
    )


def _looks_like_header(path: Path, row: Sequence[str], line: int) -> bool:
    # A word such as "Na" may be a name or a missing number: it decides nothing.
    values = [_number(cell) for cell in row]
    numbers = [c for c, v in zip(row, values, strict=True) if v is not None and math.isfinite(v)]
    texts = [c for c, v in zip(row, values, strict=True) if v is None]
    if not numbers or not texts:
        return not numbers
    # A wrong guess would lose the first row, or turn every column into text.
    raise InputError(
        f"{path}, line {line}: found both a number ({numbers[0]!r}) and text ({texts[0]!r}), so "
        "the line could be names or data; write a line of names above it, or give header=True or "
        "header=False to read_table"
    )


def _default_names(columns: int) -> list[str]:
    return [f"x{i}" for i in range(1, columns)] + ["y"]


def _typed(cells: Sequence[str]) -> np.ndarray | list[str]:
    """Return the numbers or truth values that all cells hold, else the cells as they are."""
    try:
        values = np.array([cell or "nan" for cell in cells], dtype=object).astype(np.float64)
    except ValueError:
        values = None
    # float() reads "1_000", which nobody means in a table.
    if values is not None and not any("_" in cell for cell in cells):
        whole = np.isfinite(values) & (np.floor(values) == values) & (np.abs(values) < MAX_EXACT)
        return values.astype(np.int64) if whole.all() else values
    words = [cell.lower() for cell in cells]
    if set(words) <= {"true", "false"}:
        return np.array([word == "true" for word in words])
    return list(cells)


def _number(cell: Any) -> float | None:
    """Return the number in a cell, NaN if it says that there is none, None if it is no number."""
    if isinstance(cell, str):
        text = cell.strip()
        if text.lower() in MISSING_WORDS:
            return math.nan
        if "_" in text:
            return None
        cell = text
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------ sources


def find_table(path: str | Path, folders: Sequence[Path]) -> Path | None:
    """Find a file as given, else in each folder in turn.

    Parameters
    ----------
    path : path
        ``~`` stands for the home folder.
    folders : sequence of path
        Where else to look.

    Returns
    -------
    Path or None
        None if there is no such file.
    """
    return next((place for place in _places(path, folders) if place.is_file()), None)


def _places(path: str | Path, folders: Sequence[Path]) -> list[Path]:
    given = Path(path).expanduser()
    return list(dict.fromkeys([given, *(Path(folder) / given for folder in folders)]))


def load_table(
    *,
    path: str | Path | None = None,
    source: str | None = None,
    folders: Sequence[Path] = (),
    target: str | Sequence[str] | None = None,
) -> Table:
    """Read the file at ``path`` if it is found, else fetch ``source``.

    Parameters
    ----------
    path : path, optional
        Looked for as given, then in ``folders``.
    source : str, optional
        ``sklearn:NAME``, ``openml:NAME`` or ``openml:ID``.
    folders : sequence of path
        Where else to look.
    target : str or sequence of str, optional
        Columns to predict instead of the source's own.

    Returns
    -------
    Table
        (rows, columns).

    Raises
    ------
    InputError
        Neither is given, the file is nowhere and there is no source, the source is unknown or
        cannot be fetched, or the file cannot be used (see `read_table`).
    """
    found = None if path is None else find_table(path, folders)
    if found is not None:
        table = read_table(found)
    elif source is not None:
        table = _fetch(source)
    elif path is not None:
        raise InputError(_not_found(path, folders))
    else:
        raise InputError("no data: give data.path (a file) or data.source (such as sklearn:wine)")
    if target is None:
        return table
    return Table(
        table.frame, table.name, table.has_header, table.row_offset, _names(target), table.unit
    )


def _not_found(path: str | Path, folders: Sequence[Path]) -> str:
    places = _places(path, folders)
    near: list[str] = []
    for place in places:
        if place.parent.is_dir():
            files = [file.name for file in place.parent.iterdir() if file.is_file()]
            near += [
                str(place.parent / name)
                for name in difflib.get_close_matches(place.name, files, n=2)
            ]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return (
        f"{path}: no such file; looked for {', '.join(str(place) for place in places)}{hint}; "
        "correct data.path, set BNNMCMC_DATA to the folder that holds it, or give data.source"
    )


def _fetch(source: str) -> Table:
    kind, _, name = source.partition(":")
    match kind:
        case "sklearn":
            return _fetch_sklearn(name)
        case "openml" if name:
            return _fetch_openml(name)
        case _:
            raise InputError(
                f"data.source = {source!r}: expected sklearn:NAME, openml:NAME or openml:ID"
            )


def _fetch_sklearn(name: str) -> Table:
    if name not in SKLEARN_TABLES:
        raise InputError(
            f"data.source = 'sklearn:{name}': unknown table{_nearest(name, SKLEARN_TABLES)}; "
            f"expected one of {', '.join(SKLEARN_TABLES)}"
        )
    import sklearn.datasets

    # The diabetes table comes scaled by all its rows unless told otherwise.
    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(sklearn.datasets, f"load_{name}")(as_frame=True, **options)
    frame = bunch.frame
    if name == "diabetes":
        frame = frame.rename(columns={"target": "progression"})
    elif name != "linnerud":
        frame["target"] = np.asarray(bunch.target_names)[frame["target"].to_numpy()]
    targets = bunch.target_names if name == "linnerud" else _last(frame)
    return Table(frame, f"sklearn:{name}", True, 1, tuple(targets))


def _fetch_openml(name: str) -> Table:
    import sklearn.datasets

    which: dict[str, Any] = {"data_id": int(name)} if name.isdecimal() else {"name": name}
    try:
        bunch = sklearn.datasets.fetch_openml(**which, as_frame=True, parser="auto")
    except Exception as error:  # network, cache and parser errors have no common base
        raise InputError(
            f"data.source = 'openml:{name}': could not be fetched: {type(error).__name__}: "
            f"{error}; check the name and the network, or give a file in data.path instead"
        ) from error
    table = _named_table(bunch.frame, f"openml:{name}")
    targets = tuple(str(target) for target in bunch.target_names or ())
    return Table(table.frame, table.name, True, 1, targets)


def table_from_arrays(
    x: Any,
    y: Any = None,
    feature_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
) -> Table:
    """Make a table of arrays in memory.

    Parameters
    ----------
    x : array or DataFrame (rows, features)
        pandas, or anything with ``to_pandas()``.
    y : array, Series or DataFrame (rows,) or (rows, targets), optional
        Numbers, or labels of any type; None for rows to predict.
    feature_names, target_names : sequence of str, optional
        Instead of the frame's own; without either ``x1 .. xp`` and ``y`` (``y1 .. yt``).

    Returns
    -------
    Table
        (rows, features + targets), the targets last; named ``"X"`` in messages.

    Raises
    ------
    InputError
        ``x`` is not two-dimensional, ``y`` has another number of rows, names do not fit.
    """
    return _array_table(x, y, feature_names, target_names, "X")


def _array_table(
    x: Any,
    y: Any,
    feature_names: Sequence[str] | None,
    target_names: Sequence[str] | None,
    name: str,
) -> Table:
    import pandas as pd

    features, found = _frame(x, name, "X")
    if not found:
        features.columns = [f"x{i}" for i in range(1, features.shape[1] + 1)]
    features = _renamed(features, feature_names, name, "feature_names")
    has_header = found or feature_names is not None
    if y is None:
        return Table(features, name, has_header, 1, ())
    targets, found = _frame(y, name, "y")
    if not found:
        count = targets.shape[1]
        targets.columns = ["y"] if count == 1 else [f"y{i}" for i in range(1, count + 1)]
    targets = _renamed(targets, target_names, name, "target_names")
    if len(features) != len(targets):
        raise InputError(
            f"{name}: X has {_rows(len(features))} and y has {_rows(len(targets))}; expected as "
            "many in both"
        )
    shared = [column for column in targets.columns if column in set(features.columns)]
    if shared:
        raise InputError(
            f"{name}: {_listed(shared)} names a column both of X and of y; rename it, or give "
            "target_names"
        )
    frame = pd.concat([features, targets], axis=1)
    return Table(frame, name, has_header, 1, tuple(targets.columns))


def _frame(values: Any, name: str, what: str) -> "tuple[pandas.DataFrame, bool]":
    """Return a frame, rows counted from 0, and whether its columns came with names."""
    import pandas as pd

    if not isinstance(values, pd.DataFrame | pd.Series) and hasattr(values, "to_pandas"):
        values = values.to_pandas()
    if isinstance(values, pd.Series):
        values = values.to_frame() if values.name not in (None, "") else values.to_numpy()
    if isinstance(values, pd.DataFrame):
        frame = values.reset_index(drop=True)
        frame.columns = [str(column) for column in frame.columns]
        return frame, True
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name}: {what} is no array: {error}") from error
    if what == "y" and array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2:
        raise InputError(
            f"{name}: {what} has shape {array.shape}; expected (rows, columns), a dense array or "
            "a DataFrame (for one column: reshape(-1, 1))"
        )
    if array.dtype.kind == "S":
        array = np.char.decode(array)
    if what == "X" and array.dtype.kind == "U":
        # One column of text makes an array of numbers and text all text: undo it as for a file.
        return pd.DataFrame({i: _typed(cells.tolist()) for i, cells in enumerate(array.T)}), False
    # Arrays of objects: a column that holds only numbers shall be a numeric one.
    return pd.DataFrame(array).infer_objects(), False


def _renamed(
    frame: "pandas.DataFrame", names: Sequence[str] | None, name: str, what: str
) -> "pandas.DataFrame":
    if names is None:
        return frame
    if len(names) != frame.shape[1]:
        raise InputError(
            f"{name}: {what} has {len(names)} names ({_listed(list(names))}), expected "
            f"{frame.shape[1]}, one for each column"
        )
    frame.columns = [str(column) for column in names]
    return frame


# -------------------------------------------------------------------------------------- cells


def _floats(column: "pandas.Series") -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a column, NaN where there is none, and where a cell is no number."""
    from pandas.api import types

    dtype = column.dtype
    if types.is_bool_dtype(dtype) or types.is_numeric_dtype(dtype):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.zeros(len(values), dtype=bool)
    missing = column.isna().to_numpy()
    numbers = [
        math.nan if gone else _number(cell)
        for cell, gone in zip(column.astype(object), missing, strict=True)
    ]
    bad = np.array([number is None for number in numbers], dtype=bool)
    return np.array([math.nan if n is None else n for n in numbers], dtype=np.float64), bad


def _is_categorical(table: Table, name: str) -> bool:
    """Tell categories from numbers, for a column that the user has not called categorical."""
    from pandas.api import types

    column = table.frame[name]
    dtype = column.dtype
    if types.is_bool_dtype(dtype) or isinstance(dtype, types.CategoricalDtype):
        return True
    if types.is_numeric_dtype(dtype) and not types.is_complex_dtype(dtype):
        return False
    if not (types.is_object_dtype(dtype) or types.is_string_dtype(dtype)):
        raise InputError(
            f"{table.name}, column {name!r}: found values of type {dtype}, expected numbers or "
            f"categories; turn them into numbers, or leave the column out: "
            f'data.drop = ["{name}"]'
        )
    cells = list(column.astype(object))
    values, bad = _floats(column)
    filled = bad | ~np.isnan(values)
    if not bad.any():
        # Only numbers: text on purpose ("1", "2" in Parquet), or numbers kept as objects, or
        # numbers of a text file with missing cells.
        return bool(filled.all()) and all(isinstance(cell, str) for cell in cells)
    # "1,5" is a number to those who wrote it; as categories such a column would be nonsense.
    words = bad & [not _is_decimal_comma(cell) for cell in cells]
    return bool(2 * words.sum() > filled.sum())


def _is_decimal_comma(cell: Any) -> bool:
    return isinstance(cell, str) and re.fullmatch(r"[-+]?\d+,\d+", cell.strip()) is not None


def _check_numbers(
    table: Table,
    name: str,
    values: np.ndarray,
    bad: np.ndarray,
    if_text: str,
    gaps: bool = False,
) -> None:
    """Raise an error that names the first cell that is not a finite number (``gaps``: or empty)."""
    wrong = bad | np.isinf(values) if gaps else ~np.isfinite(values)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    cell = table.frame[name].iloc[row]
    at, more = _at(table, row, name), _more(wrong, "cell")
    if bad[row]:
        advice = "write a decimal point" if _is_decimal_comma(cell) else if_text
        raise InputError(f"{at}: found {str(cell)!r}{more}, expected a number; {advice}")
    if np.isnan(values[row]):
        raise InputError(_missing(at, cell, more))
    raise InputError(
        f"{at}: found the infinite value {values[row]}{more}, expected a finite number; correct "
        "the cell or remove its row"
    )


def _missing(at: str, cell: Any, more: str) -> str:
    found = f" ({cell!r})" if isinstance(cell, str) and cell else ""
    return (
        f"{at}: found a missing value{found}{more}, expected a value in every row; fill it in, "
        "remove its row, or leave the column out"
    )


def _label(value: Any) -> str:
    """Return the text by which labels are compared, the same for 1, 1.0 and "1.0"."""
    if isinstance(value, str):
        number = _number(value)
        exact = number is not None and math.isfinite(number) and abs(number) < MAX_EXACT
        return _label(number) if exact else value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _levels(column: "pandas.Series") -> tuple[np.ndarray, list[Any]]:
    """Return (rows,) indices into the sorted distinct values, -1 where missing, and these."""
    import pandas as pd

    codes, uniques = pd.factorize(column)
    values = [value.item() if isinstance(value, np.generic) else value for value in uniques]
    first: dict[str, Any] = {}
    for value in values:
        if value != "":
            first.setdefault(_label(value), value)
    try:
        labels = sorted(first, key=lambda label: first[label])
    except TypeError:  # labels of several types
        labels = sorted(first)
    index = {label: i for i, label in enumerate(labels)}
    # The last entry is for code -1, the missing cells.
    lookup = np.array([index.get(_label(value), -1) for value in values] + [-1], dtype=np.int64)
    return lookup[codes], [first[label] for label in labels]


def _check_levels(table: Table, name: str, codes: np.ndarray, gaps: bool = False) -> None:
    """Raise an error that names the first cell without a category (allowed with ``gaps``)."""
    column, missing = table.frame[name], codes < 0
    if missing.any() and not gaps:
        row = int(missing.argmax())
        raise InputError(_missing(_at(table, row, name), column.iloc[row], _more(missing, "cell")))
    if column.dtype.kind == "f":
        _check_numbers(table, name, *_floats(column), if_text="", gaps=gaps)


# ------------------------------------------------------------------------------------ prepare


@dataclass(frozen=True)
class _RawFeature:
    """A checked column: numbers, or with ``categories`` indices into them."""

    name: str
    values: np.ndarray
    categories: tuple[str, ...] | None


def prepare(
    table: Table,
    *,
    task: Task,
    target: str | Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    categorical: Sequence[str] = (),
    split: Split = Split(),
    batch_size: int | None = None,
    support: Support = "real",
    tolerant: bool = False,
) -> Dataset:
    """Check a table, split it, and encode and scale it by its training part.

    Columns of text, categories and truth values become 0/1 columns, one for each category of
    the whole table. A column of text in which at most half of the cells are not numbers counts
    as numeric with mistakes.

    With ``tolerant``, a missing number becomes the median of the training part and a missing
    category 0 in all columns of its categories; a column with gaps gets one more 0/1 column that
    says where they are. In new rows, a category that the table did not have becomes 0 in all
    columns too; that, and a gap in a column that had none, is an `UnseenWarning`. Columns that are
    constant in the training part are kept, as 0. Gaps in targets stay errors.

    Parameters
    ----------
    table : Table
        (rows, columns).
    task : {"regression", "classification"}
        What the target is.
    target : str or sequence of str, optional
        Columns to predict, one for classification; the table's default if not given.
    features : sequence of str, optional
        Use only these columns.
    drop : sequence of str
        Columns to leave out.
    categorical : sequence of str
        Columns to treat as categories, whatever they hold.
    split : Split
        Which rows train, validate and test.
    batch_size : int, optional
        The training part must have as many rows.
    support : {"real", "count", "unit"}
        What the likelihood takes a numeric target for. Counts, and shares between 0 and 1, are
        checked and stay as they are.
    tolerant : bool
        See above; else gaps, unseen categories and constant columns are errors.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        A name, a cell, the split, a constant column or a class makes the table unusable; the
        message lists all such mistakes that do not follow from one another.
    """
    targets, names = _choose_columns(table, task, target, features, drop, categorical, split)
    rows = len(table.frame)
    problems: list[str] = _split_problems(table, split, rows)
    raw: list[_RawFeature] = []
    for name in names:
        try:
            raw.append(_read_feature(table, name, name in _names(categorical), tolerant))
        except InputError as error:
            problems.append(str(error))
    y = np.empty((rows, 0))
    classes: tuple[Label, ...] | None = None
    try:
        if task == "classification":
            y, classes = _read_classes(table, targets[0])
        else:
            y = _read_numbers(table, targets)
            _check_support(table, targets, y, [support] * len(targets))
    except InputError as error:
        problems.append(str(error))
    _fail(table.name, problems)

    train, validation, test = _split(table, split, rows, y if classes else None, classes)
    fitted, problems = _fit_features(table, raw, train, tolerant)
    if classes is None:
        columns, more = _fit_targets(table, targets, y, train, support)
        y = (y - [c.center for c in columns]) / [c.scale for c in columns] if not more else y
    else:
        columns = (TargetColumn(targets[0], 0.0, 1.0),)
        more = _absent_classes(table, targets[0], classes, y[train])
    problems += more
    if batch_size is not None and len(train) < batch_size:
        problems.append(
            f"{table.name}: the training part has {_rows(len(train))}, fewer than the batch size "
            f"of {batch_size}; choose a smaller batch or more training rows"
        )
    _fail(table.name, problems)
    encoding = Encoding(
        task, fitted, columns, classes, table.has_header, tuple(table.frame.columns), tolerant
    )
    x = np.column_stack([_encode(f, r.values) for f, r in zip(fitted, raw, strict=True)])
    return Dataset(x, y, train, validation, test, encoding, table.name)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))


def _choose_columns(
    table: Table,
    task: Task,
    target: str | Sequence[str] | None,
    features: Sequence[str] | None,
    drop: Sequence[str],
    categorical: Sequence[str],
    split: Split,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the targets and of the features, both in the order of the table."""
    columns = [str(column) for column in table.frame.columns]
    problems = []
    if task not in ("regression", "classification"):
        problems.append(f"task = {task!r}: expected 'regression' or 'classification'")
    if len(table.frame) == 0:
        problems.append(f"{table.name}: the table has no rows; expected at least one")
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        problems.append(
            f"{table.name}: found several columns named {_listed(twice)}, expected different "
            "names; rename them in the file"
        )
    targets = _names(table.default_target if target is None else target)
    kept = None if features is None else _names(features)
    dropped = _names(drop)
    given = {
        "data.target": targets,
        "data.features": kept or (),
        "data.drop": dropped,
        "data.categorical": _names(categorical),
        "data.split.column": () if split.column is None else (split.column,),
    }
    problems += [
        f"{field}: {table.name} has no column {name!r}{_nearest(name, columns)}; its columns are "
        f"{_listed(columns)}"
        for field, names in given.items()
        for name in names
        if name not in columns
    ]
    if not targets:
        problems.append(
            f"{table.name}: no column to predict; name one in data.target, of {_listed(columns)}"
        )
    if task == "classification" and len(targets) > 1:
        problems.append(
            f"data.target: found {len(targets)} columns ({_listed(targets)}), expected one for "
            "classification"
        )
    if task == "regression":
        given["data.categorical"] = tuple(n for n in _names(categorical) if n not in targets)
        problems += [
            f"data.categorical: {name!r} is the target of a regression, expected numbers; take "
            "it out, or choose a classification likelihood"
            for name in _names(categorical)
            if name in targets
        ]
    problems += [
        f"{field}: {name!r} is also the target; take it out of one of them"
        for field in ("data.features", "data.drop", "data.split.column")
        for name in given[field]
        if name in targets
    ]
    problems += [
        f"data.features: {name!r} is also listed in {field}; take it out of one of them"
        for field in ("data.drop", "data.split.column")
        for name in given[field]
        if name in given["data.features"]
    ]
    names = tuple(
        name
        for name in columns
        if name not in (*targets, *dropped, split.column) and (kept is None or name in kept)
    )
    if not names and not problems:
        problems.append(
            f"{table.name}: no feature is left; its columns are {_listed(columns)}, the target "
            f"is {_listed(targets)}, dropped are {_listed(dropped) or 'none'}"
        )
    if "" in names or "" in targets:
        problems.append(
            f"{table.name}: column {columns.index('') + 1} has no name in the header; if it "
            'numbers the rows, leave it out with data.drop = [""], else name it in the file'
        )
    _fail(table.name, problems)
    return targets, names


def _read_feature(table: Table, name: str, listed: bool, gaps: bool) -> _RawFeature:
    """Return a feature column whose every cell can be used, or with ``gaps`` is empty."""
    column = table.frame[name]
    if not listed and not _is_categorical(table, name):
        values, bad = _floats(column)
        _check_numbers(
            table,
            name,
            values,
            bad,
            "correct the cell, or if the column is categorical, list it in data.categorical",
            gaps,
        )
        return _RawFeature(name, values, None)
    codes, levels = _levels(column)
    _check_levels(table, name, codes, gaps)
    if len(levels) > MAX_CATEGORIES:
        raise InputError(
            f"{table.name}, column {name!r}: found {len(levels)} categories "
            f"({_listed(levels[:3])}, ...), expected at most {MAX_CATEGORIES}; merge some, turn "
            f'them into numbers, or leave the column out: data.drop = ["{name}"]'
        )
    return _RawFeature(name, codes, tuple(_label(level) for level in levels))


def _read_numbers(table: Table, targets: Sequence[str]) -> np.ndarray:
    """Return the targets of a regression, (rows, targets) float64."""
    columns = []
    for name in targets:
        column = table.frame[name]
        advice = "correct the cell, or for labels choose a classification likelihood"
        if column.dtype.kind in "bcmM" or column.dtype.name == "category":
            raise InputError(
                f"{table.name}, column {name!r}: found values of type {column.dtype}, expected "
                "numbers in the target of a regression; for labels choose a classification "
                "likelihood"
            )
        values, bad = _floats(column)
        _check_numbers(table, name, values, bad, advice)
        columns.append(values)
    return np.column_stack(columns)


def _read_classes(table: Table, name: str) -> tuple[np.ndarray, tuple[Label, ...]]:
    """Return (rows,) class indices and the labels."""
    codes, levels = _levels(table.frame[name])
    _check_levels(table, name, codes)
    if len(levels) < 2:
        raise InputError(
            f"{table.name}, column {name!r}: found only one class, {levels[0]!r}, expected at "
            "least two; is data.target the right column?"
        )
    labels = [level if isinstance(level, str | int | float) else str(level) for level in levels]
    return codes, tuple(labels)


def _fit_features(
    table: Table, raw: Sequence[_RawFeature], train: np.ndarray, tolerant: bool
) -> tuple[tuple[FeatureColumn, ...], list[str]]:
    """Scale by the training rows; the second result lists columns that cannot be scaled."""
    fitted, constant, problems = [], [], []
    for feature in raw:
        if tolerant:
            column, more = _fit_tolerant(table, feature, train)
            fitted.append(column)
            problems += more
            continue
        values = feature.values[train]
        center, scale = 0.0, 1.0
        if (values == values[0]).all():
            value = feature.categories[values[0]] if feature.categories else float(values[0])
            constant.append((feature.name, value))
        elif feature.categories is None:
            center, scale = _center_and_scale(values)
            problems += _spread_problem(table, feature.name, scale)
        fitted.append(FeatureColumn(feature.name, feature.categories, center, scale))
    if constant:
        found = ", ".join(f"{name!r} = {value!r}" for name, value in constant)
        names = ", ".join(f'"{name}"' for name, _ in constant)
        problems.append(
            f"{table.name}: constant in the training part: {found}; such a column tells nothing "
            f"and cannot be scaled; leave it out: data.drop = [{names}]"
        )
    return tuple(fitted), problems


def _fit_tolerant(
    table: Table, feature: _RawFeature, train: np.ndarray
) -> tuple[FeatureColumn, list[str]]:
    """Scale a column that may have gaps or be constant."""
    gaps = bool(_gaps(feature.values, feature.categories).any())
    if feature.categories is not None:
        return FeatureColumn(feature.name, feature.categories, 0.0, 1.0, gaps=gaps), []
    values = feature.values[train]
    known = values[~np.isnan(values)]
    if not len(known):
        return FeatureColumn(feature.name, None, 0.0, 1.0, 0.0, gaps), [
            f"{table.name}, column {feature.name!r}: found no value in the "
            f"{_rows(len(train))} of the training part; fill it in, or leave the column out"
        ]
    fill = float(np.median(known))
    values = np.where(np.isnan(values), fill, values)
    if (values == values[0]).all():
        return FeatureColumn(feature.name, None, float(values[0]), 1.0, fill, gaps), []
    center, scale = _center_and_scale(values)
    problems = _spread_problem(table, feature.name, scale)
    return FeatureColumn(feature.name, None, center, scale, fill, gaps), problems


def _check_support(
    table: Table, targets: Sequence[str], y: np.ndarray, supports: Sequence[Support]
) -> None:
    """Refuse numbers that the likelihood of a count or of a share cannot have."""
    for name, values, support in zip(targets, y.T, supports, strict=True):
        if support == "real":
            continue
        if support == "count":
            wrong = (values < 0) | (values != np.floor(values))
            expected = "whole numbers from 0 for a likelihood of counts"
            advice = "correct the cell, or choose another likelihood, such as gaussian"
        else:
            # As they are computed with: in float32, 1 - 1e-9 is 1.
            single = values.astype(np.float32)
            wrong = (single <= 0) | (single >= 1)
            expected = "numbers between 0 and 1, without these, for a beta likelihood"
            advice = "move them inside, give percentages as shares, or choose another likelihood"
        if wrong.any():
            row = int(wrong.argmax())
            raise InputError(
                f"{_at(table, row, name)}: found {float(values[row])!r}{_more(wrong, 'cell')}, "
                f"expected {expected}; {advice}"
            )


def _fit_targets(
    table: Table,
    targets: Sequence[str],
    y: np.ndarray,
    train: np.ndarray,
    support: Support = "real",
) -> tuple[tuple[TargetColumn, ...], list[str]]:
    fitted, problems = [], []
    for name, values in zip(targets, y[train].T, strict=True):
        center, scale = _center_and_scale(values)
        if support == "real":
            fitted.append(TargetColumn(name, center, scale))
        else:
            fitted.append(TargetColumn(name, 0.0, 1.0, support, center))
        if (values == values[0]).all():
            problems.append(
                f"{table.name}, target {name!r}: found the one value {float(values[0])!r} in all "
                f"{_rows(len(train))} of the training part, expected different ones; is "
                "data.target the right column?"
            )
        else:
            problems += _spread_problem(table, name, scale)
    return tuple(fitted), problems


def _center_and_scale(values: np.ndarray) -> tuple[float, float]:
    # Values beyond 1e154 overflow here; _spread_problem reports it.
    with np.errstate(over="ignore", invalid="ignore"):
        return float(values.mean()), float(values.std())


def _spread_problem(table: Table, name: str, scale: float) -> list[str]:
    if 0 < scale < math.inf:
        return []
    return [
        f"{table.name}, column {name!r}: the standard deviation of the training part is {scale}, "
        "expected a positive number; give the column in other units"
    ]


def _absent_classes(
    table: Table, name: str, classes: Sequence[Label], y_train: np.ndarray
) -> list[str]:
    absent = [label for i, label in enumerate(classes) if i not in set(y_train.tolist())]
    if not absent:
        return []
    return [
        f"{table.name}, target {name!r}: no row of the training part has the class "
        f"{_listed(absent)}; move such rows into it, or leave the class out of the table"
    ]


def _gaps(values: np.ndarray, categories: tuple[str, ...] | None) -> np.ndarray:
    """Return (rows,) where a number is NaN, or the index of a category -1."""
    return np.isnan(values) if categories is None else values == -1


def _encode(feature: FeatureColumn, values: np.ndarray) -> np.ndarray:
    """Return (rows, columns) of scaled numbers, or of 0 and 1; with what is said of gaps."""
    missing = _gaps(values, feature.categories)
    if feature.categories is None:
        if feature.fill is not None:
            values = np.where(missing, feature.fill, values)
        encoded = ((values - feature.center) / feature.scale)[:, None]
    else:
        encoded = (values[:, None] == np.arange(len(feature.categories))).astype(np.float64)
    return np.column_stack([encoded, missing]) if feature.gaps else encoded


# -------------------------------------------------------------------------------------- split


def _split_problems(table: Table, split: Split, rows: int) -> list[str]:
    """List what is wrong with a split whatever the data are."""
    problems = [
        f"data.split.{field} = {share!r}: expected a share of all rows, 0 <= share < 1"
        for field, share in (("test", split.test), ("validation", split.validation))
        if not 0 <= share < 1
    ]
    if not problems and split.test + split.validation >= 1:
        problems.append(
            f"data.split: test = {split.test} and validation = {split.validation} leave no row "
            "to train on; their sum must be below 1"
        )
    if not 0 <= split.seed < 2**32:
        problems.append(f"data.split.seed = {split.seed}: expected 0 <= seed < 2**32")
    given = {part: getattr(split, f"{part}_rows") for part in PARTS}
    given = {part: list(chosen) for part, chosen in given.items() if chosen is not None}
    if given and split.column is not None:
        problems.append(
            f"data.split: found both column = {split.column!r} and {_listed(list(given))} rows; "
            "give one of them"
        )
    if "train" in given and "test" not in given:
        problems.append(
            "data.split: train_rows is given without test_rows, so the other rows would not be "
            "used; give test_rows too (an empty list for no test part)"
        )
    owner: dict[int, str] = {}
    for part, chosen in given.items():
        field = f"data.split.{part}_rows"
        outside = [row for row in chosen if not _is_row(row, rows)]
        if outside:
            problems.append(
                f"{field}: {_listed(outside)} is not a row of {table.name}, expected whole "
                f"numbers from 0 to {rows - 1}"
            )
            continue
        twice = [row for row, count in Counter(chosen).items() if count > 1]
        if twice:
            problems.append(f"{field}: {_listed(twice)} is listed more than once")
        shared = [row for row in dict.fromkeys(chosen) if row in owner]
        if shared:
            problems.append(
                f"{field}: {_listed(shared)} is also in data.split.{owner[shared[0]]}_rows; a row "
                "must be in one part only"
            )
        owner |= dict.fromkeys(chosen, part)
    return problems


def _is_row(row: Any, rows: int) -> bool:
    try:
        return 0 <= operator.index(row) < rows
    except TypeError:
        return False


def _split(
    table: Table,
    split: Split,
    rows: int,
    y: np.ndarray | None,
    classes: tuple[Label, ...] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the training, validation and test part, sorted.

    ``y`` and ``classes`` are None for regression; else the random parts are stratified.
    """
    everything = np.arange(rows)
    validation = None
    given = (split.train_rows, split.validation_rows, split.test_rows)
    if split.column is not None:
        train, validation, test = _parts_by_column(table, split.column)
        validation = validation if len(validation) else None
    elif any(part is not None for part in given):
        test = _index(() if split.test_rows is None else split.test_rows)
        if split.validation_rows is not None:
            validation = _index(split.validation_rows)
        if split.train_rows is not None:
            train = _index(split.train_rows)
        else:
            held_out = test if validation is None else np.concatenate([test, validation])
            train = np.setdiff1d(everything, held_out)
    else:
        train, test = everything, everything[:0]
        if split.test > 0:
            size = math.ceil(split.test * rows)
            train, test = _cut(table, everything, size, split.test, split.seed, y, classes, "test")
    if validation is None:
        validation = everything[:0]
        size = round(split.validation * rows)
        if split.validation > 0:
            if size == 0:
                raise InputError(
                    f"data.split.validation = {split.validation}: that is no row of the "
                    f"{rows} in {table.name}; choose a larger share, or 0 for no validation part"
                )
            train, validation = _cut(table, train, size, size, split.seed, y, classes, "validation")
    if len(train) == 0:
        raise InputError(
            f"{table.name}: the training part is empty; {_rows(len(validation))} validate and "
            f"{_rows(len(test))} test; correct data.split"
        )
    return np.sort(train), np.sort(validation), np.sort(test)


def _index(rows: Sequence[int]) -> np.ndarray:
    return np.array([operator.index(row) for row in rows], dtype=np.int64)


def _parts_by_column(table: Table, name: str) -> tuple[np.ndarray, ...]:
    words = np.array([str(cell).strip().lower() for cell in table.frame[name].astype(object)])
    unknown = ~np.isin(words, PARTS)
    if unknown.any():
        row = int(unknown.argmax())
        raise InputError(
            f"{_at(table, row, name)}: found {str(table.frame[name].iloc[row])!r}"
            f"{_more(unknown, 'cell')}, expected train, validation or test"
        )
    return tuple(np.flatnonzero(words == part) for part in PARTS)


def _cut(
    table: Table,
    rows: np.ndarray,
    count: int,
    size: float | int,
    seed: int,
    y: np.ndarray | None,
    classes: tuple[Label, ...] | None,
    part: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a part of ``size`` (``count`` rows) at random; return the other rows and the part."""
    if count >= len(rows):
        raise InputError(
            f"{table.name}: the {part} part of {_rows(count)} leaves none of {_rows(len(rows))} "
            f"to train on; choose a smaller data.split.{part}"
        )
    if y is not None and classes is not None:
        labels = y[rows]
        counts = np.bincount(labels, minlength=len(classes))
        present = int((counts > 0).sum())
        few = [classes[i] for i in np.flatnonzero(counts == 1)]
        if few:
            hint = "" if isinstance(few[0], str) else "; for a number to predict use regression"
            raise InputError(
                f"{table.name}: only one row has the class {_listed(few)} when the {part} part "
                "is drawn, but a draw in equal shares needs two of each; merge or leave out "
                f"the class, or choose the parts (data.split.column, data.split.test_rows){hint}"
            )
        if min(count, len(rows) - count) < present:
            raise InputError(
                f"{table.name}: {_rows(count)} in the {part} part and {len(rows) - count} outside "
                f"it cannot each hold all {present} classes; choose another data.split.{part} "
                "or fewer classes"
            )
        from sklearn.model_selection import train_test_split

        rest, drawn = train_test_split(rows, test_size=size, random_state=seed, stratify=labels)
        return rest, drawn
    # The rows that scikit-learn's train_test_split draws, without the two seconds it takes to load.
    order = np.random.RandomState(seed).permutation(len(rows))
    return rows[order[count:]], rows[order[:count]]


# ------------------------------------------------------------------------------------ new rows


def as_table(encoding: Encoding, rows: Any, y: Any = None) -> Table:
    """Return new rows as a table, an array's columns named as in training.

    Parameters
    ----------
    encoding : Encoding
        Of the training data.
    rows : Table, DataFrame or array (rows, features)
    y : array, optional
        Targets, if they are not among the columns.
    """
    if isinstance(rows, Table):
        return rows
    # An array without names: its columns are the features, in the table's order.
    features = [feature.name for feature in encoding.features]
    bare = isinstance(rows, np.ndarray | list) and np.shape(rows)[1:] == (len(features),)
    return table_from_arrays(
        rows,
        y,
        feature_names=features if bare else None,
        target_names=None if y is None else [target.name for target in encoding.targets],
    )


def encode_features(encoding: Encoding, table: Table) -> np.ndarray:
    """Encode and scale the features of new rows.

    Columns are matched by name, in any order, others are ignored. If the training table had no
    names, they are matched by position: the table must have the same columns as the training
    table, with or without its targets.

    Parameters
    ----------
    encoding : Encoding
        Of the training data.
    table : Table
        (rows, columns).

    Returns
    -------
    numpy array (rows, encoded features), float64

    Raises
    ------
    InputError
        No rows, a missing column, another number of columns, or a cell that is missing, not a
        number, or a category that the training table did not have. The encoding of a tolerant
        `prepare` takes missing cells and unseen categories, with an `UnseenWarning` where the
        training table had none.
    """
    table = _aligned(encoding, table)
    problems, encoded = [], []
    for feature in encoding.features:
        try:
            encoded.append(_encode(feature, _new_values(table, feature, encoding.tolerant)))
        except InputError as error:
            problems.append(str(error))
    _fail(table.name, problems)
    return np.column_stack(encoded)


def encode_targets(encoding: Encoding, table: Table) -> np.ndarray | None:
    """Encode and scale the targets of new rows.

    Parameters
    ----------
    encoding : Encoding
        Of the training data.
    table : Table
        (rows, columns), matched as in `encode_features`.

    Returns
    -------
    numpy array or None
        (rows, targets) float64, or (rows,) int64 class indices; None if the table lacks a
        target column.

    Raises
    ------
    InputError
        A cell is missing, not a number, or an unknown class; or as in `encode_features`.
    """
    table = _aligned(encoding, table)
    names = [target.name for target in encoding.targets]
    if not set(names) <= set(table.frame.columns):
        return None
    if encoding.classes is not None:
        labels = [_label(label) for label in encoding.classes]
        return _known_codes(table, names[0], labels, "class")
    y = _read_numbers(table, names)
    _check_support(table, names, y, [target.support for target in encoding.targets])
    return (y - [t.center for t in encoding.targets]) / [t.scale for t in encoding.targets]


def _aligned(encoding: Encoding, table: Table) -> Table:
    """Return the table with the columns named as in training, and only those known there."""
    found = [str(column) for column in table.frame.columns]
    wanted = [feature.name for feature in encoding.features]
    targets = [target.name for target in encoding.targets]
    if len(table.frame) == 0:
        raise InputError(f"{table.name}: the table has no rows; expected at least one")
    by_name = encoding.has_header or (table.has_header and set(wanted) <= set(found))
    if by_name:
        missing = [name for name in wanted if name not in found]
        if missing:
            near = "".join(_nearest(name, found) for name in missing[:1])
            unnamed = "" if table.has_header else " (the table came without names)"
            raise InputError(
                f"{table.name}: the feature columns {_listed(missing)} are missing{near}; found "
                f"{_listed(found)}{unnamed}; expected the names of the training table"
            )
        twice = [name for name in (*wanted, *targets) if found.count(name) > 1]
        if twice:
            raise InputError(
                f"{table.name}: found several columns named {_listed(twice)}, expected one"
            )
        # Missing targets are no mistake: rows to predict need none.
        chosen = {name: found.index(name) for name in (*wanted, *targets) if name in found}
    else:
        full = encoding.columns
        bare = [name for name in full if name not in targets]
        layout = {len(full): full, len(bare): bare}.get(len(found))
        if layout is None:
            raise InputError(
                f"{table.name}: found {len(found)} columns, expected {len(bare)}, or {len(full)} "
                f"with the target: the columns of the training table in its order, "
                f"{_listed(full)}"
            )
        chosen = {name: layout.index(name) for name in layout}
    frame = table.frame.iloc[:, list(chosen.values())].copy()
    frame.columns = list(chosen)
    return Table(
        frame, table.name, table.has_header, table.row_offset, table.default_target, table.unit
    )


def _new_values(table: Table, feature: FeatureColumn, tolerant: bool) -> np.ndarray:
    if feature.categories is not None:
        values = _known_codes(table, feature.name, feature.categories, "category", tolerant)
    else:
        values, bad = _floats(table.frame[feature.name])
        advice = "the training column was numeric"
        _check_numbers(table, feature.name, values, bad, advice, tolerant)
    if tolerant and not feature.gaps:
        missing = _gaps(values, feature.categories)
        if missing.any():
            filled = "0 in all columns of its categories"
            if feature.categories is None:
                filled = f"the median, {feature.fill:g}"
            row = int(missing.argmax())
            _warn_unseen(
                f"{_at(table, row, feature.name)}: found a missing value"
                f"{_more(missing, 'cell')}, but none was missing in training; encoded as {filled}"
            )
    return values


def _warn_unseen(message: str) -> None:
    warnings.warn(message, UnseenWarning, stacklevel=2)


def _known_codes(
    table: Table, name: str, labels: Sequence[str], what: str, tolerant: bool = False
) -> np.ndarray:
    """Return (rows,) indices into the labels of training; -1 where missing, -2 where unseen."""
    codes, levels = _levels(table.frame[name])
    _check_levels(table, name, codes, tolerant)
    index = {label: i for i, label in enumerate(labels)}
    # The last entry is for code -1, the missing cells.
    lookup = np.array([index.get(_label(level), -1) for level in levels] + [-1], dtype=np.int64)
    known = lookup[codes]
    unseen = (known < 0) & (codes >= 0)
    if unseen.any():
        row = int(unseen.argmax())
        found = (
            f"{_at(table, row, name)}: found the {what} {str(levels[codes[row]])!r}"
            f"{_more(unseen, 'cell')}, which the training table did not have; "
        )
        if not tolerant:
            raise InputError(f"{found}expected one of {_listed(labels)}")
        _warn_unseen(f"{found}encoded as 0 in all columns of its categories")
        known = np.where(unseen, -2, known)
    return known


def target_to_units(encoding: Encoding, y_scaled: np.ndarray) -> np.ndarray:
    """Undo the scaling of the targets.

    Parameters
    ----------
    encoding : Encoding
        Of the training data.
    y_scaled : numpy array (..., targets)
        Scaled targets.

    Returns
    -------
    numpy array (..., targets), float64
        In the units of the table.

    Raises
    ------
    InputError
        The last axis does not have one entry per target.
    """
    y = np.asarray(y_scaled, dtype=np.float64)
    count = len(encoding.targets)
    if y.ndim == 0 or y.shape[-1] != count:
        raise InputError(f"scaled targets of shape {y.shape}: expected (..., {count})")
    return y * encoding.target_scale + [t.center for t in encoding.targets]


# -------------------------------------------------------------------------------------- files


def save_dataset(folder: str | Path, dataset: Dataset) -> None:
    """Write ``data.npz`` and ``scaling.json``.

    Each is written beside its place and moved there when complete, so that an interruption
    leaves the old file or the new one.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    dataset : Dataset
        What to write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataset.encoding.to_json(), indent=2, ensure_ascii=False) + "\n"

    def write_arrays(file: BinaryIO) -> None:
        np.savez(
            file,
            x=dataset.x,
            y=dataset.y,
            train=dataset.train,
            validation=dataset.validation,
            test=dataset.test,
            name=np.array(dataset.name),
        )

    _replace(folder / "data.npz", write_arrays)
    _replace(folder / "scaling.json", lambda file: file.write(text.encode()))


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name lasts only once the folder is on disk too.
    parent = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def load_dataset(folder: str | Path) -> Dataset:
    """Read what `save_dataset` wrote.

    Parameters
    ----------
    folder : path
        Holds ``data.npz`` and ``scaling.json``.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        A file is missing or damaged.
    """
    path = Path(folder) / "scaling.json"
    try:
        encoding = Encoding.from_json(json.loads(path.read_text(encoding="utf-8")))
        path = Path(folder) / "data.npz"
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("x", "y", "train", "validation", "test")}
            name = str(file["name"])
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; expected the data set of a run there") from error
    except Exception as error:  # JSON, zip and npy errors have no common base
        raise InputError(f"{path}: damaged, or not written by bnnmcmc: {error}") from error
    return Dataset(**arrays, encoding=encoding, name=name)


def fingerprint(dataset: Dataset) -> str:
    """Return a checksum of the arrays, the split and the encoding.

    Parameters
    ----------
    dataset : Dataset
        Its name does not count.

    Returns
    -------
    str
        SHA-256, 64 hexadecimal digits, the same on every machine.
    """
    digest = hashlib.sha256()
    integer, real = np.dtype("<i8"), np.dtype("<f8")
    for array, dtype in (
        (dataset.x, real),
        (dataset.y, integer if dataset.encoding.classes else real),
        (dataset.train, integer),
        (dataset.validation, integer),
        (dataset.test, integer),
    ):
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
    digest.update(json.dumps(dataset.encoding.to_json(), sort_keys=True).encode())
    return digest.hexdigest()
