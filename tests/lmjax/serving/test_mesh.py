"""Serving on a mesh: the tokens of one device, by a model in parts and by replicas of it."""

import threading

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data.tokenizers.base import ByteTokenizer
from lmjax.generation import Generator, TextGenerator
from lmjax.generation.embeddings import LoadedStates
from lmjax.models import initialize
from lmjax.parallel import Mesh, serving_layout
from lmjax.serving.engine import Engine
from lmjax.serving.pages import page_keys
from lmjax.serving.replicas import Replicas
from lmjax.serving.request import CollectedAnswer
from lmjax.serving.start import serving_meshes
from lmjax.serving.weights import ServedWeights
from tests.larger import larger
from tests.lmjax.serving.engines import (
    FAMILIES,
    SMALL,
    answered,
    assert_idle,
    expected,
    prompts,
    request,
)
from tests.lmjax.serving.servers import MODEL

ONE = Mesh(fsdp=1)
LENGTHS = [3, 20, 1]


def served_weights(family, seed=0):
    """Random weights as `engines.make_generator` has them, in parts on the mesh that is set."""
    layout, config = serving_layout(), FAMILIES[family]
    _, params = initialize(config, layout, jax.random.key(seed))
    params = larger(params, 4, axes=2)
    return ServedWeights.of(Generator(config, params, layout))


def check_mesh(family, sizes, settings=SMALL):
    """Answers on a mesh are those of one device, with probabilities that differ by rounding."""
    requests = [request(prompt) for prompt in prompts(0, LENGTHS)]
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        wanted = expected(requests, family)
    (mesh,) = serving_meshes(sizes, jax.devices())
    with jax.set_mesh(mesh):
        engine = Engine({"tiny": served_weights(family)}, settings)
        found = answered(engine, requests)
    for answer, row in zip(found, wanted):
        assert answer.ids == row.tokens
        scores = [token.log_probability for token in answer.tokens]
        # 2e-5: sums in another order, as in tests/lmjax/generation/test_generator.py
        np.testing.assert_allclose(scores, row.log_probabilities, rtol=0, atol=2e-5)
    return engine


@pytest.mark.parametrize(
    "sizes",
    [Mesh(fsdp=2, tensor=2), pytest.param(Mesh(fsdp=1, tensor=4), marks=pytest.mark.slow)],
)
def test_a_mesh_gives_the_tokens_of_one_device(sizes):
    """Two key heads are cut over two devices, and whole on each of four."""
    engine = check_mesh("rotary", sizes, replace(SMALL, slots=2))
    keys = engine._runner._pages.keys[0]
    part = keys.addressable_shards[0].data.shape[-1]
    assert part == keys.shape[-1] // (2 if sizes.tensor == 2 else 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rotary"])
def test_all_families_on_a_mesh(family):
    check_mesh(family, Mesh(fsdp=2, tensor=2), replace(SMALL, guesses=2))


def test_vectors_on_a_mesh_are_those_of_one_device():
    """1e-5: sums in another order."""

    def vectors(sizes):
        (mesh,) = serving_meshes(sizes, jax.devices())
        with jax.set_mesh(mesh):
            layout = serving_layout()
            _, params = initialize(MODEL, layout, jax.random.key(3))
            text = TextGenerator(Generator(MODEL, params, layout), ByteTokenizer())
            states = LoadedStates(text)
            return states.vectors(["abc", "x"], 2, 16), states.perplexity("abcde", 16)

    (wanted, known), (found, again) = vectors(ONE), vectors(Mesh(fsdp=2, tensor=2))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert abs(again - known) < 1e-3 * known


def two_replicas(family="rotary"):
    """Replicas on two devices each, and their meshes."""
    meshes = serving_meshes(Mesh(data=2, fsdp=1, tensor=2), jax.devices())
    with jax.set_mesh(meshes[0]):
        weights = {"tiny": served_weights(family), "other": served_weights(family, seed=1)}
        return Replicas(weights, replace(SMALL, slots=2), None, meshes)


def test_replicas_share_a_queue_and_give_the_same_tokens():
    """Both work, each request is answered once, and the state is of both together."""
    requests = [request(prompt) for prompt in prompts(1, LENGTHS * 4)]
    requests += [request(prompt, model="other") for prompt in prompts(2, LENGTHS)]
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        wanted = [row.tokens for row in expected(requests[:12])]
        wanted += [row.tokens for row in expected(requests[12:], seed=1)]
    replicas, stop = two_replicas(), threading.Event()
    devices = [
        jax.tree.leaves(engine._weights["tiny"].params)[0].devices() for engine in replicas.engines
    ]
    assert not devices[0] & devices[1]
    answers = [CollectedAnswer() for _ in requests]
    for one, answer in zip(requests, answers):
        replicas.submit(one, answer)
    assert replicas.load().waiting == len(requests)
    thread = threading.Thread(target=replicas.run, args=(stop,))
    thread.start()
    try:
        for _ in range(1200):
            if all(answer.reason for answer in answers):
                break
            stop.wait(0.1)
    finally:
        stop.set()
        replicas.wake()
        thread.join()
    assert [answer.ids for answer in answers] == wanted
    assert_idle(replicas)
    assert min(engine.counts["finished_length"] for engine in replicas.engines) > 0
    assert replicas.counts["finished_length"] == len(requests)


def test_a_request_goes_where_its_beginning_is_known():
    """The second replica has two pages of the prompt, and gets it until it is two ahead."""
    replicas, prompt = two_replicas(), list(range(10))
    engine = replicas.engines[1]
    keys = page_keys(engine._weights["tiny"].salt, prompt, SMALL.page)
    pages = engine._book.take(2)
    for page, key in zip(pages, keys, strict=True):
        engine._book.publish(page, key)
    engine._book.release(pages)
    assert [one.known_tokens(request(prompt)) for one in replicas.engines] == [0, 8]
    assert engine.known_tokens(request(prompt, model="other")) == 0
    waiting = []
    for _ in range(4):  # half of its slots is one request
        replicas.submit(request(prompt), CollectedAnswer())
        waiting.append([one.load().waiting for one in replicas.engines])
    assert waiting == [[0, 1], [0, 2], [1, 2], [1, 3]]


def test_replicas_cancel_take_new_weights_and_end():
    replicas = two_replicas()
    waiting = CollectedAnswer()
    number = replicas.submit(request([1, 2]), waiting)
    replicas.cancel(number)
    for engine in replicas.engines:
        engine._drop_cancelled()
    assert waiting.reason == "cancelled" and replicas.load().waiting == 0
    new = replicas.engines[0]._weights["other"]
    replicas.set_weights("tiny", new)
    for engine in replicas.engines:
        one, other = (engine._weights[name].params for name in ("tiny", "other"))
        same = jax.tree.map(lambda a, b: np.array_equal(a, b), one, other)
        assert all(jax.tree.leaves(same))
    left = CollectedAnswer()
    replicas.submit(request([1, 2]), left)
    stop = threading.Event()
    stop.set()
    replicas.run(stop)
    assert left.reason == "error"


def test_a_failure_of_one_replica_ends_all():
    replicas, stop = two_replicas(), threading.Event()

    def fail():
        raise RuntimeError("a device is gone")

    replicas.engines[1].step = fail
    with pytest.raises(RuntimeError, match="a device is gone"):
        replicas.run(stop)
    assert stop.is_set()


def test_meshes_that_a_server_has_no_use_for():
    assert [mesh.size for mesh in serving_meshes(ONE, jax.devices())] == [1]
    assert [mesh.size for mesh in serving_meshes(Mesh(data=2, fsdp=-1), jax.devices())] == [4, 4]
    with pytest.raises(UserError, match=r"mesh\.context=2"):
        serving_meshes(Mesh(fsdp=1, context=2), jax.devices())
    with pytest.raises(UserError, match="16 devices"):
        serving_meshes(Mesh(fsdp=16), jax.devices())
