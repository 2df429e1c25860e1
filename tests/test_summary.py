"""What the terminal shows of many chains."""

import json
import math

import pytest
from rich.console import Console

from bnnmcmc.summary import print_diagnostics, print_summary


def chain(number, status="ok", ess=50.0, sentence=""):
    return {
        "chain": number,
        "status": status,
        "sentence": sentence or f"Sentence {number}.",
        "draws": 20,
        "log_density": -100.0 - number,
        "log_density_drift": 0.1,
        "acceptance_rate": None,
        "energy_error": 0.01,
        "divergences": 0,
        "tree_depth_max": None,
        "step_size": 0.1,
        "gradients": 100,
        "ess_log_density": 10.0,
        "ess_function_median": ess,
        "ess_function_min": 1.0,
        "rhat_log_density": 1.0,
        "rhat_function_median": 1.0 + number / 10_000,
        "rhat_function_max": 1.5,
        "rhat_weights_max": 2.0,
    }


def shown(rows):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_diagnostics(console, rows, {"verdict": ["Said."]})
    return console.export_text()


@pytest.fixture
def ten_thousand():
    rows = [chain(i) for i in range(10_000)]
    for i in (17, 4000, 9999):
        rows[i] = chain(i, "low", sentence=f"Low {i}.")
    rows[5000] = chain(5000, "nonfinite", math.nan, sentence="Lost.")
    for i in range(100, 140):
        rows[i] = chain(i, "stuck", 1.0, sentence=f"Stuck {i}.")
    return rows


def test_of_many_chains_the_worst_ten_and_quantiles(ten_thousand):
    text = shown(ten_thousand)
    assert len(text.splitlines()) < 60
    assert "the worst 10 of 10000 chains" in text
    table = text.split("All 10000 chains")[0]
    numbers = [int(line.split()[0]) for line in table.splitlines() if line[:8].strip().isdigit()]
    assert numbers == [5000, *range(100, 109)]
    quantiles = {
        line.split("  ")[0].strip(): line.split() for line in text.splitlines() if "R-hat" in line
    }
    assert quantiles["R-hat predictions"][-6:-1] == ["1", "1.05", "1.5", "1.95", "2"]
    ess = next(line for line in text.splitlines() if line.strip().startswith("ESS predictions"))
    assert ess.split()[-1] == "1"  # one is not finite


def test_many_faults_are_counted_worst_first(ten_thousand):
    text = shown(ten_thousand)
    assert "9956 of 10000 chains ok" in text
    assert "1 nonfinite, 40 stuck, 3 low" in text
    sentences = [line for line in text.splitlines() if line.startswith("  chain ")]
    assert len(sentences) == 10
    assert "Lost." in sentences[0]
    assert all("Stuck" in line for line in sentences[1:])
    assert "and 34 more; see diagnostics.csv" in text


def test_a_few_chains_are_all_shown():
    text = shown([chain(0), chain(1, "low", sentence="Low one.")])
    assert "All 2 chains" not in text
    assert "Low one." in text
    assert "more;" not in text


def test_the_summary_of_a_run_stays_short(finished, tmp_path, ten_thousand):
    """Also with ten thousand entries in the manifest."""
    manifest = json.loads((finished / "run" / "manifest.json").read_text())
    manifest["status"] = [
        {name: row[name] for name in ("chain", "status", "sentence")} for row in ten_thousand
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_summary(console, tmp_path)
    assert len(console.export_text().splitlines()) < 40
