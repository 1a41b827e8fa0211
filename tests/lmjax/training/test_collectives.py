"""What the devices send each other in a training step, counted in the compiled program.

A product of which one side alone is cut along what is summed gives no error of types as it does
where both are: XLA adds an all-reduce without a word. So every collective of the step is counted
here, with the size of what it moves, where it stands, and the axes of the mesh that it goes over,
and compared with what each axis is for:

- `data`, `fsdp` and `context` cut the batch, so the gradient of every parameter is summed over
  them, a layer's where backward comes through the layer: once, or once for each part of a batch
  that is accumulated. (XLA's CPU backend writes a reduce-scatter as an all-reduce of which every
  device takes its part.) The token table enters twice, as embedding and as head.
- `fsdp` cuts the parameters: with ZeRO-3 each matrix of a layer is gathered in forward and again in
  backward, the table once; with ZeRO-1 and 2 all layers of each matrix at once before them.
- `tensor` cuts heads, hidden units and vocabulary (Shoeybi et al. 2019): activations are summed
  behind attention and feed-forward, and their gradients before what reads them, which is five
  matrices here (XLA's TPU compiler adds those of attention, and of feed-forward, first). The lookup
  of embeddings is one more sum, as is the gradient before the head, whose cross-entropy takes a
  maximum and two sums of each row.
- `context` cuts the sequence: each layer gathers its keys and its values and sums their gradients;
  the segments are gathered once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    ExpertsConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TopKRouter,
    TransformerConfig,
)
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import abstract_example
from lmjax.training.schedules import Cosine
from tests.collectives import Transfer, expectation, tally, transfers

LENGTH = 24
# Every size below differs from every other, so that sizes tell what is moved.
MODEL = TransformerConfig(
    vocab_size=250,
    hidden=32,
    num_layers=5,
    max_length=LENGTH,
    attention=AttentionConfig(
        num_heads=8, head_dim=4, bias=False, output_bias=False, positions=Rotary()
    ),
    feed_forward=GatedFeedForwardConfig(size=80),
    norm=RMSNormConfig(),
    positions=None,
)
TABLE = 256 * 32  # the vocabulary is padded to 256 rows
MATRICES = 4 * [32 * 32] + 3 * [32 * 80]  # of a layer


def of_a_step(mesh: jax.sharding.Mesh, zero=3, accumulation=1, remat="none") -> list[Transfer]:
    """The transfers of a training step on a mesh, with 8 rows in each part of the batch."""
    model = replace(MODEL, remat=remat)
    layout, objective = training_layout(), CausalLM()
    schedule = Cosine(peak=1e-2, warmup=5).build(20)
    rows = 8 * accumulation
    tokens = np.zeros((rows, LENGTH + 1), np.int32)
    example = objective.prepare(tokens, np.ones_like(tokens), np.zeros(rows, np.uint64))
    with jax.set_mesh(mesh):
        learner = Learner(model, objective, AdamW(), schedule, layout, microbatch=8, zero=zero)
        return transfers(learner.step, learner.abstract(), abstract_example(example, layout))


def expected(sizes: dict[str, int], zero=3, accumulation=1, remat="none"):
    """Rows of what the docstring above says, in numbers."""
    data, fsdp, context, tensor = (
        sizes.get(axis, 1) for axis in ("data", "fsdp", "context", "tensor")
    )
    batch = tuple(axis for axis in ("data", "fsdp") if sizes.get(axis, 1) > 1)
    sequence = ("context",) if context > 1 else ()
    matrices, table = [size // tensor for size in MATRICES], TABLE // tensor
    rows = 8 * LENGTH // (data * fsdp * context)
    keys = 8 * LENGTH * 32 // (data * fsdp * tensor)  # of whole sequences
    part = (0,) if accumulation > 1 else ()
    forward, backward = (*part, 0), (*part, 1)
    # XLA sums over rows first and over the sequence then; the head's sum is written in one.
    for axes in (batch, sequence):
        yield backward, axes, "all-reduce", [*matrices, 32, 32]
        yield part, axes, "all-reduce", [table, 32]
    yield part, (*batch, *sequence), "all-reduce", [table]
    if fsdp > 1:
        yield (), ("fsdp",), "all-gather", [table]
        for place in (forward, backward) if zero == 3 else ():
            yield place, ("fsdp",), "all-gather", matrices
        if zero < 3:
            yield (), ("fsdp",), "all-gather", [5 * size for size in matrices]
    if tensor > 1:
        again = 1 if remat == "full" else 0  # attention's output, on which the rest depends
        yield forward, ("tensor",), "all-reduce", 2 * [rows * 32]
        yield backward, ("tensor",), "all-reduce", (5 + again) * [rows * 32]
        yield part, ("tensor",), "all-reduce", [*2 * [rows * 32], *3 * [rows]]
    if context > 1:
        yield forward, sequence, "all-gather", 2 * [keys]
        yield backward, sequence, "all-reduce", 2 * [keys]
        yield part, sequence, "all-gather", [8 * LENGTH // (data * fsdp)]


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        (dict(fsdp=8), {}),
        (dict(fsdp=8), dict(zero=1)),
        (dict(fsdp=1, tensor=8), {}),
        (dict(fsdp=1, context=8), {}),
        (dict(data=2, fsdp=2, tensor=2), {}),
        (dict(fsdp=2, context=2, tensor=2), {}),
        (dict(fsdp=4, tensor=2), dict(remat="full")),
        (dict(data=2, fsdp=4), dict(zero=2, accumulation=2)),
    ],
    ids=str,
)
def test_a_step_sends_what_its_mesh_is_for(sizes, settings):
    found = of_a_step(Mesh(**sizes).build(), **settings)
    assert tally(found) == expectation(expected(sizes, **settings))
    # The norm of the gradient and the metrics are numbers, and are no business of the layers.
    layers = max(len(transfer.loops) for transfer in found)
    assert all(len(transfer.loops) < layers for transfer in found if transfer.size == 1)


@pytest.mark.parametrize("capacity", [None, 1.0])
def test_experts_send_tokens_and_no_weights(monkeypatch, capacity):
    """Of a layer, on an axis of experts that its 8 experts and the 8 rows are divided over.

    Within a capacity tokens go to their experts and back by all-to-all, forward and backward.
    Without one they are gathered and their sums scattered. Gradients of experts are summed over the
    axes that divide the batch, but for `expert`; over `tensor`, activations, as in a dense layer.
    """
    experts = ExpertsConfig(size=80, experts=8, router=TopKRouter(capacity=capacity))
    monkeypatch.setitem(globals(), "MODEL", replace(MODEL, feed_forward=experts))
    found = tally(of_a_step(Mesh(fsdp=2, expert=2, tensor=2).build()))
    rows = 8 // 4 * LENGTH * 32  # numbers of the activations on a device
    matrix = 8 // 2 * 32 * 80 // 2  # and of one matrix of its experts, whole along fsdp
    for loop in (0,), (1,):
        moved = {kind: sum(sizes.elements()) for kind, sizes in found[loop, ("expert",)].items()}
        if capacity is None:
            assert found[loop, ("expert",)]["all-gather"][2 * rows] == 1
            assert found[loop, ("expert",)]["reduce-scatter"][rows] == 1
            assert "all-to-all" not in moved
        else:
            slots = 2 * LENGTH // 8  # two choices of each token, evenly
            assert moved == {"all-to-all": 2 * 2 * 8 * slots * 32}
        assert found[loop, ("fsdp",)]["all-gather"][matrix] == 3
        attention, layer = ([1, 3][loop[0]], 1)
        assert found[loop, ("tensor",)]["all-reduce"][rows] == attention + layer
    assert found[(1,), ("fsdp",)]["reduce-scatter"] == {matrix // 2: 3}
    over = [kinds for (_, axes), kinds in found.items() if "expert" in axes]
    sizes = {size for kinds in over for of_kind in kinds.values() for size in of_kind}
    assert not {matrix, matrix // 2} & sizes


def test_one_device_sends_nothing():
    assert of_a_step(Mesh(fsdp=1).build(jax.devices()[:1])) == []


def test_one_cut_side_is_an_all_reduce_without_a_word():
    """Of both versions of jax: why the collectives are counted."""
    with jax.set_mesh(Mesh(fsdp=1, tensor=8).build()):
        cut, whole = jnp.ones((8, 16), out_sharding=P(None, "tensor")), jnp.ones((16, 4))
        sum_of_parts = Transfer("all-reduce", (8, 4), (), ("tensor",))
        assert transfers(jnp.matmul, cut, whole) == [sum_of_parts]
        with pytest.raises(Exception, match="Contracting dimensions are sharded"):
            jnp.matmul(cut, jax.reshard(whole, P("tensor", None)))
