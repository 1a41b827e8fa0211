"""Every notebook runs from its first cell to its last."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("notebooks").glob("*.ipynb"))
# How many pictures each makes, and something that it prints.
EXPECTED = {
    "glm": (9, "outputs change exactly where the mask says: True"),
    "quickstart": (2, "The list"),
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """With a few steps of training; its pictures and its texts are there."""
    monkeypatch.setenv("LMJAX_NOTEBOOK_STEPS", "10")
    monkeypatch.setenv("LMJAX_NOTEBOOK_OUTPUT", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": os.fspath(path.parents[1])}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    number, printed = EXPECTED[path.stem]
    assert len(pictures) == number
    assert any(printed in output.get("text", "") for output in outputs)
