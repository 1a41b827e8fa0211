"""Augmentation on the devices against loops over rows; special tokens and padding stay."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.models import Batch, initialize
from lmjax.objectives import Augmentation, TextLabels
from lmjax.objectives.augmentation import shortened, swapped
from lmjax.objectives.text_labels import FILLER
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from tests.lmjax.objectives.test_text_labels import MODEL

SPECIAL = (1, 2)
LENGTHS = (12, 9, 5, 1)
CAUSAL = replace(MODEL, heads=MODEL.heads[:1])


def batch_of(rows=4, seed=0):
    """Texts from token 1 on to token 2, with a second text behind another 2 in the middle."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(3, 257, (rows, 12)).astype(np.int32)
    segments, types = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(rows):
        length = LENGTHS[row % 4]
        tokens[row, 0], tokens[row, length // 2], tokens[row, length - 1] = 1, 2, 2
        tokens[row, length:] = 0
        segments[row, :length], types[row, length // 2 + 1 : length] = 1, 1
    positions = np.tile(np.arange(12, dtype=np.int32), (rows, 1))
    return Batch(tokens=tokens, positions=positions, segments=segments, token_types=types)


def changer(mesh=None, filler=None, **settings):
    """Key -> the batch after augmentation, on the host; and the model's parameters."""
    augmentation = Augmentation(special=SPECIAL, **settings)
    mesh = mesh or Mesh(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        layout = training_layout()
        graph, params = initialize(CAUSAL, layout, jax.random.key(5))
        batch = jax.tree.map(lambda a: layout.reshard(jnp.asarray(a), "batch", "seq"), batch_of())

        @jax.jit
        def apply(params, batch, key):
            model = nnx.merge(graph, params)
            return augmentation.apply(model, batch, jax.random.key(key), filler)

    def change(key=0):
        with jax.set_mesh(mesh):
            return jax.device_get(apply(params, batch, key))

    return change, jax.device_get(params)


def texts(batch):
    """The tokens of each row's texts, with the text that each is of."""
    found = []
    for tokens, segments, types in zip(batch.tokens, batch.segments, batch.token_types):
        length = int((segments > 0).sum())
        assert (segments[:length] == 1).all() and not tokens[length:].any()
        found.append(list(zip(tokens[:length].tolist(), types[:length].tolist())))
    return found


def test_deletion_keeps_the_rest_in_order():
    """Against a loop that walks through both texts; special tokens are always there."""
    before, lengths, (change, _) = texts(batch_of()), [], changer(deletion=0.4)
    for key in range(6):
        after = texts(change(key))
        for old, new in zip(before, after):
            rest = iter(old)
            assert all(pair in rest for pair in new)  # a subsequence
            assert [p for p in old if p[0] in SPECIAL] == [p for p in new if p[0] in SPECIAL]
        lengths.append([len(text) for text in after])
    assert all(len(set(column)) > 1 for column in list(zip(*lengths))[:2])
    change, _ = changer(deletion=0.99)
    for old, new in zip(before, texts(change())):
        assert any(p[0] not in SPECIAL for p in new) == any(p[0] not in SPECIAL for p in old)


def test_left_out_tokens_are_those_of_a_loop(one_device):
    draw, batch = np.random.default_rng(1), batch_of()
    left_out = draw.random(batch.tokens.shape) < 0.5
    got = jax.device_get(shortened(jax.tree.map(jnp.asarray, batch), jnp.asarray(left_out)))
    for row, old in enumerate(texts(batch)):
        expected = [pair for column, pair in enumerate(old) if not left_out[row, column]]
        assert texts(got)[row] == expected


def test_swapped_tokens_stay_in_their_text(one_device):
    draw, batch = np.random.default_rng(2), batch_of()
    chosen = (draw.random(batch.tokens.shape) < 0.7) & (batch.segments > 0)
    arguments = map(jnp.asarray, (batch.tokens, chosen, batch.token_types))
    got = np.asarray(swapped(*arguments, jax.random.key(3)))
    np.testing.assert_array_equal(got[~chosen], batch.tokens[~chosen])
    for row in range(len(got)):
        for text in (0, 1):
            here = chosen[row] & (batch.token_types[row] == text)
            assert sorted(got[row, here]) == sorted(batch.tokens[row, here])
    assert (got[0] != batch.tokens[0]).any()


def test_synonyms_are_the_nearest_rows_of_the_embedding():
    """By a loop in float64 over the whole table; the share of each row is exact."""
    change, params = changer(synonyms=0.4, nearest=3)
    after = change()
    table = params["embedding"]["table"][:257].astype(np.float64)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    before = batch_of()
    for row in range(4):
        old, new = before.tokens[row], after.tokens[row]
        free = (before.segments[row] > 0) & ~np.isin(old, SPECIAL)
        assert (old != new).sum() == round(free.sum() * 0.4)
        for column in np.flatnonzero(old != new):
            near = table @ table[old[column]]
            near[[*SPECIAL, old[column]]] = -2
            assert new[column] in np.argsort(-near)[:3]
            assert free[column]
    np.testing.assert_array_equal(after.segments, before.segments)


def test_refilled_tokens_are_the_masked_model_s():
    """A model that always says the token after the mask's position, and is sure of it."""

    seen = []

    class Filler:
        def __call__(self, batch):
            jax.debug.callback(lambda tokens: seen.append(np.asarray(tokens)), batch.tokens)
            return batch.positions, None

        def logits(self, hidden):
            wanted = 100 + hidden
            # The special token 1 would be more likely still.
            likely = jnp.arange(257) == wanted[..., None]
            return jnp.where(jnp.arange(257) == 1, 1e5, jnp.where(likely, 1e4, 0.0))

    change, _ = changer(filler=Filler(), refill=0.5, refill_with="folder", mask_id=2)
    before, after = batch_of(), change()
    masked = seen[0]
    hidden = (masked == 2) & (before.tokens != 2)
    assert hidden.sum() >= 5
    expected = np.where(hidden, 100 + before.positions, before.tokens)
    np.testing.assert_array_equal(after.tokens, expected)
    assert not hidden[before.segments == 0].any()


def test_refilling_draws_from_the_model_s_distribution():
    """The rarer of two words, with probability 1/4, comes in 1/4 of the cases within 4 sigma."""

    class Filler:
        def __call__(self, batch):
            return batch.positions, None

        def logits(self, hidden):
            logits = jnp.where(jnp.arange(257) == 50, jnp.log(3.0), -1e9)
            logits = jnp.where(jnp.arange(257) == 60, 0.0, logits)
            return jnp.broadcast_to(logits, (*hidden.shape, 257))

    counts = collections.Counter()
    change, _ = changer(filler=Filler(), refill=0.9, refill_with="folder", mask_id=2)
    for key in range(40):
        counts.update(change(key).tokens.ravel().tolist())
    total = counts[50] + counts[60]
    assert total > 400
    assert abs(counts[60] / total - 0.25) < 4 * np.sqrt(0.25 * 0.75 / total)


def test_a_mesh_and_another_seed():
    everything = {"deletion": 0.2, "swap": 0.3, "synonyms": 0.2, "nearest": 2}
    change, _ = changer(**everything)
    one, other = change(), change(1)
    assert (other.tokens != one.tokens).any()
    mesh = Mesh(fsdp=2, context=2, tensor=2).build(jax.devices())
    for a, b in zip(*map(jax.tree.leaves, (changer(mesh, **everything)[0](), one)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_training_sees_it(one_device):
    """Evaluation has the same sums, and training does where nothing is changed."""

    def sums(augmentation, train):
        objective = TextLabels(augmentation=augmentation)
        learner = Learner(CAUSAL, objective, AdamW(), lambda step: 0.0, training_layout())
        tokens, segments = batch_of().tokens, batch_of().segments
        labels = np.tile(np.array([0.0, 1.0], np.float32), (4, 1, 1))
        example = objective.prepare(tokens, segments, np.zeros(4, np.uint64), labels=labels)
        example = to_devices(example, training_layout(), 257)
        state = learner.init(seed=0)
        if train:
            return learner.compiled_step(state, example)[1]["loss"]
        return learner.compiled_evaluate(state.params, example).loss

    strong = Augmentation(deletion=0.5, swap=0.5, special=SPECIAL)
    assert sums(strong, False) == sums(None, False)
    plain = sums(None, True)
    assert sums(Augmentation(special=SPECIAL), True) == plain
    assert sums(strong, True) != plain


def test_the_step_reads_the_masked_model(one_device):
    """Its parameters come in beside the state; without anything hidden they change nothing."""
    encoder = replace(MODEL, heads=(), word_head=True, token_types=None)
    encoder = replace(encoder, attention=replace(encoder.attention, causal=False))
    layout = training_layout()
    graph, params = initialize(encoder, layout, jax.random.key(9))
    batch = batch_of()
    labels = np.tile(np.array([0.0, 1.0], np.float32), (4, 1, 1))
    losses = []
    for share in (0.5, 1e-9):
        augmentation = Augmentation(refill=share, refill_with="folder", mask_id=2, special=SPECIAL)
        objective = TextLabels(augmentation=augmentation)
        arguments = CAUSAL, objective, AdamW(), lambda step: 0.0, layout
        learner = Learner(*arguments, frozen={FILLER: graph})
        seeds = np.zeros(4, np.uint64)
        example = objective.prepare(batch.tokens, batch.segments, seeds, labels=labels)
        example = to_devices(example, layout, 257)
        frozen, state = {FILLER: params}, learner.init(0)
        if share < 0.1:
            plain = learner.compiled_evaluate(state.params, example, frozen)
        losses.append(float(learner.compiled_step(state, example, frozen)[1]["loss"]))
    assert losses[1] == pytest.approx(float(plain.loss / plain.weight), rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deletion": 1.0}, r"augmentation\.deletion=1\.0"),
        ({"synonyms": -0.1}, r"augmentation\.synonyms=-0\.1"),
        ({"nearest": 0}, r"augmentation\.nearest=0"),
        ({"refill": 0.1}, "give refill and refill_with"),
        ({"refill_with": "folder"}, "give refill and refill_with"),
    ],
)
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(UserError, match=message):
        Augmentation(**settings)
