"""Fine-tuning on conversations: what a run needs, leaves behind, and refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.console import RunLog, make_console
from lmjax.data import (
    Conversations,
    Data,
    Domain,
    FolderTemplate,
    TextFiles,
    WithTokens,
    chat_template,
)
from lmjax.data.balance import TagBalance
from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import PLAIN
from lmjax.data.loss_weights import LossWeights
from lmjax.generation.chat import chat_format
from lmjax.generation.run import load_run
from lmjax.interop.convert import convert
from lmjax.interop.folder import read_params
from lmjax.jobs.begin_with import warn_of_format, with_starting_model
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from, write_base

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
MARKS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, and conversations."""
    folder = tmp_path_factory.mktemp("finetune")
    write_base(folder, MODEL)
    records = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(160)]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def talks(folder, **settings):
    return Conversations(path=str(folder / "talks.jsonl"), **settings)


def finetune(folder, name, **settings):
    data = Data(
        train=(Domain(name="talk", source=talks(folder)),),
        held_out=0.2,
        length=96,
        batch_size=8,
        rows="whole_documents",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 4,
        "begin_with": str(folder / "base"),
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=2, prompts=("7 + 1?",), sample_length=4),
        "checkpoint": Checkpoints(every=2),
    }
    return Finetune(**(defaults | settings))


def losses(job):
    return [(m["split"], m["step"], m["loss"]) for m in read_metrics(job.output)]


@pytest.fixture(scope="module")
def whole(folder):
    """A run of four steps."""
    job = finetune(folder, "whole")
    job.run()
    return job


def test_a_run_learns_replies_and_shows_some(whole, capsys):
    found = losses(whole)
    held_out = [loss for split, _, loss in found if split == "held_out/talk"]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]
    results = RunFolder(whole.output).results()
    [replies] = [table for table in results["tables"] if table["title"] == "Replies"]
    assert replies["rows"][0][0] == "7 + 1?"
    whole.run()  # once more: it has ended, and says where it is
    assert f"python -m lmjax.generation {whole.output} chat=true" in capsys.readouterr().out


def test_the_model_and_its_tokenizer_are_those_it_began_with(whole, folder):
    experiment = RunFolder(whole.output).experiment()
    assert experiment.model == MODEL
    assert experiment.data.tokenizer.path == str(folder / "base" / "tokenizer")
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        model = load_run(whole.output)
        assert chat_format(whole.output, model.tokenizer) == PLAIN


def test_a_run_goes_on_bit_for_bit(whole):
    expected = losses(whole)
    go_on_from(whole, 2)
    assert losses(whole) == expected


def test_epochs_are_those_of_the_first_domain(folder):
    """Two epochs of a domain with half of the rows, beside text that is read again."""
    job = finetune(folder, "epochs", steps=None, epochs=2.0)
    text = Domain(name="text", source=TextFiles(path=str(folder / "corpus.txt"), split="line"))
    data = replace(job.data, train=(*job.data.train, text), batch_size=4)
    job = replace(job, data=data)
    with jax.set_mesh(job.mesh.build()):
        resolved = job.resolved()
        feed = resolved.prepare(RunFolder(folder / "unused"), RunLog(make_console()), {})
        mixture = feed.loader.mixture
    rows = resolved.steps * 4
    assert mixture.epochs(rows)["talk"] >= 2.0 > mixture.epochs(rows - 8)["talk"]


def test_new_tokens_begin_as_the_mean_of_the_old_ones(folder):
    tokens = WithTokens(tokens=MARKS)
    data = finetune(folder, "tokens").data
    source = talks(folder, template=chat_template("chatml"))
    data = replace(data, tokenizer=tokens, train=(Domain(name="talk", source=source),))
    job = finetune(folder, "tokens", data=replace(data, length=96), steps=1)
    with jax.set_mesh(Mesh(fsdp=8).build()):
        layout = training_layout()
        assert with_starting_model(job).model.vocab_size == 259
        for size in (259, 500):  # in the padding of the table, and beyond it
            grown = read_params(folder / "base", replace(MODEL, vocab_size=size), layout)
            before = read_params(folder / "base", MODEL, layout)
            old, new = (np.asarray(p["embedding"]["table"]) for p in (before, grown))
            np.testing.assert_array_equal(new[:257], old[:257])
            mean = np.broadcast_to(old[:257].mean(axis=0), new[257:].shape)
            np.testing.assert_allclose(new[257:], mean, rtol=0, atol=1e-6)
    job.run()
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        model = load_run(job.output)
        assert chat_format(job.output, model.tokenizer).title == "chatml"
        assert [model.tokenizer.special[name] for name in MARKS] == [257, 258]


def test_the_format_of_the_conversations_replaces_that_of_the_model_before(folder, tmp_path):
    """In the run and in a folder for transformers, also where the base has a template."""
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text("{{ 'of another model' }}")
    job = finetune(folder, "other", begin_with=str(tmp_path / "base"), steps=1)
    replace(job, output=str(tmp_path / "run")).run()
    talk = [Message("user", "7 + 1?"), Message("assistant", "8"), Message("user", "And 2?")]
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        convert(tmp_path / "run", tmp_path / "model")
        model = load_run(tmp_path / "run")
        assert chat_format(tmp_path / "run", model.tokenizer) == PLAIN
        public = chat_format(tmp_path / "model", model.tokenizer)
    assert public.encode(model.tokenizer, talk) == PLAIN.encode(model.tokenizer, talk)
    assert public.stop_strings == PLAIN.stop_strings


def test_mistakes_are_told_before_anything_is_made(folder):
    job = finetune(folder, "mistakes")
    mistakes = {
        "give the length of the training": {"steps": None},
        "epochs=-1.0": {"epochs": -1.0},
        "begin_with: give the folder": {"begin_with": None},
        "data.rows=ring cuts conversations": {"data": replace(job.data, rows="ring")},
        "have several templates": {
            "data": replace(
                job.data,
                train=(
                    *job.data.train,
                    Domain(name="other", source=talks(folder, template=chat_template("alpaca"))),
                ),
            )
        },
    }
    for message, settings in mistakes.items():
        with pytest.raises(UserError, match=message):
            replace(job, **settings)
    for message, settings in {
        "is not a run folder": {"begin_with": str(folder / "nothing")},
        "has no chat template": {
            "data": replace(
                job.data,
                train=(
                    Domain(
                        name="talk",
                        source=talks(folder, template=FolderTemplate(path=str(folder / "base"))),
                    ),
                ),
            )
        },
    }.items():
        with pytest.raises(UserError, match=message):
            replace(job, **settings).run()
    assert not (folder / "mistakes").exists()


def test_another_format_than_the_models_is_told(whole, folder, capsys):
    job = finetune(folder, "other", steps=1, begin_with=whole.output)
    source = talks(folder, template=chat_template("alpaca"))
    data = replace(job.data, length=96, train=(Domain(name="talk", source=source),))
    with jax.set_mesh(job.mesh.build()):
        warn_of_format(replace(job, data=data), RunLog(make_console()))
        said = " ".join(capsys.readouterr().out.split())
        assert f"{whole.output} has the chat format plain, and the text here is written as" in said
        warn_of_format(job, RunLog(make_console()))
        warn_of_format(finetune(folder, "base"), RunLog(make_console()))
        assert capsys.readouterr().out == ""


def test_tags_and_weights_are_read_and_reported(folder, capsys):
    """A rare tag is read more often; conversations of weight 0 teach nothing."""
    tags = ["often", "often", "often", "rare"]
    records = [
        {"prompt": f"{n} + 1?", "completion": f"{n + 1}", "tags": tags[n % 4]} for n in range(80)
    ]
    (folder / "tagged.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Conversations(path=str(folder / "tagged.jsonl"), metadata=("tags",))
    domain = Domain(
        name="tagged",
        source=source,
        balance=TagBalance(exponent=0.0),
        loss_weights=LossWeights(field="tags", weights=(("rare", 1.0),), other=0.0),
    )
    job = finetune(folder, "tags", steps=2, begin_with=str(folder / "base"))
    job = replace(job, data=replace(job.data, train=(domain,)))
    job.run()
    [table] = [
        table
        for table in RunFolder(job.output).results()["tables"]
        if table["title"] == "Tags of tagged"
    ]
    before, read = zip(*[row[1:] for row in table["rows"]], strict=True)
    assert [row[0].partition(",")[0] for row in table["rows"]] == ["often", "rare"]
    assert read == pytest.approx((0.5, 0.5), abs=0.02) and before[1] < 0.4
    assert "tagged: often" in capsys.readouterr().out
    rows = [line for line in read_metrics(job.output) if line["split"] == "train"]
    # Half of the readings weigh; each reply and its end have 2 or 3 tokens, and 8 rows about 40.
    assert all(0 < line["tokens"] < 40 * 3 for line in rows)
    with pytest.raises(UserError, match="loss_weights are read by ChatLM, not by CausalLM"):
        replace(job, objective=CausalLM())
