"""Classification of texts whose words a model that fills blanks draws anew."""

import json

import pytest

from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, LabelledTexts, TextFiles, WithTokens
from lmjax.jobs.classify import Classify
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.refilling_model import infill_format_of
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, glm
from lmjax.models.infill import BlankFormat
from lmjax.objectives import Augmentation, BlankInfilling, TextLabels
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant

MARKS = ("[MASK]", "<|startofpiece|>", "<|endofpiece|>")
MODEL = replace(
    glm(),
    vocab_size=260,
    hidden=16,
    num_layers=1,
    max_length=32,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pretrained run that fills blanks, and labelled texts."""
    folder = tmp_path_factory.mktemp("refilling")
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    source = TextFiles(path=str(folder / "corpus.txt"), split="file")
    Pretrain(
        output=str(folder / "glm"),
        steps=1,
        model=MODEL,
        objective=BlankInfilling(),
        data=Data(
            train=(Domain(name="lines", source=source),),
            tokenizer=WithTokens(tokenizer=Bytes(), tokens=MARKS),
            held_out=0.0,
            length=32,
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=Evaluation(prompts=()),
    ).run()
    lines = [{"text": f"{n} or {n % 7}", "label": "ab"[n % 2]} for n in range(120)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def job_of(folder, name, length=16, **augmentation):
    settings = {"refill": 0.4, "refill_with": str(folder / "glm")} | augmentation
    source = LabelledTexts(path=str(folder / "texts.jsonl"))
    return Classify(
        output=str(folder / name),
        steps=4,
        begin_with=str(folder / "glm"),
        objective=TextLabels(augmentation=Augmentation(**settings)),
        data=Data(
            train=(Domain(name="texts", source=source),),
            held_out=0.3,
            length=length,
            batch_size=16,
            rows="groups",
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=ChatEvaluation(every=4),
        checkpoint=Checkpoints(every=2),
    )


@pytest.mark.slow
def test_a_refilled_run_goes_on_bit_for_bit(folder):
    """The start of a blank is found in the run's own format."""
    whole = job_of(folder, "whole")
    whole.run()
    augmentation = RunFolder(whole.output).experiment().objective.augmentation
    assert (augmentation.mask_id, augmentation.start_id) == (257, 258)
    assert augmentation.special == (256, 257, 258, 259)
    parts = job_of(folder, "parts")
    replace(parts, steps=2).run()
    parts.run()
    losses, found = (
        [(m["step"], m["loss"]) for m in read_metrics(j.output)] for j in (whole, parts)
    )
    assert set(losses) <= set(found)


def test_models_that_cannot_fill(folder):
    for message, settings in {
        r"augmentation\.mask='<|endofpiece|>': .* by \[MASK\]": {"mask": MARKS[2]},
        r"augmentation\.mask='\[gMASK\]' is no special token": {"mask": "[gMASK]"},
    }.items():
        with pytest.raises(UserError, match=message):
            job_of(folder, "refused", **settings).with_model()


def test_the_format_of_a_run(folder):
    """That of its objective."""
    assert infill_format_of(str(folder / "glm")) == BlankFormat(masks=MARKS[:1], rest=())
