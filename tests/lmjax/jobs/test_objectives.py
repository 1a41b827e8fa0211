"""Runs of other objectives than causal language modelling: the same loop, resume and meshes."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog
from lmjax.data import Bytes, Data, Domain, JsonPrompts, TextFiles, WithTokens
from lmjax.jobs.messages import text_command
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.jobs.text import warn_of_answers
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import BlankInfilling, CausalLM, DocumentBlank, MaskedLM, Mixed
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from

NAMES = ("[MASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>")
OBJECTIVES = {
    "blanks": Mixed(
        objectives=(
            BlankInfilling(answers="[MASK]"),
            BlankInfilling(blanks=DocumentBlank(), answers="[MASK]"),
            CausalLM(),
        ),
        weights=(2.0, 1.0, 1.0),
    ),
    "masked": MaskedLM(),
}


def small(folder, name):
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {n} of the text, and {n * n}\n" for n in range(400)))
    prompts = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{n} ** 2 = ", "answer": f"{n * n}"}) for n in range(400)]
    prompts.write_text("\n".join(lines))
    return Pretrain(
        output=str(folder / "run"),
        steps=4,
        model=TransformerConfig(
            vocab_size=261,
            hidden=16,
            num_layers=1,
            max_length=64,
            attention=AttentionConfig(num_heads=4, head_dim=4, causal=name != "masked"),
            feed_forward=FeedForwardConfig(size=32),
            dropout=0.1,
        ),
        objective=OBJECTIVES[name],
        data=Data(
            train=(
                Domain(name="lines", source=TextFiles(path=str(corpus), split="line")),
                Domain(name="prompts", source=JsonPrompts(path=str(prompts))),
            ),
            tokenizer=WithTokens(tokenizer=Bytes(), tokens=NAMES),
            held_out=0.2,
            length=64,
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=1),
        embedding_gradient=((0, 0.1), (3, 1.0)),
        mesh=Mesh(fsdp=8),
        evaluation=Evaluation(every=2, prompts=()),
        checkpoint=Checkpoints(every=2),
    )


def losses(experiment):
    with open(f"{experiment.output}/metrics.jsonl", encoding="utf-8") as file:
        return [(entry["split"], entry["step"], entry["loss"]) for entry in map(json.loads, file)]


@pytest.mark.parametrize("name", ["blanks", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit_and_on_another_mesh_as_well(name, tmp_path, capsys):
    """Resumed: equal. On another mesh: sums in another order, 1e-4 after four steps in float32.

    The mesh is tried with blanks alone, to compile less.
    """
    whole = small(tmp_path, name)
    whole.run()
    assert capsys.readouterr().out.count("the tokens around answers") == 1
    found = losses(whole)
    go_on_from(whole, 2)
    assert losses(whole) == found
    splits = {split for split, _, _ in found}
    assert splits == {"train", "held_out/lines", "held_out/prompts"}
    if name == "masked":
        return
    other = replace(whole, output=str(tmp_path / "mesh"), mesh=Mesh(data=2, fsdp=2, tensor=2))
    other.run()
    np.testing.assert_allclose(
        [loss for _, _, loss in losses(other)], [loss for _, _, loss in found], rtol=1e-4
    )


ANSWERS = BlankInfilling(answers="[MASK]")
UNAWARE = {  # by case: an objective, and the beginning of what is said of it
    "none": (CausalLM(), "CausalLM takes the tokens around answers, [MASK] and <|endofpiece|>,"),
    "no setting": (BlankInfilling(), "BlankInfilling takes"),
    "all": (ANSWERS, None),
    "all of a mixture": (Mixed(objectives=(ANSWERS, ANSWERS), weights=(1.0, 1.0)), None),
    "some of a mixture": (
        Mixed(objectives=(CausalLM(), ANSWERS, BlankInfilling()), weights=(1.0, 1.0, 1.0)),
        "CausalLM and BlankInfilling take",
    ),
}


@pytest.mark.parametrize("place", ["source", "evaluation", "nowhere"])
@pytest.mark.parametrize("case", UNAWARE)
def test_it_is_told_where_the_tokens_around_answers_are_text(case, place, tmp_path):
    """By domain, once, and what to set."""
    objective, message = UNAWARE[case]
    experiment = small(tmp_path, "blanks")
    lines, prompts = experiment.data.train
    domains = {
        "source": (lines, prompts),
        "evaluation": (lines, replace(lines, name="prompts", evaluation=prompts.source)),
        "nowhere": (lines,),
    }
    data = replace(experiment.data, train=domains[place])
    said = io.StringIO()
    warn_of_answers(RunLog(Console(file=said)), data, objective)
    if message is None or place == "nowhere":
        assert said.getvalue() == ""
        return
    (line,) = said.getvalue().splitlines()
    assert line.startswith(f"  prompts: {message}")
    assert "objective=BlankInfilling, answers='[MASK]', eop='<|endofpiece|>'; with JsonL" in line


@config
class Unfilled(MaskedLM):
    """A masked objective that does not say how its model fills blanks."""

    def infill_format(self):
        return None


def test_an_encoder_that_fills_no_blanks_is_given_no_prompts(tmp_path):
    experiment = replace(small(tmp_path, "masked"), objective=Unfilled())
    asked = replace(experiment, evaluation=replace(experiment.evaluation, prompts=("line",)))
    with pytest.raises(UserError, match=r"Unfilled\.infill_format\): set evaluation\.prompts="):
        asked.run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    folder = RunFolder(tmp_path)
    folder.write_config(experiment)
    assert text_command(str(tmp_path)) == ""
    folder.write_config(replace(experiment, objective=MaskedLM()))
    assert text_command(str(tmp_path)).startswith("python -m lmjax.generation")


def test_mistakes_are_told_before_training(tmp_path):
    experiment = small(tmp_path, "blanks")
    with pytest.raises(UserError, match="MaskedLM needs an encoder"):
        replace(experiment, objective=MaskedLM())
    data = replace(experiment.data, tokenizer=Bytes(), train=experiment.data.train[:1])
    with pytest.raises(UserError, match=r"needs the token '\[MASK\]'.*WithTokens"):
        replace(experiment, data=data).run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
