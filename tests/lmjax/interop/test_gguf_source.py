"""GGUF files read back, and by transformers."""

from types import MappingProxyType

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop import gguf_file, gguf_source, huggingface
from lmjax.interop.convert import convert
from lmjax.interop.export import convert_to_gguf
from lmjax.interop.folder import load_trained_model
from lmjax.models import (
    Batch,
    Llama3Scaling,
    Rotary,
    initialize,
    llama,
    mixtral,
    with_quantization,
)
from lmjax.models.rotary import rotary_frequencies
from lmjax.parallel import training_layout
from tests.lmjax.data.real_strings import real_strings
from tests.lmjax.interop.tokenizer_kinds import tokenizer_of
from tests.parity_cases import parity_folder
from tests.whole_logits import program

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
# Every architecture; bit for bit but where 1 + scale is written.
EXACT, ROUNDED = 0.0, 2e-6
CASES = {
    "llama2_gqa": EXACT,
    "mistral": EXACT,
    "qwen2": EXACT,
    "qwen3": EXACT,
    "baichuan2_7b": ROUNDED,  # the head's rows are divided by their lengths before and after
    "chatglm2_6b": EXACT,
    "mixtral": EXACT,
    "gpt2": EXACT,
    "gemma": ROUNDED,
    "gemma2": ROUNDED,
    "falcon_7b": EXACT,
    "falcon_40b": EXACT,
    "bloom": EXACT,
}
FAST = ("llama2_gqa", "gpt2", "chatglm2_6b")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST]
SIZES = {"vocab_size": 97, "hidden": 64, "num_layers": 2, "max_length": 64}
SMALL = replace(
    llama("7B"),
    **SIZES,
    attention=replace(llama("7B").attention, num_heads=4, num_kv_heads=2, head_dim=16),
    feed_forward=replace(llama("7B").feed_forward, size=128),
)
MIXTURE = replace(
    mixtral(),
    **SIZES,
    attention=SMALL.attention,
    feed_forward=replace(mixtral().feed_forward, size=128, experts=4),
)


def model_of(name):
    if name == "mixtral":
        return MIXTURE, *initialize(MIXTURE, training_layout(), jax.random.key(1))
    config, graph, params = huggingface.read(parity_folder(name), training_layout())
    if name == "gemma2":  # a file has the scale of its published sizes
        attention = replace(config.attention, scale=config.attention.head_dim**-0.5)
        config = replace(config, attention=attention)
        graph, _ = initialize(config, training_layout(), jax.random.key(0))
    return config, graph, params


def logits(config, graph, params, length=None):
    tokens = np.array([[10, 3, 77, 50, 91, 12, 12, 0]], np.int32)[:, :length]
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    batch = Batch(tokens=tokens, positions=positions, segments=np.ones_like(tokens))
    return np.asarray(program(graph, None, params, batch))[..., : config.vocab_size]


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_what_was_written_gives_the_same_logits(one_device, tmp_path, name):
    config, graph, params = model_of(name)
    path = tmp_path / "model.gguf"
    gguf_file.write(path, config, params, None, "f32")
    found = gguf_source.read(path, training_layout())
    assert type(found[0].attention.positions) is type(config.attention.positions)
    length = found[0].max_length  # of Mistral its window, which files do not have
    expected = logits(config, graph, params, length)
    np.testing.assert_allclose(logits(*found, length), expected, rtol=0, atol=CASES[name])
    with gguf_source.as_folder(path) as folder:
        assert huggingface.is_model_folder(folder)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_weights_of_fewer_bits_are_what_their_library_says(one_device, tmp_path, kind):
    _, params = initialize(SMALL, training_layout(), jax.random.key(1))
    path = tmp_path / "model.gguf"
    gguf_file.write(path, SMALL, params, None, kind)
    _, _, found = gguf_source.read(path, training_layout())
    down = found["blocks"]["feed_forward"]["down"]["weight"]
    kept = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    assert kept.tensor_type.name == kind.upper()
    expected = gguf.quants.dequantize(kept.data, kept.tensor_type)
    np.testing.assert_array_equal(np.asarray(down)[1], expected.T)
    before = np.asarray(params["blocks"]["feed_forward"]["down"]["weight"])[1]
    assert 0 < abs(expected.T - before).max() < 0.2 * abs(before).max()


@pytest.mark.parametrize(
    ("kind", "config"),
    [("q8_0", SMALL), ("q4_0", SMALL), ("q8_0", MIXTURE)],
    ids=["q8_0", "q4_0", "experts"],
)
def test_weights_stay_in_few_bits(one_device, tmp_path, kind, config):
    """The numbers that the library makes of them, bit for bit, in as many bytes as in the file."""
    _, params = initialize(config, training_layout(), jax.random.key(1))
    path = tmp_path / "model.gguf"
    gguf_file.write(path, config, params, None, kind)
    small, _, kept = gguf_source.read(path, training_layout(), few_bits=True)
    assert small.quantization.tables == small.quantization.weights
    tensors = gguf.GGUFReader(path).tensors
    file_bytes = sum(int(t.n_bytes) for t in tensors if t.name.startswith("blk."))
    assert sum(a.nbytes for a in jax.tree.leaves(kept["blocks"])) == file_bytes
    floats, _ = with_quantization(kept, small, None)
    _, _, expected = gguf_source.read(path, training_layout())
    jax.tree.map(np.testing.assert_array_equal, floats, expected)


def test_weights_of_several_kinds_are_floats_where_no_setting_has_them(one_device, tmp_path):
    """A layer's weight of another kind in one layer alone; the others stay in few bits."""
    _, params = initialize(SMALL, training_layout(), jax.random.key(1))
    path, title = tmp_path / "model.gguf", "blk.0.ffn_down.weight"
    gguf_file.write(path, SMALL, params, None, "q8_0")
    plain = gguf_source.GGUFFile(path).read(title)
    path = rewritten(path, tmp_path / "mixed.gguf", {title: (plain, None)})
    small, _, kept = gguf_source.read(path, training_layout(), few_bits=True)
    assert kept["blocks"]["feed_forward"]["down"]["weight"].dtype == np.float32
    assert kept["blocks"]["feed_forward"]["up"]["weight"]["codes"].dtype == np.int8
    floats, _ = with_quantization(kept, small, None)
    _, _, expected = gguf_source.read(path, training_layout())
    jax.tree.map(np.testing.assert_array_equal, floats, expected)


def rewritten(path, new, tensors, more=MappingProxyType({})):
    """The file again with other tensors by name, None for one that it shall lack, and more."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(new, "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        found, kind = tensors.get(tensor.name, (np.array(tensor.data), None))
        if found is not None:
            kind = tensor.tensor_type if found.dtype == np.uint8 and kind is None else kind
            writer.add_tensor(tensor.name, found, raw_dtype=kind)
    for name, tensor in more.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


def test_weights_that_no_package_writes(one_device, tmp_path):
    """K-quants, of which the library says what numbers they are: blocks of 256 in 210 bytes."""
    wide = replace(SMALL, feed_forward=replace(SMALL.feed_forward, size=256))
    _, params = initialize(wide, training_layout(), jax.random.key(1))
    path, title = tmp_path / "model.gguf", "blk.0.ffn_down.weight"
    gguf_file.write(path, wide, params, None, "f32")
    blocks = np.random.default_rng(0).integers(0, 255, (64, 210), np.uint8)
    blocks[:, -2:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    kind = gguf.GGMLQuantizationType.Q6_K
    path = rewritten(path, tmp_path / "k.gguf", {title: (blocks, kind)})
    _, _, found = gguf_source.read(path, training_layout())
    expected = gguf.quants.dequantize(blocks, kind).T
    down = np.asarray(found["blocks"]["feed_forward"]["down"]["weight"])
    np.testing.assert_array_equal(down[0], expected)
    assert np.isfinite(expected).all() and expected.std() > 0.1


@pytest.mark.parametrize("name", ["bytes", "like LLaMA", "like Gemma"])
def test_the_tokenizer_comes_back(one_device, tmp_path, name):
    """The same tokens of texts as people write them, and the same beginning and end."""
    tokenizer = ByteTokenizer() if name == "bytes" else tokenizer_of(name)
    config = replace(SMALL, vocab_size=tokenizer.vocab_size + 3)
    _, params = initialize(config, training_layout(), jax.random.key(0))
    path = tmp_path / "model.gguf"
    gguf_file.write(path, config, params, tokenizer, "f16", "{{ messages }}")
    with gguf_source.as_folder(path) as folder:
        found = read_tokenizer(folder)
        assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not folder.exists()
    for text in real_strings()[::20]:
        assert list(found.encode(text)) == list(tokenizer.encode(text)), text
    assert (found.begin, found.end) == (tokenizer.begin, tokenizer.end)
    assert found.opening == tokenizer.opening
    assert found.special.items() >= tokenizer.special.items()


def test_a_file_becomes_a_run_and_a_model_folder(one_device, tmp_path):
    """With its tokenizer; from the run the same file is written again."""
    tokenizer = tokenizer_of("like LLaMA")
    config = replace(SMALL, vocab_size=tokenizer.vocab_size)
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    path, run = tmp_path / "model.gguf", tmp_path / "run"
    gguf_file.write(path, config, params, tokenizer, "f32", "{{ bos_token }}")
    convert(path, run)
    trained = load_trained_model(run, training_layout())
    expected = logits(config, graph, params)
    np.testing.assert_array_equal(logits(trained.config, graph, trained.params), expected)
    text = real_strings()[40]
    assert list(trained.tokenizer.encode(text)) == list(tokenizer.encode(text))
    convert_to_gguf(run, tmp_path / "again.gguf", "f32")
    assert gguf_source.GGUFFile(tmp_path / "again.gguf").fields == gguf_source.GGUFFile(path).fields
    convert(path, tmp_path / "model", to_run=False)
    found = huggingface.read(tmp_path / "model", training_layout())
    np.testing.assert_array_equal(logits(*found), expected)
    assert (tmp_path / "model" / "chat_template.jinja").exists()


def test_files_that_cannot_be_read(one_device, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match="is no GGUF file, or a damaged one"):
        convert(path, tmp_path / "run")
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="is of the architecture mamba; those that can be read are"):
        convert(path, tmp_path / "run")
    _, params = initialize(SMALL, training_layout(), jax.random.key(0))
    gguf_file.write(path, SMALL, params, None, "f32")
    title = "blk.1.ffn_up.weight"
    lacking = rewritten(path, tmp_path / "lacking.gguf", {title: (None, None)})
    with pytest.raises(UserError, match=f"the tensor {title} is missing"):
        convert(lacking, tmp_path / "run")
    small = np.zeros((3, 64), np.float32)
    cut = rewritten(path, tmp_path / "cut.gguf", {title: (small, None)})
    with pytest.raises(UserError, match=r"\[3, 64\]; by the fields of the file it should be"):
        convert(cut, tmp_path / "run")
    with pytest.raises(UserError, match="step=3"):
        convert(path, tmp_path / "run", step=3)
    assert not (tmp_path / "run").exists()


def test_rotations_of_llama_3(one_device, tmp_path):
    """Frequencies that a tensor of the file divides are those of our scaling."""
    scaled = Llama3Scaling(factor=4.0, length=32)
    _, params = initialize(SMALL, training_layout(), jax.random.key(0))
    path = tmp_path / "model.gguf"
    gguf_file.write(path, SMALL, params, None, "f32")
    lengths = jax.numpy.array([1], "int32")
    usual = np.asarray(rotary_frequencies(10_000.0, 16))[0]
    factors = usual / np.asarray(scaled.frequencies(10_000.0, 16, lengths))[0]
    assert factors.min() == 1 and factors.max() == 4
    reader = gguf.GGUFReader(path)
    assert all(tensor.name != "rope_freqs.weight" for tensor in reader.tensors)
    again = rewritten(path, tmp_path / "again.gguf", {}, {"rope_freqs.weight": factors})
    config, *found = gguf_source.read(again, training_layout())
    attention = replace(SMALL.attention, positions=Rotary(scaling=scaled))
    expected = replace(SMALL, attention=attention)
    graph, _ = initialize(expected, training_layout(), jax.random.key(0))
    np.testing.assert_allclose(
        logits(config, *found), logits(expected, graph, params), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", ["llama2_gqa", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_transformers_reads_it_back(one_device, tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="needs the extra parity")
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    config, graph, params = model_of(name)
    gguf_file.write(tmp_path / "model.gguf", config, params, None, "f32")
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        )
    except ImportError as missing:  # accelerate
        pytest.skip(str(missing))
    tokens = torch.tensor([[10, 3, 77, 50, 91, 12, 12, 0]])
    with torch.no_grad():
        found = theirs.eval()(tokens).logits.numpy()
    # Another program's order of sums.
    np.testing.assert_allclose(logits(config, graph, params), found, rtol=0, atol=1e-5)
