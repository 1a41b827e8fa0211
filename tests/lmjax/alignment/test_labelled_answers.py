"""KTO on answers with labels: against a loop over single texts, on any mesh and accumulation."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment import KTO, LabelledAnswers, log_probabilities
from lmjax.alignment.labelled_answers import count_labels, wanted_of, with_other_answers
from lmjax.config import UserError, replace
from lmjax.data import build_stores
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.spans import KINDS, RowSpans
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    TransformerConfig,
    abstract,
    plain_batch,
)
from lmjax.models.batch import Batch
from lmjax.objectives import Example, TokenTargets
from lmjax.parallel import Mesh, training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from lmjax.training.trainable import Adapters, LastBlocks

MODEL = TransformerConfig(
    vocab_size=97,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.5,
)
ROWS, SLOTS, LENGTH = 8, 2, 12
KTO_LOSS = KTO(beta=0.4, desirable=1.3, undesirable=0.7)
OBJECTIVE = LabelledAnswers(answers=SLOTS, preference=KTO_LOSS)
NAN = float("nan")
RANKS = np.array([[0, 1], [0, NAN], [1, NAN], [0, 0], [0, 2], [3, 5], [0, NAN], [NAN, NAN]])


def texts():
    """Request and answer of each slot; the answer is empty where there is no rank."""
    random = np.random.default_rng(0)
    sizes = random.choice((3, 5), (ROWS, SLOTS, 2))  # few: each sum is compiled
    return [
        [
            [random.integers(1, 97, size).tolist() for size in sizes[row, slot]]
            if not np.isnan(RANKS[row, slot])
            else [[], []]
            for slot in range(SLOTS)
        ]
        for row in range(ROWS)
    ]


@functools.cache
def example():
    """Rows of the texts, as the objective prepares them of stored tokens and spans."""
    tokens, segments = np.zeros((2, ROWS, SLOTS * LENGTH), np.int32)
    spans = []
    for row, slots in enumerate(texts()):
        for slot, (request, answer) in enumerate(slots):
            begin, middle = slot * LENGTH, slot * LENGTH + len(request)
            end = middle + len(answer)
            tokens[row, begin:end], segments[row, begin:end] = [*request, *answer], slot + 1
            if answer:
                spans.append((row, middle, end, KINDS.index("assistant")))
    labels = np.stack([np.zeros_like(RANKS), RANKS, np.zeros_like(RANKS)], axis=2)
    arrays = (np.array(column) for column in zip(*spans, strict=True))
    return OBJECTIVE.prepare(
        tokens,
        segments,
        np.zeros(ROWS, np.uint64),
        spans=RowSpans(*arrays),
        labels=labels.astype(np.float32),
    )


def learner_of(model=MODEL, **settings):
    graph, _ = abstract(model, training_layout())
    rate = lambda step: 1e-2  # noqa: E731
    frozen = {"reference": graph}
    return Learner(model, OBJECTIVE, AdamW(), rate, training_layout(), frozen=frozen, **settings)


@functools.cache
def gradients(shape, microbatch=None):
    """Loss, weight, divergence and gradients; the reference has other parameters."""
    shape = dict(shape)
    with jax.set_mesh(Mesh(**shape).build(jax.devices()[: math.prod(shape.values())])):
        learner = learner_of(microbatch=microbatch)
        state, reference = learner.init(seed=0), learner.init(seed=1).params
        placed = to_devices(example(), learner.layout, 97)
        found, sums = jax.jit(learner.gradients)(state, placed, state.key, {"reference": reference})
        return jax.device_get((sums.loss, sums.weight, sums.extra["kl"], found))


ONE = (("fsdp", 1),)


def test_it_is_the_loss_of_a_loop_over_single_texts(one_device):
    """To float32's rounding: one text at a time, without padding, and the paper's formula."""
    learner = learner_of()
    graph = learner.graph
    params = {"policy": learner.init(seed=0).params, "reference": learner.init(seed=1).params}

    @jax.jit
    def log_probs(params, batch, tokens):
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        return log_probabilities(model, hidden, tokens)

    def log_ratio(request, answer):
        tokens = np.array([[*request, *answer]], np.int32)
        given = plain_batch(tokens[:, :-1]), tokens[:, 1:]
        policy, reference = (
            float(np.sum(log_probs(params[name], *given)[0, len(request) - 1 :]))
            for name in ("policy", "reference")
        )
        return policy - reference

    rows = texts()
    labelled = {(r, s): w for (r, s), w in np.ndenumerate(wanted_of(RANKS)) if not np.isnan(w)}
    others = [
        log_ratio(rows[r][s][0], rows[r - 1][s][1])
        for r, s in labelled
        if ((r - 1) % ROWS, s) in labelled
    ]
    kl = max(0.0, float(np.mean(others)))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    total = 0.0
    for (row, slot), wanted in labelled.items():
        lead = log_ratio(*rows[row][slot]) - kl
        total += 1.3 * (1 - sigmoid(0.4 * lead)) if wanted else 0.7 * (1 - sigmoid(-0.4 * lead))
    loss, weight, found_kl, _ = gradients(ONE)
    assert weight == len(labelled) == 9
    assert len(others) == 5 and kl > 0
    assert float(found_kl / weight) == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_any_mesh_and_accumulation_gives_the_gradients_of_one_device():
    """To 1e-6 of the largest gradient; the divergence is that of the whole batch in all of them."""
    one, other = gradients(ONE), gradients((("data", 2), ("fsdp", 2), ("tensor", 2)), 4)
    assert one[1] == other[1]
    assert float(other[0]) == pytest.approx(float(one[0]), rel=1e-6)
    # A small difference of sums of log-probabilities, which are about -20.
    assert float(other[2]) == pytest.approx(float(one[2]), abs=2e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[3]))
    for a, b in zip(jax.tree.leaves(one[3]), jax.tree.leaves(other[3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "trainable",
    [
        pytest.param(Adapters(), id="lora"),
        pytest.param(LastBlocks(count=1), id="last", marks=pytest.mark.slow),
    ],
)
def test_what_a_reference_shares_is_held_once(one_device, trainable):
    """The gradients of a reference with parameters of its own, to the rounding of two programs.

    What is not trained is one array of policy and reference, before a step and after it.
    """
    lora = LoRA(rank=2, layers=("*",)) if isinstance(trainable, Adapters) else None
    model = replace(MODEL, lora=lora)
    settings = {"trained": trainable.part(model), "microbatch": 4 if lora else None}
    apart, shared = (
        learner_of(model, begun=begun, **settings)
        for begun in (frozenset(), frozenset({"reference"}))
    )
    placed, state = to_devices(example(), shared.layout, 97), shared.init(seed=0)
    begin = state.params
    start = jax.tree.map(jnp.copy, shared.trained.of(begin))
    moved = jax.tree.map(lambda leaf: leaf + 0.05, start)
    state = dataclasses.replace(state, params=shared.trained.whole(moved, begin))
    (one, sums), (other, expected) = (
        jax.jit(learner.gradients)(state, placed, state.key, {"reference": reference})
        for learner, reference in ((shared, start), (apart, begin))
    )
    assert abs(float(expected.extra["reward"])) > 1e-3
    assert float(sums.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)

    def alone(params):
        """Addresses of the parameters of which nothing is trained."""
        flat = traverse_util.flatten_dict(params, sep=".")
        parts = traverse_util.flatten_dict(start, sep=".")
        return {n: a.unsafe_buffer_pointer() for n, a in flat.items() if n not in parts}

    state = shared.init(seed=0, params=begin)
    before = alone(state.params)
    state, _ = shared.compiled_step(state, placed, {"reference": start})
    assert alone(state.params) == alone(shared.trained.whole(start, state.params)) == before
    assert "embedding.table" in before


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=4, max_size=4)


@given(SHAPES)
def test_answers_of_other_rows(shapes):
    """Against lists: request and answer of the row before, cut at the beginning to 8 tokens."""
    length, count = 8, 0
    tokens, segments, weights = np.zeros((3, 4, length), np.int32)
    rows = []
    for row, (request, answer) in enumerate(shapes):
        answer = min(answer, length - request)
        ids = list(range(count + 1, count + 1 + request + answer))
        count += len(ids)
        tokens[row, : len(ids)], segments[row, : len(ids)] = ids, 1
        weights[row, request - 1 : request - 1 + answer] = 1
        rows.append((ids[:request], ids[request:]))
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    targets = TokenTargets(np.roll(tokens, -1, axis=1), weights.astype(np.float32))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        batch = Batch(tokens=tokens, positions=positions.copy(), segments=segments)
        placed = to_devices(Example(batch, targets), training_layout(), 97)
        found, others = jax.device_get(OTHER(placed.inputs, placed.targets))
    for row in range(4):
        (request, own), (_, answer) = rows[row], rows[row - 1]
        if not own or not answer:
            assert not others.weights[row].any()
            continue
        whole = [*request, *answer][-length:]
        assert found.tokens[row].tolist() == whole + [0] * (length - len(whole))
        assert found.segments[row].sum() == len(whole)
        predicted = others.tokens[row][others.weights[row] > 0].tolist()
        assert predicted == answer[-min(len(answer), len(whole) - 1) :]
        index = np.flatnonzero(others.weights[row])
        assert [whole[n + 1] for n in index] == predicted


OTHER = jax.jit(with_other_answers)


def test_labels():
    expected = [[1, 0], [1, NAN], [0, NAN], [NAN, NAN], [1, 0], [1, 0], [1, NAN], [NAN, NAN]]
    np.testing.assert_array_equal(wanted_of(RANKS), expected)


def test_stores_of_answers(tmp_path):
    pairs = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(3)]
    labels = [{"prompt": f"{n}", "completion": "a", "label": n % 2 == 0} for n in range(5)]
    ties = [{"prompt": "a", "answers": ["b", "c"], "ranks": [1, 1]}]
    stores = {}
    for name, records in {"pairs": pairs, "labels": labels, "ties": ties}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        made = build_stores(Comparisons(path=str(path)), ByteTokenizer(), tmp_path / name)
        [stores[name]] = made.values()
    assert count_labels(stores["pairs"]) == (3, 3)
    assert count_labels(stores["labels"]) == (3, 2)
    LabelledAnswers().check_stores({"labels": stores["labels"]})
    OBJECTIVE.check_stores({name: stores[name] for name in ("pairs", "labels")})
    with pytest.raises(UserError, match=r"up to 2 answers.*set objective.answers=2"):
        LabelledAnswers().check_stores(stores)
    with pytest.raises(UserError, match="ties: none of its answers has a label"):
        OBJECTIVE.check_stores({"ties": stores["ties"]})
    with pytest.raises(UserError, match="answers=0: must be at least 1"):
        LabelledAnswers(answers=0)


def test_one_row_has_no_answer_of_another():
    """Its own would be compared, and the divergence be that of matched pairs."""
    batch, targets = example().inputs[0], example().targets.answers[0]
    with pytest.raises(UserError, match="a batch of one row has none: give at least 2 rows"):
        with_other_answers(*jax.tree.map(lambda a: a[:1], (batch, targets)))
