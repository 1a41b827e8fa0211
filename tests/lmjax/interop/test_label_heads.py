"""Folders with a head on labels, live beside transformers' classes."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from lmjax.config import UserError, replace
from lmjax.generation.prompts import left_padded
from lmjax.interop import huggingface
from lmjax.interop.convert import convert, head_notes
from lmjax.interop.folder import read_params
from lmjax.models import (
    SpanHeadConfig,
    TextHeadConfig,
    TokenHeadConfig,
    abstract,
    initialize,
    plain_batch,
)
from lmjax.models.family import families
from lmjax.parallel import training_layout

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)
torch.set_num_threads(1)

BERT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
LLAMA = BERT | {"num_key_value_heads": 1, "head_dim": 8}
GPT = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
T5["decoder_start_token_id"] = 0
OPT = {key: value for key, value in BERT.items() if key != "intermediate_size"}
# The families of transformers, and the settings of a small model of each.
SETTINGS = {
    "OpenAIGPT": GPT,
    "GPT2": GPT,
    "Bloom": {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3},
    "Falcon": {k: v for k, v in OPT.items() if k != "max_position_embeddings"},
    "OPT": OPT | {"ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "Bert": BERT,
    "T5": T5,
    "Llama": LLAMA,
    "Mistral": LLAMA | {"sliding_window": 4},
    "Mixtral": LLAMA | {"num_local_experts": 4},
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Gemma": LLAMA,
    "Gemma2": LLAMA | {"sliding_window": 4},
}
ENDINGS = (
    *("ForCausalLM", "LMHeadModel", "ForPreTraining", "ForConditionalGeneration"),
    "EncoderModel",
)
CLASSES = [
    f"{family.architecture[: -len(ending)]}{kind.ending}"
    for family in families()
    for kind in family.heads
    for ending in ENDINGS
    if family.architecture.endswith(ending)
]
LABELS = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}, "label2id": {"no": 0, "perhaps": 1}}
NO_ENDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
TOKENS = np.random.default_rng(0).integers(2, 61, (2, 12)).astype(np.int32)
TOKENS[:, -1] = 1  # T5 reads the state at the end of the text, of which there is one


def make(name, folder, **settings):
    """A random model of a class of transformers', saved; nothing of it is left at 0 or 1."""
    kind = getattr(transformers, name)
    family = max((key for key in SETTINGS if name.startswith(key)), key=len)
    if not name.endswith("Answering"):
        settings = LABELS | {"label2id": {"no": 0, "perhaps": 1, "yes": 2}} | settings
    config = kind.config_class(**SETTINGS[family], **NO_ENDS | settings)
    model = kind._from_config(config, attn_implementation="eager")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def their_outputs(model, tokens=TOKENS):
    """Of each row by itself, outputs on the last axis."""
    found = []
    for row in tokens:
        with torch.no_grad():
            out = model(torch.tensor(row[None], dtype=torch.long))
        both = "start_logits" in out
        logits = torch.stack((out.start_logits, out.end_logits), -1) if both else out.logits
        found.append(logits[0].numpy())
    return np.stack(found)


def batch_of(config, tokens=TOKENS):
    """The texts as the model reads them; a decoder has them less their ends."""
    batch = plain_batch(tokens)
    if not hasattr(config, "encoder_layers"):
        return batch
    begun = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], axis=1)
    return dataclasses.replace(plain_batch(begun), encoder=batch)


def our_outputs(config, params, batch):
    """Outputs of the head on labels; of texts without the axis of texts."""
    graph, _ = abstract(config, training_layout())
    (head,) = config.heads

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return model.outputs(head.name, model(batch)[0], batch)

    found = np.asarray(run(params, batch))
    return found[:, 0] if head.of_texts else found


def assert_close(found, expected):
    """2e-5 of the largest, as for logits of words."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_every_class_that_transformers_has_is_here():
    """Of these families and tasks."""
    endings = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
    there = {key + ending for key in SETTINGS for ending in endings}
    there = {name for name in there if hasattr(transformers, name)}
    assert there == set(CLASSES)


# Heads of tokens and of spans by default for four of the families.
SOME = ("Bert", "GPT2", "T5", "Llama")


def is_default(name):
    """Returns whether a class is compared by default, not among the slow tests alone."""
    return "Sequence" in name or name.startswith(SOME)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if is_default(n) else [pytest.mark.slow]) for n in CLASSES]
)
def test_logits_are_theirs_and_are_written_again(one_device, tmp_path, name):
    model = make(name, tmp_path / "theirs", problem_type="single_label_classification")
    config, _, params = huggingface.read(tmp_path / "theirs", training_layout())
    expected = their_outputs(model)
    assert_close(our_outputs(config, params, batch_of(config)), expected)
    (head,) = config.heads
    assert not config.word_head and head.outputs == expected.shape[-1]
    if not isinstance(head, SpanHeadConfig):
        assert head.labels == ("no", "perhaps", "yes")
    if isinstance(head, TextHeadConfig):
        assert head.problem == "single_label_classification"

    huggingface.write(tmp_path / "ours", config, params)
    again, found = type(model).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert again.config.architectures == [name]
    if not isinstance(head, SpanHeadConfig):
        assert again.config.id2label == model.config.id2label
        assert again.config.label2id == model.config.label2id
        assert again.config.problem_type == (
            None if isinstance(head, TokenHeadConfig) else model.config.problem_type
        )
    reread = huggingface.read_config(tmp_path / "ours")[1]
    assert huggingface.architecture_of(reread) == huggingface.architecture_of(config)
    assert reread.heads == config.heads
    huggingface.rewrite(tmp_path / "ours", tmp_path / "copy")
    assert huggingface.read_config(tmp_path / "copy")[1] == reread


@pytest.mark.parametrize(
    "name", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"]
)
def test_the_last_token_of_a_padded_text(one_device, tmp_path, name):
    """transformers finds it by the id of padding, we by the length of the text.

    So both have the same scores of texts that do not end in that token. Rows of transformers are
    padded at their ends, ours at their beginnings.
    """
    model = make(name, tmp_path)
    config, _, params = huggingface.read(tmp_path, training_layout())
    texts = [TOKENS[0, :size].tolist() for size in (12, 7, 3)]
    rows = torch.tensor([text + [0] * (12 - len(text)) for text in texts])
    with torch.no_grad():
        expected = model(rows, attention_mask=(rows != 0).long()).logits.numpy()
    assert_close(our_outputs(config, params, left_padded(texts, 12)), expected)
    # The text 5 0 is read at its last token here, at the one before it there.
    ours = our_outputs(config, params, plain_batch(np.array([[5, 0]])))
    assert_close(
        our_outputs(config, params, plain_batch(np.array([[5]]))),
        their_outputs(model, [np.array([5, 0])]),
    )
    assert np.abs(ours - their_outputs(model, [np.array([5, 0])])).max() > 1e-2


def test_a_reward_model_that_began_here(one_device, tmp_path):
    """One output without a name, beside a head of words that the class has not."""
    make("LlamaForSequenceClassification", tmp_path / "theirs")
    base = huggingface.read_config(tmp_path / "theirs")[1]
    head = TextHeadConfig(name="reward", outputs=1, bias=False, problem="regression")
    config = replace(base, word_head=True, tied_head=False, heads=(head,))
    _, params = initialize(config, training_layout(), jax.random.key(0))
    huggingface.write(tmp_path / "ours", config, params)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1 and model.config.problem_type == "regression"
    found = our_outputs(config, params, plain_batch(TOKENS))
    assert_close(found, their_outputs(model.eval()))
    again, _, same = huggingface.read(tmp_path / "ours", training_layout())
    assert again.heads == (replace(head, name="label"),)
    np.testing.assert_array_equal(our_outputs(again, same, plain_batch(TOKENS)), found)


def test_one_of_several_heads_is_written(one_device, tmp_path):
    make("GPT2ForTokenClassification", tmp_path / "theirs")
    base = huggingface.read_config(tmp_path / "theirs")[1]
    heads = TokenHeadConfig(name="tag", outputs=4), TextHeadConfig(name="topic", bias=False)
    config = replace(base, word_head=True, heads=heads)
    _, params = initialize(config, training_layout(), jax.random.key(0))
    with pytest.raises(UserError, match=r"several \(tag, topic\)"):
        huggingface.write(tmp_path / "ours", config, params)
    for head in heads:
        alone = replace(config, heads=(head,))
        folder = tmp_path / head.name
        huggingface.write(folder, alone, params)
        (named,) = json.loads((folder / "config.json").read_text())["architectures"]
        model = getattr(transformers, named).from_pretrained(folder).eval()
        own = {k: v for k, v in params.items() if k != "heads"}
        own |= {"heads": {head.name: params["heads"][head.name]}}
        assert_close(our_outputs(alone, own, plain_batch(TOKENS)), their_outputs(model))


def test_what_transformers_cannot_have_is_said(one_device, tmp_path):
    make("GPT2ForTokenClassification", tmp_path)
    config, _, params = huggingface.read(tmp_path, training_layout())
    config = replace(config, heads=(TextHeadConfig(pooler=True),))
    with pytest.raises(UserError, match=r"no gpt2 with the head 'label'.*bias=false"):
        huggingface.write(tmp_path / "ours", config, params)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    for wrong in ({"0": "a", "2": "b"}, ["a", "b"], {"0": 1}):
        path.write_text(json.dumps(settings | {"id2label": wrong}))
        with pytest.raises(UserError, match=r"config\.json: id2label"):
            huggingface.read_config(tmp_path)
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in LABELS}))
    assert huggingface.read_config(tmp_path)[1].heads == (TokenHeadConfig(dropout=0.1),)
    path.write_text(json.dumps(settings | {"classifier_dropout": 2}))
    with pytest.raises(UserError, match="dropout=2"):
        huggingface.read_config(tmp_path)


def paths(tree):
    return {name: np.asarray(leaf) for name, leaf in huggingface.by_path(tree).items()}


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM", "BertModel"])
def test_fine_tuning_begins_with_the_pooler_of_a_bert(one_device, tmp_path, name):
    """Whatever class the folder says; its other heads are left, and the last layer is fresh."""
    model = make(name, tmp_path)
    if name == "BertForMaskedLM":  # whose public files have one all the same
        other = make("BertForPreTraining", tmp_path / "other").state_dict()
        kept = {key: value.numpy().copy() for key, value in model.state_dict().items()}
        poolers = {key: value.numpy() for key, value in other.items() if "pooler" in key}
        save_file(kept | poolers, tmp_path / "model.safetensors", {"format": "pt"})
        model = transformers.BertModel.from_pretrained(tmp_path)
    base = huggingface.read_config(tmp_path)[1]
    heads = TextHeadConfig(name="topic", token="first", pooler=True), TokenHeadConfig(name="tag")
    config = replace(base, word_head=False, classifier=None, heads=heads)
    params = paths(read_params(tmp_path, config, training_layout(), seed=1))
    wanted = huggingface.by_path(abstract(config, training_layout())[1])
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in wanted.items()}
    theirs = {key.removeprefix("bert."): value for key, value in model.state_dict().items()}
    np.testing.assert_array_equal(
        params["heads.topic.pooler.weight"].T, theirs["pooler.dense.weight"]
    )
    np.testing.assert_array_equal(params["heads.topic.pooler.bias"], theirs["pooler.dense.bias"])
    np.testing.assert_array_equal(
        params["embedding.table"][:61], theirs["embeddings.word_embeddings.weight"]
    )
    assert 0 < np.std(params["heads.topic.outputs.weight"]) < 0.03  # BERT's 0.02
    # A run of ours has it in its classifier of pairs.
    if name == "BertForPreTraining":
        convert(tmp_path, tmp_path / "run")
        ours = paths(read_params(tmp_path / "run", config, training_layout(), seed=1))
        for key, value in params.items():
            np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_a_head_of_the_same_name_is_taken_or_does_not_fit(one_device, tmp_path):
    make("GPT2ForSequenceClassification", tmp_path)
    config, _, params = huggingface.read(tmp_path, training_layout())
    found = read_params(tmp_path, config, training_layout())
    jax.tree.map(np.testing.assert_array_equal, found, params)
    (head,) = config.heads
    other = replace(config, heads=(replace(head, outputs=5, labels=()),))
    with pytest.raises(UserError, match=r"heads\.label\.outputs\.weight: \[24, 3\] there"):
        read_params(tmp_path, other, training_layout())
    fresh = replace(other, heads=(replace(other.heads[0], name="new"),))
    found = read_params(tmp_path, fresh, training_layout())
    assert found["heads"]["new"]["outputs"]["weight"].shape == (24, 5)
    assert "label" not in found["heads"]


def test_conversion_to_a_run_and_back(one_device, tmp_path, capsys):
    """The same model, and a note on transformers' last token."""
    model = make("GPT2ForSequenceClassification", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "run")
    assert "pad_token_id" not in capsys.readouterr().out
    convert(tmp_path / "run", tmp_path / "ours")
    told = " ".join(capsys.readouterr().out.split())
    assert "set model.config.pad_token_id to a token that no text ends with" in told
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert_close(their_outputs(again), their_outputs(model))  # of another kind of attention
    assert again.config.id2label == model.config.id2label
    config = replace(huggingface.read_config(tmp_path / "ours")[1], word_head=True)
    assert "the head 'label' alone" in head_notes(config)[0]
