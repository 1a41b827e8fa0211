"""What the devices send each other for each token that is decoded, counted in the compiled program.

- Over `data` and `fsdp`, which cut the rows, every device learns all rows' new tokens and their
  log-probabilities, and whether all rows have ended. `fsdp` cuts the parameters too: each matrix is
  gathered for every token where layers are scanned, and once before the first token where they lie
  apart. The table is gathered once.
- Over `tensor`: a sum of activations behind attention and feed-forward, one for the lookup of the
  embedding, and the logits of all tokens.
- `context` is for training: no sequence is cut, and nothing is sent.
"""

import functools

import jax
import numpy as np
import pytest

from lmjax.generation import Generator, Sampling
from lmjax.generation.decoder import Decoder
from lmjax.generation.prompts import prompt_batch
from lmjax.models import (
    AttentionConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TransformerConfig,
    initialize,
)
from lmjax.parallel import Mesh, generation_layout
from tests.collectives import Transfer, expectation, tally, transfers

ROWS, LAYERS = 8, 3
MODEL = TransformerConfig(
    vocab_size=250,
    hidden=32,
    num_layers=LAYERS,
    max_length=32,
    attention=AttentionConfig(
        num_heads=8, head_dim=4, bias=False, output_bias=False, positions=Rotary()
    ),
    feed_forward=GatedFeedForwardConfig(size=80),
    norm=RMSNormConfig(),
    positions=None,
)
TABLE = 256 * 32  # the vocabulary is padded to 256 rows
MATRICES = 4 * [32 * 32] + 3 * [32 * 80]  # of a layer
TOKEN = (0,)  # the loop over tokens


def of_decoding(mesh: Mesh, unstack: bool) -> list[Transfer]:
    """The transfers of the loop that decodes."""
    settings = Sampling(temperature=0.0).arguments(())
    with jax.set_mesh(mesh.build()):
        _, params = initialize(MODEL, generation_layout(), jax.random.key(0))
        generator = Generator(MODEL, params, unstack=unstack)
        decoding = generator.decoder.start(
            generator.weights,
            generator.put_on_devices(prompt_batch(ROWS * [[1, 2, 3]], None)),
            generator.put_on_devices(np.full(ROWS, 16, np.int32)),
            generator.put_on_devices(np.arange(ROWS, dtype=np.uint32)),
            None,
            slots=16,
            samples=1,
            **settings,
        )
        go_on = functools.partial(Decoder.go_on.__wrapped__, generator.decoder, **settings)
        return transfers(go_on, generator.weights, decoding, np.int32(8))


def rows_over(sizes: dict[str, int]) -> tuple[str, ...]:
    """The axes that cut the rows."""
    return tuple(axis for axis in ("data", "fsdp") if sizes.get(axis, 1) > 1)


def expected(sizes: dict[str, int], unstack: bool):
    """Rows of what the docstring above says, in numbers."""
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    rows = ROWS // (data * fsdp)
    layers, times = (TOKEN, LAYERS) if unstack else ((*TOKEN, 0), 1)
    yield TOKEN, rows_over(sizes), "all-gather", [ROWS, ROWS]
    if fsdp > 1:
        matrices = [size // tensor for size in times * MATRICES]
        yield (), ("fsdp",), "all-gather", [TABLE // tensor]
        yield () if unstack else layers, ("fsdp",), "all-gather", matrices
    if tensor > 1:
        yield TOKEN, ("tensor",), "all-gather", [rows * 256]
        yield TOKEN, ("tensor",), "all-reduce", [rows * 32]
        yield layers, ("tensor",), "all-reduce", 2 * times * [rows * 32]


@pytest.mark.parametrize(
    ("sizes", "unstack"),
    [
        (dict(data=2, fsdp=2, tensor=2), False),
        (dict(data=2, fsdp=2, tensor=2), True),
        *(
            pytest.param({"fsdp": 1} | sizes, False, marks=pytest.mark.slow)
            for sizes in ({"data": 8}, {"tensor": 8}, {"context": 8})
        ),
    ],
    ids=str,
)
def test_a_token_costs_what_its_mesh_is_for(sizes, unstack):
    found = of_decoding(Mesh(**sizes), unstack)
    assert tally(found) == expectation(expected(sizes, unstack))
    ended = [(TOKEN, over)] if (over := rows_over(sizes)) else []
    assert [(t.loops, t.axes) for t in found if t.size == 1] == ended
