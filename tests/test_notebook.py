"""The notebook in experiments/ runs from top to bottom."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "first_run.ipynb"


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # It is kept without outputs.
    assert not any(cell.get("outputs") for cell in notebook.cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = [
        output["data"].get("text/html", "") + output["data"].get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    assert any("<caption" in text and "100 from each chain" in text for text in shown)
    assert any("Prediction of target" in text and "target_lower_90" in text for text in shown)
    assert any("lie inside their 90 % interval" in text for text in shown)
