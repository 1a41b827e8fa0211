"""Reading compiled programs: products and collectives of loops, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.parallel import Mesh
from lmjax.scaling.program import CompiledProgram

LOOP = """HloModule step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %w = f32[16,16]{1,0} constant({...})
  %dot.1 = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ag = (f32[2,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%s), replica_groups={{0,1,2,3}}
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %dot.1)
}

%all-reduce-scatter.1 (p0: f32[8,16]) -> f32[2,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %ar = f32[8,16]{1,0} all-reduce(%p0), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %ds = f32[2,16]{1,0} dynamic-slice(%ar, %i, %z), dynamic_slice_sizes={2,16}
}

%condition (p.1: (s32[], f32[8,16])) -> pred[] {
  %p.1 = (s32[], f32[8,16]) parameter(0)
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %w.1 = (s32[], f32[8,16]) while(%a), condition=%condition, body=%body
  %cp = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%a), source_target_pairs={{0,1}}
  %k = f32[16,32]{1,0} constant({...})
  %c = f32[8,32]{1,0} convolution(%a, %k), dim_labels=bf_io->bf
  ROOT %f = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_loops_body_counts_as_often_as_it_turns():
    program = CompiledProgram(LOOP)
    assert program.runs["body"] == (5, 1)
    assert program.runs["main"] == (1, 0)
    found = {(c.kind, c.bytes, c.devices, c.times, c.loops) for c in program.collectives}
    assert found == {
        ("all-gather", 4 * 8 * 16, 4, 5, 1),
        ("reduce-scatter", 4 * 2 * 16, 4, 1, 0),
        ("collective-permute", 4 * 8 * 16, 2, 1, 0),
    }


CUT = """HloModule cut

%begin (p: bf16[2,16]) -> bf16[8,16] {
  ROOT %g.1 = bf16[8,16]{1,0} all-gather(%p), channel_id=1, GROUPS, CHAIN
}

%between (p.1: bf16[2,16]) -> bf16[8,16] {
  ROOT %g.2 = bf16[8,16]{1,0} all-gather(%p.1), channel_id=1, GROUPS, CHAIN
}

%end (p.2: bf16[2,16]) -> bf16[8,16] {
  ROOT %g.3 = bf16[8,16]{1,0} all-gather(%p.2), channel_id=1, GROUPS, CHAIN
}

ENTRY %main (a: bf16[2,16]) -> bf16[8,16] {
  %a = bf16[2,16]{1,0} parameter(0)
  %async-collective-start = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%begin
  %fusion.1 = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%between
  %async-collective-done = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%end
  %t.1 = bf16[4,8]{1,0} all-to-all(%a), channel_id=1, GROUPS, dimensions={0}
  ROOT %t.2 = bf16[4,8]{1,0} all-to-all(%t.1), channel_id=1, GROUPS, dimensions={0}
}
""".replace("GROUPS", "replica_groups={{0,1,2,3}}").replace(
    "CHAIN", 'frontend_attributes={chain_id="3"}'
)


def test_one_that_is_cut_into_several_instructions_counts_once():
    """As all collectives of `shard_map` have one channel, a channel does not make them one."""
    found = sorted((c.kind, c.bytes) for c in CompiledProgram(CUT).collectives)
    assert found == [("all-gather", 2 * 8 * 16), ("all-to-all", 64), ("all-to-all", 64)]


def test_a_compiler_may_say_how_often_a_loop_turns():
    told = 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    assert CompiledProgram(LOOP.replace("body=%body", told)).runs["body"] == (7, 1)


PIPELINE = """HloModule pipeline

%work (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %w = f32[16,16]{1,0} constant({...})
  ROOT %d = f32[8,16]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%idle (p.1: f32[8,16]) -> f32[8,16] {
  ROOT %p.1 = f32[8,16]{1,0} parameter(0)
}

%body (t: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %t = (s32[], f32[8,16]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%t), index=1
  %c = f32[8,16]{1,0} conditional(%b, %x, %x), branch_computations={%idle, %work}
  %k = f32[8,16]{1,0:T(8,128)} copy(%c)
  %f = f32[8,16]{1,0:T(8,128)S(1)} copy(%c)
  ROOT %r = (s32[], f32[8,16]) tuple(%i, %k)
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %l = (s32[], f32[8,16]) while(%a), condition=%c, body=%body, "known_trip_count":{"n":"10"}
  ROOT %g = f32[8,16]{1,0} get-tuple-element(%l), index=1
}
"""


def test_branches_of_a_pipeline_are_taken_in_some_turns():
    product = 2 * 8 * 16 * 16
    assert CompiledProgram(PIPELINE).flops == 10 * product
    assert CompiledProgram(PIPELINE, taken=0.4).flops == 4 * product


NESTED = PIPELINE.replace("ROOT %d = ", "%d = ").replace(
    """rhs_contracting_dims={0}
}""",
    """rhs_contracting_dims={0}
  ROOT %e = f32[8,16]{1,0} conditional(%b, %d, %d), branch_computations={%idle, %loss}
}

%loss (p.2: f32[8,16]) -> f32[8,16] {
  %p.2 = f32[8,16]{1,0} parameter(0)
  %w.2 = f32[16,16]{1,0} constant({...})
  ROOT %f = f32[8,16]{1,0} dot(%p.2, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}""",
    1,
)


def test_branches_inside_of_branches_have_a_share_of_their_own():
    product = 2 * 8 * 16 * 16
    assert CompiledProgram(NESTED, taken=0.4).flops == 2 * 4 * product
    assert CompiledProgram(NESTED, taken=0.4, inner=0.25).flops == (4 + 1) * product


def test_copies_in_the_devices_memory():
    assert CompiledProgram(PIPELINE).copies == [(4 * 8 * 16, 10)]
    assert CompiledProgram(LOOP).copies == []


def test_flops_of_all_loops():
    """A product of [8, 16] . [16, 16] five times, and one of [8, 16] . [16, 32]."""
    assert CompiledProgram(LOOP).flops == 5 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 32


def test_bytes_that_leave_a_device():
    sent = {one.kind: one.sent for one in CompiledProgram(LOOP).collectives}
    assert sent["all-gather"] == 5 * 512 * 3 / 4
    assert sent["reduce-scatter"] == 512 * 3 / 4
    assert sent["collective-permute"] == 512


CONVOLUTIONS = {
    # A product as a TPU has it: [8, 16] . [16, 32].
    ("f32[8,16]", "f32[16,32]", "f32[8,32]", "dim_labels=bf_io->bf"): 2 * 8 * 16 * 32,
    # Four products of [8, 16] . [16, 32] in one: of the four of the window one meets each.
    (
        "f32[4,8,16]",
        "f32[4,16,32]",
        "f32[4,8,32]",
        "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
    ): 4 * 2 * 8 * 16 * 32,
    # A usual convolution of length 10 with a window of 3, its ends padded by one.
    (
        "f32[2,16,10]",
        "f32[3,16,32]",
        "f32[2,32,10]",
        "window={size=3 pad=1_1}, dim_labels=bf0_0io->bf0",
    ): 2 * 2 * 16 * 32 * 28,
}


@pytest.mark.parametrize("shapes", CONVOLUTIONS, ids=str)
def test_flops_of_convolutions(shapes):
    left, right, out, rest = shapes
    text = (
        f"ENTRY %main (a: {left}) -> {out} {{\n"
        f"  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%a, %b), {rest}\n}}\n"
    )
    assert CompiledProgram(text).flops == CONVOLUTIONS[shapes]


def test_a_compiled_scan():
    """Forward and backward of 6 layers on 8 devices: 18 products, gathers in the loops."""
    mesh = Mesh(fsdp=8).build()
    with jax.set_mesh(mesh):
        weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=spec(mesh, None, "fsdp"))
        rows = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=spec(mesh, "fsdp"))

        def loss(weights, x):
            def layer(x, w):
                whole = jax.reshard(w, P(None, None))
                return jnp.tanh(jnp.matmul(x, whole)), None

            return jnp.sum(jax.lax.scan(layer, x, weights)[0])

        program = CompiledProgram(jax.jit(jax.grad(loss)).lower(weights, rows).compile().as_text())
    gathers = [one for one in program.collectives if one.kind == "all-gather"]
    assert sum(one.times * one.bytes for one in gathers) in (n * 6 * 64 * 64 * 4 for n in (1, 2))
    assert {one.devices for one in program.collectives} == {8}
    assert program.flops == pytest.approx(6 * 3 * 2 * 2 * 64 * 64, rel=0.01)


def spec(mesh, *axes):
    return jax.sharding.NamedSharding(mesh, P(*axes))
