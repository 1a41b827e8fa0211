"""Rows of several documents beside transformers, live.

What is pinned of transformers 5, and why. Documents in a row are kept apart for it by positions
that start anew (`position_ids`), and by nothing else; it looks at them only where it is called with
`use_cache=False` and without `attention_mask`. With a cache, the default in training too, or with a
mask of ones, every document of a row sees those before it, without a word. OPT and BLOOM never
look: theirs are compared document by document.
"""

import os

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.interop import huggingface
from lmjax.objectives import CausalLM
from lmjax.parallel import training_layout

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
torch = pytest.importorskip("torch", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)
torch.set_num_threads(1)  # the models are tiny, and waiting threads keep cores busy

LENGTHS = (5, 9, 1, 6)  # of the documents in the row
SIZES = {"vocab_size": 97, "hidden_size": 32}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
CONFIGS = {
    "llama": SIZES | LAYERS | {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": SIZES | LAYERS | {"intermediate_size": 64, "num_key_value_heads": 2},
    "opt": SIZES | LAYERS | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": SIZES | {"n_layer": 2, "n_head": 4},
}


def row():
    """Tokens and document numbers of one row, and the target behind its last token."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 97, sum(LENGTHS) + 1).astype(np.int32)
    documents = np.repeat(np.arange(len(LENGTHS)) + 1, LENGTHS)
    return tokens, np.append(documents, documents[-1]).astype(np.int32)


def their_model(family, attention):
    """A model of transformers' in training, without dropout, far from where it begins."""
    config = transformers.AutoConfig.for_model(family, **CONFIGS[family], dropout=0.0)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()


def nats(model, tokens, targets, **call):
    """Summed cross-entropy of the next tokens."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens[None], dtype=torch.long), **call).logits[0]
    targets = torch.tensor(targets, dtype=torch.long)
    return float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))


def packed(model, tokens, **call):
    """The row as transformers packs it: positions start anew with each document."""
    places = np.concatenate([np.arange(length) for length in LENGTHS])
    places = torch.tensor(places[None], dtype=torch.long)
    return nats(model, tokens[:-1], tokens[1:], position_ids=places, **call)


def apart(model, tokens):
    """Each document by itself."""
    ends = np.cumsum(LENGTHS)
    parts = [
        (tokens[end - size : end], tokens[end - size + 1 : end + 1])
        for end, size in zip(ends, LENGTHS)
    ]
    return sum(nats(model, inputs, targets, use_cache=False) for inputs, targets in parts)


def ours(folder):
    """The loss of the row, as a run packs it."""
    tokens, documents = row()
    _, graph, params = huggingface.read(folder, training_layout())
    objective = CausalLM()
    example = objective.prepare(tokens[None], documents[None], np.zeros(1, np.uint64))

    def loss(params, example):
        return objective.loss(nnx.merge(graph, params), example, None).loss

    return float(jax.jit(loss)(params, example))


@pytest.mark.parametrize("family", CONFIGS)
def test_our_packed_row_is_its_documents_apart(one_device, tmp_path, family):
    """1e-6 relative: float32 sums of 21 losses, which differ by up to 1e-7 of it."""
    tokens, _ = row()
    model = their_model(family, "eager")
    model.save_pretrained(tmp_path)
    assert ours(tmp_path) == pytest.approx(apart(model, tokens), rel=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_packed_row_is_ours(one_device, tmp_path, family, attention):
    """Called as the docstring says; called otherwise, the documents see each other."""
    tokens, _ = row()
    model = their_model(family, attention)
    model.save_pretrained(tmp_path)
    expected = ours(tmp_path)
    assert packed(model, tokens, use_cache=False) == pytest.approx(expected, rel=1e-6)
    ones = torch.ones(1, sum(LENGTHS), dtype=torch.long)
    for leaking in ({}, {"use_cache": False, "attention_mask": ones}):
        assert packed(model, tokens, **leaking) != pytest.approx(expected, rel=1e-3)


def test_opt_always_leaks_in_transformers(one_device, tmp_path):
    """BLOOM takes no positions at all."""
    tokens, _ = row()
    model = their_model("opt", "eager")
    model.save_pretrained(tmp_path)
    assert packed(model, tokens, use_cache=False) != pytest.approx(ours(tmp_path), rel=1e-3)
