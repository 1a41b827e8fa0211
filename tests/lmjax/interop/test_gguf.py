"""GGUF files: read back by their own library, and run by llama.cpp."""

import json
import urllib.request

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer
from lmjax.interop import gguf_file, huggingface
from lmjax.interop.export import convert_to_gguf
from lmjax.interop.gguf_tokenizer import tokenizer_fields
from lmjax.interop.library_tokenizer import Unwritable
from lmjax.interop.tensor_names import entries_of, theirs
from lmjax.models import Batch, abstract, initialize, llama, mixtral
from lmjax.parallel import training_layout
from tests.lmjax.data.real_strings import real_strings
from tests.lmjax.interop.tokenizer_kinds import tokenizer_of
from tests.parity_cases import parity_folder

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
# Folder of each architecture, and the largest difference of log-probabilities from llama.cpp's.
# Float32 sums in another order; where the activation is GELU, llama.cpp takes it from a table of
# float16 numbers (findings/llama-cpp-takes-gelu-from-a-table-of-float16.sh).
EXACT, TABLE = 1e-4, 5e-3
CASES = {
    "llama2_gqa": EXACT,
    "mistral": EXACT,
    "qwen2": EXACT,
    "qwen3": EXACT,
    "qwen": EXACT,
    "baichuan2_7b": EXACT,
    "chatglm2_6b": EXACT,
    "mixtral": EXACT,
    "gpt2": TABLE,
    "gemma": TABLE,
    "gemma2": TABLE,
    "falcon_7b": TABLE,
    "falcon_40b": TABLE,
    "bloom": TABLE,
}
TOKENIZER = CharacterTokenizer("".join(map(chr, range(32, 127))))
LARGE = replace(
    llama("7B"),
    vocab_size=97,
    hidden=128,
    num_layers=2,
    max_length=64,
    attention=replace(llama("7B").attention, num_heads=4, num_kv_heads=2, head_dim=32),
    feed_forward=replace(llama("7B").feed_forward, size=256),
)
# Made here, of random numbers; the others are folders of the parity cases.
MADE = {
    "large": LARGE,
    "mixtral": replace(
        mixtral(),
        **{name: getattr(LARGE, name) for name in ("vocab_size", "hidden", "num_layers")},
        max_length=64,
        attention=LARGE.attention,
        feed_forward=replace(mixtral().feed_forward, size=256, experts=4),
    ),
}
FAST = ("llama2_gqa", "qwen2", "gpt2", "falcon_40b")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in FAST]


@pytest.fixture
def written(one_device, tmp_path):
    """Writes the model of a folder; gives its config, structure, parameters and file."""

    def write(name, kind="f32", tokenizer=None):
        if name in MADE:
            config = MADE[name]
            graph, params = initialize(config, training_layout(), jax.random.key(1))
        else:
            config, graph, params = huggingface.read(parity_folder(name), training_layout())
        if name == "gemma2":  # llama.cpp has the scale of its published sizes built in
            attention = replace(config.attention, scale=config.attention.head_dim**-0.5)
            config = replace(config, attention=attention)
            graph, _ = abstract(config, training_layout())
        path = tmp_path / f"{name}-{kind}.gguf"
        notes = gguf_file.write(path, config, params, tokenizer, kind)
        return config, graph, params, path, notes

    return write


def fields(path):
    """The fields of a file by name."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    """The tensors of a file in float32, by name."""
    found = gguf.GGUFReader(path).tensors
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(
            [int(size) for size in one.shape[::-1]]
        )
        for one in found
    }


def read_again(config, params, path):
    """Parameters as the file has them."""
    layout, paths = gguf_file.layout_of(config), huggingface.by_path(params)
    files, found = tensors(path), {}
    for name, index in entries_of(layout, config, paths):
        parts = [paths[path].shape[len(index) :] for path in name.ours]
        for path, part in zip(
            name.ours, name.transform.read(files.pop(theirs(name, index, config)), parts)
        ):
            whole = found.setdefault(path, np.zeros(paths[path].shape, np.float32))
            whole[index][: len(part)] = part
    assert not files
    return found


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_its_own_library_reads_the_parameters(written, name):
    """Bit for bit; 1 + scale less 1 loses the last bits of a small scale."""
    config, _, params, path, _ = written(name)
    kept = huggingface.by_path(params)
    for title, found in read_again(config, params, path).items():
        expected = np.asarray(kept[title])
        if title.startswith(("embedding", "head")):
            found, expected = (a[: config.vocab_size] for a in (found, expected))
        if title == "head.table" and config.normalized_head:
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7, err_msg=title)


class Server:
    """llama.cpp with a file, one text at a time, keys and values in float32."""

    def __init__(self, path):
        llama = pytest.importorskip("xllamacpp", reason="needs the extra parity, for llama.cpp")
        settings = llama.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = 64, 1, 1
        settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity, settings.warmup = 0, False
        self.server = llama.Server(settings)

    def log_probabilities(self, tokens, count):
        """Of each token that may follow, in nats."""
        asked = {
            "prompt": tokens,
            "n_predict": 1,
            "n_probs": count,
            "logprobs": count,
            # Numbers are given of tokens that are whole characters alone, and before this bias.
            "logit_bias": [[ord("A"), 1000.0]],
            "post_sampling_probs": False,
            "cache_prompt": False,
        }
        [choice] = self.server.handle_completions(asked)["choices"]
        [content] = choice["logprobs"]["content"]
        found = {one["id"]: one["logprob"] for one in content["top_logprobs"]}
        return np.array([found[token] for token in range(count)])

    def tokens(self, text):
        """Tokens of a text, nothing around it."""
        asked = json.dumps({"content": text, "add_special": False}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            asked,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["tokens"]


def ours(graph, params, tokens, count):
    """Log-probabilities of what follows, by our model."""
    tokens = np.array([tokens], np.int32)
    batch = Batch(
        tokens=tokens,
        positions=np.arange(tokens.shape[1], dtype=np.int32)[None],
        segments=np.ones_like(tokens),
    )

    @jax.jit
    def run(params, batch):
        model = nnx.merge(graph, params)
        return jax.nn.log_softmax(model.logits(model(batch)[0])[0, -1, :count])

    return np.asarray(run(params, batch))


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_llama_cpp_gives_our_log_probabilities(written, name):
    config, graph, params, path, _ = written(name, tokenizer=TOKENIZER)
    # Up to the end of the context that the file has: a window, or what was trained.
    *_, context = (v for k, v in fields(path).items() if k.endswith("context_length"))
    tokens = [10, 3, 77, 50, 91, 12, 12, 0, 63][: context - 1]
    found = Server(path).log_probabilities(tokens, config.vocab_size)
    expected = ours(graph, params, tokens, config.vocab_size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CASES[name])


@pytest.mark.parametrize(
    "kind",
    [
        *("f16", "q8_0", "q5_1"),
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("bf16", "q4_0")),
    ],
)
def test_weights_of_fewer_bits(written, kind):
    """Each number is within what its form can miss, and the file is as small as it should be.

    float16 and bfloat16 keep 11 and 8 bits. A block of 32 has a step of its largest magnitude over
    127, or over 8 (q4_0), or of its span over 31, itself in float16: half of it is missed, and
    2**-11 of what lies as many steps away; of q4_0, whose steps lie on one side of 0, a whole one.
    """
    *_, path, notes = written("large", kind)
    exact, found = tensors(written("large")[3]), tensors(path)
    assert notes == ["the file has no tokenizer, and takes tokens for text: the model has none"]
    for title, array in exact.items():
        if array.ndim == 1:
            np.testing.assert_array_equal(found[title], array)
            continue
        blocks = array.reshape(-1, 32)
        most, span = np.abs(blocks).max(axis=1), np.ptp(blocks, axis=1)
        bound = {
            "f16": most * 2**-11,
            "bf16": most * 2**-8,
            "q8_0": most * (1 / 127 / 2 + 2**-11),
            "q5_1": span / 31 / 2 + (span + most) * 2**-11,
            "q4_0": most * (1 / 8 + 2**-11),
        }[kind]
        assert (np.abs(found[title].reshape(-1, 32) - blocks).max(axis=1) <= bound + 1e-7).all()
    bits = {"f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q4_0": 4.5}[kind]
    whole = written("large")[3].stat().st_size
    assert path.stat().st_size < (bits / 32 + 0.05) * whole


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_llama_cpp_reads_fewer_bits(written, kind):
    """Against our model of the weights that the file has.

    llama.cpp rounds activations as well, to 8 bits of the largest of 32 numbers.
    """
    config, graph, params, path, _ = written("large", kind, TOKENIZER)
    again = read_again(config, params, path)
    params = huggingface.nest({name: jax.numpy.asarray(a) for name, a in again.items()})
    tokens = [10, 3, 77, 50, 91, 12, 12, 0, 63]
    found = Server(path).log_probabilities(tokens, config.vocab_size)
    expected = ours(graph, params, tokens, config.vocab_size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["bytes", "like LLaMA", "like Gemma"])
def test_llama_cpp_gives_our_tokens(one_device, tmp_path, name):
    """Of texts as people write them, in all scripts."""
    tokenizer = ByteTokenizer() if name == "bytes" else tokenizer_of(name)
    config = replace(LARGE, vocab_size=tokenizer.vocab_size + 3)
    _, params = initialize(config, training_layout(), jax.random.key(0))
    path = tmp_path / "model.gguf"
    assert gguf_file.write(path, config, params, tokenizer, "f16") == []
    server = Server(path)
    for text in real_strings()[::40]:
        if text:
            assert server.tokens(text) == list(tokenizer.encode(text)), text


@pytest.mark.parametrize("name", ["opt", "gpt1", "baichuan2_13b", "glm", "xlnet"])
def test_models_that_llama_cpp_lacks(one_device, tmp_path, name):
    with pytest.raises(UserError, match=r"llama\.cpp"):
        convert_to_gguf(parity_folder(name), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers_that_llama_cpp_lacks():
    for name, reason in {"like T5": "merges pairs", "byte pairs": "byte_fallback"}.items():
        with pytest.raises(Unwritable, match=reason):
            tokenizer_fields(tokenizer_of(name), 10**6)
    with pytest.raises(Unwritable, match="has 96 tokens, and the model's table 90 rows"):
        tokenizer_fields(TOKENIZER, 90)
    with pytest.raises(Unwritable, match="in bytes"):
        tokenizer_fields(CharacterTokenizer("aé"), 90)


def test_a_folder_becomes_a_file(one_device, tmp_path):
    """What is there already is left as it is."""
    path = tmp_path / "model.gguf"
    convert_to_gguf(parity_folder("gpt2"), path, "q8_0")
    before = path.read_bytes()
    found = fields(path)
    assert (found["general.architecture"], found["gpt2.block_count"]) == ("gpt2", 2)
    with pytest.raises(UserError, match="exists already"):
        convert_to_gguf(parity_folder("gpt2"), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
