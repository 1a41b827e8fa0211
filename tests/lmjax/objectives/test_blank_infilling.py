"""What blank infilling feeds the model: exactly, in its statistics, and nothing of the answers."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmjax.config import UserError, replace
from lmjax.objectives import BlankInfilling, DocumentBlank, Mixed, SentenceBlanks, TokenBlanks
from lmjax.objectives.blank_infilling import fill_in
from lmjax.objectives.blanks import Cut, length_probabilities
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.rows import RowPiece
from tests.lmjax.objectives.rows import (
    BEGIN,
    DBLOCK,
    END,
    EOP,
    GMASK,
    LEXICON,
    MASK,
    SMASK,
    SOP,
    WORDS,
    batches,
    full_batch,
    make_row,
)
from tests.parity_cases import parity_folder

LENGTH = 64
KINDS = {
    "tokens": (BlankInfilling(), MASK),
    "words": (BlankInfilling(blanks=TokenBlanks(whole_words=True)), MASK),
    "sentences": (BlankInfilling(blanks=SentenceBlanks()), SMASK),
    "rest": (BlankInfilling(blanks=DocumentBlank(rest=1.0)), GMASK),
    "middle": (BlankInfilling(blanks=DocumentBlank(rest=0.0)), GMASK),
    "joined": (BlankInfilling(cross_documents=True), MASK),
    "joined, four": (BlankInfilling(cross_documents=True, samples=4), MASK),
    "joined, rest": (BlankInfilling(blanks=DocumentBlank(), cross_documents=True), GMASK),
}


def examples():
    return json.loads((parity_folder("glm_data") / "examples.json").read_text())["examples"]


@pytest.mark.parametrize("number", range(14))
def test_the_reference_makes_the_same_of_the_same_spans(number):
    example = examples()[number]
    tokens = np.array(example["tokens"])
    if example["spans"] is None:
        cut = Cut(np.array([[example["prefix_length"], len(tokens)]]), open=True)
    else:
        cut = Cut(np.array(example["spans"]))
    sample = fill_in(tokens, cut, example["mask_token"], 6, 7)
    np.testing.assert_array_equal(sample.tokens, example["input_tokens"])
    np.testing.assert_array_equal(sample.targets, example["targets"])
    np.testing.assert_array_equal(sample.weights, example["loss_mask"])
    np.testing.assert_array_equal([sample.positions, sample.block_positions], example["positions"])
    places = np.arange(len(sample.tokens))
    expected = (places < example["sep"]) | (places <= places[:, None])
    np.testing.assert_array_equal(sample.ranks <= sample.ranks[:, None], expected)


def slow_fill_in(tokens, spans, is_open):
    """Token by token, as one would with pen and paper."""
    begins = {first: end for first, end in spans}
    part_a, place_of = [], {}
    place = 0
    while place < len(tokens):
        if place in begins:
            place_of[place] = len(part_a)
            part_a.append(MASK)
            place = begins[place]
        else:
            part_a.append(tokens[place])
            place += 1
    places = [(token, token, 0, number, 0) for number, token in enumerate(part_a)]
    for first, end in spans:
        given_, wanted = SOP, [*tokens[first:end], *([] if is_open else [EOP])]
        for inside, target in enumerate(wanted, 1):
            places.append((given_, target, 1, place_of[first], inside))
            given_ = target
    return [list(column) for column in zip(*places, strict=True)]


@st.composite
def texts_with_spans(draw):
    tokens = draw(st.lists(st.integers(20, 300), min_size=2, max_size=40))
    edges = draw(st.lists(st.integers(0, len(tokens)), min_size=2, max_size=12, unique=True))
    edges = sorted(edges)
    spans = list(zip(edges[::2], edges[1::2]))
    return tokens, draw(st.permutations(spans)), draw(st.booleans())


@given(texts_with_spans())
def test_any_spans_are_cut_out_as_by_hand(case):
    """Spans that touch, whole texts, spans at both ends."""
    tokens, spans, is_open = case
    is_open = is_open and len(spans) == 1 and spans[0][1] == len(tokens)
    sample = fill_in(np.array(tokens), Cut(np.array(spans), is_open), MASK, SOP, EOP)
    expected = slow_fill_in(tokens, spans, is_open)
    found = sample.tokens, sample.targets, sample.weights, sample.positions, sample.block_positions
    for values, slow in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, slow)


def restored(example, row, mask):
    """The text of each segment of a row, with every blank filled by its targets."""
    batch, texts = example.inputs, []
    for segment in range(1, batch.segments[row].max() + 1):
        here = batch.segments[row] == segment
        inputs, targets = batch.tokens[row, here], example.targets.tokens[row, here]
        positions, blocks = batch.positions[row, here], batch.block_positions[row, here]
        text = {place: [token] for place, token in enumerate(inputs[blocks == 0])}
        for place in np.unique(positions[blocks > 0]):
            assert text[place] == [mask]
            content = targets[(blocks > 0) & (positions == place)].tolist()
            text[place] = content[:-1] if content[-1] == EOP else content
        texts.append([token for place in sorted(text) for token in text[place]])
    return texts


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(data=st.data())
def test_filled_in_blanks_give_the_text_back(kind, data):
    """Each segment is a document of the row, or documents side by side, and only blanks count."""
    objective, mask = KINDS[kind]
    tokens, segments, seeds = data.draw(batches(objective.row_length(LENGTH)))
    try:
        example = objective.prepare(tokens, segments, seeds, LEXICON, LENGTH)
    except UserError:
        return  # no document has room: tested below
    for row in range(len(tokens)):
        stored = " ".join(map(str, tokens[row, segments[row] > 0]))
        for text in restored(example, row, mask):
            assert " ".join(map(str, text)) in stored
            if not objective.cross_documents:
                assert text.count(BEGIN) <= 1
        assert set(np.flatnonzero(example.targets.weights[row])) == set(
            np.flatnonzero(example.inputs.block_positions[row])
        )
    np.testing.assert_array_equal(example.inputs.tokens.shape, (2, LENGTH))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_part_a_whole_and_part_b_so_far(kind):
    objective, _ = KINDS[kind]
    tokens, segments, seeds = full_batch(objective.row_length(LENGTH), rows=4, longest=40)
    batch = objective.prepare(tokens, segments, seeds, LEXICON, LENGTH).inputs
    seen = np.asarray(batch.mask(causal=True).dense(LENGTH, LENGTH))[:, 0]
    for row in range(4):
        for query in range(LENGTH):
            for key in range(LENGTH):
                same = batch.segments[row, query] == batch.segments[row, key] != 0
                in_a = batch.block_positions[row, key] == 0
                asks_in_a = batch.block_positions[row, query] == 0
                expected = same and (in_a or (not asks_in_a and key <= query))
                assert seen[row, query, key] == expected


def place_blanks(count, size=512):
    """Blanks of texts of words alone that have all the room, in the order of the text."""
    edges = np.arange(size + 1)
    return [TokenBlanks().spread(edges, 3 * size, RandomStream(seed))[1] for seed in range(count)]


def test_lengths_of_blanks_are_distributed_as_the_references():
    """Chi-square against the exact probabilities and the reference's 20,000 lengths; fixed seeds.

    The last length of a sample is the one that reached the share, so not every length is as likely
    as it was drawn: the reference has the same bias, and it is below what these counts can show.
    """
    reference = np.load(parity_folder("glm_data") / "span_statistics.npz")
    exact = reference["expected_probability"][1:]
    np.testing.assert_allclose(length_probabilities(3.0, 39), exact, rtol=1e-12)
    samples = place_blanks(818)
    lengths = np.concatenate([spans[:, 1] - spans[:, 0] for spans in samples])
    assert lengths.min() == 1 and lengths.max() <= 39
    counts = np.bincount(np.minimum(lengths, 10), minlength=11)[1:]
    expected = np.append(exact[:9], exact[9:].sum()) * len(lengths)
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
    theirs = np.append(reference["count"][1:10], reference["count"][10:].sum())
    assert stats.chi2_contingency([counts, theirs]).pvalue > 1e-3
    ratios = np.array([(spans[:, 1] - spans[:, 0]).sum() / 512 for spans in samples])
    assert ratios.min() >= int(0.15 * 512) / 512
    assert stats.ks_2samp(ratios, reference["masked_ratio"]).pvalue > 1e-3
    number = [len(spans) for spans in samples]
    assert stats.ks_2samp(number, reference["spans_per_sample"]).pvalue > 1e-3


def test_blanks_do_not_touch_and_lie_everywhere():
    """A gap of a token or more between two; a single one at all places alike, chi-square."""
    for spans in place_blanks(200, size=100):
        assert (spans[1:, 0] > spans[:-1, 1]).all()
        assert spans[0, 0] >= 0 and spans[-1, 1] <= 100
    drawn = place_blanks(4000, size=7)
    # int(0.15 * 7) is one token, so one blank of any length that fits: all places as likely.
    starts = [spans[0, 0] for spans in drawn if len(spans) and np.ptp(spans[0]) == 2]
    assert stats.chisquare(np.bincount(starts, minlength=6)).pvalue > 1e-3


def test_blanks_are_filled_in_random_order():
    piece = RowPiece(np.random.default_rng(0).choice(WORDS, 60), False, 1)
    orders = [
        tuple(np.argsort(cut.spans[:, 0]))
        for cut in (
            TokenBlanks().choose(piece, LEXICON, RandomStream(seed)) for seed in range(3000)
        )
        if len(cut.spans) == 3
    ]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6 and stats.chisquare(counts).pvalue > 1e-3


def test_blanks_of_whole_words_hold_the_share_of_the_words():
    """Counted one by one beside the marks of two documents; space belongs to the word behind it."""
    rng = np.random.default_rng(0)
    blanks = TokenBlanks(share=0.3, mean=1.0, whole_words=True)
    for seed in range(100):
        text = np.array([BEGIN, *rng.choice(WORDS, 70), END, BEGIN, *rng.choice(WORDS, 60), END])
        documents = (1, 71), (73, 133)
        begins = {
            place
            for first, end in documents
            for place in range(first, end)
            if place == first or (text[place] % 2 == 0 and text[place - 1] < 290)
        }
        cut = blanks.choose(RowPiece(text, True, 2), LEXICON, RandomStream(seed))
        assert {*cut.spans.ravel().tolist()} <= begins | {71, 133}
        for first, end in documents:
            words = sum(first <= place < end for place in begins)
            inside = cut.spans[(cut.spans[:, 0] >= first) & (cut.spans[:, 1] <= end)]
            hidden = sum(b <= place < e for b, e in inside for place in begins)
            # The last blank may pass the share: by less than its length, here below 9 words.
            assert int(0.3 * words) <= hidden < int(0.3 * words) + 9
            in_order = inside[np.argsort(inside[:, 0])]
            for (_, before), (after, _) in itertools.pairwise(in_order):
                assert any(before <= place < after for place in begins)  # a word between


def test_sentences_are_whole_and_reach_the_share():
    rng = np.random.default_rng(0)
    for seed in range(100):
        text = np.array([BEGIN, *rng.choice(WORDS, 60), END])
        cut = SentenceBlanks().choose(RowPiece(text, True, 1), LEXICON, RandomStream(seed))
        lengths = cut.spans[:, 1] - cut.spans[:, 0]
        assert lengths.sum() >= int(0.15 * 62)
        assert lengths[:-1].sum() < int(0.15 * 62)
        for first, end in cut.spans:
            assert first == 1 or text[first - 1] % 10 == 0
            assert end == 61 or text[end - 1] % 10 == 0
            assert not any(token % 10 == 0 for token in text[first : end - 1])


def test_the_last_sentence_stays():
    text = np.array([BEGIN, 21, 22, 30, END])
    assert not len(SentenceBlanks().choose(RowPiece(text, True, 1), LEXICON, RandomStream(0)).spans)


def test_lengths_of_a_documents_blank_are_uniform():
    piece = RowPiece(np.array([BEGIN, *WORDS[:19]]), False, 1)
    cuts = [DocumentBlank().choose(piece, LEXICON, RandomStream(seed)) for seed in range(4000)]
    lengths = [np.ptp(cut.spans[0]) for cut in cuts]
    assert stats.chisquare(np.bincount(lengths, minlength=19)[10:]).pvalue > 1e-3
    rest = sum(cut.spans[0, 1] == 20 for cut in cuts)
    assert stats.binomtest(rest, 4000, 0.5).pvalue > 1e-3
    assert all(cut.open == (cut.spans[0, 1] == 20) for cut in cuts)


def test_a_rest_is_closed_where_the_text_has_no_end_of_its_own():
    """A separator stands before documents, so the end of one that is whole needs a mark."""
    whole, going_on = (RowPiece(np.array([END, *WORDS[:9]]), closed, 1) for closed in (True, False))
    rest = DocumentBlank(rest=1.0)
    assert not rest.choose(whole, LEXICON, RandomStream(0)).open
    assert rest.choose(going_on, LEXICON, RandomStream(0)).open
    assert rest.choose(
        RowPiece(np.array([*WORDS[:9], END]), True, 1), LEXICON, RandomStream(0)
    ).open


def test_a_rest_over_several_documents_runs_across_them():
    objective = KINDS["joined, rest"][0]
    rows = [
        make_row([10, 60], objective.row_length(LENGTH), np.random.default_rng(s)) for s in (0, 1)
    ]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    example = objective.prepare(tokens, segments, np.arange(2, dtype=np.uint64), LEXICON, LENGTH)
    assert (example.inputs.segments.max(axis=1) == 1).all()
    last = objective.blanks.text_length(LENGTH) - 1  # of the text that has room
    targets = example.targets.tokens
    np.testing.assert_array_equal(targets[:, last + 1], tokens[:, last])  # no [eop]


def test_rows_are_nearly_always_full_and_nearly_nothing_is_left_out():
    """The room for blanks is enough, and little more: of 200 rows of one document."""
    for kind, least in dict(
        tokens=0.99, words=0.99, sentences=0.93, rest=0.99, middle=0.99
    ).items():
        objective, _ = KINDS[kind]
        size = objective.row_length(512)
        rng = np.random.default_rng(0)
        rows = [make_row([size], size, rng) for _ in range(200)]
        tokens, segments = map(np.stack, zip(*rows, strict=True))
        seeds = rng.integers(0, 2**63, 200).astype(np.uint64)
        example = objective.prepare(tokens, segments, seeds, LEXICON, 512)
        assert (example.inputs.segments > 0).mean() > least, kind
        if kind == "tokens":
            targets = example.targets
            hidden = ((targets.weights > 0) & (targets.tokens != EOP)).sum(axis=1)
            text = [len(*restored(example, row, MASK)) for row in range(200)]
            assert (hidden >= (0.15 * (np.array(text) - 1)).astype(int)).all()
            assert (np.array(text) >= size - objective.row_overlap(512) + 1).all()


def word_edges(text):
    """Where the text can be cut between words, or beside the marks of documents."""
    edges = {len(text)}
    for place, token in enumerate(text):
        before = text[place - 1] if place else BEGIN
        goes_on = token % 2 or 290 <= before < 300
        if token in (BEGIN, END) or before in (BEGIN, END) or not goes_on:
            edges.add(place)
    return sorted(edges)


@settings(max_examples=40)
@given(
    words=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    whole_words=st.booleans(),
    share=st.sampled_from([0.15, 0.3, 0.6]),
    seed=st.integers(0, 2**32),
)
def test_the_beginning_that_has_room_is_the_longest(words, whole_words, share, seed):
    """By trying all beginnings of one to four documents, each with its blanks, in any room."""
    rng = np.random.default_rng(seed)
    text = np.concatenate([[BEGIN, *rng.choice(WORDS, number), END] for number in words])
    blanks = TokenBlanks(share=share, mean=1.0, whole_words=whole_words)
    numbers = {
        size: len(blanks.choose(RowPiece(text[:size], False, 4), LEXICON, RandomStream(seed)).spans)
        for size in (word_edges(text) if whole_words else range(len(text) + 1))
    }
    for room in range(len(text) + 2 * numbers[len(text)] + 2):
        longest = max(size for size, number in numbers.items() if size + 2 * number <= room)
        kept, cut = blanks.fit(RowPiece(text, False, 4), room, LEXICON, RandomStream(seed))
        np.testing.assert_array_equal(kept, text[:longest])
        assert len(cut.spans) == numbers[longest]
        assert (cut.spans <= longest).all()


@pytest.mark.parametrize("kind", ["tokens", "words", "sentences", "rest", "joined, four"])
def test_each_row_goes_on_where_the_one_before_surely_ended(kind):
    """Two neighbours of one long document hold all of it, from one's beginning to the other's."""
    objective, mask = KINDS[kind]
    size, overlap = objective.row_length(512), objective.row_overlap(512)
    advance = size - overlap
    text, _ = make_row([4000], 4000, np.random.default_rng(0))
    tokens = np.stack([text[row * advance :][:size] for row in range(7)])
    segments = np.ones_like(tokens)
    example = objective.prepare(tokens, segments, np.arange(7, dtype=np.uint64), LEXICON, 512)
    for row in range(7):
        found = np.concatenate(restored(example, row, mask))
        assert len(found) > advance
        np.testing.assert_array_equal(found, tokens[row, : len(found)])


def test_mixed_rows_go_on_behind_the_one_that_needs_most():
    short, rest = KINDS["tokens"][0], KINDS["rest"][0]
    mixed = Mixed(objectives=(short, rest), weights=(1.0, 1.0))
    advance = mixed.row_length(512) - mixed.row_overlap(512)
    assert advance == rest.row_length(512) - rest.row_overlap(512) == 509
    assert short.row_length(512) - short.row_overlap(512) < 450


def test_four_samples_have_a_quarter_of_the_text_each():
    objective = BlankInfilling(cross_documents=True, samples=4)
    size = objective.row_length(512)
    assert size % 4 == 0
    tokens, segments, seeds = full_batch(size, rows=2)
    example = objective.prepare(tokens, segments, seeds, LEXICON, 512)
    assert (example.inputs.segments.max(axis=1) == 4).all()
    for row in range(2):
        texts = restored(example, row, MASK)
        np.testing.assert_array_equal(np.concatenate(texts), tokens[row])
        assert [len(text) for text in texts] == [size // 4] * 4


def test_positions_may_count_on():
    objective = BlankInfilling(blanks=DocumentBlank(rest=1.0), running_positions=True)
    size = objective.row_length(LENGTH)
    tokens, segments = make_row([size], size, np.random.default_rng(0))
    seeds = np.zeros(1, np.uint64)
    batch = objective.prepare(tokens[None], segments[None], seeds, LEXICON, LENGTH).inputs
    used = (batch.segments[0] > 0).sum()
    np.testing.assert_array_equal(batch.positions[0, :used], np.arange(used))


def test_inputs_of_blanks_can_be_hidden():
    """A share of part B, without [sop] and without a change of targets."""
    plain = BlankInfilling()
    tokens, segments, seeds = full_batch(plain.row_length(512), rows=20)
    before = plain.prepare(tokens, segments, seeds, LEXICON, 512)
    hiding = replace(plain, block_mask_share=0.3)
    after = hiding.prepare(tokens, segments, seeds, LEXICON, 512)
    first = before.inputs.segments == 1  # later documents are cut by other numbers
    may = (before.inputs.block_positions > 1) & first
    hidden = (after.inputs.tokens == DBLOCK) & first
    assert not hidden[~may].any()
    assert stats.binomtest(int(hidden.sum()), int(may.sum()), 0.3).pvalue > 1e-3
    np.testing.assert_array_equal(after.targets.tokens[first], before.targets.tokens[first])


def test_text_without_room_is_refused():
    rows = [make_row([2] * 40, 48, np.random.default_rng(seed)) for seed in (0, 1)]
    tokens, segments = map(np.stack, zip(*rows, strict=True))
    with pytest.raises(UserError, match=r"no room for blanks .TokenBlanks.: the .* 4 tokens"):
        BlankInfilling().prepare(tokens, segments, np.zeros(2, np.uint64), LEXICON, LENGTH)
    segments[:, -1] = 0  # rows with padding may be the last of a set
    BlankInfilling().prepare(tokens, segments, np.zeros(2, np.uint64), LEXICON, LENGTH)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (dict(samples=0), "samples=0"),
        (dict(sop="[MASK]"), "sop='.MASK.', eop='<.endofpiece.>': give three tokens"),
        (dict(block_mask_share=1.0), "block_mask_share=1.0"),
        (dict(blanks=dict(share=0.0)), "share of the text is 0.0"),
        (dict(blanks=dict(mean=0.0)), "mean=0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings_, message):
    with pytest.raises(UserError, match=message):
        if blanks := settings_.get("blanks"):
            settings_ = dict(blanks=TokenBlanks(**blanks))
        BlankInfilling(**settings_)
