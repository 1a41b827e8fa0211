"""The families beside transformers' own classes, live, on random configurations.

The settings that they vary are those of settings_table.py. What is pinned of transformers 5, and
why: eager attention, because its sdpa has no soft caps; one document a row, because rows of several
are another matter (test_transformers_packed.py), and each row by itself, because it counts padding
as positions in some families; float32 by name, because the dtype of a folder is obeyed by default.
Tokens are numbers here: tokenizers begin otherwise than those of transformers 4 (tests/lmjax/data).
"""

import copy
import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.generation import Generator, Sampling
from lmjax.generation.prompts import left_padded
from lmjax.interop import huggingface
from lmjax.models import (
    abstract,
    bloom,
    falcon,
    gemma2,
    gpt1,
    gpt2,
    llama,
    llama2,
    mistral,
    mixtral,
    opt,
    plain_batch,
    skywork,
)
from lmjax.models.family import families
from lmjax.parallel import training_layout
from tests.lmjax.interop.settings_table import (
    EVERY_IGNORED,
    EVERY_REFUSED,
    OTHERS,
    TABLES,
    covered,
    page,
)

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)
torch.set_num_threads(1)  # the models are tiny, and waiting threads keep cores busy

CASES = 8  # configurations of a family
FEW = 1  # of them, where tests that take minutes are left out
NO_FLOAT64 = {"mixtral"}  # whose products of experts torch has not
LENGTH, NEW = 12, 8  # tokens of the longest prompt, and after it
WHOLE = ("bert", "t5", "xlnet")  # whose texts are not continued from a cache here
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def configurations(kind):
    """CASES random configurations; each row of each column is in one, if it has no more."""
    draw = np.random.default_rng(list(TABLES).index(kind))
    columns = [draw.permutation(np.resize(column, CASES)) for column in TABLES[kind].obeyed]
    return [{k: v for part in row for k, v in part.items()} for row in zip(*columns)]


def in_older_form(settings):
    """Rotary positions as files of before transformers 5 have them."""
    rope = dict(settings["rope_parameters"])
    kind, base = rope.pop("rope_type"), rope.pop("rope_theta")
    others = {key: value for key, value in settings.items() if key != "rope_parameters"}
    scaling = {"type": kind, **rope} if kind != "default" else None
    return {**others, "rope_theta": base, "rope_scaling": scaling}


def classes_of(kind):
    """The class of transformers that loads a family with its heads."""
    others = {
        "bert": transformers.AutoModelForPreTraining,
        "t5": transformers.AutoModelForSeq2SeqLM,
    }
    return others.get(kind, transformers.AutoModelForCausalLM)


def random_model(kind, settings, seed):
    """A model of transformers', eager and in float32, with nothing left at 0 or 1."""
    config = transformers.AutoConfig.for_model(kind, **copy.deepcopy(settings | NO_ENDS))
    model = classes_of(kind).from_config(config, attn_implementation="eager")
    if kind == "t5" and settings.get("tie_word_embeddings") is False:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # of norms and biases
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
    return model.eval()


def save(model, folder, settings):
    """Weights as transformers writes them, and a config.json of these settings alone."""
    model.save_pretrained(folder)
    written = {"model_type": model.config.model_type, **settings, **NO_ENDS}
    (folder / "config.json").write_text(json.dumps(written))


def prompts(kind, vocab_size, seed):
    """Two rows; of models that continue texts the second is shorter in every other case."""
    draw = np.random.default_rng(seed)
    lengths = (LENGTH, LENGTH - 5 * (seed % 2 and kind not in WHOLE))
    return [draw.integers(0, vocab_size, length).tolist() for length in lengths]


def batch_of(kind, rows):
    """The rows as we read them, padded on the left where they are continued."""
    if kind not in WHOLE:
        return left_padded(rows, LENGTH)
    batch = plain_batch(np.array(rows))
    if kind == "t5":
        return dataclasses.replace(batch, encoder=plain_batch(batch.tokens[:, ::-1].copy()))
    return dataclasses.replace(batch, token_types=(batch.positions // 5 % 2).astype(np.int32))


def their_logits(model, batch):
    """Logits of each row by itself, at its places in the batch.

    A copy of the model computes them: rotary positions that follow the length of the text keep
    that of the last one.
    """
    logits = np.zeros((*batch.tokens.shape, model.config.vocab_size), np.float32)
    for number, real in enumerate(batch.segments == 1):
        rows = {"input_ids": batch.tokens}
        if batch.token_types is not None:
            rows["token_type_ids"] = batch.token_types
        row = {k: torch.tensor(v[number][real][None], dtype=torch.long) for k, v in rows.items()}
        if batch.encoder is not None:
            row["decoder_input_ids"] = row["input_ids"]
            row["input_ids"] = row["decoder_input_ids"].flip(1)
        with torch.no_grad():
            found = copy.deepcopy(model)(**row)
        name = "prediction_logits" if "prediction_logits" in found else "logits"
        logits[number, real] = found[name][0].numpy()
    return logits


def their_tokens(model, prompt):
    """What `generate` chooses, through its own cache where the family has one."""
    tokens = copy.deepcopy(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[0, len(prompt) :].tolist()


def our_logits(config, params, batch):
    """Logits of a padded batch, of the real vocabulary."""
    graph, _ = abstract(config, training_layout())

    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    return np.asarray(jax.jit(run)(params, batch))[..., : config.vocab_size]


def load(kind, folder):
    """What transformers makes of a folder; nothing is missing or left over."""
    model, found = classes_of(kind).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values()), found
    return model.eval()


def assert_close(found, expected, batch, tolerance):
    """Equal at all tokens that are no padding.

    The tolerance is relative to the largest logit. 2e-5 is what float32 sums in another order
    come to (each side differs from its own float64 by up to a few 1e-6) with room for platforms.
    """
    real = batch.segments == 1
    found, expected = np.asarray(found)[real], np.asarray(expected)[real]
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "number", [n if n < FEW else pytest.param(n, marks=pytest.mark.slow) for n in range(CASES)]
)
@pytest.mark.parametrize("kind", TABLES)
def test_logits_tokens_and_back(one_device, tmp_path, kind, number):
    """Theirs is read: same logits, same greedy tokens; written again: the very same model."""
    settings = configurations(kind)[number]
    if "rope_parameters" in settings and number % 2:
        settings = in_older_form(settings)
    model = random_model(kind, settings, number)
    save(model, tmp_path / "theirs", settings)
    config, _, params = huggingface.read(tmp_path / "theirs", training_layout())

    rows = prompts(kind, config.vocab_size, number)
    batch = batch_of(kind, rows)
    expected = their_logits(model, batch)
    exact = expected
    if kind not in NO_FLOAT64:  # T5's own float32 is further from it than ours
        exact = their_logits(copy.deepcopy(model).double(), batch)
    assert_close(our_logits(config, params, batch), exact, batch, 2e-5)
    # A third of them is continued: what a cache changes depends on few settings.
    if kind not in WHOLE and number % 3 == 0:
        # Layers in one stack give the tokens of layers apart, and are sooner compiled.
        generator = Generator(config, params, unstack=False)
        tokens = generator.generate(rows, Sampling(temperature=0.0), NEW)
        assert tokens == [their_tokens(model, row) for row in rows]

    huggingface.write(tmp_path / "ours", config, params)
    again = load(kind, tmp_path / "ours")
    assert_close(their_logits(again, batch), expected, batch, 1e-6)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("kind", TABLES)
def test_every_setting_of_a_family_is_in_its_table(kind):
    """Those that transformers writes for it."""
    keys = transformers.AutoConfig.for_model(kind).to_dict().keys()
    assert not keys - covered(kind)


@pytest.mark.parametrize("kind", TABLES)
def test_what_is_not_given_is_what_transformers_takes_it_for(kind):
    family = next(family for family in families() if family.model_type == kind)
    theirs = type(transformers.AutoConfig.for_model(kind))
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    known = {"scale_attn_weights", "tie_word_embeddings", *defaults}
    assert family.defaults.keys() <= known | {"mlp_bias", "attention_bias"}  # which are ignored
    shared = family.defaults.keys() & defaults.keys()
    assert {k: family.defaults[k] for k in shared} == {k: defaults[k] for k in shared}
    assert family.aliases.items() >= theirs.attribute_map.items()


@pytest.mark.parametrize("kind", TABLES)
def test_of_two_names_of_a_setting_the_same_one_counts(kind):
    """Where a config.json has both, and each says something else."""
    family = next(family for family in families() if family.model_type == kind)
    others = [*family.aliases.items(), *family.former.items()]
    for other, name in others:
        if kind == "xlnet" and name in ("n_head", "d_model"):  # of which it refuses two
            continue
        settings = configurations(kind)[0] | {name: 8, other: 4}
        theirs = transformers.AutoConfig.for_model(kind, **settings)
        assert family.settings(settings)[name] == getattr(theirs, name), (name, other)


@pytest.mark.parametrize("kind", TABLES)
def test_ignored_settings_change_no_number(one_device, tmp_path, kind):
    """All of them at once: the same logits of theirs, and the very same config of ours.

    1e-6 of the largest logit: BERT's chunks are other matrices, summed in another order.
    """
    settings = configurations(kind)[0]
    ignored = {k: v for k, (v, *_) in (EVERY_IGNORED | TABLES[kind].ignored).items()}
    ignored = {k: v for k, v in ignored.items() if k not in ("return_dict", "pretraining_tp")}
    model = random_model(kind, settings, 1)
    other = random_model(kind, settings | ignored, 1)
    other.load_state_dict(model.state_dict())
    batch = batch_of(kind, prompts(kind, model.config.vocab_size, 0))
    assert_close(their_logits(other, batch), their_logits(model, batch), batch, 1e-6)
    configs = []
    for given in (settings, settings | ignored | {"pretraining_tp": 2}):
        save(model, tmp_path, given)
        configs.append(huggingface.read_config(tmp_path)[1])
    assert configs[0] == configs[1]


REFUSED = [
    (kind, key, value)
    for kind, table in TABLES.items()
    for key, values in (EVERY_REFUSED | table.refused).items()
    if key not in table.ignored
    for value in values
]


@pytest.mark.parametrize(("kind", "key", "value"), REFUSED, ids=str)
def test_refused_settings_are_named(tmp_path, kind, key, value):
    *outer, inner = key.split(".")
    settings = {k: v for k, v in configurations(kind)[0].items() if v is not None}
    if outer:
        settings.pop("rope_parameters", None)
    given = {outer[0]: {inner: value}} if outer else {key: value}
    if key == "layer_types":
        given["num_hidden_layers"] = 2
    if key == "num_ln_in_parallel_attn":
        given["new_decoder_architecture"] = False
    text = json.dumps({"model_type": kind, **settings, **given})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        huggingface.read_config(tmp_path)
    assert key in str(error.value)


SHOWN = [(test, key) for settings in OTHERS.values() for key, _, _, test in settings if test]


@pytest.mark.parametrize(("test", "key"), SHOWN)
def test_what_the_page_names_as_shown_is_tested(test, key):
    path = Path(__file__).parents[3] / test
    if not path.is_file():
        pytest.skip(f"{test} is not here")
    assert key in path.read_text("utf-8")


def test_the_page_has_the_tables():
    path = Path(huggingface.__file__).parent / "SETTINGS.md"
    assert path.read_text("utf-8") == page(), (
        "python -m tests.lmjax.interop.settings_table > lmjax/interop/SETTINGS.md"
    )


# Presets, and the classes that they are for transformers.
PRESETS = {
    "gpt1": (gpt1(), "OpenAIGPTLMHeadModel"),
    "gpt2": (gpt2(), "GPT2LMHeadModel"),
    "opt": (opt(), "OPTForCausalLM"),
    "opt_350m": (opt("350M"), "OPTForCausalLM"),
    "bloom": (bloom(), "BloomForCausalLM"),
    "llama": (llama(), "LlamaForCausalLM"),
    "llama2_70b": (llama2("70B"), "LlamaForCausalLM"),
    "skywork": (skywork(), "LlamaForCausalLM"),
    "mistral": (mistral(), "MistralForCausalLM"),
    "mixtral": (mixtral(), "MixtralForCausalLM"),
    "gemma2": (gemma2(), "Gemma2ForCausalLM"),
    "falcon_7b": (falcon("7B"), "FalconForCausalLM"),
    "falcon_40b": (falcon("40B"), "FalconForCausalLM"),
}


def shrunk(config):
    """The same kind of model, tiny; its windows are shorter than the prompts."""
    heads, kv_heads = config.attention.num_heads, config.attention.kv_heads
    return replace(
        config,
        vocab_size=97,
        hidden=32,
        num_layers=2,
        max_length=32,
        embedding_size=config.embedding_size and 16,
        embedding_scale=config.embedding_scale if config.embedding_scale == 1 else math.sqrt(32),
        attention=replace(
            config.attention,
            num_heads=4,
            num_kv_heads=4 if kv_heads == heads else min(kv_heads, 2),
            head_dim=8,
            windows=tuple(window and 5 for window in config.attention.windows),
        ),
        feed_forward=replace(config.feed_forward, size=4 * 32),
    )


def random_parameters(config, seed):
    """Parameters with nothing left at 0 or 1."""
    draw = np.random.default_rng(seed)

    def leaf(path, shape):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        value = 0.3 * draw.standard_normal(shape.shape, np.float32)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), shape.sharding.spec)
        return jax.device_put(value + np.float32(name == "scale"), sharding)

    return jax.tree.map_with_path(leaf, abstract(config, training_layout())[1])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_written_for_transformers(one_device, tmp_path, name):
    """A model that began here gives the same logits there."""
    config, architecture = shrunk(PRESETS[name][0]), PRESETS[name][1]
    params = random_parameters(config, 1)
    huggingface.write(tmp_path, config, params)
    model = load("llama", tmp_path)
    assert type(model).__name__ == architecture
    batch = left_padded(prompts("llama", config.vocab_size, 1), LENGTH)
    expected = their_logits(model, batch)
    assert_close(our_logits(config, params, batch), expected, batch, 2e-5)
