"""Every notebook runs from its first cell to its last, and begins with what Colab needs."""

import importlib.util
import os
from pathlib import Path

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

NOTEBOOKS = sorted(Path(__file__).parents[1].joinpath("notebooks").glob("*.ipynb"))
# How many devices each runs on, how many pictures it makes, and something that it prints.
EXPECTED = {
    "assistant": (1, 2, "What does os.path.join(a, *p) do?"),
    "emergence": (1, 2, "by p^L"),
    "glm": (1, 9, "outputs change exactly where the mask says: True"),
    "quickstart": (1, 2, "The list"),
    "tpu_vm": (4, 1, "10 steps, of which the last had a loss of"),
}
COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]({COLAB}github)"
SOURCE = "git+https://example.com/lmjax"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """With a few steps of training; its pictures and its texts are there."""
    devices, number, printed = EXPECTED[path.stem]
    monkeypatch.setenv("LMJAX_NOTEBOOK_STEPS", "10")
    monkeypatch.setenv("LMJAX_NOTEBOOK_OUTPUT", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(devices))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": os.fspath(path.parents[1])}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == number
    assert any(printed in output.get("text", "") for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_begins_with_a_badge_and_an_installation(path, monkeypatch):
    """The first code cell installs lmjax where it is not, and only there.

    What `%pip` would be given is looked at, nothing is installed.
    """
    title, cell = nbformat.read(path, as_version=4).cells[:2]
    assert title.source.split("\n\n")[1] == BADGE
    commands = []

    class Shell:
        def run_line_magic(self, name, line):
            commands.append(f"{name} {line.format(**namespace)}")

    namespace = {"get_ipython": Shell}

    def run(source="", accelerator="none"):
        text = cell.source.replace('SOURCE = ""', f'SOURCE = "{source}"')
        text = text.replace('ACCELERATOR = "none"', f'ACCELERATOR = "{accelerator}"')
        exec(TransformerManager().transform_cell(text), namespace)

    run()
    assert not commands
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lmjax is not installed: let SOURCE say"):
        run()
    run(SOURCE)
    run(SOURCE, "tpu")
    assert commands == [
        f'pip install --quiet "lmjax @ {SOURCE}"',
        f'pip install --quiet "lmjax[tpu] @ {SOURCE}"',
    ]
