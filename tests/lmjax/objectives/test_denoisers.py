"""Masked, span-corruption, prefix and permutation objectives, and mixtures: host and loss."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmjax.config import UserError, replace
from lmjax.models import bert, gpt2, initialize, t5
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    DocumentBlank,
    MaskedLM,
    Mixed,
    PermutationLM,
    PrefixLM,
    SentenceBlanks,
    SpanCorruption,
    TextObjective,
)
from lmjax.objectives.causal_lm import positions_in_segments
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.lexicon import SHAPES_ONLY
from lmjax.objectives.span_corruption import random_parts
from lmjax.parallel import training_layout
from tests.lmjax.objectives.rows import (
    BEGIN,
    CLS,
    END,
    LEXICON,
    MASK,
    PAD,
    SENTINEL,
    SEP,
    WORDS,
    batches,
    full_batch,
    make_row,
)

LENGTH = 64
OBJECTIVES = {
    "causal": CausalLM(),
    "blanks": BlankInfilling(),
    "sentences": BlankInfilling(blanks=SentenceBlanks()),
    "documents": BlankInfilling(blanks=DocumentBlank()),
    "prefix": PrefixLM(),
    "permutation": PermutationLM(),
    "masked": MaskedLM(),
    "words": MaskedLM(whole_words=True),
    "next": MaskedLM(pair="next sentence"),
    "order": MaskedLM(pair="sentence order"),
    "spans": SpanCorruption(),
    "documents' spans": SpanCorruption(cross_documents=False),
    "two": Mixed(objectives=(BlankInfilling(), CausalLM()), weights=(2.0, 1.0)),
    "encoders": Mixed(objectives=(SpanCorruption(), SpanCorruption(share=0.5)), weights=(1, 1)),
}


def prepare(objective: TextObjective, data):
    return objective.prepare(*data, LEXICON, LENGTH)


def rows_of(data, rows):
    return tuple(array[rows] for array in data)


# ---- every objective ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_row_depends_on_its_text_and_seed_alone(name, data):
    """So hosts and workers make no difference; shapes are known before there is any text."""
    objective = OBJECTIVES[name]
    given_ = data.draw(batches(objective.row_length(LENGTH), rows=3))
    try:
        example = prepare(objective, given_)
        alone = prepare(objective, rows_of(given_, [1]))
    except UserError:
        return  # rows without room
    shapes = objective.shapes(3, LENGTH)
    for whole, row, shape in zip(*map(jax.tree.leaves, (example, alone, shapes)), strict=True):
        np.testing.assert_array_equal(whole[1:2], row)
        assert (whole.shape, whole.dtype) == (shape.shape, shape.dtype)
    if not isinstance(objective, MaskedLM):
        assert not example.targets.weights[example.inputs.segments == 0].any()


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "causal"])
def test_another_seed_draws_other_numbers(name):
    objective = OBJECTIVES[name]
    tokens, segments, seeds = full_batch(objective.row_length(LENGTH), rows=2, longest=60)
    first = prepare(objective, (tokens, segments, seeds))
    second = prepare(objective, (tokens, segments, seeds + np.uint64(1)))
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


def test_a_lexicon_for_shapes_takes_any_name():
    assert SHAPES_ONLY.token("whatever") == 0


# ---- masked language modelling -----------------------------------------------------------------


def test_masked_tokens_are_a_share_and_replaced_in_three_ways():
    """15 percent of each document, rounded; 80/10/10 by chi-square; random words are uniform."""
    size = 2000
    rows = [make_row([size], size, np.random.default_rng(seed)) for seed in range(20)]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    seeds = np.arange(20, dtype=np.uint64)
    example = MaskedLM().prepare(tokens, segments, seeds, LEXICON, size)
    batch, targets = example.inputs, example.targets
    chosen = targets.weights > 0
    assert (chosen.sum(axis=1) == 300).all()
    assert not (chosen & (tokens == BEGIN)).any()
    np.testing.assert_array_equal(targets.tokens, tokens)
    np.testing.assert_array_equal(batch.tokens[~chosen], tokens[~chosen])
    inputs, answers = batch.tokens[chosen], tokens[chosen]
    random = inputs[(inputs != MASK) & (inputs != answers)]
    assert np.isin(random, WORDS).all()
    # A random word is the hidden one once in len(WORDS) times.
    same = 0.1 + 0.1 / len(WORDS)
    counts = [(inputs == MASK).sum(), (inputs == answers).sum(), len(random)]
    expected = np.array([0.8, same, 0.2 - same]) * len(inputs)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    assert stats.chisquare(np.histogram(random, 10, (20, 300))[0]).pvalue > 1e-3
    places = np.flatnonzero(chosen[0])
    assert stats.kstest(places / size, "uniform").pvalue > 1e-3


@given(batches(LENGTH))
def test_whole_words_are_hidden_whole(data):
    """A word is space, an even token and the odd ones behind it, cut at the marks of documents."""
    tokens, segments, _ = data
    example = prepare(MaskedLM(whole_words=True), data)
    weights = example.targets.weights
    for row in range(len(tokens)):
        used = (example.inputs.segments[row] > 0).sum()
        for place in range(1, used):
            pair = tokens[row, place - 1 : place + 1]
            if (
                (pair[1] % 2 or pair[0] >= 290)
                and pair.min() >= 20
                and segments[row, place - 1] == segments[row, place]
            ):
                assert weights[row, place] == weights[row, place - 1]


def test_masked_documents_keep_their_segments_and_positions():
    data = full_batch(LENGTH, rows=2, longest=20)
    batch = prepare(MaskedLM(), data).inputs
    np.testing.assert_array_equal(batch.segments, data[1])
    np.testing.assert_array_equal(batch.positions, positions_in_segments(data[1]))
    joined = prepare(MaskedLM(cross_documents=True), data).inputs
    assert (joined.segments == 1).all()


@pytest.mark.parametrize("kind", ["next sentence", "sentence order"])
def test_pairs_are_what_their_labels_say(kind):
    objective = MaskedLM(pair=kind)
    tokens, segments, seeds = full_batch(objective.row_length(LENGTH), rows=400, longest=90)
    example = prepare(objective, (tokens, segments, seeds))
    batch, targets = example.inputs, example.targets
    assert stats.binomtest(int((targets.labels == 1).sum()), 400, 0.5).pvalue > 1e-3
    lengths = []
    for row in range(400):
        used = int((batch.segments[row] > 0).sum())
        text = np.where(targets.weights[row] > 0, targets.tokens[row], batch.tokens[row])[:used]
        lengths.append(used)
        marks = np.flatnonzero(text == SEP)
        assert text[0] == CLS and len(marks) == 2 and marks[1] == used - 1
        np.testing.assert_array_equal(batch.token_types[row, :used], np.arange(used) > marks[0])
        first, second = text[1 : marks[0]], text[marks[0] + 1 : marks[1]]
        stored = " ".join(map(str, tokens[row]))
        ordered = (
            [second, first] if kind == "sentence order" and targets.labels[row] else [first, second]
        )
        follows = " ".join(map(str, np.concatenate(ordered))) in stored
        assert follows == (kind == "sentence order" or targets.labels[row] == 0)
        for part in (first, second):
            assert len(part) and " ".join(map(str, part)) in stored
            assert not np.isin(part, (BEGIN, END)).any()
    assert min(lengths) < LENGTH // 2 and np.median(lengths) > LENGTH // 2


def test_the_one_document_of_a_row_gives_its_own_later_text():
    objective = MaskedLM(pair="next sentence")
    size = objective.row_length(LENGTH)
    rows = [make_row([size], size, np.random.default_rng(seed)) for seed in range(50)]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    example = prepare(objective, (tokens, segments, np.arange(50, dtype=np.uint64)))
    assert 10 < example.targets.labels.sum() < 40


def test_labels_weigh_as_much_as_their_rows_tokens(one_device):
    """The loss is the two formulas on the model's own logits; the head's bias has its part."""
    config = replace(
        bert(), num_layers=1, hidden=32, vocab_size=500, max_length=LENGTH, dropout=0.0
    )
    config = replace(config, attention=replace(config.attention, num_heads=2, head_dim=16))
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    params["head_bias"] = params["head_bias"] + jax.random.normal(
        jax.random.key(1), params["head_bias"].shape
    )
    objective = MaskedLM(pair="next sentence")
    example = prepare(objective, full_batch(objective.row_length(LENGTH), rows=4))
    targets = example.targets
    targets.labels[3] = -1  # a row without a pair
    sums = jax.jit(lambda p, e: objective.loss(nnx.merge(graph, p), e, None))(params, example)

    @jax.jit
    def outputs(params, inputs):
        model = nnx.merge(graph, params)
        hidden, _ = model(inputs)
        return model.logits(hidden), model.classes(hidden)

    logits, classes = (np.asarray(a, np.float64) for a in outputs(params, example.inputs))
    logits = logits[..., :500]

    def nll(logits, answers):
        right = np.take_along_axis(logits, answers[..., None], -1)[..., 0]
        return np.log(np.exp(logits).sum(-1)) - right

    words = (nll(logits, targets.tokens) * targets.weights).sum()
    weights = targets.weights.sum(axis=1)
    labels = (nll(classes, np.maximum(targets.labels, 0)) * weights)[:3].sum()
    # float32 against float64: 1e-5 of it
    np.testing.assert_allclose(sums.loss, words + labels, rtol=1e-5)
    np.testing.assert_allclose(sums.extra["cross_entropy"], words, rtol=1e-5)
    np.testing.assert_allclose(sums.extra["label_cross_entropy"], labels, rtol=1e-5)
    assert sums.weight == targets.weights.sum()


# ---- span corruption ---------------------------------------------------------------------------


def test_t5s_arithmetic():
    """568 tokens give 512 and 114, as the paper's footnotes and t5x have them."""
    objective = SpanCorruption()
    assert objective.row_length(512) == 568
    assert objective.lengths(568) == (512, 114)
    assert objective.amounts(568) == (85, 28)
    for length in range(8, 600, 17):
        size = objective.row_length(length)
        assert objective.lengths(size)[0] <= length < objective.lengths(size + 1)[0]


@pytest.mark.parametrize("cross_documents", [True, False])
@settings(max_examples=30)
@given(data=st.data())
def test_what_the_decoder_writes_fills_what_the_encoder_reads(cross_documents, data):
    objective = SpanCorruption(cross_documents=cross_documents)
    given_ = data.draw(batches(objective.row_length(LENGTH)))
    try:
        example = prepare(objective, given_)
    except UserError:
        return
    batch = example.inputs
    assert batch.encoder.tokens.shape == (2, LENGTH)
    for row in range(2):
        stored = " ".join(map(str, given_[0][row]))
        for segment in range(1, batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            inputs = batch.encoder.tokens[row, batch.encoder.segments[row] == segment].tolist()
            targets = example.targets.tokens[row, here].tolist()
            np.testing.assert_array_equal(batch.tokens[row, here], [PAD, *targets[:-1]])
            assert inputs.pop() == targets.pop() == END
            spans = {}
            for token in targets:
                if token > 300:
                    spans[token] = []
                else:
                    spans[[*spans][-1]].append(token)
            assert list(spans) == [SENTINEL - number for number in range(len(spans))]
            assert [token for token in inputs if token > 300] == list(spans)
            text = [word for token in inputs for word in spans.get(token, [token])]
            assert " ".join(map(str, text)) in stored
            hidden = sum(map(len, spans.values()))
            assert (hidden, len(spans)) == objective.amounts(len(text))
            assert hidden == max(1, min(round(0.15 * len(text)), len(text) - 1))
    assert ((example.targets.weights > 0) == (batch.segments > 0)).all()


def test_all_ways_to_cut_are_as_likely():
    """6 = three numbers from 1 on, in 10 ways; chi-square."""
    found = [tuple(random_parts(6, 3, RandomStream(seed))) for seed in range(4000)]
    ways, counts = np.unique(found, axis=0, return_counts=True)
    assert len(ways) == 10 and (ways.sum(axis=1) == 6).all() and ways.min() == 1
    assert stats.chisquare(counts).pvalue > 1e-3


# ---- prefixes and permutations -----------------------------------------------------------------


@given(batches(LENGTH + 1))
def test_a_prefix_is_seen_whole_and_not_predicted(data):
    """As causal language modelling but for ranks and weights, against a loop over documents."""
    example, causal = prepare(PrefixLM(), data), CausalLM().prepare(*data)
    batch = example.inputs
    for name in ("tokens", "positions", "segments"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(causal.inputs, name))
    np.testing.assert_array_equal(example.targets.tokens, causal.targets.tokens)
    for row in range(2):
        for segment in range(1, batch.segments[row].max() + 1):
            places = np.flatnonzero(batch.segments[row] == segment)
            ranks = batch.ranks[row, places]
            prefix = (ranks == places[0]).sum()
            assert 1 <= prefix <= len(places)
            np.testing.assert_array_equal(ranks[prefix:], places[prefix:])
            weights = example.targets.weights[row, places]
            assert not weights[: prefix - 1].any()
            np.testing.assert_array_equal(
                weights[prefix - 1 :], causal.targets.weights[row, places[prefix - 1 :]]
            )


def test_lengths_of_prefixes_are_uniform():
    tokens, segments = make_row([11], 11, np.random.default_rng(0))
    tokens, segments = (np.tile(array, (3000, 1)) for array in (tokens, segments))
    example = PrefixLM().prepare(tokens, segments, np.arange(3000, dtype=np.uint64))
    lengths = (example.inputs.ranks == 0).sum(axis=1)
    assert stats.chisquare(np.bincount(lengths, minlength=11)[1:]).pvalue > 1e-3


def test_permuted_targets_are_a_sixth_in_random_order():
    size = 1200
    rows = [make_row([size], size, np.random.default_rng(seed)) for seed in range(20)]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    seeds = np.arange(20, dtype=np.uint64)
    example = PermutationLM().prepare(tokens, segments, seeds, LEXICON, size)
    batch, targets = example.inputs, example.targets
    chosen = targets.weights > 0
    # Every stretch has exactly a sixth; only the last one of a row is cut.
    np.testing.assert_allclose(chosen.mean(axis=1), 1 / 6, atol=5 * 6 / size)
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(targets.tokens, tokens)
    for row in range(20):
        ranks = batch.ranks[row, chosen[row]]
        assert sorted(ranks) == list(range(1, chosen[row].sum() + 1))
        assert abs(stats.spearmanr(ranks, np.arange(len(ranks))).statistic) < 0.3
    assert not batch.ranks[~chosen].any()
    runs = np.diff(np.flatnonzero(np.diff(np.pad(chosen, ((0, 0), (1, 1))).ravel().astype(int))))
    assert runs[::2].max() <= 10  # two spans may touch, not three


# ---- mixtures ----------------------------------------------------------------------------------


def test_a_mixed_row_is_what_its_objective_makes_of_it():
    objective = OBJECTIVES["two"]
    tokens, segments, seeds = full_batch(objective.row_length(LENGTH), rows=600)
    example = objective.prepare(tokens, segments, seeds, LEXICON, LENGTH)
    batch, targets = example.inputs, example.targets
    chosen = objective.choose(seeds)
    assert stats.binomtest(int((chosen == 0).sum()), 600, 2 / 3).pvalue > 1e-3
    for row in range(6):
        own = objective.objectives[chosen[row]]
        size = own.row_length(LENGTH)
        part = tokens[[row], :size], segments[[row], :size], seeds[[row]]
        alone = own.prepare(*part, LEXICON, LENGTH)
        for name in ("tokens", "positions", "segments"):
            np.testing.assert_array_equal(getattr(batch, name)[[row]], getattr(alone.inputs, name))
        for name in ("tokens", "weights"):
            np.testing.assert_array_equal(
                getattr(targets, name)[[row]], getattr(alone.targets, name)
            )
        if chosen[row]:
            np.testing.assert_array_equal(batch.ranks[row], np.arange(LENGTH))
            assert not batch.block_positions[row].any()


@pytest.mark.parametrize(
    ("objectives", "weights", "message"),
    [
        ((CausalLM(),), (1.0, 2.0), "1 objectives and 2 weights"),
        ((CausalLM(),), (0.0,), "above 0"),
        ((CausalLM(), CausalLM(z_loss=1e-4)), (1.0, 1.0), "their losses differ"),
        ((CausalLM(), MaskedLM()), (1.0, 1.0), "their losses differ"),
        ((OBJECTIVES["two"],), (1.0,), "mixture themselves"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(objectives, weights, message):
    with pytest.raises(UserError, match=message):
        Mixed(objectives=objectives, weights=weights)


# ---- what does not fit -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "model", "message"),
    [
        (MaskedLM(), gpt2(), "needs an encoder, .* causal model is trained with CausalLM"),
        (MaskedLM(), t5(), "needs an encoder"),
        (MaskedLM(pair="next sentence"), replace(bert(), classifier=None), "has classes"),
        (CausalLM(), bert(), "CausalLM needs a model whose tokens do not see those behind"),
        (PrefixLM(), t5(), "PrefixLM gives nothing to the encoder"),
        (BlankInfilling(), bert(), "BlankInfilling needs"),
        (SpanCorruption(), gpt2(), "an encoder and a decoder"),
        (PermutationLM(), gpt2(), "two streams"),
        (OBJECTIVES["two"], bert(), "needs a model whose tokens do not see"),
    ],
)
def test_a_model_that_does_not_fit_is_named(objective, model, message):
    with pytest.raises(UserError, match=message):
        objective.check(model)


@pytest.mark.parametrize(
    ("objective", "token"),
    [
        (BlankInfilling(sop="<bop>"), "<bop>"),
        (MaskedLM(mask="<mask>"), "<mask>"),
        (MaskedLM(pair="sentence order", sep="</s>"), "</s>"),
        (SpanCorruption(sentinel="<sentinel {}>"), "<sentinel 0>"),
    ],
)
def test_a_token_that_is_not_there_is_named_before_there_is_text(objective, token):
    padding = np.zeros((1, objective.row_length(LENGTH)), np.int32)
    with pytest.raises(UserError, match=rf"needs the token '{token}'.*WithTokens"):
        objective.prepare(padding, padding, np.zeros(1, np.uint64), LEXICON, LENGTH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedLM(share=0.0), "share=0.0"),
        (lambda: SpanCorruption(mean=0.5), "mean=0.5"),
        (lambda: SpanCorruption(sentinel="<s>"), "where the number stands"),
        (lambda: PermutationLM(context=1), "context=1"),
        (lambda: MaskedLM(pair="sentence order").row_length(4), "data.length=4"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
