"""Runs with adapters: begun with another model, gone on with, merged, converted, decoded."""

import json
import math
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import traverse_util

from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.generation.run import load
from lmjax.generation.sampling import Sampling
from lmjax.interop.__main__ import Convert
from lmjax.interop.beginning import beginning_folder
from lmjax.interop.convert import convert, convert_adapters
from lmjax.interop.folder import load_trained_model, read_params
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    TransformerConfig,
    plain_batch,
)
from lmjax.parallel import Mesh, training_layout
from lmjax.runs import manifest
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Constant
from lmjax.training.trainable import LastBlocks, Matching
from tests.lmjax.jobs.base_run import go_on_from
from tests.whole_logits import logits_of_config

TOKENS = np.random.default_rng(0).integers(0, 257, (8, 16)).astype(np.int32)
ADAPTED = LoRA(rank=2, alpha=6.0, layers=("attention.*", "up"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of two steps without adapters; nothing of what follows changes it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    experiment = Pretrain(
        output=str(folder / "run"),
        steps=2,
        model=TransformerConfig(
            vocab_size=257,
            hidden=16,
            num_layers=2,
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
def public(base):
    """The same model as a folder that transformers reads."""
    with jax.set_mesh(Mesh(fsdp=8).build()):
        convert(base.output, f"{base.output}_public")
    return f"{base.output}_public"


@pytest.fixture(scope="module")
def tuned(base, public):
    """A run that trained adapters, begun with the public folder."""
    experiment = replace(
        base,
        output=f"{base.output}_tuned",
        steps=4,
        model=replace(base.model, lora=ADAPTED),
        begin_with=public,
        mesh=Mesh(fsdp=4, tensor=2),
        checkpoint=Checkpoints(every=2),
    )
    experiment.run()
    return experiment


def parameters(folder):
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        params = jax.device_get(load_trained_model(folder, training_layout()).params)
    params["embedding"]["table"] = params["embedding"]["table"][:257]
    return traverse_util.flatten_dict(params, sep=".")


def logits(config, params):
    return logits_of_config(config, params, plain_batch(TOKENS))


def of_run(folder):
    trained = load_trained_model(folder, training_layout())
    return logits(trained.config, trained.params)


def test_adapters_alone_are_trained(base, tuned, capsys):
    """The other parameters keep every bit of the public folder's."""
    before, after = parameters(base.output), parameters(tuned.output)
    for path, leaf in after.items():
        if ".adapter." in path:
            assert leaf.any()
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    tuned.run()
    adapters = sum(leaf.size for path, leaf in after.items() if ".adapter." in path)
    every = sum(leaf.size for leaf in after.values())
    told = " ".join(capsys.readouterr().out.split())
    assert f"trained {adapters:,} of {every:,} parameters" in told


def saved(folder):
    """Numbers of each array among the parameters of the newest checkpoint, by its path."""
    run = RunFolder(folder)
    newest = str(Checkpointer(run.checkpoints).latest())
    arrays = manifest.read(run.checkpoints / newest)["arrays"]
    sizes = {name: math.prod(shape) for name, (shape, _) in arrays.items()}
    return {n.removeprefix("params."): s for n, s in sizes.items() if n.startswith("params.")}


def test_checkpoints_hold_what_is_trained_alone(base, tuned, tmp_path):
    """Of adapters, and of the last of two blocks; the rest is what the folder has."""
    after = parameters(tuned.output)
    assert saved(tuned.output) == {p: a.size for p, a in after.items() if ".adapter." in p}
    last = replace(
        base,
        output=str(tmp_path / "last"),
        begin_with=base.output,
        trainable=LastBlocks(count=1),
        checkpoint=Checkpoints(every=1),
    )
    last.run()
    before, after, kept = parameters(base.output), parameters(last.output), saved(last.output)
    for path, leaf in after.items():
        if path.startswith("blocks."):
            assert kept[path] == leaf.size // 2
            np.testing.assert_array_equal(leaf[0], before[path][0], err_msg=path)
            assert np.any(leaf[1] != before[path][1])
        elif path not in kept:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert {p for p in after if p not in kept} == {"embedding.table", "positions.table"}
    shutil.rmtree(RunFolder(last.output).checkpoints / "2")
    last.run()  # the second step again
    for path, leaf in parameters(last.output).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)


def test_a_base_that_is_not_as_it_was_is_told(base, public, tuned, tmp_path):
    """Whoever reads the run, or goes on with it; a tokenizer's settings are no parameters."""
    theirs = tmp_path / "base"
    shutil.copytree(public, theirs)
    run = replace(tuned, output=str(tmp_path / "run"), begin_with=str(theirs), steps=1)
    run.run()
    expected = parameters(run.output)
    (theirs / "tokenizer_config.json").write_text("{}")
    theirs.rename(tmp_path / "moved")
    for use in (lambda: parameters(run.output), replace(run, steps=2).run):
        with pytest.raises(UserError, match=r"rest is in begin_with=.*cannot be read"):
            use()
    with jax.set_mesh(Mesh(fsdp=8).build()):
        convert(base.output, theirs)
    [weights] = theirs.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"1")
    for use in (lambda: parameters(run.output), replace(run, steps=2).run):
        with pytest.raises(UserError, match="have changed since: its fingerprint was"):
            use()
    shutil.rmtree(theirs)
    (tmp_path / "moved").rename(theirs)
    for path, leaf in parameters(run.output).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_what_begins_with_adapters_begins_as_they_ended(one_device, base, tuned):
    """With the same ones, with others, and without: 1e-5 of logits of about 1."""
    expected = of_run(tuned.output)
    assert np.abs(expected - of_run(base.output)).max() > 1e-2
    layout = training_layout()
    for lora in (ADAPTED, replace(ADAPTED, dropout=0.5), LoRA(), replace(ADAPTED, alpha=1.0), None):
        config = replace(base.model, lora=lora)
        params = read_params(tuned.output, config, layout, seed=3)
        np.testing.assert_allclose(logits(config, params), expected, rtol=0, atol=1e-5)
        paths = traverse_util.flatten_dict(params, sep=".")
        drawn = [leaf for path, leaf in paths.items() if path.endswith(".adapter.b.weight")]
        same = lora is not None and lora.layers == ADAPTED.layers and lora.alpha == ADAPTED.alpha
        assert all(bool(np.any(leaf)) == same for leaf in drawn)


def test_it_is_decoded_and_converted(one_device, tuned, tmp_path):
    """The same words from the run, and from the model folder, in which nothing is of adapters."""
    convert(tuned.output, tmp_path / "public")
    convert(tmp_path / "public", tmp_path / "back")
    np.testing.assert_allclose(of_run(tmp_path / "back"), of_run(tuned.output), rtol=0, atol=1e-5)
    texts = [
        load(folder).generate(["line 1"], Sampling(temperature=0), max_tokens=12)
        for folder in (tuned.output, tmp_path / "public")
    ]
    assert texts[0] == texts[1]


def test_adapters_are_written_alone(one_device, public, tuned, tmp_path):
    """And read with the folder that the run began with: the same logits, and words."""
    Convert(source=tuned.output, destination=str(tmp_path / "peft"), to="peft").run()
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == public
    convert(tmp_path / "peft", tmp_path / "run")
    np.testing.assert_allclose(of_run(tmp_path / "run"), of_run(tuned.output), rtol=0, atol=1e-5)
    texts = [
        load(folder).generate(["line 1"], Sampling(temperature=0), max_tokens=12)
        for folder in (tuned.output, tmp_path / "peft")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match="the model has no adapters"):
        convert_adapters(public, tmp_path / "none")


def test_more_than_adapters_is_no_folder_of_adapters(tuned, tmp_path):
    both = RunFolder(shutil.copytree(tuned.output, tmp_path / "run"))
    both.write_config(replace(tuned, trainable=Matching(patterns=("adapter.*", "bias"))))
    with pytest.raises(UserError, match=r"more than adapters, such as .*bias"):
        Convert(source=str(both.path), destination=str(tmp_path / "peft"), to="peft").run()


def test_it_goes_on_after_an_interruption(tuned):
    """Two more steps from the checkpoint: the bits of four in one go."""
    expected = parameters(tuned.output)
    go_on_from(tuned, 2)
    found = parameters(tuned.output)
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_a_choice_that_fits_nothing_is_refused(base):
    with jax.sharding.use_abstract_mesh(base.mesh.abstract(8)):
        with pytest.raises(UserError, match="the model has 2 blocks"):
            replace(base, trainable=LastBlocks(count=3)).learner()
        with pytest.raises(UserError, match="'quary' is for no dense layer"):
            replace(base, model=replace(base.model, lora=LoRA(layers=("quary",)))).learner()
    stages, told = Mesh(stage=2, fsdp=4).abstract(8), "a pipeline trains all parameters"
    with jax.sharding.use_abstract_mesh(stages), pytest.raises(UserError, match=told):
        replace(base, trainable=LastBlocks(count=1)).learner()


def test_a_relative_beginning_is_found_from_anywhere(tmp_path, monkeypatch):
    """From where the run was started, unless its path leads somewhere from here."""
    (tmp_path / "runs" / "base").mkdir(parents=True)
    job = SimpleNamespace(begin_with="runs/base", output="runs/tuned")
    monkeypatch.chdir(tmp_path / "runs")
    assert beginning_folder(job, "tuned") == str(tmp_path / "runs" / "base")
    assert beginning_folder(job, tmp_path / "runs" / "moved") == "runs/base"
    monkeypatch.chdir(tmp_path)
    assert beginning_folder(job, "runs/tuned") == "runs/base"
