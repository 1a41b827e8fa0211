"""Texts are continued alike on one device and with the experts divided over several."""

import jax
import numpy as np
import pytest

from lmjax.config import replace
from lmjax.generation import Generator, Sampling
from lmjax.models import TopKRouter, initialize, mixtral
from lmjax.parallel import Mesh, generation_layout
from tests.larger import larger

CONFIG = replace(
    mixtral(),
    vocab_size=97,
    hidden=32,
    num_layers=2,
    max_length=64,
    attention=replace(mixtral().attention, num_heads=4, num_kv_heads=2, head_dim=8),
    feed_forward=replace(mixtral().feed_forward, size=48, experts=4),
)
# Tokens above it would be dropped in training.
NARROW = replace(CONFIG.feed_forward, router=TopKRouter(capacity=0.5))
PROMPTS = [list(range(3, 3 + length)) for length in (5, 9, 2)]


def continued(config, sizes, prompts):
    """Greedy tokens on a mesh, of parameters that are the same on every one."""
    mesh = Mesh(**sizes)
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    with jax.set_mesh(mesh.build(devices)):
        _, params = initialize(config, generation_layout(), jax.random.key(0))
        params = larger(params, 10, axes=3)
        generator = Generator(config, params, unstack=len(devices) == 1)
        return generator.generate(prompts, Sampling(temperature=0.0), 6)


@pytest.fixture(scope="module")
def alone():
    return continued(CONFIG, dict(fsdp=1), [*PROMPTS, PROMPTS[0]])


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [(dict(fsdp=1, expert=2, tensor=2), 4), (dict(fsdp=2, expert=2), 3)],
    ids=["4 rows", "3 rows"],
)
def test_a_mesh_gives_the_tokens_of_one_device(alone, sizes, rows):
    """Rows that divide among the devices, and rows that do not and are whole on each."""
    prompts = [*PROMPTS, PROMPTS[0]][:rows]
    assert continued(CONFIG, sizes, prompts) == alone[:rows]


def test_a_capacity_drops_nothing_here(alone):
    config = replace(CONFIG, feed_forward=NARROW)
    assert continued(config, dict(fsdp=1), PROMPTS) == alone[:3]
