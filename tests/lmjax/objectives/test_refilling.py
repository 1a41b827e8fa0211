"""Hidden tokens that a model which fills blanks draws anew, against a loop without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lmjax.config import replace
from lmjax.models import AttentionConfig, FeedForwardConfig, blank_row, glm, initialize
from lmjax.objectives import Augmentation, TextLabels
from lmjax.objectives.refilling import fill_blanks
from lmjax.objectives.text_labels import FILLER
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from tests.larger import larger
from tests.lmjax.objectives.test_augmentation import CAUSAL, SPECIAL, batch_of

MASK, START = 254, 255
BARRED = (*SPECIAL, MASK, START, 256)
GLM = replace(
    glm(),
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=48,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.0,
)


@functools.cache
def filler_on(mesh):
    """The model that fills, with large weights, so that its distributions are far from even."""
    with jax.set_mesh(mesh):
        graph, params = initialize(GLM, training_layout(), jax.random.key(3))
        return graph, larger(params, 20, axes=2)


@functools.cache
def filling_on(mesh):
    """`fill_blanks` of the model, compiled once."""
    graph, _ = filler_on(mesh)

    @jax.jit
    def fill(params, batch, hidden, seed):
        arguments = MASK, START, BARRED, jax.random.key(seed)
        return fill_blanks(nnx.merge(graph, params), batch, hidden, *arguments)

    return fill


def filled(mesh, batch, hidden, seed):
    """What `fill_blanks` makes of a batch, on the host."""
    params, layout = filler_on(mesh)[1], training_layout()
    with jax.set_mesh(mesh):
        put = lambda a: layout.reshard(jnp.asarray(a), "batch", None)  # noqa: E731
        found = filling_on(mesh)(params, *jax.tree.map(put, (batch, hidden)), seed)
        return np.asarray(jax.reshard(found, PartitionSpec()))


def cut(tokens, hidden):
    """A text with one mask for each run of hidden tokens; the places of the masks; the runs."""
    context, places, runs = [], [], []
    for column, token in enumerate(tokens):
        if not hidden[column]:
            context.append(int(token))
        elif column and hidden[column - 1]:
            runs[-1].append(column)
        else:
            places.append(len(context))
            runs.append([column])
            context.append(MASK)
    return context, places, runs


@functools.cache
def whole_model():
    """A row -> logits after its last token, without those of tokens that are never drawn."""
    graph, params = filler_on(one())

    @jax.jit
    def logits_of(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    def scores(row):
        size = len(row.tokens)
        padded = jax.tree.map(lambda a: np.pad(a, (0, 48 - size))[None], row)
        with jax.set_mesh(one()):
            last = np.array(logits_of(params, padded))[0, size - 1]
        last[list(BARRED)] = -np.inf
        return last

    return scores


def loop(batch, hidden, seed):
    """The same by one call of the whole model, without a cache, for each token that is drawn."""
    found, keys = batch.tokens.copy(), jax.random.key(seed)
    for row, tokens in enumerate(batch.tokens):
        context, places, runs = cut(tokens[batch.segments[row] > 0], hidden[row])
        number, spans = 0, []  # of the inputs after the text
        for place, run in zip(places, runs, strict=True):
            content = [START]
            for column in run:
                last = whole_model()(blank_row(context, [*spans, (place, content)]))
                shape, tiny = (len(found), 1, len(last)), np.finfo(np.float32).tiny
                draws = jax.random.uniform(jax.random.fold_in(keys, number), shape, minval=tiny)
                found[row, column] = np.argmax(last - np.log(-np.log(np.asarray(draws)[row, 0])))
                content.append(int(found[row, column]))
                number += 1
            number += 1
            spans.append((place, content))
    return found


@functools.cache
def one():
    return Mesh(fsdp=1).build(jax.devices()[:1])


def hidden_in(batch, seed, share=0.5):
    free = (batch.segments > 0) & ~np.isin(batch.tokens, SPECIAL)
    return free & (np.random.default_rng(seed).random(free.shape) < share)


@pytest.mark.parametrize("seed", range(3))
def test_blanks_are_filled_as_by_a_loop(seed):
    """Neighbours in one blank, several blanks, rows with none; the same draws are compared."""
    batch = batch_of(seed=seed)
    hidden = hidden_in(batch, seed)
    hidden[2] = False
    found, expected = filled(one(), batch, hidden, seed), loop(batch, hidden, seed)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found[~hidden], batch.tokens[~hidden])
    assert (found[hidden] != batch.tokens[hidden]).mean() > 0.9
    assert not np.isin(found[hidden], BARRED).any()


def test_a_mesh_changes_nothing_and_another_seed_does():
    batch = batch_of(seed=7)
    hidden = hidden_in(batch, 7)
    mesh = Mesh(fsdp=2, context=2, tensor=2).build(jax.devices())
    alone = filled(one(), batch, hidden, 1)
    np.testing.assert_array_equal(filled(mesh, batch, hidden, 1), alone)
    assert (filled(one(), batch, hidden, 2) != alone).any()


def test_a_row_that_is_hidden_whole_and_one_without_tokens():
    """Most inputs, of one blank and of many; padding stays."""
    batch = batch_of(seed=9)
    hidden = np.zeros_like(batch.tokens, bool)
    hidden[0], hidden[1, ::2] = True, True
    hidden &= batch.segments > 0
    batch.segments[3] = 0
    expected = loop(batch, hidden & (batch.segments > 0), 4)
    np.testing.assert_array_equal(filled(one(), batch, hidden, 4), expected)


def test_the_step_reads_the_model_that_fills(one_device):
    """Its parameters come in beside the state, and have no gradient; evaluation reads none."""
    layout = training_layout()
    graph, params = filler_on(one())
    batch = batch_of()
    labels = np.tile(np.array([0.0, 1.0], np.float32), (4, 1, 1))
    augmentation = Augmentation(
        refill=0.5, refill_with="folder", mask_id=MASK, start_id=START, special=BARRED
    )
    objective = TextLabels(augmentation=augmentation)
    arguments = CAUSAL, objective, AdamW(), lambda step: 0.0, layout
    learner = Learner(*arguments, frozen={FILLER: graph})
    example = objective.prepare(batch.tokens, batch.segments, np.zeros(4, np.uint64), labels=labels)
    example, state = to_devices(example, layout, 257), learner.init(0)
    plain = learner.compiled_evaluate(state.params, example, {FILLER: params})
    plain = float(plain.loss / plain.weight)
    _, metrics = learner.compiled_step(state, example, {FILLER: params})
    assert abs(float(metrics["loss"]) - plain) > 1e-4
