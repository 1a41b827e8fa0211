"""Public folders without a head of words, live beside transformers' classes without one."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.generation import load
from lmjax.interop import huggingface
from lmjax.interop.folder import model_folder, read_params
from lmjax.models import abstract, plain_batch
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
LLAMA = BERT | {"num_key_value_heads": 1}
XLNET = {"vocab_size": 61, "d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 40}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3}
NO_ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
# Classes, and the settings of a small model of each.
ENCODERS = {
    "BertModel": BERT,
    "BertForSequenceClassification": BERT | {"num_labels": 3},
    "BertForNextSentencePrediction": BERT,
    "LlamaModel": LLAMA,
    "LlamaForSequenceClassification": LLAMA,
    "MistralModel": LLAMA,
    "XLNetModel": XLNET,
    "T5EncoderModel": T5,
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 12)).astype(np.int32)


def make(name, settings, folder):
    """A random model of a class of transformers', saved; nothing of it is left at 0 or 1."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings, **NO_ENDS))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def hidden(folder):
    """What we compute of the tokens."""
    config, graph, params = huggingface.read(folder, training_layout())
    batch = plain_batch(TOKENS)
    return config, params, np.asarray(jax.jit(lambda p: nnx.merge(graph, p)(batch)[0])(params))


def their_hidden(model):
    base = getattr(model, model.base_model_prefix, model)
    with torch.no_grad():
        return base(torch.tensor(TOKENS, dtype=torch.long)).last_hidden_state.numpy()


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_are_theirs_and_are_written_again(one_device, tmp_path, name):
    """2e-5 of the largest, as for logits; the written folder gives the very same states there."""
    model = make(name, ENCODERS[name], tmp_path / "theirs")
    config, params, found = hidden(tmp_path / "theirs")
    assert not config.word_head
    expected = their_hidden(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())

    huggingface.write(tmp_path / "ours", config, params)
    assert huggingface.architecture_of(huggingface.read_config(tmp_path / "ours")[1]) == (
        huggingface.architecture_of(config)
    )
    (named,) = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
    again = getattr(transformers, named).from_pretrained(tmp_path / "ours")
    np.testing.assert_array_equal(their_hidden(again.eval()), expected)


def test_without_architectures_the_weights_tell(one_device, tmp_path):
    make("BertModel", BERT, tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["architectures"]
    path.write_text(json.dumps(settings))
    assert not huggingface.read_config(tmp_path)[1].word_head
    (tmp_path / "model.safetensors").unlink()
    path.write_text(json.dumps(settings | {"architectures": ["BertModel"]}))
    assert not huggingface.read_config(tmp_path)[1].word_head


def test_a_class_of_ones_own_with_more_heads_predicts_words(one_device, tmp_path):
    """The architecture says nothing; three heads more stand beside the one of words."""
    model = make("BertForMaskedLM", BERT, tmp_path)
    state = dict(model.state_dict()) | {
        f"cls.{name}.weight": torch.ones(4, 24) for name in ("species", "chain", "graft")
    }
    tied = {key: value.clone() for key, value in state.items()}
    from safetensors.torch import save_file

    save_file(tied, tmp_path / "model.safetensors", {"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["Antibodies"]}))
    config, graph, params = huggingface.read(tmp_path, training_layout())
    assert config.word_head and config.classifier is None

    @jax.jit
    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(plain_batch(TOKENS))[0])[..., :61]

    with torch.no_grad():
        expected = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    found = np.asarray(logits(params))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_fresh_head_on_request(one_device, tmp_path):
    """The rest is the folder's, bit for bit; the head is BERT's own, and another seed's another."""
    make("BertModel", BERT, tmp_path)
    config = model_folder(str(tmp_path))
    wanted = replace(config, word_head=True)
    plain = read_params(tmp_path, config, training_layout())
    params = read_params(tmp_path, wanted, training_layout(), seed=1)
    shapes = jax.tree.map(lambda a: a.shape, params)
    assert shapes == jax.tree.map(lambda a: a.shape, abstract(wanted, training_layout())[1])
    kept = {name: params[name] for name in plain}
    jax.tree.map(np.testing.assert_array_equal, kept, plain)
    fresh = params["head_transform"]["dense"]["weight"]
    assert 0.015 < np.std(fresh) < 0.025  # the deviation of BERT's initialisation is 0.02
    other = read_params(tmp_path, wanted, training_layout(), seed=2)
    assert not np.array_equal(other["head_transform"]["dense"]["weight"], fresh)
    # What config.json ties, or has of other sizes, is still a mistake.
    with pytest.raises(UserError, match="do not fit the model"):
        read_params(tmp_path, replace(wanted, hidden=48), training_layout())


def test_what_can_be_done_is_said(one_device, tmp_path):
    """Where words are asked for: of the folder, and of the model."""
    make("BertModel", BERT, tmp_path)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(56))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    with pytest.raises(UserError, match=r"no head that predicts words.*model\.word_head=true"):
        load(tmp_path)
    graph, params = huggingface.read(tmp_path, training_layout())[1:]
    hidden = jnp.zeros((*TOKENS.shape, BERT["hidden_size"]))
    with pytest.raises(UserError, match="no head that predicts words"):
        nnx.merge(graph, params).logits(hidden)
