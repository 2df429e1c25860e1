"""The README's example of the estimators runs, and says what it does."""

import re
from pathlib import Path

import numpy as np

import bnnmcmc

README = Path(__file__).parent.parent / "README.md"
MARK = "<!-- run by tests/test_readme_estimators.py -->"


def test_example(tmp_path, monkeypatch):
    code = re.search(MARK + r"\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code.group(1), "README.md", "exec"), names)
    rows, y = names["X_test"], names["y_test"]
    low, high = names["interval"].T
    assert np.all((low < names["median"]) & (names["median"] < high))
    assert 0.8 < np.mean((low <= y) & (y <= high)) <= 1
    assert names["samples"].shape == (100, len(rows))
    assert names["lppd"] == np.mean(names["prediction"].log_prob(y.to_numpy()))
    assert names["model"].fit_.steps.draws == 300
    found = bnnmcmc.load("diabetes.bnn").predict(rows)
    assert np.corrcoef(found.mean[:, 0], names["mean"])[0, 1] > 0.999
