"""GGUF files that generation and the server open as they are: what their folder gives."""

import jax
import pytest

from lmjax.config import UserError, replace
from lmjax.data.chat.folder import DEFAULT, Template, write_templates
from lmjax.data.chat.messages import Message
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.generation.__main__ import Generate
from lmjax.generation.chat import chat_format
from lmjax.generation.run import load
from lmjax.interop import gguf_file, huggingface
from lmjax.interop.export import convert_to_gguf
from lmjax.launch import run
from lmjax.models import initialize, llama
from lmjax.parallel import Mesh, generation_layout
from lmjax.serving.__main__ import Serve
from lmjax.serving.start import serving_meshes
from tests.larger import larger
from tests.lmjax.serving.engines import GREEDY, SMALL, answered, prompts, request

pytest.importorskip("gguf", reason="needs the extra gguf")
pytestmark = pytest.mark.usefixtures("mesh")
TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
MODEL = replace(
    llama("7B"),
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=64,
    attention=replace(llama("7B").attention, num_heads=2, num_kv_heads=2, head_dim=8),
    feed_forward=replace(llama("7B").feed_forward, size=32),
)


@pytest.fixture(scope="module")
def params(mesh):
    """Random ones, large enough that answers differ."""
    _, params = initialize(MODEL, generation_layout(), jax.random.key(3))
    return larger(params, 4, axes=2)


@pytest.fixture(scope="module")
def files(params, tmp_path_factory):
    """A model folder, and the file that was written from it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    huggingface.write(folder, MODEL, params)
    ByteTokenizer().save(folder)
    write_templates(folder, {DEFAULT: Template(TEMPLATE, "chat_template.jinja")})
    path = folder.with_suffix(".gguf")
    convert_to_gguf(folder, path, "f32")
    return folder, path


def test_the_command_gives_the_reply_of_the_folder(files, monkeypatch, capsys):
    """In the file's own chat format."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)

    def end(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    replies = []
    for model in files:
        argv = [str(model), "chat=true", "prompt=ab", "temperature=0", "max_tokens=12"]
        run(Generate(), argv, positional="model")
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1] and len(set(replies[0])) > 2


def test_a_server_opens_a_file(files):
    """Its engine gives the folder's tokens, and conversations are written as by the folder."""
    folder, path = files
    meshes = serving_meshes(Mesh(fsdp=1), jax.devices()[:1])
    served = Serve(model=str(path), engine=SMALL).opened(meshes)
    assert served.names == ["tiny.gguf"]
    requests = [request(tokens, model="tiny.gguf") for tokens in prompts(0, (3, 20))]
    text, talk = load(folder), [Message("user", "ab")]
    wanted = text.generator.generate([one.tokens for one in requests], GREEDY, 12)
    assert [one.ids for one in answered(served.engine, requests)] == wanted
    own = chat_format(folder, text.tokenizer).encode(text.tokenizer, talk)
    assert served.chat.encode(served.text.tokenizer, talk) == own


def test_a_file_without_a_tokenizer_is_refused(params, tmp_path):
    path = tmp_path / "mute.gguf"
    gguf_file.write(path, MODEL, params, None, "f32")
    with pytest.raises(UserError, match=r"mute\.gguf: text needs a tokenizer.*the file has none"):
        load(path)
