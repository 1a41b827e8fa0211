"""A run that begins with the parameters of another model."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Bytes, Characters, Data, Domain, TextFiles
from lmjax.data.public_tokenizers import TokenizerFolder
from lmjax.interop.convert import convert
from lmjax.interop.folder import load_trained_model, model_folder
from lmjax.interop.kept_files import read_end_ids
from lmjax.jobs.begin_with import _warn_of_frozen_tokens
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from lmjax.training.trainable import Adapters
from tests.lmjax.jobs.base_run import prepare_alone


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of two steps; nothing of what follows changes it."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    experiment = Pretrain(
        output=str(folder / "run"),
        steps=2,
        model=TransformerConfig(
            vocab_size=257,
            hidden=16,
            num_layers=1,
            max_length=32,
            attention=AttentionConfig(num_heads=4, head_dim=4),
            feed_forward=FeedForwardConfig(size=32),
        ),
        data=Data(
            train=(Domain(name="lines", source=TextFiles(path=str(folder / "corpus.txt"))),),
            tokenizer=Bytes(),
            held_out=0.0,
            length=32,
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        mesh=Mesh(fsdp=8),
        evaluation=Evaluation(prompts=()),
    )
    experiment.run()
    return experiment


@pytest.fixture(scope="module")
def public(first):
    """The same model as a folder that transformers reads."""
    folder = f"{first.output}_public"
    with jax.set_mesh(Mesh(fsdp=8).build()):
        convert(first.output, folder)
    return folder


def parameters(folder):
    """Those that count: public folders do not hold the padding of the vocabulary."""
    with jax.set_mesh(Mesh(fsdp=8).build()):
        trained = load_trained_model(folder, training_layout())
        params = jax.device_get(trained.params)
    params["embedding"]["table"] = params["embedding"]["table"][: trained.config.vocab_size]
    return params


def test_it_begins_with_the_very_parameters(first, public, tmp_path, capsys):
    """At a rate of 1e-30 a step changes no bit of a parameter, unless it was 0."""
    still = replace(
        first,
        output=str(tmp_path / "run"),
        steps=1,
        seed=7,
        model=replace(model_folder(public), dropout=0.1),
        begin_with=public,
        schedule=Constant(peak=1e-30, warmup=0),
        mesh=Mesh(fsdp=4, tensor=2),
        ema_decay=0.5,
    )
    still.run()
    found, expected = parameters(still.output), parameters(first.output)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-28), found, expected)
    told = capsys.readouterr().out
    assert f"the parameters in {public}" in " ".join(told.split())
    assert "model." not in told  # dropout changes no logits


def test_it_is_talked_to_as_before(first, public, tmp_path, monkeypatch):
    """The folder's chat template and ends come along where the tokenizer is the same."""
    theirs = shutil.copytree(public, tmp_path / "public")
    (theirs / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (theirs / "generation_config.json").write_text('{"eos_token_id": [256, 10]}')
    data = replace(first.data, tokenizer=TokenizerFolder(path=str(theirs)))
    output = tmp_path / "run"
    here = replace(first, output=str(output), begin_with=str(theirs), data=data, steps=1)
    prepare_alone(here, monkeypatch, before="train")
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (output / name).read_text().strip() != ""
    assert read_end_ids(output) == [256, 10]
    RunFolder(output).remove()
    assert not output.exists()
    plain = replace(first, output=str(output), begin_with=str(theirs), steps=1)
    prepare_alone(plain, monkeypatch, before="train")
    assert not (output / "chat_template.jinja").exists()


def test_what_is_not_alike_is_said(first, tmp_path, capsys, monkeypatch):
    attention = replace(first.model.attention, windows=(8,))
    data = replace(first.data, tokenizer=TokenizerFolder(path=f"{first.output}/tokenizer"))
    changed = replace(
        first,
        output=str(tmp_path / "run"),
        begin_with=first.output,
        model=replace(first.model, attention=attention),
        data=data,
        optimizer=AdamW(),
    )
    prepare_alone(changed, monkeypatch, before="train")
    told = " ".join(capsys.readouterr().out.split())
    assert f"model.attention.windows.0 is 8 here; in {first.output} it is null" in told
    assert "tokenizer is not" not in told


def test_another_tokenizer_is_said(first, tmp_path, capsys, monkeypatch):
    """The last of the model's rows is one that the other tokenizer has no byte for."""
    other = replace(first, output=str(tmp_path / "run"), begin_with=first.output)
    other = replace(other, data=replace(first.data, tokenizer=Characters()))
    prepare_alone(other, monkeypatch, before="train")
    assert f"the tokenizer is not that of {first.output}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_parameters_of_other_shapes(first, tmp_path):
    """Which they are, how they differ, and nothing is left behind."""
    wide = replace(first, output=str(tmp_path / "run"), begin_with=first.output)
    wide = replace(wide, model=replace(first.model, feed_forward=FeedForwardConfig(size=64)))
    with pytest.raises(UserError) as error:
        wide.run()
    for line in (
        "blocks.feed_forward.up.weight: [1, 16, 32] there, [1, 16, 64] in the model",
        f"model=model_folder:{first.output} takes the model from there",
    ):
        assert line in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_none(first, tmp_path):
    lost = replace(first, output=str(tmp_path / "run"), begin_with=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="there is no such folder"):
        lost.run()


def test_new_tokens_that_stay_alike_are_told(first, capsys):
    """Adapters leave the embedding, in which all new tokens are one vector."""
    with jax.set_mesh(Mesh(fsdp=8).build()):
        learner = first.learner()
    adapted = dataclasses.replace(learner, trained=Adapters().part(learner.model))
    grown = dataclasses.replace(adapted, model=replace(first.model, vocab_size=259))
    log = RunLog(make_console())
    _warn_of_frozen_tokens(257, adapted, log)
    _warn_of_frozen_tokens(257, dataclasses.replace(grown, trained=learner.trained), log)
    assert "new to the model" not in capsys.readouterr().out
    _warn_of_frozen_tokens(257, grown, log)
    assert "2 tokens are new to the model and begin alike" in capsys.readouterr().out
