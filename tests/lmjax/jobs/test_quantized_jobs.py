"""Adapters over a base of few bits: trained, gone on with, merged, converted, and refused."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from lmjax.config import UserError, replace
from lmjax.generation.run import load
from lmjax.generation.sampling import Sampling
from lmjax.interop.convert import convert, convert_adapters
from lmjax.interop.folder import load_trained_model, read_params
from lmjax.jobs.settings import Checkpoints
from lmjax.models import (
    NF4,
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    ScaledInt8,
    TransformerConfig,
    abstract,
    merge_adapters,
    plain_batch,
    with_base,
)
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.trainable import AllParameters, Biases, Matching
from tests.lmjax.jobs.base_run import go_on_from, write_base
from tests.whole_logits import logits_of_config

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=32,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
LORA = LoRA(rank=2, alpha=6.0, layers=("*",), base=NF4(block=8))
TOKENS = np.random.default_rng(0).integers(0, 257, (8, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of four steps that began with a float one, on a mesh."""
    folder = tmp_path_factory.mktemp("quantized")
    write_base(folder, MODEL)
    before = RunFolder(folder / "base").experiment()
    job = replace(
        before,
        output=str(folder / "tuned"),
        steps=4,
        begin_with=before.output,
        model=replace(MODEL, lora=LORA),
        mesh=Mesh(fsdp=4, tensor=2),
        checkpoint=Checkpoints(every=2),
    )
    job.run()
    return job


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


def params_of(folder):
    return load_trained_model(folder, training_layout()).params


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def logits(config, params):
    return logits_of_config(config, params, plain_batch(TOKENS))


def test_the_base_stays_and_adapters_learn(tuned):
    """What is kept of the base is that of the folder it began with, to the last bit."""
    after = flat(params_of(tuned.output))
    plain = replace(MODEL, lora=replace(LORA, base=None))
    before = read_params(tuned.begin_with, plain, training_layout())
    kept = flat(with_base(before, plain, LORA.base)[0])
    assert after.keys() == kept.keys()
    assert after["blocks.attention.query.weight.codes"].dtype == np.uint8
    for path, leaf in after.items():
        if ".adapter." in path:
            assert leaf.any()
        else:
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)


def test_it_goes_on_to_the_same_bits(tuned):
    before, losses = flat(params_of(tuned.output)), [m["loss"] for m in read_metrics(tuned.output)]
    go_on_from(tuned, 2)
    for path, leaf in flat(params_of(tuned.output)).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert [m["loss"] for m in read_metrics(tuned.output)] == losses


def test_what_begins_with_it_begins_as_it_ended(tuned):
    """With the same base, with another, in float32, and without adapters: bits, or near them."""
    params = params_of(tuned.output)
    expected = logits(tuned.model, params)
    layout = training_layout()
    same = flat(read_params(tuned.output, tuned.model, layout))
    for path, leaf in flat(params).items():
        np.testing.assert_array_equal(same[path], leaf)
    for lora in (replace(LORA, base=None), None):
        config = replace(MODEL, lora=lora)
        found = logits(config, read_params(tuned.output, config, layout))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    config = replace(MODEL, lora=replace(LORA, base=ScaledInt8(block=8)))
    found = read_params(tuned.output, config, layout)
    assert found["blocks"]["feed_forward"]["up"]["weight"]["codes"].dtype == np.int8
    np.testing.assert_allclose(logits(config, found), expected, rtol=0, atol=0.1)


def test_it_is_decoded_and_converted(tuned, tmp_path):
    """The model folder has the float weights with what the adapters add; PEFT's has these alone."""
    convert(tuned.output, tmp_path / "public")
    merged, config = merge_adapters(params_of(tuned.output), tuned.model)
    back = read_params(tmp_path / "public", config, training_layout())
    np.testing.assert_allclose(logits(config, back), logits(config, merged), rtol=0, atol=1e-5)
    texts = [
        load(folder).generate(["line 1"], Sampling(temperature=0), max_tokens=8)
        for folder in (tuned.output, tmp_path / "public")
    ]
    assert texts[0] == texts[1]
    kept = {}
    for lora in (LORA, replace(LORA, base=None)):  # read so, or made so of all that was read
        config = replace(MODEL, lora=lora)
        kept[lora] = read_params(tmp_path / "public", config, training_layout())
    expected = flat(with_base(kept[lora], config, LORA.base)[0])
    shapes = abstract(replace(MODEL, lora=LORA), training_layout())[1]
    for path, leaf in flat(kept[LORA]).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    jax.tree.map(lambda a, b: a.sharding.spec == b.sharding.spec or 1 / 0, kept[LORA], shapes)
    convert_adapters(tuned.output, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable": AllParameters()}, "AllParameters trains blocks.*NF4 keeps in few bits"),
        ({"trainable": Matching(patterns=("up.*",))}, "Matching trains blocks.feed_forward.up"),
        ({"ema_decay": 0.9}, "ema_decay=0.9: parameters that model.lora.base keeps"),
    ],
)
def test_what_is_kept_in_few_bits_is_not_trained(tuned, settings, words):
    with pytest.raises(UserError, match=words):
        replace(tuned, **settings).learner()
    replace(tuned, trainable=Biases()).learner()
