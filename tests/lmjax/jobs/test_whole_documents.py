"""A run on rows of whole documents: it goes on bit for bit, and says what its rows are like."""

import json
import re

import pytest

from lmjax.config import replace
from lmjax.data import Bytes, Data, Domain, JsonPrompts, TextFiles, WithTokens
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import BlankInfilling, CausalLM, Mixed
from lmjax.parallel import Mesh
from lmjax.training.schedules import Constant

NAMES = ("[MASK]", "<|startofpiece|>", "<|endofpiece|>")
OBJECTIVES = {
    "causal": CausalLM(),
    "answers": Mixed(objectives=(BlankInfilling(answers="[MASK]"), CausalLM()), weights=(2.0, 1.0)),
}


def small(folder, objective):
    """Four steps; the text has one line that is longer than a row."""
    corpus = folder / "corpus.txt"
    lines = [f"line {n} of the text, and {n * n}" for n in range(400)]
    corpus.write_text("\n".join([*lines, "a long line " * 20]))
    prompts = folder / "prompts.jsonl"
    answered = [{"prompt": f"{n} ** 2 = ", "answer": f"{n * n}"} for n in range(400)]
    prompts.write_text("\n".join(map(json.dumps, answered)))
    return Pretrain(
        output=str(folder / "run"),
        steps=4,
        model=TransformerConfig(
            vocab_size=260,
            hidden=16,
            num_layers=1,
            max_length=64,
            attention=AttentionConfig(num_heads=2, head_dim=8),
            feed_forward=FeedForwardConfig(size=32),
        ),
        objective=objective,
        data=Data(
            train=(
                Domain(
                    name="lines",
                    source=TextFiles(path=str(corpus), split="line"),
                    evaluation=JsonPrompts(path=str(prompts)),
                ),
                Domain(name="prompts", source=JsonPrompts(path=str(prompts))),
            ),
            tokenizer=WithTokens(tokenizer=Bytes(), tokens=NAMES),
            held_out=0.2,
            length=64,
            batch_size=8,
            rows="whole_documents",
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=1),
        mesh=Mesh(fsdp=8),
        evaluation=Evaluation(every=2, prompts=()),
        checkpoint=Checkpoints(every=2),
    )


def losses(experiment):
    with open(f"{experiment.output}/metrics.jsonl", encoding="utf-8") as file:
        return [(entry["split"], entry["step"], entry["loss"]) for entry in map(json.loads, file)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_on_whole_documents_goes_on_bit_for_bit(name, tmp_path, capsys):
    whole = small(tmp_path, OBJECTIVES[name])
    whole.run()
    said = " ".join(capsys.readouterr().out.split())
    for domain in ("lines", "prompts"):
        note = rf"rows {domain}: \d+ rows of whole documents, with \d+\.\d% padding"
        assert re.search(note, said)
    assert re.search(r"lines: 1 of 401 documents, .* no room in a row of \d+ tokens .* cut", said)
    parts = replace(whole, output=str(tmp_path / "parts"))
    replace(parts, steps=2).run()
    parts.run()
    assert losses(parts) == losses(whole)
    capsys.readouterr()
    ring = replace(whole, output=str(tmp_path / "ring"), data=replace(whole.data, rows="ring"))
    ring.run()
    assert "of whole documents" not in capsys.readouterr().out
    assert losses(ring) != losses(whole)
