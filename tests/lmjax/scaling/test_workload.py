"""Counts of parameters, FLOPs and bytes against the traced model on a mesh, and its residuals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.models import (
    ExpertChoiceRouter,
    FeedForwardConfig,
    abstract,
    bert,
    bloom,
    falcon,
    glam,
    glm,
    gpt2,
    grok1,
    llama,
    mixtral,
    opt,
    palm,
    switch,
    t5,
)
from lmjax.models.batch import Batch
from lmjax.parallel import Mesh, training_layout
from lmjax.scaling.division import Division
from lmjax.scaling.flops import count_parameters, forward_flops_per_token
from lmjax.scaling.workload import Workload, workload_of
from lmjax.training.optimizers import Adafactor, AdamW, Lion, Muon

TINY = dict(num_layers=4, hidden=96, vocab_size=250, max_length=64)
FAMILIES = {
    "gpt2": gpt2("124M"),
    "opt": opt("350M"),  # narrow embeddings
    "bloom": bloom("560M"),
    "llama": llama("7B"),
    "falcon": falcon("40B"),
    "palm": palm("8B"),  # one key head
    "glm": glm("110M"),
    "bert": bert("base"),
    "t5": t5("small"),
    "mixtral": mixtral("8x7B"),  # experts
    "grok": grok1("314B"),
    "glam": glam("0.1B"),  # experts in every second layer
    "switch": switch("base"),
}


def tiny(name):
    """A family's model with few and small layers, and its sharing of key heads."""
    config = FAMILIES[name]
    kv_heads = {"falcon": 2, "palm": 1, "mixtral": 2}.get(name)
    attention = replace(config.attention, num_heads=8, num_kv_heads=kv_heads, head_dim=16)
    feed_forward = replace(config.feed_forward, size=320)
    if config.alternate_feed_forward is not None:
        other = replace(config.alternate_feed_forward, size=160)
        config = replace(config, alternate_feed_forward=other)
    config = replace(config, **TINY, attention=attention, feed_forward=feed_forward)
    if config.embedding_size:
        config = replace(config, embedding_size=32)
    return replace(config, encoder_layers=4) if hasattr(config, "encoder_layers") else config


def workload(config, **settings):
    return Workload(config, 64, 8, 1e9, **settings)


NEWER_JAX = jax.__version_info__ >= (0, 12)
MESHES = [dict(fsdp=1), dict(fsdp=4), dict(fsdp=2, tensor=4), dict(fsdp=1, tensor=8), dict(data=2)]
MESHES += [dict(expert=4), dict(fsdp=2, expert=2, tensor=2)]


def families_on_meshes():
    """Every family on two meshes, and on the others among the slow tests."""
    for number, name in enumerate(FAMILIES):
        for place, sizes in enumerate(MESHES):
            marks = [] if (place - number) % len(MESHES) < 2 else [pytest.mark.slow]
            yield pytest.param(name, sizes, marks=marks, id=f"{sizes}-{name}")


@pytest.mark.parametrize(("name", "sizes"), list(families_on_meshes()))
def test_parameters_of_a_chip_are_those_of_the_layout(name, sizes):
    config = tiny(name)
    mesh = Mesh(**({"fsdp": 1} | sizes))
    with jax.sharding.use_abstract_mesh(mesh.abstract(math.prod(sizes.values()))):
        _, shapes = abstract(config, training_layout())
    expected = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(shapes)
    )
    assert workload(config).on_chip(Division(**sizes)) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_add_up(name):
    made = workload(tiny(name))
    forward = forward_flops_per_token(made.model, 64)
    assert sum(made.forward_parts.values()) == pytest.approx(forward)
    assert made.model_flops == pytest.approx(3 * forward)
    assert made.count == count_parameters(made.model).total


def test_recomputed_flops():
    made = workload(tiny("llama"))
    parts, model = made.forward_parts, made.model_flops
    scores = 0.5 * parts["attention"]
    assert made.hardware_flops(Division(remat="none")) == pytest.approx(
        model + scores + parts["head"]
    )
    assert made.attention_flops(Division(remat="none")) == pytest.approx(3.5 * parts["attention"])
    extra = parts["products"] + parts["attention"]
    assert made.hardware_flops(Division(remat="full")) == pytest.approx(
        made.hardware_flops(Division(remat="none")) + extra
    )


@pytest.mark.parametrize(
    ("schedule", "remat", "passes"),
    [("1f1b", "none", 4), ("1f1b", "full", 5), ("zb_h1", "none", 3), ("zb_h1", "full", 4)],
)
def test_passes_of_pipelines(schedule, remat, passes):
    """Each part is computed again in backward, unless what it needs is kept.

    In units of a forward pass, of which backward is two, and that of inputs or weights alone one.
    """
    made = workload(tiny("llama"))
    parts = made.forward_parts
    division = Division(stage=2, microbatches=4, schedule=schedule, remat=remat)
    ends = 4 * parts["head"] + 0.5 * parts["attention"]
    blocks = parts["products"] + parts["attention"]
    assert made.hardware_flops(division) == pytest.approx(passes * blocks + ends)
    assert made.attention_flops(division) == pytest.approx((passes + 0.5) * parts["attention"])
    others = dataclasses.replace(division, parts_again=False)
    assert made.hardware_flops(others) == made.hardware_flops(Division(remat=remat))


def test_flops_of_experts():
    """Those that a token uses, of 8 and of 64; empty slots are computed as well."""
    one = 2 * 96 * 320  # of one matrix in one layer and token
    made = workload(tiny("mixtral"))
    assert made.expert_flops == 4 * 2 * 3 * one
    assert made.hardware_flops(Division(remat="dots")) - made.hardware_flops(
        Division(remat="none")
    ) == pytest.approx(made.forward_parts["attention"] + made.expert_flops)
    sparse = workload(tiny("glam"))
    assert sparse.expert_flops == 2 * 2 * 2 * one
    alike = replace(sparse.model.feed_forward.router, capacity=1.0)
    even = replace(sparse.model, feed_forward=replace(sparse.model.feed_forward, router=alike))
    for remat, passes in (("none", 3), ("dots", 4), ("full", 4)):
        more = sparse.hardware_flops(Division(remat=remat)) - workload(even).hardware_flops(
            Division(remat=remat)
        )
        assert more == pytest.approx(passes * 0.25 * sparse.expert_flops)


def test_rows_of_experts():
    """Two of each token, of all devices where none is dropped; slots where they have a capacity."""
    dropless, capacity = workload(tiny("mixtral")), workload(tiny("glam"))
    assert dropless.expert_rows(Division(expert=4)) == 2 * 4
    assert capacity.expert_rows(Division(expert=4)) == 2 * 1.25
    choice = replace(tiny("mixtral").feed_forward, router=ExpertChoiceRouter(capacity=3.0))
    assert workload(replace(tiny("mixtral"), feed_forward=choice)).expert_rows(Division()) == 3
    assert workload(tiny("llama")).expert_rows(Division()) == 0


def test_dense_layers():
    """All, none, or every second one; a shared expert is one as well."""
    shared = FeedForwardConfig(size=32)
    config = tiny("glam")
    experts = replace(config.feed_forward, shared=shared)
    assert workload(tiny("mixtral")).dense_layers == []
    assert workload(tiny("llama")).dense_layers == [(tiny("llama").feed_forward, 1.0)]
    found = workload(replace(config, feed_forward=experts)).dense_layers
    assert found == [(shared, 0.5), (config.alternate_feed_forward, 0.5)]


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [(AdamW(), 2), (Lion(), 1), (AdamW(decay_to="start"), 3), (Adafactor(factored=False), 1)],
)
def test_state_of_optimizers(optimizer, numbers):
    share = workload(tiny("llama"), optimizer=optimizer).optimizer_share
    assert share == pytest.approx(numbers, rel=0.01)


def test_state_of_factored_and_mixed_optimizers():
    wide = replace(tiny("llama"), hidden=256)
    factored = workload(wide, optimizer=Adafactor(smallest_factored=32)).optimizer_share
    assert factored < 0.1
    muon = workload(wide, optimizer=Muon()).optimizer_share
    assert 1 < muon < 2


def residual_bytes(config, remat, length=256):
    """Bytes a layer and token of what backward reads, as JAX decides it, attention's scores aside.

    The chunked attention of a CPU keeps what differs from a kernel: those arrays are left out.
    """
    config = replace(config, dtype="bfloat16", remat=remat, max_length=length)
    with jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1)):
        graph, shapes = abstract(config, training_layout())

        def kept(params, x, tokens):
            def run(params, x):
                batch = Batch(tokens=tokens, positions=tokens, segments=tokens)
                return nnx.merge(graph, params).run(x, batch)[0]

            return jax.vjp(run, params, x)[1]

        x = jax.ShapeDtypeStruct((1, length, config.hidden), jnp.bfloat16)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        kept = jax.eval_shape(kept, shapes, x, tokens)
    found = 0
    for leaf in jax.tree.leaves(kept):
        layers, *rest = leaf.shape or (0,)
        if layers == config.num_layers and length in rest and 64 not in rest:
            found += math.prod(rest) * leaf.dtype.itemsize / length
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "palm", "falcon", "bloom"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_activations_are_what_jax_keeps(name, remat):
    """Within 3 percent: a number or two of each token (rooted means, logarithms) are left out.

    Of GELU in its tanh form newer versions of jax keep an array of hidden units less.
    """
    config = tiny(name)
    kept = workload(replace(config, dtype="bfloat16")).kept_bytes(remat)
    found = residual_bytes(config, remat)
    if remat == "none" and config.feed_forward.activation == "gelu_tanh" and NEWER_JAX:
        found += 2 * config.feed_forward.size
    assert kept == pytest.approx(found, rel=0.03)


def test_an_experiment_is_a_workload():
    from experiments.gpt3_175b import experiment

    made = workload_of(experiment)
    assert made.count == 174_604_259_328
    assert (made.rows, made.length) == (1536, 2048)
    assert made.tokens == pytest.approx(300e9, rel=1e-3)
    assert made.model_flops == experiment.flops_per_token()
    assert workload_of(experiment, 1e9).tokens == 1e9
