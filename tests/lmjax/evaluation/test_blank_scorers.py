"""Scores of models that fill blanks, against what these models decode and guess."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import CharacterTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.blank_scorers import (
    BERTScorer,
    GLMScorer,
    PrefixScorer,
    ScoredRow,
    T5Scorer,
    batches_of,
    scorer_of,
)
from lmjax.evaluation.boundary import TokenPair, token_pairs
from lmjax.evaluation.likelihood import Fitted, LikelihoodScorer
from lmjax.evaluation.requests import (
    ContinuationRequest,
    RollingRequest,
    Written,
    WrittenRequest,
)
from lmjax.evaluation.scoring_plan import LONG
from lmjax.evaluation.task_evaluator import check_room, fits_into
from lmjax.evaluation.tasks import Item, Lambada, Question
from lmjax.generation import Sampling, TextGenerator
from lmjax.generation.fill import BlankInfiller, MaskedTokenInfiller, SentinelInfiller
from lmjax.generation.generator import Generator
from lmjax.models import (
    AttentionConfig,
    BlockPositions,
    EncoderDecoderConfig,
    FeedForwardConfig,
    Normal,
    RelativeBuckets,
    Rotary,
    TransformerConfig,
    abstract,
    blank_row,
    initialize,
)
from lmjax.objectives import CausalLM, PrefixLM, SpanCorruption, WeightedSum
from lmjax.parallel import Mesh, generation_layout

SPECIAL = (
    *("[MASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>"),
    *("<pad>", "<extra_id_0>", "[CLS]", "[SEP]"),
)
TOKENIZER = ExtendedTokenizer(CharacterTokenizer("".join(map(chr, range(32, 127)))), SPECIAL)
ID = TOKENIZER.special
ATTENTION = AttentionConfig(num_heads=2, head_dim=8)
GLM = TransformerConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden=16,
    num_layers=2,
    max_length=48,
    attention=ATTENTION,
    feed_forward=FeedForwardConfig(size=32),
    positions=BlockPositions(),
    initializer=Normal(std=0.3),
)
T5 = EncoderDecoderConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden=16,
    num_layers=1,
    encoder_layers=1,
    max_length=48,
    attention=replace(ATTENTION, positions=RelativeBuckets()),
    feed_forward=FeedForwardConfig(size=32),
    positions=None,
    initializer=Normal(std=0.3),
)
BERT = replace(GLM, positions=None, attention=replace(ATTENTION, positions=Rotary(), causal=False))
PREFIX = replace(GLM, positions=None, attention=replace(ATTENTION, positions=Rotary()))
CONTEXT = (TOKENIZER.begin, *TOKENIZER.encode("is it"))


RUN_ON = pytest.mark.parametrize(
    "run_on",
    [
        pytest.param((), id="two tables"),
        pytest.param(("[gMASK]",), id="running", marks=pytest.mark.slow),
    ],
)


def made(model, filling, reads_prefix=False):
    """A model of random parameters that fills blanks."""
    _, params = initialize(model, generation_layout(), jax.random.key(3))
    generator = Generator(model, params)
    return TextGenerator(generator, TOKENIZER, filling, reads_prefix=reads_prefix)


def decoded(text, prompt, source=None):
    """Tokens that the model writes greedily, and their log-probability."""
    sources = None if source is None else [source]
    [found] = text.generator.continuations([prompt], Sampling(temperature=0.0), 5, sources=sources)
    return tuple(found.tokens), sum(found.log_probabilities)


def compare(scorer, context, tokens, wanted):
    """The score of decoded tokens is what they were decoded with; of others it is not greedy."""
    other = (*tokens[:-1], (tokens[-1] + 1) % 95)
    pairs = [[TokenPair(context, some)] for some in (tokens, other, tokens[:2])]
    found = scorer.score(pairs)
    # Five tokens, each within 1e-5: with a cache and without.
    assert found[0].log_probability == pytest.approx(wanted, abs=1e-4)
    assert [one.is_greedy for one in found] == [True, False, True]
    assert [one.tokens for one in found] == [5, 5, 2]
    alone = scorer.score(pairs[2:])
    assert alone[0].log_probability == pytest.approx(found[2].log_probability, abs=1e-5)


@RUN_ON
def test_glm_fills_the_rest_of_the_context(one_device, run_on):
    model = GLM if not run_on else replace(GLM, positions=None, attention=replace(
        ATTENTION, positions=Rotary()))  # fmt: skip
    text = made(model, BlankInfiller(run_on=run_on))
    start = [ID["<|startofpiece|>"]]
    row = blank_row([*CONTEXT, ID["[gMASK]"]], [(len(CONTEXT), start)], bool(run_on))
    scorer = scorer_of(text, 3)
    assert isinstance(scorer, GLMScorer)
    compare(scorer, CONTEXT, *decoded(text, row))
    long = ContinuationRequest("a long one " * 9, " yes")
    [found] = scorer.continuations([long])
    # The space between them is the continuation's, and one token the blank's.
    assert (found.cut, found.tokens) == (98 + 1 - (48 - 1 - 5), 5)
    [whole] = scorer.rolling([RollingRequest("a text " * 20)])
    [strided] = scorer.rolling([RollingRequest("a text " * 20, 10)])
    assert whole.tokens == strided.tokens == 140


@pytest.mark.parametrize("replies", [False, True])
def test_t5_writes_into_the_sentinel(one_device, replies):
    text = made(T5, SentinelInfiller(replies=replies))
    marks = [] if replies else [ID["<extra_id_0>"]]
    context = CONTEXT[1:]
    prompt, source = [ID["<pad>"], *marks], [*context, *marks, TOKENIZER.end]
    scorer = scorer_of(text, 3)
    assert isinstance(scorer, T5Scorer)
    compare(scorer, context, *decoded(text, prompt, source))
    with pytest.raises(UserError, match="no perplexity of whole texts"):
        scorer.rolling([RollingRequest("a text")])


def test_bert_hides_each_token_by_itself(one_device):
    text = made(BERT, MaskedTokenInfiller())
    scorer = scorer_of(text, 3)
    assert isinstance(scorer, BERTScorer)
    [two, one] = scorer.continuations(
        [ContinuationRequest("is it ", "so"), ContinuationRequest("is it s", "o")]
    )
    found = [text.guess(f"is it {hidden}", 500)[0] for hidden in ("[MASK]o", "s[MASK]")]
    values = [float(np.log(dict(guesses)[wanted])) for guesses, wanted in zip(found, "so")]
    assert one.log_probability == pytest.approx(values[1], abs=1e-4)
    # The space is scored too; guesses are shown without it.
    assert two.tokens == 3 and two.log_probability < sum(values)
    [whole] = scorer.rolling([RollingRequest("is it so")])
    assert whole.tokens == 8
    with pytest.raises(UserError, match="does not fit into the 48 tokens"):
        scorer.rolling([RollingRequest("long " * 20)])


def test_a_model_that_continues_texts_is_scored_from_the_left(one_device):
    text = made(GLM, None)
    assert isinstance(scorer_of(text), LikelihoodScorer)
    assert isinstance(Answering(text).scorer, LikelihoodScorer)


@pytest.mark.parametrize(
    ("model", "filling"),
    [
        (GLM, BlankInfiller()),
        (T5, SentinelInfiller()),
        (BERT, MaskedTokenInfiller()),
        (GLM, None),
    ],
    ids=["GLM", "T5", "BERT", "causal"],
)
def test_what_fits_is_what_is_scored_without_a_cut(one_device, model, filling):
    """Contexts of lengths around the 48 tokens that the models read, markers included."""
    text = made(model, filling)
    fits = fits_into(TOKENIZER, 48, filling=filling)
    requests = [ContinuationRequest("x" * length, " yes") for length in range(40, 50)]
    expected = [found.cut == 0 for found in Answering(text).answers(requests)]
    asked = [Question(Item("x", "yes"), one.context, (one,), 0) for one in requests]
    assert list(map(fits, asked)) == expected
    assert True in expected and False in expected


@RUN_ON
def test_glm_writes_into_the_blank_of_the_rest(one_device, run_on):
    """Decoded from a row that is made by hand; a prompt that is too long loses its left end."""
    model = GLM if not run_on else replace(GLM, positions=None, attention=replace(
        ATTENTION, positions=Rotary()))  # fmt: skip
    text = made(model, BlankInfiller(run_on=run_on))
    for prompt in ("is it", "x" * 50 + "is it so"):
        whole = [TOKENIZER.begin, *TOKENIZER.encode(prompt)]
        tokens = whole[-(48 - 1 - 5) :]  # beside the blank and five tokens of an answer
        start = [(len(tokens), [ID["<|startofpiece|>"]])]
        row = blank_row([*tokens, ID["[gMASK]"]], start, bool(run_on))
        wanted = TOKENIZER.decode(decoded(text, row)[0])
        [answer] = Answering(text).answers([WrittenRequest(prompt, (), 5)])
        assert answer == Written((wanted,), len(whole) - len(tokens))


@pytest.mark.parametrize("replies", [False, True])
def test_t5_writes_behind_what_its_encoder_reads(one_device, replies):
    text = made(T5, SentinelInfiller(replies=replies))
    marks = [] if replies else [ID["<extra_id_0>"]]
    requests, wanted = [], []
    for prompt in ("is it", "so it is"):
        source = [TOKENIZER.begin, *TOKENIZER.encode(prompt), *marks, TOKENIZER.end]
        source = [one for one in source[:-1] if one != TOKENIZER.end] + source[-1:]
        found = TOKENIZER.decode(decoded(text, [ID["<pad>"], *marks], source)[0])
        requests.append(WrittenRequest(prompt, (), 5))
        wanted.append(Written((found,), 0))
    assert Answering(text).answers(requests) == wanted
    with pytest.raises(UserError, match="48 tokens are to be written, but the model reads 48"):
        Answering(text).answers([WrittenRequest("is it", (), 48)])


def test_a_model_that_guesses_masks_is_refused_before_it_is_asked():
    asked = [Question(Item("is it", "yes"), "is it", (WrittenRequest("is it"),), 0)]
    with pytest.raises(UserError, match="a model that guesses masks writes no texts"):
        check_room(Lambada(path="texts"), asked, TOKENIZER, None, MaskedTokenInfiller())


@pytest.mark.parametrize(
    "model, filling, room",
    [(GLM, BlankInfiller(), 42), (T5, SentinelInfiller(), 46), (GLM, None, 43)],
    ids=["GLM", "T5", "causal"],
)
def test_prompts_that_fit_are_written_behind_without_a_cut(one_device, model, filling, room):
    text = made(model, filling)
    fits = fits_into(TOKENIZER, 48, filling=filling)
    marks = len(TOKENIZER.opening)
    requests = [WrittenRequest("x" * (room - marks + more), (), 5) for more in (-1, 0, 1)]
    assert [one.cut for one in Answering(text).answers(requests)] == [0, 0, 1]
    asked = [Question(Item("x", "yes"), one.prompt, (one,), 0) for one in requests]
    assert list(map(fits, asked)) == [True, True, False]


KINDS = {
    "GLM": (GLM, BlankInfiller()),
    "T5": (T5, SentinelInfiller()),
    "BERT": (BERT, MaskedTokenInfiller()),
    "prefix": (PREFIX, None),
}
MIXED_LENGTHS = [
    ContinuationRequest(context, ending)
    for context, ending in (("is it", " so"), ("x" * 24, " or no"), ("", "a"))
]


def log_probabilities(scorer, requests, note=None):
    return [one.log_probability for one in scorer.continuations(requests, note)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_depends_on_batches_or_order(one_device, kind):
    text = made(*KINDS[kind], kind == "prefix")
    wanted = log_probabilities(scorer_of(text, 8), MIXED_LENGTHS)
    backwards = log_probabilities(scorer_of(text, 1), MIXED_LENGTHS[::-1])
    assert backwards[::-1] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GLM", "T5"])
def test_no_number_depends_on_the_mesh(one_device, kind):
    found = []
    for axes in ({}, {"fsdp": 2, "tensor": 2}):
        devices = jax.devices()[: 4 if axes else 1]
        with jax.set_mesh(Mesh(**axes).build(devices)):
            text = made(*KINDS[kind], kind == "prefix")
            found.append(log_probabilities(scorer_of(text, 8), MIXED_LENGTHS))
    assert found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["T5", "BERT"])
def test_what_is_scored_is_told_before_a_kill(one_device, kind):
    """The last batch fails; the answers of those before it have been told, each once."""
    scorer, told = scorer_of(made(*KINDS[kind]), 1), {}
    whole, batches = scorer.program, list(batches_of(rows_for(scorer), 1))

    class Killed:
        left = len(batches) - 1

        def whole(self, *given):
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return whole.whole(*given)

    scorer.program = Killed()
    with pytest.raises(KeyboardInterrupt):
        scorer.continuations(MIXED_LENGTHS, lambda number, answer: told.setdefault(number, answer))
    assert len(told) == len(MIXED_LENGTHS) - 1
    scorer.program = whole
    for number, answer in enumerate(scorer.continuations(MIXED_LENGTHS)):
        assert told.get(number, answer).log_probability == pytest.approx(answer.log_probability)


def rows_for(scorer):
    pairs = token_pairs(TOKENIZER, MIXED_LENGTHS, scorer.beginning)
    return [row for pair in pairs for row in scorer.rows(pair)[0]]


@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 700)), min_size=1, max_size=40),
    st.integers(1, 64),
)
@settings(max_examples=50)
def test_long_rows_and_long_sources_stand_in_small_batches(lengths, size):
    rows = [ScoredRow([1] * own, 0, (1,), (1,) * source or None) for own, source in lengths]
    found = list(batches_of(rows, size))
    assert sorted(n for batch in found for n in batch.numbers) == list(range(len(rows)))
    for batch in found:
        assert len(batch.numbers) <= batch.size
        for columns, side in ((batch.columns, 0), (batch.source_columns, 1)):
            assert max(lengths[n][side] for n in batch.numbers) <= columns
            assert batch.size * columns <= max(size * LONG, columns)


def test_a_continuation_that_the_decoder_cannot_read_is_refused(one_device):
    scorer = scorer_of(made(*KINDS["T5"]))
    with pytest.raises(UserError, match="of 48 tokens does not fit into the 48 tokens"):
        scorer.continuations([ContinuationRequest("is it", "y" * 48)])


def test_a_prefix_model_sees_its_context_both_ways(one_device):
    """As in a row of its training whose drawn prefix is the context; so it writes, too."""
    text, objective = made(PREFIX, None, True), PrefixLM()
    scorer = scorer_of(text, 2)
    assert isinstance(scorer, PrefixScorer)
    context, continuation = CONTEXT, tuple(TOKENIZER.encode(" so"))
    row = np.array([[*context, *continuation]], np.int32)
    for seed in range(200):
        example = objective.prepare(row, np.ones_like(row), np.array([seed], np.uint64))
        if example.targets.weights.sum() == len(continuation):
            break
    graph, _ = abstract(PREFIX, text.generator.layout)

    @jax.jit
    def logits_of(params, batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    logits = logits_of(text.generator.params, text.generator.put_on_devices(example.inputs))
    values = jax.nn.log_softmax(logits[0, :, : PREFIX.vocab_size])
    wanted = float(sum(values[np.arange(row.size - 1), row[0, 1:]] * example.targets.weights[0]))
    pair = TokenPair(context, continuation)
    [found] = scorer.score([[pair]])
    assert found.log_probability == pytest.approx(wanted, abs=1e-4)
    [causal] = LikelihoodScorer(text).score([Fitted(pair, 0)])
    assert abs(causal.log_probability - wanted) > 1e-2
    [[written]] = [
        answer.texts for answer in Answering(text).answers([WrittenRequest("is it", (), 4)])
    ]
    [again] = scorer.score([[TokenPair(context, tuple(TOKENIZER.encode(written)))]])
    assert again.is_greedy and again.tokens == 4


def test_objectives_that_continue_a_prefix():
    blanks = SpanCorruption()
    assert PrefixLM().reads_prefix and not CausalLM().reads_prefix
    for objectives, expected in (((PrefixLM(), blanks), True), ((PrefixLM(), CausalLM()), False)):
        assert WeightedSum(objectives=objectives, weights=(1.0, 1.0)).reads_prefix == expected
    assert not blanks.reads_prefix
