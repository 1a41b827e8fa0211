"""Public folders of quantised weights: layouts written out in numpy, and folders there and back."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lmjax.config import UserError, replace
from lmjax.interop import huggingface
from lmjax.interop.packed_formats import AWQFormat, CompressedFormat, GPTQFormat, format_of
from lmjax.interop.packed_integers import AWQ_ORDER, PackedWeight, pack, unpack
from lmjax.interop.packed_writer import write_packed
from lmjax.models import Int4, Int8, Quantization, initialize, llama, with_quantization
from lmjax.parallel import Mesh, training_layout

MODEL = replace(
    llama(),
    vocab_size=128,
    hidden=32,
    num_layers=2,
    max_length=16,
    attention=replace(llama().attention, num_heads=4, num_kv_heads=2, head_dim=8),
    feed_forward=replace(llama().feed_forward, size=48),
)


@pytest.fixture(scope="module", autouse=True)
def one_mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@settings(max_examples=12, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    shape=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    axis=st.integers(0, 1),
    seed=st.integers(0, 9),
    awq=st.booleans(),
)
def test_packed_numbers_come_back(bits, shape, axis, seed, awq):
    """All codes, odd shapes; and each stands where the layout says, found by shifts alone."""
    order = AWQ_ORDER if awq and bits == 4 else None
    n = np.random.default_rng(seed).integers(0, 2**bits, shape)
    packed = pack(n, bits, axis, order)
    np.testing.assert_array_equal(unpack(packed, bits, axis, shape[axis], order), n)
    each = 32 // bits
    for i, j in np.ndindex(*shape):
        line = (i, j)[axis]
        at = (order or tuple(range(each))).index(line % each)
        word = packed[(line // each, j) if axis == 0 else (i, line // each)]
        assert (int(word) >> (bits * at)) & (2**bits - 1) == n[i, j]


def random_packed(bits, groups=3, seed=0):
    """A weight of 24 inputs and 16 outputs, whose zeros are of all kinds, 0 and the largest too."""
    rng = np.random.default_rng(seed)
    zero = rng.integers(0, 2**bits, (groups, 16))
    zero[0, :2] = 0, 2**bits - 1
    scale = rng.random((groups, 16)).astype(np.float16)
    return PackedWeight(bits, rng.integers(0, 2**bits, (24, 16)).astype(np.uint8), zero, scale)


@pytest.mark.parametrize(
    "form",
    [
        GPTQFormat(4, 8, False, less_one=True),
        GPTQFormat(4, 8, False, less_one=False),
        GPTQFormat(8, 8, False),
        AWQFormat(4, 8, False),
        CompressedFormat(4, 8, False),
        CompressedFormat(8, 8, False),
    ],
    ids=str,
)
def test_what_is_written_is_read(form):
    """The same float32, also where zeros are 0 and the largest."""
    weight = random_packed(form.bits)
    tensors = form.write(weight)
    np.testing.assert_array_equal(form.read(tensors), weight.weight())
    assert form.of(form.settings([])) == form
    shapes = {name: array.shape for name, array in tensors.items()}
    assert form.shape(shapes) == (16, 24)


def test_gptq_with_inputs_in_the_order_of_their_size():
    """g_idx names the group of each input, in any order: a loop over all numbers."""
    weight = random_packed(4)
    group = np.random.default_rng(1).permutation(np.arange(24) % 3)
    tensors = GPTQFormat(4, 8, False).write(weight) | {"g_idx": group.astype(np.int32)}
    found = GPTQFormat(4, 8, False).read(tensors)
    for out, i in np.ndindex(16, 24):
        n = int(weight.n[i, out]) - int(weight.zero[group[i], out])
        assert found[out, i] == np.float32(n) * np.float32(weight.scale[group[i], out])


def test_compressed_tensors_of_bytes_and_of_floats():
    """`weight` itself in int8 or float8, a scale for each output."""
    rng = np.random.default_rng(0)
    n = rng.integers(-128, 128, (6, 8)).astype(np.int8)
    scale = rng.random((6, 1)).astype(np.float32)
    tensors = {"weight": n, "weight_scale": scale}
    found = CompressedFormat(8, None, True, "int-quantized").read(tensors)
    np.testing.assert_array_equal(found, n * scale)
    floats = np.array([[448.0, -0.5], [2.0**-9, 0]], jax.numpy.float8_e4m3fn)
    tensors = {"weight": floats, "weight_scale": scale[:2]}
    found = CompressedFormat(8, None, True, "float-quantized").read(tensors)
    np.testing.assert_array_equal(found, floats.astype(np.float32) * scale[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of gptq, awq, compressed"),
        ({"bits": 4}, "quant_method must be one of"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 is not supported, only 2, 4, 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' of AWQ"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0: should be"),
        ({"quant_method": "compressed-tensors", "format": "x"}, "format='x' is not supported"),
    ],
)
def test_other_formats_are_refused_by_name(given, message):
    with pytest.raises(UserError, match=f"quantization_config=.*{message}"):
        format_of({"quantization_config": given})


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("gptq", Int4(block=16, scales="float16")),
        ("awq", Int4(block=16, symmetric=False, scales="float16")),
        ("compressed-tensors", Int8(block=None, scales="float16")),
    ],
)
def test_folders_there_and_back(tmp_path, kind, code):
    """Read again, weights are the floats that the small model stood for, to the last bit."""
    params = initialize(MODEL, training_layout(), jax.random.key(0))[1]
    small, config = with_quantization(params, MODEL, Quantization(weights=code))
    write_packed(tmp_path / kind, config, small, kind=kind)
    told = json.loads((tmp_path / kind / "config.json").read_text("utf-8"))
    assert told["quantization_config"]["quant_method"] == kind
    with safe_open(tmp_path / kind / "model.safetensors", "numpy") as file:
        names = set(file.keys())
    assert "model.layers.1.mlp.down_proj.weight" not in names
    assert "lm_head.weight" in names
    read, _, found = huggingface.read(tmp_path / kind, training_layout())
    assert read.quantization is None
    expected, _ = with_quantization(small, config, None)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_groups_that_do_not_divide_are_refused(tmp_path):
    params = initialize(MODEL, training_layout(), jax.random.key(0))[1]
    small, config = with_quantization(params, MODEL, Quantization(weights=Int4(block=20)))
    with pytest.raises(UserError, match="has 32 inputs, no multiple of group=20"):
        write_packed(tmp_path / "x", config, small, kind="gptq")


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_itself_reads_it(bits):
    """Its own unpacking and dequantisation of what we write: the same float32."""
    packed = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="needs compressed-tensors"
    )
    torch = pytest.importorskip("torch")
    weight = random_packed(bits)
    tensors = CompressedFormat(bits, 8, False).write(weight)
    shape = torch.Size(tensors["weight_shape"].tolist())
    n = packed.unpack_from_int32(torch.tensor(tensors["weight_packed"]), bits, shape)
    np.testing.assert_array_equal(n.numpy(), weight.n.T.astype(int) - 2 ** (bits - 1))
    again = packed.pack_to_int32(n, bits)
    np.testing.assert_array_equal(again.numpy(), tensors["weight_packed"])
    zero = torch.tensor(tensors["weight_zero_point"])
    zero = packed.unpack_from_int32(zero, bits, torch.Size((16, 3)), packed_dim=0)
    np.testing.assert_array_equal(zero.numpy(), weight.zero.T - 2 ** (bits - 1))
