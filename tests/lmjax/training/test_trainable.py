"""Choices of what is trained: only that changes, as where all is; memory; any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lmjax.config import UserError, replace
from lmjax.models import (
    NF4,
    AttentionConfig,
    ClassifierConfig,
    FeedForwardConfig,
    LoRA,
    TextHeadConfig,
    TransformerConfig,
    abstract,
    llama,
)
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.matrices import as_matrices
from lmjax.training.optimizers import Adafactor, AdamW, Muon
from lmjax.training.placement import abstract_example, to_devices
from lmjax.training.trainable import (
    Adapters,
    AllParameters,
    Biases,
    LastBlocks,
    Matching,
    parameter_paths,
)
from tests.lmjax.models.adapted import with_random_b

BASE = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=3,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    tied_head=False,
)
ADAPTED = replace(BASE, lora=LoRA(rank=2, alpha=6.0, dropout=0.1, layers=("*", "head")))
ONE = Mesh(fsdp=1)


def learner_of(model, trainable, optimizer=None, **settings):
    return Learner(
        model,
        CausalLM(),
        optimizer or AdamW(),
        lambda step: 1e-2,
        training_layout(),
        trained=trainable.part(model),
        clip=None,
        **settings,
    )


def example(rows=8):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 97, (rows, 17)).astype(np.int32)
    found = CausalLM().prepare(tokens, np.ones_like(tokens), np.zeros(rows, np.uint64))
    return to_devices(found, training_layout(), 97)


def flat(params):
    return traverse_util.flatten_dict(jax.device_get(params), sep=".")


def after_one_step(model, trainable, **settings):
    """Parameters before and after, by path, and the state."""
    learner = learner_of(model, trainable, **settings)
    state = learner.init(0)
    state = jax.tree.map(lambda a: a, state)
    before = flat(state.params)
    state, metrics = learner.compiled_step(state, example())
    return before, flat(state.params), state, float(metrics["loss"])


def changed(before, after, layers=3):
    """Paths of what changed; of what changed in some layers alone, with their numbers."""
    found = set()
    for path, old in before.items():
        same = old == after[path]
        if path.startswith("blocks."):
            rows = [n for n in range(layers) if not same[n].all()]
            found |= {path if len(rows) == layers else f"{path}{rows}"} if rows else set()
        elif not same.all():
            found.add(path)
    return found


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        (Biases(), lambda path: path.endswith("bias")),
        (
            Matching(patterns=("feed_forward.*", "final_norm.scale")),
            lambda path: "feed_forward." in path or path == "final_norm.scale",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_that_changes(one_device, trainable, trained):
    """Nothing else has a gradient, decays, or has a place in the optimizer's state.

    Of keys the bias has a gradient of 0, but for rounding.
    """
    before, after, state, _ = after_one_step(BASE, trainable)
    wanted = {path for path in before if trained(path)}
    assert changed(before, after) | {"blocks.attention.key.bias"} >= wanted
    assert changed(before, after) <= wanted
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(m.size for m in moments) == 2 * sum(before[path].size for path in wanted)


def test_adapters_alone_change(one_device):
    """After two steps: A has no gradient as long as B is zero, and decays."""
    learner = learner_of(ADAPTED, Adapters())
    state = learner.init(0)
    before = flat(state.params)
    for _ in range(2):
        state, _ = learner.compiled_step(state, example())
    after = flat(state.params)
    assert changed(before, after) == {path for path in before if ".adapter." in path}
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert all(leaf.dtype == jnp.float32 for leaf in moments)
    assert sum(m.size for m in moments) == 2 * sum(
        leaf.size for path, leaf in before.items() if ".adapter." in path
    )


@pytest.mark.parametrize(
    ("mesh", "zero", "changes"),
    [
        pytest.param(ONE, 3, dict(remat="full", unroll=0), marks=pytest.mark.slow),
        (Mesh(data=2, fsdp=2, context=2), 3, {}),
    ],
    ids=str,
)
def test_the_last_blocks_train_as_where_all_do(mesh, changes, zero):
    """The same first step of AdamW, to 1e-4 of it: the others keep their bits."""
    model = replace(BASE, **changes)
    with jax.set_mesh(mesh.build(jax.devices()[: 8 if mesh is not ONE else 1])):
        before, everything, _, loss = after_one_step(model, AllParameters(), zero=zero)
        _, after, state, same = after_one_step(model, LastBlocks(count=2), zero=zero)
    assert loss == pytest.approx(same, rel=1e-6)
    for path, leaf in before.items():
        first = 1 if path.startswith("blocks.") else 0
        if not path.startswith(("blocks.", "final_norm", "head")):
            first = len(leaf)
        np.testing.assert_array_equal(after[path][:first], leaf[:first])
        if "key.bias" not in path:  # whose gradient is 0, and its sign rounding
            np.testing.assert_allclose(after[path][first:], everything[path][first:], atol=1e-6)
    moments = traverse_util.flatten_dict(state.optimizer[0].mu, sep=".")
    assert all(leaf.shape[0] == 2 for path, leaf in moments.items() if path.startswith("blocks."))
    assert not any(path.startswith("embedding") for path in moments)


@pytest.mark.parametrize(
    ("model", "trainable", "optimizer"),
    [
        (ADAPTED, Adapters(), Adafactor(smallest_factored=2)),
        pytest.param(BASE, LastBlocks(count=1), Muon(), marks=pytest.mark.slow),
    ],
    ids=["Adafactor", "Muon"],
)
def test_other_optimizers(one_device, model, trainable, optimizer):
    before, after, _, _ = after_one_step(model, trainable, optimizer=optimizer)
    for path, leaf in before.items():
        first = {"Adapters": 0, "LastBlocks": 2}[type(trainable).__name__]
        if not trainable.trains(path):
            first = len(leaf)
        elif not path.startswith("blocks."):
            first = 0
        np.testing.assert_array_equal(after[path][:first], leaf[:first])


def losses(mesh, **settings):
    """Of 10 steps with adapters and dropout, from one beginning on one device."""
    built = mesh.build(jax.devices()[: 1 if mesh is ONE else 8])
    with jax.set_mesh(built):
        learner = learner_of(ADAPTED, Adapters(), **settings)
        start = learner.init(0)
        params = with_random_b(start.params)
        state, found = learner.init(0, params), []
        for _ in range(10):
            state, metrics = learner.compiled_step(state, example())
            found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def on_one_device():
    return losses(ONE)


@pytest.mark.parametrize(
    ("mesh", "zero"),
    [
        (Mesh(fsdp=2, context=2, tensor=2), 2),
        pytest.param(Mesh(data=2, fsdp=4), 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_any_mesh_gives_the_losses_of_one_device(on_one_device, mesh, zero):
    """1e-5 relative: sums in another order, amplified by 10 steps of training."""
    found = losses(mesh, zero=zero)
    assert found[-1] < found[0] - 0.05
    np.testing.assert_allclose(found, on_one_device, rtol=1e-5)


def peak(function, state, row, **options):
    """Bytes on the device while a function runs: arguments and what it makes."""
    (leaves, of_state), (arrays, of_row) = map(jax.tree.flatten, (state, row))

    def flat_function(leaves, arrays):  # of classes that check what lowering puts into them
        return jax.tree.leaves(function(of_state.unflatten(leaves), of_row.unflatten(arrays)))

    compiled = jax.jit(flat_function, **options).lower(leaves, arrays).compile()
    memory = compiled.memory_analysis()
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_adapters(one_device, dtype):
    """Within 1.15 of a forward pass, and what backward reads of a row, less than 20 widths a layer.

    A copy of the weights, their gradients or moments would each be 2 or 4 bytes a parameter.
    """
    model = replace(
        BASE,
        vocab_size=1000,
        hidden=256,
        num_layers=8,
        attention=AttentionConfig(num_heads=4, head_dim=64),
        feed_forward=FeedForwardConfig(size=1024),
        dtype=dtype,
    )
    learner = learner_of(replace(model, lora=LoRA()), Adapters())
    state = learner.abstract()
    row = abstract_example(CausalLM().shapes(1, 16), training_layout())
    training = peak(learner.step, state, row, donate_argnums=0)
    plain = learner_of(model, AllParameters())
    params = plain.abstract().params
    forward = peak(plain.evaluate, params, row)
    activations = 20 * 16 * 256 * 8 * 4
    assert activations < 0.15 * forward
    assert training <= 1.15 * forward + activations
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    adapters = 8 * 2 * (256 * 8 + 8 * 256)  # query and value
    assert moments == 2 * adapters + 2  # and two counts of steps


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_memory_of_a_base_in_few_bits(one_device, remat):
    """Beside the parameters no more than over a float base, but for one block's float weights."""
    model = replace(
        BASE,
        vocab_size=1000,
        hidden=256,
        num_layers=8,
        attention=AttentionConfig(num_heads=4, head_dim=64),
        feed_forward=FeedForwardConfig(size=1024),
        remat=remat,
    )
    row = abstract_example(CausalLM().shapes(1, 16), training_layout())
    sizes, peaks = [], []
    for base in (None, NF4()):
        learner = learner_of(replace(model, lora=LoRA(base=base)), Adapters())
        state = learner.abstract()
        leaves = jax.tree.leaves(state.params)
        sizes.append(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
        peaks.append(peak(learner.step, state, row, donate_argnums=0))
    block = 4 * 256 * (4 * 256 + 2 * 1024)
    assert sizes[1] < sizes[0] - 8 * block * (1 - 4.7 / 32)  # 4 cells of 64 have a second scale
    assert peaks[1] - sizes[1] <= peaks[0] - sizes[0] + block


def test_what_nothing_fits_is_refused(one_device):
    def message(trainable, model=BASE):
        with pytest.raises(UserError) as error:
            trainable.check(model, training_layout())
        return str(error.value)

    assert "model.lora=LoRA puts adapters" in message(Adapters())
    assert "the model has 3 blocks" in message(LastBlocks(count=4))
    said = message(Matching(patterns=("bias", "querry.*")))
    assert "'querry.*' matches no parameter" in said and "blocks.attention.query.bias" in said
    assert "nothing matches no parameter" in message(Matching(patterns=()))
    without = replace(llama(), num_layers=1, hidden=16, vocab_size=97)
    assert "trainable=Biases trains no parameter" in message(Biases(), without)
    with pytest.raises(UserError, match=r"trainable.count=0"):
        LastBlocks(count=0)
    for trainable, model in (
        (AllParameters(), BASE),
        (LastBlocks(count=3), BASE),
        (Biases(), replace(without, classifier=ClassifierConfig())),
        (Adapters(), ADAPTED),
    ):
        trainable.check(model, training_layout())


def test_an_adapters_matrices_are_inputs_by_outputs(one_device):
    """Also of the layer whose inputs are heads: optimizers look at whole matrices."""
    _, shapes = abstract(ADAPTED, training_layout())
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = [key.key for key in path]
        if "adapter" in names:
            matrices = jax.eval_shape(functools.partial(as_matrices, path), leaf)
            assert matrices.shape[1 if names[-2] == "b" else 2] == 2, names
            assert matrices.ndim == 3


@pytest.mark.parametrize("trainable", [Adapters(), LastBlocks(), Biases()])
def test_heads_on_labels_are_trained_with_what_feeds_them(one_device, trainable):
    """A reward model's head is drawn afresh: one that is frozen would never learn to read."""
    model = replace(ADAPTED, heads=(TextHeadConfig(name="reward", outputs=1, bias=False),))
    paths = parameter_paths(model, training_layout())
    assert [trainable.trains(p) for p in paths if p.startswith("heads.")] == [True]
