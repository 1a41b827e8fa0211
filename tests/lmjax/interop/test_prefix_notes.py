"""Notes on written models that read prompts from both sides."""

import io

import jax
import pytest
from rich.console import Console

from lmjax.config import to_json
from lmjax.interop.convert import convert
from lmjax.interop.prefix_notes import by_ranks, left_to_right
from lmjax.objectives import CausalLM, PrefixLM
from lmjax.parallel import Mesh
from lmjax.runs.trained_model import TrainedModel
from tests.lmjax.jobs.test_evaluate import MODEL, PrefixRun, write_run


@pytest.mark.parametrize("objective", [None, CausalLM(), PrefixLM()])
def test_they_are_of_models_with_such_an_objective(objective):
    trained = TrainedModel(MODEL, {}, None, objective)
    notes = [*left_to_right(trained), *by_ranks(trained)]
    assert len(notes) == (2 if isinstance(objective, PrefixLM) else 0)
    assert all("objective PrefixLM" in note for note in notes)


def test_a_folder_for_transformers_says_so(tmp_path):
    write_run(tmp_path / "run", 0, PrefixRun())
    assert "PrefixLM" in to_json(PrefixRun())
    console = Console(file=io.StringIO(), width=500)
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        convert(tmp_path / "run", tmp_path / "model", console=console)
    assert "note: the model reads prompts from both sides" in console.file.getvalue()
