"""A URL that cannot be served is refused with the reason, and no folder called `gs:` is made."""

import os
import sys

import jax
import pytest
from fsspec.registry import _registry as loaded

from experiments.debug import experiment as debug
from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, JsonLines, SentencePiece, TextFiles, TokenizerFolder
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.store import TokenStore
from lmjax.data.tfds import TFDS
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import ByteTokenizer, load_tokenizer
from lmjax.generation import load
from lmjax.generation.__main__ import Generate
from lmjax.interop import huggingface
from lmjax.interop.__main__ import Convert
from lmjax.interop.convert import convert
from lmjax.interop.folder import load_trained_model, model_folder, read_params, tokenizer_folder
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import MetricsWriter, read_metrics

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


# What works with files of this machine alone.
LOCAL_ONLY = {
    "TFDS": lambda url: TFDS(name="wikipedia", data_dir=url),
    "Tokenizer.save": lambda url: ByteTokenizer().save(url),
    "build_stores": lambda url: build_stores(TEXT, ByteTokenizer(), url),
    "TokenStore": TokenStore,
    "Checkpointer": Checkpointer,
    "MetricsWriter": MetricsWriter,
    "huggingface.write": write_model,
    "huggingface.rewrite, folder": lambda url: huggingface.rewrite("model", url),
}
SERVES_URLS = {
    "TextFiles": lambda url: TextFiles(path=("text.txt", url)),
    "JsonLines": lambda url: JsonLines(path=url),
    "Data": lambda url: Data(train=(Domain(name="a", source=TEXT),), tokenizer=Bytes(), cache=url),
    "SentencePiece": lambda url: SentencePiece(path=url),
    "TokenizerFolder": lambda url: TokenizerFolder(path=url),
    "read_tokenizer": read_tokenizer,
    "load_tokenizer": load_tokenizer,
    "RunFolder": RunFolder,
    "Generate": lambda url: Generate(model=url),
    "Pretrain, output": lambda url: replace(debug, output=url),
    "Pretrain, begin_with": lambda url: replace(debug, begin_with=url),
    "read_metrics": read_metrics,
    "read_trained": lambda url: load_trained_model(url, training_layout()),
    "load": load,
    "convert, source": lambda url: convert(url, "model"),
    "convert, destination": lambda url: convert("model", url),
    "Convert, source": lambda url: Convert(source=url, destination="model"),
    "Convert, destination": lambda url: Convert(source="model", destination=url),
    "model_folder": model_folder,
    "tokenizer_folder": tokenizer_folder,
    "read_params": lambda url: read_params(url, MODEL, training_layout()),
    "huggingface.read": lambda url: huggingface.read(url, training_layout()),
    "huggingface.read_config": huggingface.read_config,
    "huggingface.rewrite, source": lambda url: huggingface.rewrite(url, "model"),
}
WRITES = ("Data", "Pretrain, output", "convert, destination", "Convert, destination")


@pytest.fixture
def text_alone(tmp_path, monkeypatch):
    """A folder with a text, in which nothing else may be made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("a text")
    with jax.set_mesh(Mesh().build(jax.devices()[:1])):
        yield
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("name", LOCAL_ONLY)
def test_what_needs_files_refuses_a_url(name):
    with pytest.raises(UserError, match=r"=gs://bucket/run: this is a URL.* mount the bucket"):
        LOCAL_ONLY[name](URL)


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("name", SERVES_URLS)
@pytest.mark.parametrize(
    ("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")]
)
def test_a_scheme_whose_package_is_missing(monkeypatch, name, scheme, package, extra):
    """The extra is named, whether or not it happens to be installed where this runs."""
    monkeypatch.setitem(sys.modules, package, None)
    for known in ("gs", "gcs", "s3", "s3a"):
        monkeypatch.delitem(loaded, known, raising=False)
    wanted = rf"={scheme}://bucket/run: .* not installed: pip install 'lmjax\[{extra}\]'"
    with pytest.raises(UserError, match=wanted):
        SERVES_URLS[name](f"{scheme}://bucket/run")


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("name", SERVES_URLS)
@pytest.mark.parametrize("url", ["nowhere://bucket/run", "simplecache::s3://bucket/run"])
def test_a_scheme_that_nothing_serves(name, url):
    with pytest.raises(UserError, match=r"bucket/run: .*:// cannot be served.*gs://.*s3://"):
        SERVES_URLS[name](url)


@pytest.mark.usefixtures("text_alone")
@pytest.mark.parametrize("name", WRITES)
def test_a_scheme_that_cannot_be_written(name):
    with pytest.raises(UserError, match=r"nothing can be written to https://"):
        SERVES_URLS[name]("https://host/run")


def test_a_place_of_data_sets_in_the_environment(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    with pytest.raises(UserError, match=r"TFDS_DATA_DIR=gs://bucket/tfds: this is a URL"):
        TFDS(name="wikipedia").parts()
    with pytest.raises(UserError, match="TFDS knows no data set"):
        replace(TFDS(name="nothing_of_the_kind"), data_dir="/tmp").parts()
