"""Training of mixtures of experts: auxiliary losses, their measures, and any mesh."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from lmjax.config import UserError, replace
from lmjax.models import (
    AttentionConfig,
    ExpertChoiceRouter,
    ExpertsConfig,
    GatedFeedForwardConfig,
    RMSNormConfig,
    Rotary,
    TopKRouter,
    TransformerConfig,
)
from lmjax.objectives import CausalLM, Example
from lmjax.parallel import AXES, Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import Adafactor, AdamW, Muon
from lmjax.training.pipelining import Pipeline
from lmjax.training.schedules import Cosine
from lmjax.training.trainable import LastBlocks
from lmjax.training.trained_part import TrainedPart
from tests.larger import larger

EXPERTS, LENGTH, ROWS, STEPS = 8, 16, 8, 10
# Weights of the losses are large, so that their gradients are seen beside that of the targets.
ROUTERS = {
    "dropless": TopKRouter(balance=0.3, z_loss=0.1),
    "capacity": TopKRouter(balance=0.3, z_loss=0.1, capacity=0.75),
    "expert choice": ExpertChoiceRouter(z_loss=0.1),
}
MODEL = TransformerConfig(
    vocab_size=61,
    hidden=16,
    num_layers=2,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=2, head_dim=8, bias=False, positions=Rotary()),
    feed_forward=ExpertsConfig(size=24, experts=EXPERTS, router=ROUTERS["dropless"]),
    norm=RMSNormConfig(),
    positions=None,
)
OBJECTIVE = CausalLM()


def routed_by(name, **changes):
    """The model with a router of these."""
    experts = replace(MODEL.feed_forward, router=ROUTERS[name], **changes)
    return replace(MODEL, feed_forward=experts)


PAIRED = replace(
    routed_by("dropless"), num_layers=4, alternate_feed_forward=GatedFeedForwardConfig(size=24)
)


def example_of(seed=0):
    """Rows of packed documents; every other one ends in padding."""
    draw = np.random.default_rng(seed)
    shape = (ROWS, LENGTH + 1)
    tokens = draw.integers(0, 61, shape).astype(np.int32)
    segments = 1 + np.cumsum(draw.random(shape) < 0.1, axis=1).astype(np.int32)
    segments[::2, 11:] = 0
    return OBJECTIVE.prepare(tokens, segments, np.zeros(ROWS, np.uint64))


def learner_of(model, optimizer=None, **settings):
    """A learner of the model."""
    rate = Cosine(peak=1e-2, warmup=5).build(STEPS)
    optimizer = AdamW() if optimizer is None else optimizer
    return Learner(model, OBJECTIVE, optimizer, rate, training_layout(), **settings)


def mesh_of(sizes):
    """A mesh of as many devices as the sizes need."""
    mesh = Mesh(**{"fsdp": 1} | sizes)
    return mesh.build(jax.devices()[: np.prod([getattr(mesh, axis) for axis in AXES])])


@functools.cache
def state_of(model):
    """A state drawn on one device; its matrices are large, so that routers decide."""
    with jax.set_mesh(mesh_of({})):
        state = learner_of(model).init(0)
        params = larger(state.params, 8, axes=3)
        return dataclasses.replace(state, params=params)


def on_mesh(state, learner, mesh):
    """The state on another mesh."""
    return jax.tree.map(
        lambda a, shape: jax.device_put(
            a,
            jax.NamedSharding(
                mesh, shape.sharding.spec if shape.sharding else jax.sharding.PartitionSpec()
            ),
        ),
        state,
        learner.abstract(),
    )


def gradients_on(sizes, model, accumulation=1, **settings):
    """Gradients and sums of one batch."""
    mesh = mesh_of(sizes)
    with jax.set_mesh(mesh):
        learner = learner_of(model, microbatch=ROWS // accumulation, **settings)
        state = on_mesh(state_of(model), learner, mesh)
        sharding = jax.NamedSharding(mesh, training_layout().spec("batch", "seq"))
        example = jax.device_put(example_of(), sharding)
        run = jax.jit(lambda s, e: learner.gradients(s, e, s.key))
        return jax.device_get(run(state, example))


@functools.cache
def on_one_device(name):
    return gradients_on({}, routed_by(name))


@functools.cache
def paired_on_one_device():
    """Of a model with a dense layer before each sparse one."""
    return gradients_on({}, PAIRED)


def assert_alike(found, expected):
    """1e-5 of the largest gradient and of each sum: float32 sums in another order."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest)
    jax.tree.map(check, found[0], expected[0])
    sums, wanted = (dataclasses.asdict(sums) for _, sums in (found, expected))
    check = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(check, sums, wanted)


MESHES = (
    dict(expert=8),
    dict(expert=4, tensor=2),
    dict(data=2, fsdp=2, expert=2),
    dict(fsdp=2, expert=2, tensor=2),
    dict(expert=2, context=2, tensor=2),
    dict(fsdp=2, context=4),
)
FAST = "{'fsdp': 2, 'expert': 2, 'tensor': 2}"


def routers_on_meshes():
    """All ways of routing on one mesh, and on each of the others one of them in turn."""
    turns = itertools.cycle(ROUTERS)
    for sizes in MESHES:
        marks = () if str(sizes) == FAST else pytest.mark.slow
        for name in ROUTERS if str(sizes) == FAST else [next(turns)]:
            yield pytest.param(name, sizes, marks=marks, id=f"{name}-{sizes}")


@pytest.mark.parametrize(("name", "sizes"), list(routers_on_meshes()))
def test_a_mesh_gives_the_gradients_of_one_device(name, sizes):
    """Losses, measures and gradients, with drops and without."""
    assert_alike(gradients_on(sizes, routed_by(name)), on_one_device(name))


@pytest.mark.parametrize(
    ("name", "zero"), [("dropless", 2), pytest.param("capacity", 1, marks=pytest.mark.slow)]
)
def test_accumulation_gives_the_gradients_of_the_whole_batch(name, zero):
    """Rows are routed and balanced by themselves, so parts of a batch change nothing."""
    found = gradients_on(dict(fsdp=2, expert=2), routed_by(name), accumulation=2, zero=zero)
    assert_alike(found, on_one_device(name))


@pytest.mark.parametrize(
    ("name", "remat"),
    [("dropless", "full"), ("capacity", "dots")],
)
@pytest.mark.slow
def test_what_is_computed_again_changes_nothing(name, remat):
    found = gradients_on(dict(fsdp=2, expert=2), replace(routed_by(name), remat=remat))
    assert_alike(found, on_one_device(name))


@pytest.mark.slow
def test_shared_experts_and_biases_on_a_mesh():
    """What `tensor` divides is added up once."""
    shared = GatedFeedForwardConfig(size=8, bias=True)
    model = routed_by("dropless", bias=True, shared=shared)
    found = gradients_on(dict(fsdp=2, expert=2, tensor=2), model)
    assert_alike(found, gradients_on({}, model))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "schedule"), [("dropless", "1f1b"), ("capacity", "zb_h1")])
def test_a_pipeline_has_the_auxiliary_losses_too(name, schedule):
    """Gradients and measures of a schedule's stages, with experts divided inside of each."""
    sizes, pipeline = dict(stage=2, expert=2, tensor=2), Pipeline(schedule=schedule)
    found = gradients_on(sizes, routed_by(name), accumulation=4, pipeline=pipeline)
    assert_alike(found, on_one_device(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [(dict(fsdp=2, expert=2, tensor=2), 2), (dict(stage=2, expert=2, tensor=2), 4)],
    ids=str,
)
def test_dense_and_sparse_layers_in_turn(sizes, accumulation):
    """On a mesh, and in a pipeline whose stages hold a pair of layers each."""
    found = gradients_on(sizes, PAIRED, accumulation=accumulation)
    assert_alike(found, paired_on_one_device())


def test_trained_blocks_come_in_pairs():
    """As a dense and a sparse one are an entry of the stack."""
    model = replace(MODEL, alternate_feed_forward=GatedFeedForwardConfig(size=24))
    with pytest.raises(UserError, match="give an even number"):
        LastBlocks(count=1).check(model, training_layout())


def explicit_loss(model, example):
    """The mean loss, with the auxiliary losses of each layer in its forward pass."""
    config, batch = model.config, example.inputs
    router, real = config.feed_forward.router, batch.segments > 0
    graph, stacked = nnx.split(model.blocks)
    tables, mask = model.tables(batch), batch.mask(causal=True)
    x, auxiliary = model.embed(batch), 0.0
    for layer in range(config.num_layers):
        block = nnx.merge(graph, jax.tree.map(lambda a, n=layer: a[n], stacked))

        def feed(x, block=block):
            nonlocal auxiliary
            logits = x @ block.feed_forward.router.weight[...]
            probabilities = jax.nn.softmax(logits, axis=2)
            squares = jnp.square(jax.nn.logsumexp(logits, axis=2))
            auxiliary = auxiliary + router.z_loss * jnp.sum(squares * real)
            if isinstance(router, TopKRouter):
                rank = jnp.argsort(jnp.argsort(-logits, axis=2), axis=2)
                used = (rank < router.chosen) & real[..., None]
                tokens = jnp.sum(real, axis=1)[:, None]
                share = jnp.sum(used, axis=1) / (tokens * router.chosen)
                mean = jnp.sum(probabilities * real[..., None], axis=1) / tokens
                balance = EXPERTS * share * mean * tokens  # rows by their tokens
                auxiliary = auxiliary + router.balance * jnp.sum(balance)
            return block.feed(x, mask, None, None)

        x = config.arrangement.apply(
            x, block.norms, lambda x, block=block: block.attention(x, mask, tables)[0], feed
        )
    sums = OBJECTIVE.loss_of_hidden(model, model.final_norm(x), example, None)
    return sums.loss / sums.weight + auxiliary / jnp.sum(real)


@pytest.mark.parametrize("name", ROUTERS)
def test_auxiliary_losses_are_in_the_gradient_and_in_the_loss(one_device, name):
    """Those of a loss that has them in forward, to 1e-6 of the largest; means over the tokens."""
    model = routed_by(name)
    found, sums = on_one_device(name)
    state, example = state_of(model), jax.device_put(example_of())
    graph = learner_of(model).graph
    loss, expected = jax.jit(
        jax.value_and_grad(lambda params: explicit_loss(nnx.merge(graph, params), example))
    )(state.params)
    assert sums.loss / sums.weight == pytest.approx(float(loss), rel=1e-6)
    found, expected = (traverse_util.flatten_dict(g) for g in (found, jax.device_get(expected)))
    router = ("blocks", "feed_forward", "router", "weight")
    for path in found:
        largest = np.abs(expected[path]).max()
        assert largest > 0
        np.testing.assert_allclose(
            found[path] / sums.weight, expected[path], rtol=0, atol=4e-6 * largest, err_msg=path
        )
    # Without the auxiliary losses the router's gradient is another one.
    if name == "dropless":
        bare = replace(model.feed_forward, router=TopKRouter(balance=0.0, z_loss=0.0))
        without, _ = gradients_on({}, replace(model, feed_forward=bare))
        without = traverse_util.flatten_dict(without)[router] / sums.weight
        assert np.abs(without - expected[router]).max() > 0.1 * np.abs(expected[router]).max()


def test_steps_report_the_measures(one_device):
    """By step: load, drops and both losses; the loss is what the weights make of them."""
    model = routed_by("capacity")
    learner = learner_of(model)
    state = state_of(model)
    step = jax.jit(learner.step)
    for seed in range(2):
        state, metrics = step(state, jax.device_put(example_of(seed)))
        metrics = {name: float(value) for name, value in metrics.items()}
        assert metrics["expert_load"] >= 1 and 0 < metrics["dropped"] < 1
        assert metrics["balance_loss"] > 0.9 and metrics["router_z_loss"] > 0
        router = model.feed_forward.router
        means = router.balance * metrics["balance_loss"] + router.z_loss * metrics["router_z_loss"]
        # Rows have unlike numbers of tokens, but every layer reads the same ones.
        assert metrics["auxiliary_loss"] == pytest.approx(2 * means, rel=1e-5)
        assert metrics["loss"] == pytest.approx(
            metrics["cross_entropy"] + metrics["auxiliary_loss"], rel=1e-5
        )


def test_evaluation_has_no_auxiliary_losses(one_device):
    model = routed_by("dropless")
    sums = jax.jit(learner_of(model).evaluate)(state_of(model).params, jax.device_put(example_of()))
    assert sums.loss == sums.extra["cross_entropy"] and set(sums.extra) == {"cross_entropy"}


def test_a_batch_without_targets_teaches_nothing(one_device):
    """Nor do its auxiliary losses: gradients of zero, no NaN."""
    model, example = routed_by("dropless"), example_of()
    targets = dataclasses.replace(example.targets, weights=np.zeros_like(example.targets.weights))
    learner = learner_of(model)
    run = jax.jit(lambda s, e: learner.gradients(s, e, s.key))
    for segments in (example.inputs.segments, np.zeros_like(example.inputs.segments)):
        inputs = dataclasses.replace(example.inputs, segments=segments)
        gradients, sums = run(state_of(model), jax.device_put(Example(inputs, targets)))
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
        assert sums.loss == 0


def test_frozen_blocks_have_no_auxiliary_losses(one_device):
    """Backward ends at the last block, whose measures alone are told."""
    model = routed_by("dropless")
    trained = TrainedPart(lambda path: path.startswith("blocks"), first=1)
    learner = learner_of(model, trained=trained)
    state = dataclasses.replace(learner.init(0), params=state_of(model).params)
    gradients, sums = jax.jit(lambda s, e: learner.gradients(s, e, s.key))(
        state, jax.device_put(example_of())
    )
    whole = on_one_device("dropless")
    for path, leaf in traverse_util.flatten_dict(gradients).items():
        expected = traverse_util.flatten_dict(whole[0])[path][1:]
        np.testing.assert_allclose(leaf, expected, atol=1e-5 * np.abs(expected).max())
    assert 0 < sums.extra["auxiliary_loss"] < whole[1].extra["auxiliary_loss"]


@pytest.mark.parametrize("optimizer", [Muon(), Adafactor()], ids=lambda o: type(o).__name__)
def test_optimizers_see_a_matrix_in_each_expert(one_device, optimizer):
    """The update of all experts is that of each of them by itself, as the weight of a layer."""
    learner = learner_of(MODEL, optimizer=optimizer)
    draw = np.random.default_rng(0)
    shape = (2, EXPERTS, 16, 24)
    weights, gradients = (jnp.asarray(draw.normal(size=shape), jnp.float32) for _ in range(2))

    def updates(wrap, weights, gradients):
        """The update of one leaf, in a tree with the names of its path."""
        params, found = wrap(weights), wrap(gradients)
        transform = learner.optimizer.build(learner.rate, params)
        return jax.jit(lambda: transform.update(found, transform.init(params), params)[0])()

    def stacked(leaf):
        return {"blocks": {"feed_forward": {"experts": {"up": {"weight": leaf}}}}}

    def alone(leaf):
        return {"blocks": {"feed_forward": {"up": {"weight": leaf}}}}

    found = jax.tree.leaves(updates(stacked, weights, gradients))[0]
    for expert in range(EXPERTS):
        own = updates(alone, weights[:, expert], gradients[:, expert])
        np.testing.assert_allclose(found[:, expert], jax.tree.leaves(own)[0], rtol=1e-4, atol=1e-6)


def test_experts_that_do_not_divide_are_refused():
    """By the axis and its size, before anything is made."""
    message = r"experts of size 8 does not divide the mesh: expert=3"
    mesh = jax.sharding.use_abstract_mesh(Mesh(fsdp=1, expert=3).abstract(3))
    with mesh, pytest.raises(UserError, match=message):
        learner_of(MODEL).abstract()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [("dropless", AdamW()), ("capacity", Muon())],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_ten_steps_on_a_mesh_have_the_losses_of_one_device(name, optimizer):
    """1e-5: sums in another order, amplified by the steps."""
    model, losses = routed_by(name), []
    for sizes in ({}, dict(fsdp=2, expert=2, tensor=2)):
        mesh = mesh_of(sizes)
        with jax.set_mesh(mesh):
            learner = learner_of(model, optimizer=optimizer)
            state = learner.init(0)
            sharding = jax.NamedSharding(mesh, training_layout().spec("batch", "seq"))
            own = []
            for seed in range(STEPS):
                example = jax.device_put(example_of(seed), sharding)
                state, metrics = learner.compiled_step(state, example)
                own.append(float(metrics["loss"]))
        losses.append(own)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
