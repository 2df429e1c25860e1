import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from sklearn.model_selection import train_test_split

from bnnmcmc.data import (
    Dataset,
    Encoding,
    Split,
    encode_features,
    encode_targets,
    find_table,
    fingerprint,
    load_dataset,
    load_table,
    prepare,
    read_table,
    save_dataset,
    table_from_arrays,
    target_to_units,
)
from bnnmcmc.errors import InputError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def numbers(rows=50, features=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(3.0, 2.0, (rows, features))
    return x, x @ np.arange(1.0, features + 1) + rng.normal(size=rows)


def frame(rows=50):
    x, y = numbers(rows, 2)
    color = np.array(["red", "green", "blue"])[np.arange(rows) % 3]
    return pd.DataFrame({"size": x[:, 0], "weight": x[:, 1], "color": color, "price": y})


def labelled(rows=60, classes=3):
    x, _ = numbers(rows)
    return x, np.array(["ant", "bee", "cat", "dog"])[np.arange(rows) % classes]


def as_table(df, target="price"):
    return table_from_arrays(df.drop(columns=target), df[target])


def same(a: Dataset, b: Dataset):
    return fingerprint(a) == fingerprint(b)


def message(call, *args, **kwargs):
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    return str(error.value)


def assert_says(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def csv_with(tmp_path, rows, header="a,b,y"):
    return write(tmp_path / "t.csv", "\n".join([header, *rows]) + "\n")


ROWS = [f"{i},{i % 7},{i * i}" for i in range(20)]


# ---------------------------------------------------------------------------- reading


def test_module_is_light():
    code = (
        "import sys, bnnmcmc.data; "
        "print([m for m in ('jax', 'pandas', 'sklearn', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_formats_give_the_same_dataset(tmp_path):
    x, y = numbers()
    x[:, 1] = np.round(x[:, 1])  # whole numbers are integers in text, floats in npz
    names = ["a", "b", "c"]
    df = pd.DataFrame(x, columns=names).assign(price=y)
    df.to_csv(tmp_path / "t.csv", index=False)
    df.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    df.to_csv(tmp_path / "semicolon.csv", index=False, sep=";")
    df.to_csv(tmp_path / "t.txt", index=False, sep=" ")
    df.to_parquet(tmp_path / "t.parquet")
    np.savez(tmp_path / "t.npz", X=x, y=y, feature_names=names, target_names=["price"])
    files = ["t.csv", "t.tsv", "semicolon.csv", "t.txt", "t.parquet", "t.npz"]
    sets = [prepare(read_table(tmp_path / f), task="regression") for f in files]
    in_memory = table_from_arrays(df[names], df["price"])
    for other in [*sets[1:], prepare(in_memory, task="regression")]:
        assert same(sets[0], other)
    assert sets[0].encoding.feature_names == ("a", "b", "c")


def test_headerless_formats_give_the_same_dataset(tmp_path):
    x, y = numbers()
    np.savetxt(tmp_path / "t.data", np.column_stack([x, y]), fmt="%.17g")
    np.savetxt(tmp_path / "t.csv", np.column_stack([x, y]), fmt="%.17g", delimiter=",")
    np.savez(tmp_path / "t.npz", x=x, Y=y)
    sets = [
        prepare(read_table(tmp_path / f), task="regression") for f in ("t.data", "t.csv", "t.npz")
    ]
    for other in [*sets[1:], prepare(table_from_arrays(x, y), task="regression")]:
        assert same(sets[0], other)
    assert sets[0].encoding.feature_names == ("x1", "x2", "x3")
    assert sets[0].encoding.targets[0].name == "y"


def test_categories_alike_in_csv_and_parquet(tmp_path):
    df = frame().assign(flag=lambda d: d["size"] > 3, code=lambda d: np.arange(len(d)) % 4)
    df = df[["size", "color", "flag", "code", "price"]]
    df.to_csv(tmp_path / "t.csv", index=False)
    df.to_parquet(tmp_path / "t.parquet")
    sets = [
        prepare(read_table(tmp_path / f), task="regression", categorical=["code"])
        for f in ("t.csv", "t.parquet")
    ]
    assert same(*sets)
    assert sets[0].encoding.feature_names == (
        *("size", "color=blue", "color=green", "color=red", "flag=False", "flag=True"),
        *("code=0", "code=1", "code=2", "code=3"),
    )
    np.testing.assert_array_equal(sets[0].x[:, 1:4].sum(1), 1.0)
    np.testing.assert_array_equal(sets[0].x[:, 3], df["color"] == "red")


def test_quotes_byte_order_mark_blanks_and_blank_lines_at_the_end(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes('\ufeff"a, b", c ,y\r\n"1", 2,3\r\n4,"x, y",6\r\n\r\n'.encode())
    table = read_table(path)
    assert list(table.frame.columns) == ["a, b", "c", "y"]
    assert list(table.frame["c"]) == ["2", "x, y"]
    assert list(table.frame["y"]) == [3, 6]
    assert table.default_target == ("y",)


@pytest.mark.parametrize(("header", "rows"), [(None, 2), (True, 1), (False, 2)])
def test_header_can_be_forced(tmp_path, header, rows):
    table = read_table(write(tmp_path / "t.csv", "1,2\n3,4\n"), header)
    assert len(table.frame) == rows
    assert table.has_header is (header is True)


def test_name_that_looks_like_a_missing_number_is_a_name(tmp_path):
    table = read_table(write(tmp_path / "t.csv", "RI,Na,None\n1,2,3\n"))
    assert list(table.frame.columns) == ["RI", "Na", "None"]


def test_mixed_first_line_is_not_guessed(tmp_path):
    path = write(tmp_path / "iris.data", "5.1,3.5,setosa\n4.9,3.0,setosa\n")
    assert_says(message(read_table, path), "iris.data, line 1", "'5.1'", "'setosa'", "header=False")
    assert list(read_table(path, header=False).frame.columns) == ["x1", "x2", "y"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty"]),
        ("\n \n", ["the file is empty"]),
        ("a,b,y\n", ["line 1", "no rows"]),
        ("a,b,y\n1,2,3\n4,5\n6,7,8\n9,9\n", ["line 3", "2 fields", "expected 3", "1 more"]),
        ("a,b,y\n1,2,3\n4,5,6,7\n", ["line 3", "4 fields", "expected 3"]),
        ("1 2 3\n4 5\n", ["line 2", "2 fields", "expected 3"]),
        ("a,b\n1,2\n\n3,4\n", ["line 3", "an empty line"]),
        ('a,b\n1,"2\n3",4\n', ["line 2", "quote"]),
    ],
)
def test_malformed_text(tmp_path, text, parts):
    path = write(tmp_path / "t.csv", text)
    assert_says(message(read_table, path), str(path), *parts)


def test_unreadable_files(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04\x00\xff\xfe")
    assert_says(message(read_table, tmp_path / "t.xlsx"), "t.xlsx", "not UTF-8", ".parquet")
    for name in ("t.parquet", "t.npz"):
        (tmp_path / name).write_bytes(b"no such format")
        assert_says(message(read_table, tmp_path / name), name, "not a readable")
    np.savez(tmp_path / "w.npz", features=np.ones((2, 2)))
    assert_says(message(read_table, tmp_path / "w.npz"), "'X' or 'x'", "'features'")
    np.savez(tmp_path / "o.npz", X=np.ones((2, 2)), y=np.array(["a", 1], dtype=object))
    assert_says(message(read_table, tmp_path / "o.npz"), "o.npz", "not of objects")
    assert_says(message(read_table, tmp_path), "a folder")
    assert_says(message(read_table, tmp_path / "none.csv"), "none.csv: no such file")


# ---------------------------------------------------------------------------- sources


def test_find_table_looks_in_folders_in_turn(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_table("t.csv", [one, two]) is None
    write(two / "t.csv", "1,2\n")
    assert find_table("t.csv", [one, two]) == two / "t.csv"
    write(one / "t.csv", "1,2\n")
    assert find_table("t.csv", [one, two]) == one / "t.csv"
    write(tmp_path / "t.csv", "1,2\n")
    assert find_table("t.csv", [one, two]) == Path("t.csv")


def test_missing_path_lists_places_and_near_misses(tmp_path):
    write(tmp_path / "airfoil.data", "1 2\n")
    text = message(load_table, path="airfol.data", folders=[tmp_path])
    assert_says(text, "airfol.data, ", str(tmp_path / "airfol.data"), "did you mean")
    assert_says(text, str(tmp_path / "airfoil.data"), "data.path", "BNNMCMC_DATA")


def test_path_first_then_source(tmp_path):
    path = write(tmp_path / "t.csv", "a,y\n1,2\n")
    assert load_table(path="t.csv", source="sklearn:wine", folders=[tmp_path]).name == str(path)
    assert load_table(path="none.csv", source="sklearn:wine").name == "sklearn:wine"
    assert_says(message(load_table), "data.path", "data.source")
    assert load_table(path=path, target="a").default_target == ("a",)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("sklearn:diabtes", ["'sklearn:diabtes'", "did you mean 'diabetes'", "linnerud"]),
        ("uci:wine", ["'uci:wine'", "sklearn:NAME", "openml:ID"]),
        ("openml:", ["'openml:'", "openml:NAME"]),
    ],
)
def test_unknown_source(source, parts):
    assert_says(message(load_table, source=source), *parts)


def test_sklearn_sources():
    diabetes = load_table(source="sklearn:diabetes")
    assert diabetes.default_target == ("progression",)
    assert diabetes.frame["age"].max() > 60  # in years, not scaled by all rows
    iris = prepare(load_table(source="sklearn:iris"), task="classification")
    assert iris.encoding.classes == ("setosa", "versicolor", "virginica")
    assert iris.encoding.feature_names[0] == "sepal length (cm)"
    cancer = prepare(load_table(source="sklearn:breast_cancer"), task="classification")
    assert cancer.encoding.classes == ("benign", "malignant")
    linnerud = prepare(load_table(source="sklearn:linnerud"), task="regression")
    assert linnerud.y.shape == (20, 3)
    digits = load_table(source="sklearn:digits")
    advice = re.search(
        r"data\.drop = (\[.*?\])", message(prepare, digits, task="classification")
    ).group(1)
    dropped = json.loads(advice)  # the advice can be pasted, and it works
    digits = prepare(digits, task="classification", drop=dropped)
    assert digits.encoding.classes == tuple(range(10))
    assert prepare(load_table(source="sklearn:wine"), task="classification").x.shape == (178, 13)


def test_openml(monkeypatch):
    calls = []

    def fetch(**arguments):
        calls.append(arguments)
        return sklearn.utils.Bunch(frame=frame(), target_names=["price"])

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    table = load_table(source="openml:houses")
    assert (table.name, table.default_target) == ("openml:houses", ("price",))
    load_table(source="openml:42")
    common = {"as_frame": True, "parser": "auto"}
    assert calls == [{"name": "houses", **common}, {"data_id": 42, **common}]
    assert prepare(table, task="regression").x.shape == (50, 5)

    def fail(**_):
        raise OSError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    text = message(load_table, source="openml:houses")
    assert_says(text, "'openml:houses'", "OSError: no route to host", "data.path")


def test_table_from_arrays():
    x, y = numbers()
    named = table_from_arrays(x, y, feature_names=["a", "b", "c"], target_names=["t"])
    assert named.has_header
    assert list(named.frame.columns) == ["a", "b", "c", "t"]
    # rows go by position, not by the index of either frame
    df = pd.DataFrame(x, columns=["a", "b", "c"], index=np.arange(50)[::-1])
    table = table_from_arrays(df, pd.Series(y, name="t"))
    pd.testing.assert_frame_equal(table.frame, named.frame)

    class Foreign:
        def to_pandas(self):
            return df

    pd.testing.assert_frame_equal(table_from_arrays(Foreign(), table.frame["t"]).frame, named.frame)
    two = table_from_arrays(x, np.column_stack([y, y]))
    assert two.default_target == ("y1", "y2")
    assert table_from_arrays(x).default_target == ()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((np.ones(3), np.ones(3)), ["shape (3,)", "reshape(-1, 1)"]),
        ((np.ones((3, 2)), np.ones(4)), ["3 rows", "4 rows"]),
        ((np.ones((3, 2)), np.ones(3), ["a"]), ["feature_names", "1 names", "expected 2"]),
        ((pd.DataFrame({"y": [1, 2]}), np.ones(2)), ["'y'", "target_names"]),
        (([[1, 2], [3]], np.ones(2)), ["X is no array"]),
    ],
)
def test_table_from_arrays_refuses(arguments, parts):
    assert_says(message(table_from_arrays, *arguments), *parts)


def test_array_of_text_is_read_like_a_text_file():
    x = np.array([[0.5, "red"], [1.5, "blue"], [2.5, "red"]] * 10)  # NumPy makes it all text
    encoding = prepare(table_from_arrays(x, np.arange(30.0)), task="regression").encoding
    assert encoding.feature_names == ("x1", "x2=blue", "x2=red")


def test_messages_for_arrays_count_rows_from_one():
    x, y = numbers()
    x[4, 1] = np.nan
    text = message(prepare, table_from_arrays(x, y), task="regression")
    assert_says(text, "X, row 5, column 'x2'", "missing")


# ------------------------------------------------------------------------------ cells


@pytest.mark.parametrize(
    ("cell", "parts"),
    [
        ("oops", ["found 'oops'", "expected a number", "data.categorical"]),
        ("1_000", ["found '1_000'", "expected a number"]),
        ("1,5", ["found '1,5'", "decimal point"]),
        ("", ["missing value", "remove its row"]),
        ("NA", ["missing value ('NA')"]),
        ("nan", ["missing value"]),
        ("?", ["missing value ('?')"]),
        ("inf", ["infinite value inf", "finite"]),
        ("-1e999", ["infinite value -inf"]),
    ],
)
@pytest.mark.parametrize("column", ["b", "y"])
def test_bad_cell_of_a_text_file(tmp_path, cell, parts, column):
    rows = list(ROWS)
    rows[4] = f'4,"{cell}",16' if column == "b" else f'4,4,"{cell}"'
    path = csv_with(tmp_path, rows)
    text = message(prepare, read_table(path), task="regression")
    if column == "y":
        parts = [part for part in parts if part != "data.categorical"]
    assert_says(text, f"{path}, line 6, column '{column}'", *parts)
    assert "more such" not in text


def test_first_bad_cell_and_the_number_of_others(tmp_path):
    rows = [f"{i},{'bad' if i in (3, 5, 9) else i},{i}" for i in range(20)]
    text = message(prepare, read_table(csv_with(tmp_path, rows)), task="regression")
    assert_says(text, "line 5, column 'b'", "'bad'", "(and 2 more such cells)")
    headerless = write(tmp_path / "t.data", "1 2 3\n4 5 6\n7 x 9\n")
    text = message(prepare, read_table(headerless), task="regression")
    assert_says(text, "t.data, line 3, column 'x2'", "'x'")


def test_bad_cells_of_several_columns_at_once(tmp_path):
    rows = [*ROWS[:9], "u,2,3", "3,v,4", "3,4,w", *ROWS[9:]]
    text = message(prepare, read_table(csv_with(tmp_path, rows)), task="regression")
    assert_says(text, "3 mistakes", "line 11, column 'a'", "line 12, column 'b'")
    assert_says(text, "line 13, column 'y'")


def test_mostly_text_is_categorical(tmp_path):
    def table(words):
        rows = [f"{i},{'w' if i < words else i % 3},{i * i}" for i in range(20)]
        return read_table(csv_with(tmp_path, rows))

    assert_says(message(prepare, table(10), task="regression"), "line 2, column 'b'", "found 'w'")
    dataset = prepare(table(11), task="regression")
    assert dataset.encoding.features[1].categories == ("0", "1", "2", "w")
    dataset = prepare(table(10), task="regression", categorical=["b"])
    assert dataset.encoding.features[1].categories == ("0", "1", "2", "w")


def test_decimal_commas_are_not_categories(tmp_path):
    rows = [f"{i};{i},5;{i * i}" for i in range(20)]
    text = message(prepare, read_table(csv_with(tmp_path, rows, "a;b;y")), task="regression")
    assert_says(text, "line 2, column 'b'", "'0,5'", "(and 19 more such cells)", "decimal point")


def test_missing_category_and_too_many(tmp_path):
    df = frame()
    df.loc[3, "color"] = None
    df.to_csv(tmp_path / "t.csv", index=False)
    text = message(prepare, read_table(tmp_path / "t.csv"), task="regression")
    assert_says(text, "line 5, column 'color'", "missing")
    df = frame(120).assign(color=[f"c{i}" for i in range(120)])
    text = message(prepare, as_table(df), task="regression")
    assert_says(text, "'color'", "120 categories", "at most 100", 'data.drop = ["color"]')


def test_column_of_dates():
    df = frame().assign(when=pd.date_range("2020-01-01", periods=50))
    text = message(prepare, as_table(df), task="regression")
    assert_says(text, "column 'when'", "datetime64", 'data.drop = ["when"]')


def test_text_of_numbers_in_parquet_is_categorical_and_objects_are_numbers():
    df = frame().assign(code=["1", "2"] * 25)
    df["size"] = df["size"].astype(object)
    encoding = prepare(as_table(df), task="regression").encoding
    assert encoding.features[0].categories is None
    assert encoding.features[3].categories == ("1", "2")


# ------------------------------------------------------------------------------ names


def test_unknown_names_all_at_once_with_the_nearest():
    text = message(
        prepare,
        as_table(frame()),
        task="regression",
        target="prize",
        drop=["sizes"],
        categorical=["colour"],
        split=Split(column="part"),
    )
    assert_says(text, "4 mistakes", "data.target: X has no column 'prize' (did you mean 'price'")
    assert_says(text, "data.drop", "'sizes' (did you mean 'size'?)", "'colour'", "'color'")
    assert_says(text, "data.split.column", "'part'", "its columns are 'size', 'weight'")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"features": ["size", "price"]}, ["data.features", "'price' is also the target"]),
        ({"drop": ["price"]}, ["data.drop", "'price' is also the target"]),
        ({"split": Split(column="price")}, ["data.split.column", "'price' is also the target"]),
        ({"features": ["size"], "drop": ["size"]}, ["data.features", "'size'", "data.drop"]),
        ({"drop": ["size", "weight", "color"]}, ["no feature is left", "'weight'", "'price'"]),
        ({"features": []}, ["no feature is left"]),
        ({"categorical": ["price"]}, ["data.categorical", "'price'", "classification"]),
        ({"target": []}, ["no column to predict", "data.target"]),
        ({"task": "ranking"}, ["'ranking'", "'regression' or 'classification'"]),
        ({"task": "classification", "target": ["color", "price"]}, ["2 columns", "expected one"]),
    ],
)
def test_contradicting_names(options, parts):
    text = message(prepare, as_table(frame()), **({"task": "regression"} | options))
    assert_says(text, *parts)


def test_duplicate_and_empty_names(tmp_path):
    rows = ["1,2,3", "2,3,5", "4,1,1"]
    text = message(prepare, read_table(csv_with(tmp_path, rows, "a,a,y")), task="regression")
    assert_says(text, "t.csv", "several columns named 'a'", "rename")
    table = read_table(csv_with(tmp_path, ROWS, ",b,y"))
    text = message(prepare, table, task="regression")
    assert_says(text, "t.csv: column 1 has no name", 'data.drop = [""]')
    assert prepare(table, task="regression", drop=[""]).encoding.feature_names == ("b",)


def test_empty_table():
    table = table_from_arrays(np.empty((0, 2)), np.empty(0))
    assert_says(message(prepare, table, task="regression"), "no rows")


def test_chosen_columns():
    table = as_table(frame())
    names = prepare(table, task="regression", features=["weight", "size"]).encoding.feature_names
    assert names == ("size", "weight")
    assert prepare(table, task="regression", features="size").x.shape == (50, 1)
    assert prepare(table, task="regression", drop=["color"]).x.shape == (50, 2)
    two = prepare(table, task="regression", target=["price", "size"])
    assert [t.name for t in two.encoding.targets] == ["price", "size"]
    assert two.y.shape == (50, 2)
    assert two.encoding.feature_names[0] == "weight"


# ------------------------------------------------------------------------------ split


def test_split_is_that_of_sklearn():
    x, y = numbers(101)
    split = Split(test=0.25, validation=0.1, seed=7)
    dataset = prepare(table_from_arrays(x, y), task="regression", split=split)
    rest, test = train_test_split(np.arange(101), test_size=0.25, random_state=7)
    train, validation = train_test_split(rest, test_size=10, random_state=7)
    np.testing.assert_array_equal(dataset.test, np.sort(test))
    np.testing.assert_array_equal(dataset.validation, np.sort(validation))
    np.testing.assert_array_equal(dataset.train, np.sort(train))


def test_split_is_stratified():
    x, y = labelled(63)
    dataset = prepare(table_from_arrays(x, y), task="classification")
    rest, test = train_test_split(np.arange(63), test_size=0.2, random_state=0, stratify=y)
    train, validation = train_test_split(rest, test_size=6, random_state=0, stratify=y[rest])
    np.testing.assert_array_equal(dataset.test, np.sort(test))
    np.testing.assert_array_equal(dataset.validation, np.sort(validation))
    np.testing.assert_array_equal(dataset.train, np.sort(train))


@pytest.mark.parametrize(("test", "validation"), [(0, 0), (0, 0.1), (0.2, 0)])
def test_parts_may_be_empty_on_purpose(test, validation):
    table = table_from_arrays(*numbers())
    dataset = prepare(table, task="regression", split=Split(test=test, validation=validation))
    sizes = (len(dataset.train), len(dataset.validation), len(dataset.test))
    assert sizes == (50 - 50 * test - 50 * validation, 50 * validation, 50 * test)
    every = np.concatenate([dataset.train, dataset.validation, dataset.test])
    np.testing.assert_array_equal(np.sort(every), np.arange(50))


def test_seed_moves_the_split():
    table = table_from_arrays(*numbers())
    a, b = (prepare(table, task="regression", split=Split(seed=s)) for s in (0, 1))
    assert not np.array_equal(a.test, b.test)


def test_split_by_column():
    parts = np.array(["train"] * 30 + ["validation"] * 8 + ["test"] * 12)
    table = as_table(frame().assign(part=parts))
    dataset = prepare(table, task="regression", split=Split(column="part"))
    np.testing.assert_array_equal(dataset.validation, np.arange(30, 38))
    np.testing.assert_array_equal(dataset.test, np.arange(38, 50))
    assert not any("part" in name for name in dataset.encoding.feature_names)


def test_validation_is_taken_from_the_training_part_if_none_is_given():
    parts = np.array(["train"] * 40 + ["test"] * 10)
    by_column = prepare(
        as_table(frame().assign(part=parts)), task="regression", split=Split(column="part", seed=3)
    )
    by_rows = prepare(
        as_table(frame()), task="regression", split=Split(test_rows=range(40, 50), seed=3)
    )
    train, validation = train_test_split(np.arange(40), test_size=5, random_state=3)
    for dataset in (by_column, by_rows):
        np.testing.assert_array_equal(dataset.validation, np.sort(validation))
        np.testing.assert_array_equal(dataset.train, np.sort(train))
    split = Split(test_rows=np.arange(40, 50), validation=0)
    assert len(prepare(as_table(frame()), task="regression", split=split).train) == 40


def test_split_by_rows():
    split = Split(train_rows=range(20, 50), validation_rows=[3, 1], test_rows=[0, 19])
    dataset = prepare(as_table(frame()), task="regression", split=split)
    np.testing.assert_array_equal(dataset.train, np.arange(20, 50))
    np.testing.assert_array_equal(dataset.validation, [1, 3])
    np.testing.assert_array_equal(dataset.test, [0, 19])
    rest = prepare(as_table(frame()), task="regression", split=replace(split, train_rows=None))
    assert len(rest.train) == 46


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        (Split(test=1.2), ["data.split.test = 1.2", "0 <= share < 1"]),
        (Split(test=-0.1), ["data.split.test = -0.1"]),
        (Split(validation=float("nan")), ["data.split.validation = nan"]),
        (Split(test=0.5, validation=0.5), ["0.5", "below 1"]),
        (Split(test=0.99, validation=0), ["test part of 50 rows leaves none", "data.split.test"]),
        (Split(test=0.97, validation=0.02), ["validation part of 1 row leaves none"]),
        (Split(validation=0.005), ["data.split.validation = 0.005", "no row of the 50"]),
        (Split(seed=-1), ["data.split.seed = -1"]),
        (Split(test_rows=[3, 50, 60]), ["data.split.test_rows", "50, 60", "from 0 to 49"]),
        (Split(test_rows=[1.5]), ["data.split.test_rows", "1.5", "whole"]),
        (Split(test_rows=[-1]), ["-1", "from 0 to 49"]),
        (Split(test_rows=[3, 3]), ["data.split.test_rows: 3", "more than once"]),
        (Split(validation_rows=[1, 2], test_rows=[2, 4]), ["2", "also in data.split.validation"]),
        (Split(train_rows=[1, 2]), ["train_rows", "without test_rows", "empty list"]),
        (Split(test_rows=range(50), validation_rows=()), ["training part is empty", "50 rows"]),
        (Split(column="color"), ["row 1, column 'color'", "'red'", "train, validation or test"]),
        (Split(column="color", test_rows=[1]), ["data.split", "'color'", "one of them"]),
    ],
)
def test_impossible_splits(split, parts):
    text = message(prepare, as_table(frame()), task="regression", split=split)
    assert_says(text, *parts)


def test_unknown_word_in_the_split_column(tmp_path):
    parts = ["train"] * 30 + ["valid"] * 8 + ["test"] * 12
    frame().assign(part=parts)[["size", "part", "price"]].to_csv(tmp_path / "t.csv", index=False)
    split = Split(column="part")
    text = message(prepare, read_table(tmp_path / "t.csv"), task="regression", split=split)
    assert_says(text, "line 32, column 'part'", "found 'valid'", "(and 7 more such cells)")


def test_problems_of_split_and_cells_at_once():
    df = frame()
    df.loc[2, "size"] = np.inf
    text = message(prepare, as_table(df), task="regression", split=Split(test=2))
    assert_says(text, "2 mistakes", "row 3, column 'size'", "data.split.test = 2")


def test_batch_larger_than_the_training_part():
    table = as_table(frame())
    text = message(prepare, table, task="regression", batch_size=36)
    assert_says(text, "35 rows", "batch size of 36")
    prepare(table, task="regression", batch_size=35)


# ---------------------------------------------------------------------------- scaling


def test_scaling_comes_from_the_training_part_alone():
    x, y = numbers()
    table = table_from_arrays(x, y)
    dataset = prepare(table, task="regression")
    np.testing.assert_allclose(dataset.x[dataset.train].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(dataset.x[dataset.train].std(0), 1)
    np.testing.assert_allclose(dataset.y[dataset.train].std(0), 1)
    assert dataset.x.dtype == dataset.y.dtype == np.float64
    held_out = [dataset.test[0], dataset.validation[0]]
    x[held_out], y[held_out] = 1e6, -1e6
    changed = prepare(table_from_arrays(x, y), task="regression")
    assert changed.encoding == dataset.encoding
    np.testing.assert_array_equal(changed.x[dataset.train], dataset.x[dataset.train])
    x[dataset.train[0]] = 1e6
    assert prepare(table_from_arrays(x, y), task="regression").encoding != dataset.encoding


def test_constant_columns():
    x, y = numbers()
    df = pd.DataFrame(x, columns=["a", "b", "c"]).assign(one=7, kind="same")
    split = Split(test_rows=[0, 1])
    df["late"] = np.where(np.arange(50) < 2, 5.0, 0.1)  # varies in the test part only
    table = table_from_arrays(df, y)
    text = message(prepare, table, task="regression", split=split)
    assert_says(text, "'one' = 7.0", "'kind' = 'same'", "'late' = 0.1", "training part")
    assert_says(text, 'data.drop = ["one", "kind", "late"]')
    prepare(table, task="regression", split=split, drop=["one", "kind", "late"])


def test_constant_target():
    table = table_from_arrays(numbers()[0], np.full(50, 0.1))
    assert_says(message(prepare, table, task="regression"), "target 'y'", "0.1", "35 rows")


def test_spread_beyond_floating_point():
    x, y = numbers()
    x[:, 0] *= 1e300
    text = message(prepare, table_from_arrays(x, y), task="regression")
    assert_says(text, "'x1'", "standard deviation", "units")


def test_target_to_units():
    x, y = numbers()
    dataset = prepare(table_from_arrays(x, np.column_stack([y, 5 * y + 2])), task="regression")
    draws = np.stack([dataset.y, dataset.y])
    units = target_to_units(dataset.encoding, draws)
    np.testing.assert_allclose(units[1], np.column_stack([y, 5 * y + 2]))
    assert_says(message(target_to_units, dataset.encoding, y[:, None]), "(50, 1)", "(..., 2)")


# ------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a"], ("a", "b")),
        ([True, False], (False, True)),
        ([3, 1], (1, 3)),
        ([0.5, -1.0], (-1.0, 0.5)),
    ],
)
def test_labels_keep_their_type(labels, classes):
    x, _ = numbers()
    dataset = prepare(table_from_arrays(x, np.array(labels * 25)), task="classification")
    assert dataset.encoding.classes == classes
    assert [type(c) for c in dataset.encoding.classes] == [type(c) for c in classes]
    assert dataset.y.dtype == np.int64
    np.testing.assert_array_equal(dataset.y, [1, 0] * 25)
    target = dataset.encoding.targets[0]
    assert (target.center, target.scale) == (0.0, 1.0)


def test_labels_of_text_files(tmp_path):
    rows = [f"{i} {(i % 2):.1f}" for i in range(40)]
    path = write(tmp_path / "t.data", "\n".join(rows))
    classes = prepare(read_table(path), task="classification").encoding.classes
    assert classes == (0, 1)
    assert [type(c) for c in classes] == [int, int]
    rows = ["a,y"] + [f"{i},{i % 2 == 0}" for i in range(40)]
    path = write(tmp_path / "t.csv", "\n".join(rows))
    assert prepare(read_table(path), task="classification").encoding.classes == (False, True)


def test_class_problems():
    x, y = labelled()
    one = table_from_arrays(x, np.full(60, "ant"))
    assert_says(message(prepare, one, task="classification"), "'y'", "only one class, 'ant'")
    rare = y.copy()
    rare[5] = "elk"
    text = message(prepare, table_from_arrays(x, rare), task="classification")
    assert_says(text, "only one row has the class 'elk'", "test part", "data.split.column")
    rare[6] = "elk"
    split = Split(test=0.5)
    text = message(prepare, table_from_arrays(x, rare), task="classification", split=split)
    assert_says(text, "only one row has the class 'elk'", "validation part")
    text = message(prepare, table_from_arrays(x, numbers(60)[1]), task="classification")
    assert_says(text, "and 50 more", "use regression")
    split = Split(test=0.03)
    text = message(prepare, table_from_arrays(x, y), task="classification", split=split)
    assert_says(text, "2 rows in the test part", "3 classes")
    split = Split(test_rows=np.flatnonzero(y == "bee"))
    text = message(prepare, table_from_arrays(x, y), task="classification", split=split)
    assert_says(text, "target 'y'", "training part", "class 'bee'")


def test_missing_and_infinite_labels():
    x, y = labelled()
    y = y.astype(object)
    y[7] = None
    text = message(prepare, table_from_arrays(x, y), task="classification")
    assert_says(text, "row 8, column 'y'", "missing")
    numeric = np.array([0.0, 1.0] * 30)
    numeric[9] = np.inf
    text = message(prepare, table_from_arrays(x, numeric), task="classification")
    assert_says(text, "row 10, column 'y'", "infinite")


@pytest.mark.parametrize("target", [["ant", "bee"] * 25, [True, False] * 25])
def test_labels_in_a_regression(target):
    text = message(prepare, table_from_arrays(numbers()[0], target), task="regression")
    assert_says(text, "'y'", "number", "classification")


# ------------------------------------------------------------------------- new rows


def test_training_rows_encode_to_themselves_in_any_order_of_columns():
    df = frame().assign(flag=lambda d: d["size"] > 3)
    dataset = prepare(as_table(df), task="regression")
    shuffled = df[["price", "flag", "color", "weight", "size"]].assign(extra="ignored")
    table = table_from_arrays(shuffled)
    np.testing.assert_array_equal(encode_features(dataset.encoding, table), dataset.x)
    np.testing.assert_array_equal(encode_targets(dataset.encoding, table), dataset.y)
    without = table_from_arrays(df.drop(columns="price"))
    np.testing.assert_array_equal(encode_features(dataset.encoding, without), dataset.x)
    assert encode_targets(dataset.encoding, without) is None


def test_rows_of_one_category_encode_as_in_training(tmp_path):
    # as text, a column of new rows may look numeric although it was not in training
    df = frame().assign(color=["1", "2", "x", "y", "z"] * 10)
    df.to_csv(tmp_path / "t.csv", index=False)
    dataset = prepare(read_table(tmp_path / "t.csv"), task="regression")
    df.iloc[:2].to_csv(tmp_path / "new.csv", index=False)
    new = encode_features(dataset.encoding, read_table(tmp_path / "new.csv"))
    np.testing.assert_array_equal(new, dataset.x[:2])


def test_headerless_rows_are_matched_by_position(tmp_path):
    x, y = numbers()
    dataset = prepare(table_from_arrays(x, y), task="regression", drop=["x2"])
    assert dataset.encoding.feature_names == ("x1", "x3")
    np.savetxt(tmp_path / "with.data", np.column_stack([x, y]), fmt="%.17g")
    np.savetxt(tmp_path / "without.data", x, fmt="%.17g")
    for name, has_target in (("with.data", True), ("without.data", False)):
        table = read_table(tmp_path / name)
        np.testing.assert_array_equal(encode_features(dataset.encoding, table), dataset.x)
        assert (encode_targets(dataset.encoding, table) is not None) is has_target
    np.testing.assert_array_equal(
        encode_targets(dataset.encoding, read_table(tmp_path / "with.data")), dataset.y
    )
    text = message(encode_features, dataset.encoding, table_from_arrays(x[:, :2]))
    assert_says(text, "2 columns", "expected 3, or 4 with the target", "'x1', 'x2', 'x3', 'y'")
    named = pd.DataFrame({"x3": x[:, 2], "x1": x[:, 0]})  # names that match win over positions
    np.testing.assert_array_equal(
        encode_features(dataset.encoding, table_from_arrays(named)), dataset.x
    )


def test_new_rows_with_mistakes(tmp_path):
    encoding = prepare(as_table(frame()), task="regression").encoding
    new = frame(5).drop(columns="price")
    bad = new.astype({"size": object, "weight": float})
    bad.loc[1, "size"], bad.loc[2, "weight"], bad.loc[3, "color"] = "big", np.nan, "pink"
    bad.to_csv(tmp_path / "new.csv", index=False)
    text = message(encode_features, encoding, read_table(tmp_path / "new.csv"))
    assert_says(text, "3 mistakes", "new.csv, line 3, column 'size': found 'big'")
    assert_says(text, "line 4, column 'weight': found a missing value")
    assert_says(text, "line 5, column 'color'", "'pink'", "'blue', 'green', 'red'")
    renamed = table_from_arrays(new.rename(columns={"size": "sizes"}))
    text = message(encode_features, encoding, renamed)
    assert_says(text, "'size' are missing", "did you mean 'sizes'", "found 'sizes', 'weight'")
    text = message(encode_features, encoding, table_from_arrays(new.to_numpy()))
    assert_says(text, "came without names", "'color'")
    assert_says(message(encode_features, encoding, table_from_arrays(new.iloc[:0])), "no rows")
    twice = pd.concat([new, new[["size"]]], axis=1)
    assert_says(message(encode_features, encoding, table_from_arrays(twice)), "several", "'size'")


def test_new_labels():
    x, y = labelled()
    encoding = prepare(table_from_arrays(x, y), task="classification").encoding
    np.testing.assert_array_equal(
        encode_targets(encoding, table_from_arrays(x[:3], ["cat", "ant", "bee"])), [2, 0, 1]
    )
    text = message(encode_targets, encoding, table_from_arrays(x[:2], ["ant", "dog"]))
    assert_says(text, "row 2, column 'y'", "class 'dog'", "'ant', 'bee', 'cat'")
    # 1 and 1.0 are the same label
    encoding = prepare(table_from_arrays(x, np.arange(60) % 2), task="classification").encoding
    np.testing.assert_array_equal(
        encode_targets(encoding, table_from_arrays(x[:2], [1.0, 0.0])), [1, 0]
    )


# ------------------------------------------------------------------------------ files


def mixed():
    df = frame().assign(flag=lambda d: d["size"] > 3)
    return prepare(as_table(df), task="regression", target=["price", "weight"])


def test_encoding_survives_json():
    x, _ = numbers()
    labels = {"text": ["ä", "b"], "bool": [True, False], "int": [2, 1], "float": [0.5, 1.5]}
    encodings = [
        prepare(table_from_arrays(x, np.array(pair * 25)), task="classification").encoding
        for pair in labels.values()
    ]
    for encoding in [mixed().encoding, *encodings]:
        again = Encoding.from_json(json.loads(json.dumps(encoding.to_json())))
        assert again == encoding
        if encoding.classes:
            assert [type(c) for c in again.classes] == [type(c) for c in encoding.classes]
    assert_says(message(Encoding.from_json, {"task": "regression"}), "features", "scaling.json")


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_dataset_survives_the_disk(tmp_path, task):
    dataset = mixed()
    if task == "classification":
        dataset = prepare(table_from_arrays(*labelled()), task=task)
    save_dataset(tmp_path / "run", dataset)
    assert sorted(os.listdir(tmp_path / "run")) == ["data.npz", "scaling.json"]
    again = load_dataset(tmp_path / "run")
    assert (again.encoding, again.name) == (dataset.encoding, dataset.name)
    for field in ("x", "y", "train", "validation", "test"):
        np.testing.assert_array_equal(getattr(again, field), getattr(dataset, field))
        assert getattr(again, field).dtype == getattr(dataset, field).dtype
    assert same(again, dataset)


def test_failed_save_keeps_the_old_files(tmp_path, monkeypatch):
    dataset = mixed()
    save_dataset(tmp_path, dataset)

    def full(file, **_):
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        save_dataset(tmp_path, prepare(table_from_arrays(*numbers()), task="regression"))
    assert sorted(os.listdir(tmp_path)) == ["data.npz", "scaling.json"]
    assert same(load_dataset(tmp_path), dataset)


def test_damaged_dataset(tmp_path):
    assert_says(message(load_dataset, tmp_path), "scaling.json: no such file")
    save_dataset(tmp_path, mixed())
    with (tmp_path / "data.npz").open("r+b") as file:
        file.truncate(1000)
    assert_says(message(load_dataset, tmp_path), "data.npz: damaged")
    write(tmp_path / "scaling.json", "{")
    assert_says(message(load_dataset, tmp_path), "scaling.json: damaged")


def test_fingerprint_sees_data_split_and_encoding():
    dataset = mixed()
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(dataset))
    assert same(dataset, replace(dataset, name="another"))
    moved = dataset.x.copy()
    moved[0, 0] = np.nextafter(moved[0, 0], 9)
    others = [
        replace(dataset, x=moved),
        replace(dataset, y=dataset.y + 1),
        replace(dataset, train=dataset.train[:-1]),
        replace(dataset, test=dataset.validation, validation=dataset.test),
        replace(dataset, encoding=replace(dataset.encoding, has_header=False)),
    ]
    assert len({fingerprint(d) for d in [dataset, *others]}) == 6


def test_airfoil():
    folder = os.environ.get("BNNMCMC_DATA") or Path(__file__).parents[2] / "shared" / "data"
    path = find_table("airfoil.data", [Path(folder)])
    if path is None:
        pytest.skip("airfoil.data is neither in BNNMCMC_DATA nor in shared/data")
    table = load_table(path=path)
    dataset = prepare(table, task="regression")
    raw = np.loadtxt(path)
    assert (dataset.x.shape, dataset.y.shape) == ((1503, 5), (1503, 1))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1052, 150, 301)
    units = target_to_units(dataset.encoding, dataset.y)[:, 0]
    np.testing.assert_allclose(units, raw[:, -1])
    np.testing.assert_array_equal(table.frame.to_numpy(dtype=float), raw)
