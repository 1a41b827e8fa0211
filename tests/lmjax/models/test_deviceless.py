"""Every family trains with the kernels for TPUs: its step compiles for a v4 that is not there."""

import jax
import pytest

from lmjax.config import replace
from lmjax.models import (
    baichuan,
    bert,
    bloom,
    chatglm,
    chatglm2,
    falcon,
    gemma2,
    glm,
    gpt2,
    gpt3,
    llama,
    mistral,
    mixtral,
    opt,
    palm,
    qwen,
    t5,
    xlnet,
)
from lmjax.objectives import CausalLM, MaskedLM, PermutationLM, SpanCorruption, glm_objective
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import abstract_example
from lmjax.training.schedules import Cosine
from pallas_kernels import topologies
from tests.buffers import shapes

LENGTH = 640  # no other size of a model is it, or a multiple of it
FAMILIES = {
    "gpt2": gpt2("124M"),
    "gpt3": gpt3("125M"),  # windows on every other layer
    "opt": opt("125M"),
    "bloom": bloom("560M"),  # ALiBi
    "llama": llama("7B"),
    "baichuan": baichuan("13B"),
    "qwen": qwen("1.8B"),
    "mistral": mistral("7B"),  # a window, grouped heads
    "mixtral": mixtral("8x7B"),  # experts
    "falcon": falcon("7B"),
    "palm": palm("8B"),
    "gemma2": gemma2("2B"),  # softcap, heads of 256
    "chatglm": chatglm("6B"),
    "chatglm2": chatglm2("6B"),
    "glm": glm("110M"),
    "t5": t5("small"),
    "bert": bert("base"),
    "xlnet": xlnet("base"),
}


OBJECTIVES = {
    "glm": glm_objective(),
    "t5": SpanCorruption(),
    "bert": MaskedLM(),
    "xlnet": PermutationLM(),
}


COMPILED = ("gpt3", "bloom", "mistral", "mixtral", "gemma2", "glm", "t5", "bert", "xlnet")


@pytest.fixture
def described_v4():
    """A mesh of one v4 chip that is not there, set for the test."""
    try:
        mesh = Mesh(fsdp=1).build(list(topologies.tpu("v4")[:1]))
    except topologies.NoCompiler as missing:
        pytest.skip(str(missing))
    with jax.set_mesh(mesh):
        yield


def shrunk(config):
    """The same kind of model, with two narrow layers and few words: it compiles in seconds.

    Heads are as wide as they are, and share key heads as they do.
    """
    attention = config.attention
    shared = attention.kv_heads < attention.num_heads
    attention = replace(
        attention, num_heads=4, num_kv_heads=min(2, attention.kv_heads) if shared else None
    )
    config = replace(
        config,
        num_layers=2,
        hidden=256,
        vocab_size=1000,
        embedding_size=config.embedding_size and 128,
        attention=attention,
        feed_forward=replace(config.feed_forward, size=384),
    )
    return replace(config, encoder_layers=2) if hasattr(config, "encoder_layers") else config


def step_of(name: str, **settings):
    """The lowered training step of a family, with these settings, on two rows."""
    objective, layout = OBJECTIVES.get(name, CausalLM()), training_layout()
    model = replace(shrunk(FAMILIES[name]), **{"dtype": "bfloat16", **settings})
    learner = Learner(
        model=model,
        objective=objective,
        optimizer=AdamW(),
        rate=Cosine(warmup=1).build(100),
        layout=layout,
    )
    example = abstract_example(objective.shapes(2, LENGTH), layout)
    (leaves, of_state), (arrays, of_row) = map(jax.tree.flatten, (learner.abstract(), example))

    def flat(leaves, arrays):  # of classes that check what lowering puts into them
        return jax.tree.leaves(learner.step(of_state.unflatten(leaves), of_row.unflatten(arrays)))

    return jax.jit(flat).lower(leaves, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_has_kernels_and_no_scores(described_v4, name):
    """Of one family of each kind of attention in what is compiled, of the others before that."""
    step = step_of(name)
    program = step.compile().as_text() if name in COMPILED else step.as_text()
    # Forward and backward are kernels; layers of a scan are in the program once.
    assert program.count("tpu_custom_call") >= 2
    lengths = (LENGTH, LENGTH + 1, LENGTH // 2)
    pairs = [shape for shape in shapes(program) if sum(size in lengths for size in shape) > 1]
    if name == "xlnet":  # whose scores of distances are an array over pairs
        assert len(pairs) <= 2
    else:
        assert pairs == []


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("attention", 1), ("full", 2)])
def test_what_is_kept_is_not_computed_again(described_v4, remat, times):
    """The kernel of the forward pass is in the program once, or once more in backward."""
    compiled = step_of("gpt2", remat=remat).compile().as_text()
    kernels = [line for line in compiled.splitlines() if "tpu_custom_call" in line]
    assert sum("attention_forward" in line for line in kernels) == times


@pytest.mark.slow
def test_inputs_of_blocks_are_kept_on_the_host(described_v4):
    kept = step_of("gpt2", remat="offload").compile().memory_analysis()
    layers, size = 2, 2 * LENGTH * 256 * 2  # bytes of a block's input
    assert kept.host_temp_size_in_bytes >= layers * size
