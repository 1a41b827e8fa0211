"""Whatever takes a path refuses a URL with the reason: nothing is made in a folder called `gs:`."""

import os

import jax
import pytest

from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, JsonLines, SentencePiece, TextFiles, TokenizerFolder
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.store import TokenStore
from lmjax.data.tfds import TFDS
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer, load_tokenizer
from lmjax.generation import load
from lmjax.interop import huggingface
from lmjax.interop.convert import convert
from lmjax.interop.folder import model_folder, read_params, tokenizer_folder
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import MetricsWriter, read_metrics
from lmjax.runs.trained_model import read_trained

URL = "gs://bucket/run"
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=4,
    num_layers=1,
    max_length=8,
    attention=AttentionConfig(num_heads=2, head_dim=2),
    feed_forward=FeedForwardConfig(size=4),
)
TEXT = TextFiles(path="text.txt")


def write_model(folder):
    huggingface.write(folder, MODEL, initialize(MODEL, training_layout(), jax.random.key(0))[1])


TAKES_A_PATH = {
    "TextFiles": lambda url: TextFiles(path=("text.txt", url)),
    "JsonLines": lambda url: JsonLines(path=url),
    "TFDS": lambda url: TFDS(name="wikipedia", data_dir=url),
    "Data": lambda url: Data(train=(Domain(name="a", source=TEXT),), tokenizer=Bytes(), cache=url),
    "SentencePiece": lambda url: SentencePiece(path=url),
    "TokenizerFolder": lambda url: TokenizerFolder(path=url),
    "read_tokenizer": read_tokenizer,
    "load_tokenizer": load_tokenizer,
    "Tokenizer.save": lambda url: ByteTokenizer().save(url),
    "build_stores": lambda url: build_stores(TEXT, ByteTokenizer(), url),
    "TokenStore": TokenStore,
    "RunFolder": RunFolder,
    "Checkpointer": Checkpointer,
    "MetricsWriter": MetricsWriter,
    "read_metrics": read_metrics,
    "read_trained": lambda url: read_trained(url, training_layout()),
    "load": load,
    "convert, source": lambda url: convert(url, "model"),
    "convert, destination": lambda url: convert("model", url),
    "model_folder": model_folder,
    "tokenizer_folder": tokenizer_folder,
    "read_params": lambda url: read_params(url, MODEL, training_layout()),
    "huggingface.read": lambda url: huggingface.read(url, training_layout()),
    "huggingface.read_config": huggingface.read_config,
    "huggingface.write": write_model,
    "huggingface.rewrite, source": lambda url: huggingface.rewrite(url, "model"),
    "huggingface.rewrite, folder": lambda url: huggingface.rewrite("model", url),
}


@pytest.mark.parametrize("name", TAKES_A_PATH)
def test_what_takes_a_path_refuses_a_url(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    refused = pytest.raises(UserError, match=r"=gs://bucket/run: this is a URL.* mount the bucket")
    with jax.set_mesh(Mesh().build(jax.devices()[:1])), refused:
        TAKES_A_PATH[name](URL)
    assert os.listdir(tmp_path) == ["text.txt"]


def test_a_place_of_data_sets_in_the_environment(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR=gs://bucket/tfds: this is a URL"):
        TFDS(name="wikipedia").parts()
    with pytest.raises(UserError, match="TFDS knows no data set"):
        replace(TFDS(name="nothing_of_the_kind"), data_dir="/tmp").parts()
