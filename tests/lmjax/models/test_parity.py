"""The families against an independent implementation: same weights, same logits, same tokens."""

import json

import jax
import numpy as np
import pytest

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.interop import huggingface
from lmjax.models import Batch, abstract, plain_batch
from lmjax.parallel import Mesh, generation_layout, training_layout
from tests.parity_cases import parity_folder
from tests.whole_logits import program

# With the calls that each case has beside `plain` and `greedy`.
CASES = {
    "gpt1": (),
    "gpt2": (),
    "gpt3_banded": (),
    "opt": ("left_padding",),
    "opt_350m": ("left_padding",),
    "bloom": ("left_padding",),
    "llama": (),
    "llama2_gqa": (),
    "skywork": (),
    "mistral": (),
    "baichuan_7b": (),
    "baichuan_13b": (),
    "baichuan2_7b": (),
    "baichuan2_13b": (),
    "qwen": (),
    "qwen2": (),
    "qwen3": (),
    "falcon_7b": (),
    "falcon_40b": (),
    "palm": (),
    "chatglm2_6b": ("left_padding",),
    "chatglm3_6b": ("left_padding",),
    "gemma": (),
    "gemma2": (),
}
PLAIN = {"qwen": "off"}  # the name of the call without anything special
PROMPT = 7


def case(name):
    """The folder, its arrays and its tolerance: 2e-5 absolute on logits of about 2.

    The reference differs from its own float64 by up to 2e-6.
    """
    folder = parity_folder(name)
    return folder, np.load(folder / "case.npz"), json.loads((folder / "case.json").read_text())


def read(name, folder, layout):
    """Config, graph and parameters; what a case's config.json does not say is added."""
    config, _, params = huggingface.read(folder, layout)
    if name == "gpt3_banded":
        config = replace(config, attention=replace(config.attention, windows=(None, 4)))
    if name == "qwen":
        config = plain_qwen(config)
    return config, abstract(config, layout)[0], params


def plain_qwen(config):
    """Qwen without dynamic NTK and LogN."""
    attention = replace(
        config.attention,
        positions=replace(config.attention.positions, scaling=None),
        logn_length=None,
    )
    return replace(config, attention=attention)


def logits_of(graph, params, batch):
    """The model's logits."""
    return np.asarray(program(graph, None, params, batch))


def padded_batch(tokens, mask):
    """A batch whose rows have padding where `mask` is 0."""
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    return Batch(tokens=tokens, positions=positions, segments=mask.astype(np.int32))


# Of each kind of cache and of sharding one: the others have layers of these, in other places.
KINDS = ("gpt2", "bloom", "llama2_gqa", "qwen", "chatglm2_6b", "gemma2", "gpt3_banded")
# Of each further kind of layer one: the rest differ from these in names and sizes.
FURTHER = (
    *("opt_350m", "mistral", "baichuan2_13b", "qwen3"),
    *("falcon_7b", "falcon_40b", "palm", "skywork"),
)
# Of each way in which blocks are not all alike, or hidden states are scaled between them.
PATTERNS = ("gpt3_banded", "gemma2", "qwen", "opt_350m")


def check(name, layout):
    """Logits, and of each kind of cache greedy tokens through it."""
    folder, arrays, description = case(name)
    config, graph, params = read(name, folder, layout)
    for call in (PLAIN.get(name, "plain"), *CASES[name]):
        tokens, expected = arrays[f"{call}.tokens"], arrays[f"{call}.logits"]
        mask = arrays.get(f"{call}.mask", np.ones_like(tokens))
        logits, real = logits_of(graph, params, padded_batch(tokens, mask)), expected.shape[-1]
        np.testing.assert_allclose(
            logits[..., :real][mask == 1],
            expected[mask == 1],
            rtol=0,
            atol=description["tolerance"],
            err_msg=call,
        )
        assert (logits[..., real:] == -1e30).all()
    if name in KINDS:
        check_greedy(config, params, arrays["greedy"], PROMPT)


def check_greedy(config, params, greedy, prompt):
    """Decoding through the cache gives the reference's tokens."""
    new = greedy.shape[1] - prompt
    rows = Generator(config, params).generate(
        greedy[:, :prompt].tolist(), Sampling(temperature=0.0), new
    )
    assert rows == greedy[:, prompt:].tolist()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(one_device, name):
    check(name, training_layout())


def test_qwen_beyond_its_length(one_device):
    """Dynamic NTK and LogN act, and alpha stays as the prompt's length made it."""
    folder, arrays, description = case("qwen")
    config, graph, params = huggingface.read(folder, training_layout())
    for call in ("within", "ntk_logn"):
        logits = logits_of(graph, params, plain_batch(arrays[f"{call}.tokens"]))
        np.testing.assert_allclose(
            logits[..., : config.vocab_size],
            arrays[f"{call}.logits"],
            rtol=0,
            atol=description["tolerance"],
            err_msg=call,
        )
    check_greedy(config, params, arrays["greedy_ntk_logn"], 11)


def plain_logits(name, mesh, layout, **changes):
    """Differences from the reference on the plain call."""
    folder, arrays, description = case(name)
    call = PLAIN.get(name, "plain")
    with jax.set_mesh(mesh):
        config, _, params = read(name, folder, layout)
        graph, _ = abstract(replace(config, **changes), layout)
        logits = logits_of(graph, params, plain_batch(arrays[f"{call}.tokens"]))
    expected = arrays[f"{call}.logits"]
    np.testing.assert_allclose(
        logits[..., : expected.shape[-1]], expected, rtol=0, atol=description["tolerance"]
    )


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in FURTHER)]
)
def test_logits_on_a_mesh(name):
    """data x fsdp x tensor = 2 x 2 x 2, but Skywork's three heads cannot be cut."""
    sizes = {"data": 4, "fsdp": 2} if name == "skywork" else {"data": 2, "fsdp": 2, "tensor": 2}
    plain_logits(name, Mesh(**sizes).build(), generation_layout())


@pytest.mark.parametrize("name", ["llama2_gqa", "bloom"])
def test_greedy_tokens_on_a_mesh(name):
    """Grouped heads, ALiBi; two rows on four devices."""
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        folder, arrays, _ = case(name)
        config, _, params = read(name, folder, generation_layout())
        check_greedy(config, params, arrays["greedy"], PROMPT)


@pytest.mark.parametrize("name", PATTERNS)
def test_layers_in_a_python_loop(name):
    plain_logits(name, Mesh(fsdp=1).build(jax.devices()[:1]), training_layout(), unroll=0)
