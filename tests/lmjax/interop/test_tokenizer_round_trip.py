"""From a model folder to a run folder and back: transformers makes the same tokenizer of both."""

import json
import os
import shutil

import jax
import pytest

from lmjax.config import to_json
from lmjax.interop.convert import convert
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from tests.lmjax.data.real_strings import real_strings
from tests.lmjax.data.vocabulary_folders import UNCASED, byte_pairs
from tests.lmjax.interop.test_convert import ConvertedRun
from tests.lmjax.interop.tokenizer_kinds import trained

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
transformers = pytest.importorskip("transformers", reason=EXTRA)
TEXTS = [*real_strings()[::20], "two  words"]
MODEL = TransformerConfig(
    vocab_size=1600,
    hidden=8,
    num_layers=1,
    max_length=40,
    attention=AttentionConfig(num_heads=1, head_dim=8),
    feed_forward=FeedForwardConfig(size=8),
)


def gpt2(folder, kind="GPT2Tokenizer", **settings):
    vocabulary, merges = byte_pairs()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = vocabulary | {name: len(vocabulary) + n for n, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(merges)
    return {"tokenizer_class": kind, "eos_token": "<|endoftext|>", **settings}


def bert(folder):
    (folder / "vocab.txt").write_text("".join(f"{name}\n" for name in UNCASED))
    return {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def saved(make):
    """The tokenizer.json that transformers itself writes for a folder."""

    def write(folder):
        settings = make(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        files = [path for path in folder.iterdir() if path.name != "tokenizer_config.json"]
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        for path in files:
            path.unlink()
        return json.loads((folder / "tokenizer_config.json").read_text())

    return write


def llama(folder):
    """With a tokenizer.json that begins texts, and a folder that says so or not."""
    (folder / "tokenizer.model").write_bytes(
        trained(
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    )
    return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}


def t5(folder):
    roles = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    (folder / "spiece.model").write_bytes(trained(model_type="unigram", **roles))
    return {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}


def gemma(folder):
    llama(folder)
    return {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


FOLDERS = {
    "GPT-2": gpt2,
    "GPT-2 with a begin": lambda f: gpt2(f, bos_token="<|im_start|>", add_bos_token=True),
    "Qwen2": lambda f: gpt2(f, "Qwen2Tokenizer"),
    "GPT-2's tokenizer.json": saved(gpt2),
    "BERT": bert,
    "BERT's tokenizer.json": saved(bert),
    "LLaMA's tokenizer.json": saved(llama),
    "T5's tokenizer.json": saved(t5),
    "Gemma's tokenizer.json": saved(gemma),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, params = initialize(MODEL, training_layout(), jax.random.key(3))
        (root / "run").mkdir()
        (root / "run" / "config.json").write_text(to_json(ConvertedRun(model=MODEL)))
        with Checkpointer(root / "run" / "checkpoints") as checkpointer:
            checkpointer.save(1, {"params": params}, {})
        convert(root / "run", root / "model")
    return root / "model"


@pytest.mark.parametrize("name", FOLDERS)
def test_the_tokenizer_comes_back(one_device, model, tmp_path, name):
    """Equal ids with what stands around a text, and equal text."""
    source = shutil.copytree(model, tmp_path / "source")
    only = tmp_path / "tokenizer"
    only.mkdir()
    settings = FOLDERS[name](only)
    (only / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(only, source, dirs_exist_ok=True)
    convert(source, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    convert(source, tmp_path / "copy", to_run=False)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ids = theirs(TEXTS)["input_ids"]
    texts = theirs.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for folder in ("back", "copy"):
        found = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for text, ours, wanted in zip(TEXTS, found(TEXTS)["input_ids"], ids, strict=True):
            assert ours == wanted, (folder, text)
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        assert found.batch_decode(ids, **how) == texts, folder
        assert found.eos_token_id == theirs.eos_token_id or "BERT" in name
