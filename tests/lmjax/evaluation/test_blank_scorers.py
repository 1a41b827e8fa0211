"""Scores of models that fill blanks, against what these models decode and guess."""

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import CharacterTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.blank_scorers import BERTScorer, GLMScorer, T5Scorer, scorer_of
from lmjax.evaluation.boundary import TokenPair
from lmjax.evaluation.likelihood import LikelihoodScorer
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest
from lmjax.evaluation.task_evaluator import fits_into
from lmjax.evaluation.tasks import Item, Question
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
    blank_row,
    initialize,
)
from lmjax.parallel import generation_layout

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
CONTEXT = (TOKENIZER.begin, *TOKENIZER.encode("is it"))


def made(model, filling):
    """A model of random parameters that fills blanks."""
    _, params = initialize(model, generation_layout(), jax.random.key(3))
    return TextGenerator(Generator(model, params), TOKENIZER, filling)


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


@pytest.mark.parametrize("run_on", [(), ("[gMASK]",)], ids=["two tables", "running"])
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
    assert whole.tokens == 140


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
    requests = [ContinuationRequest("x" * length, " yes") for length in range(36, 52)]
    expected = [found.cut == 0 for found in Answering(text).answers(requests)]
    asked = [Question(Item("x", "yes"), one.context, (one,), 0) for one in requests]
    assert list(map(fits, asked)) == expected
    assert True in expected and False in expected
