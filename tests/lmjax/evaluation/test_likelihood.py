"""Log-likelihoods against a plain loop over prefixes: every number, however they are batched."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.evaluation.boundary import beginning_of, token_pairs
from lmjax.evaluation.likelihood import LikelihoodScorer, rolling_windows
from lmjax.evaluation.requests import ContinuationRequest, RollingRequest
from lmjax.evaluation.scoring_plan import (
    cache_length,
    cut_in_batches,
    families_of,
    grouped,
    padded_length,
    right_padded,
    shared_prefixes,
)
from lmjax.generation import Generator, Sampling, TextGenerator
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    initialize,
)
from lmjax.parallel import Mesh, generation_layout
from tests.lmjax.evaluation.scored_models import TOKENIZER, loop_over_prefixes, read_model

# Learned positions, rotary with grouped keys, parallel blocks, ALiBi; others take long to compile.
FAMILIES = (
    *("gpt2", "llama2_gqa", "palm", "baichuan2_13b"),
    pytest.param("mistral", marks=pytest.mark.slow),
)
CONTEXTS = ("Q: is it?\nA:", "Q: 1\nA:", "", "once upon a ti", "x \n")
ENDINGS = (" yes", " no", "me", " not at all")
REQUESTS = [ContinuationRequest(c, x) for c in CONTEXTS for x in ENDINGS]


def scores(text, requests=REQUESTS, **options):
    return LikelihoodScorer(text, **options).continuations(requests)


def log_probabilities(answers):
    return np.array([answer.log_probability for answer in answers])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_score_is_the_sum_of_a_loop_over_prefixes(one_device, name):
    text = read_model(name)
    for request, answer in zip(REQUESTS, scores(text), strict=True):
        context, continuation = token_pairs(TOKENIZER, [request], beginning_of(TOKENIZER))[0]
        wanted, best = loop_over_prefixes(text, context, continuation)
        # 10 tokens, each within 1e-5: other orders of the same sums.
        assert answer.log_probability == pytest.approx(float(wanted.sum()), abs=1e-4)
        assert answer.is_greedy == (best == np.array(continuation)).all()
        assert answer.tokens == len(continuation)


def test_the_likeliest_continuation_is_greedy(one_device):
    """A continuation that the model itself writes; and the same with another last token."""
    text = read_model("llama2_gqa")
    [written] = text.generate(["once upon"], Sampling(temperature=0.0), 5)
    found = scores(text, [ContinuationRequest("once upon", written)])
    other = written[:-1] + ("a" if written[-1] != "a" else "b")
    found += scores(text, [ContinuationRequest("once upon", other)])
    if not written[0].isspace():
        assert [one.is_greedy for one in found] == [True, False]


def test_no_number_depends_on_batches_order_or_what_is_shared(one_device):
    text = read_model("gpt2")
    wanted = log_probabilities(scores(text))
    for size in (1, 7):
        assert log_probabilities(scores(text, batch_size=size)) == pytest.approx(wanted, abs=1e-5)
    assert log_probabilities(scores(text, share=False)) == pytest.approx(wanted, abs=1e-5)
    order = list(range(len(REQUESTS)))
    random.Random(0).shuffle(order)
    found = log_probabilities(scores(text, [REQUESTS[n] for n in order]))
    assert found == pytest.approx(wanted[order], abs=1e-5)


def test_what_many_contexts_begin_with_is_computed_once(one_device):
    """Behind a prompt with examples; a window may end within it."""
    prompt = "Q: a?\nA: b\n\nQ: c?\nA: d\n\nQ: ee?\nA: f\n\n"
    contexts = [f"{prompt}Q: {sign * (1 + n % 3)}?\nA:" for n, sign in enumerate("ghijklmnop")]
    requests = [ContinuationRequest(c, x) for c in contexts for x in ENDINGS]
    pairs = token_pairs(TOKENIZER, requests, (96,))
    [(length, families)] = shared_prefixes(families_of(pairs))
    assert length == 1 + len(prompt) + 3 and len(families) == len(contexts)
    for name, window in (("baichuan2_13b", None), ("llama2_gqa", 7)):
        text = read_model(name, window=window)
        apart = log_probabilities(scores(text, requests, share=False))
        assert log_probabilities(scores(text, requests)) == pytest.approx(apart, abs=1e-4)


def test_any_mesh_gives_the_same(one_device):
    wanted = log_probabilities(scores(read_model("llama2_gqa")))
    with jax.set_mesh(Mesh(tensor=2, fsdp=2).build(jax.devices()[:4])):
        found = log_probabilities(scores(read_model("llama2_gqa"), batch_size=8))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_context_that_is_too_long_loses_its_left_and_nothing_else(one_device):
    """What is scored is the same; the score is that of the context's last tokens."""
    text, longest = read_model("llama2_gqa", length=24), 24
    context = "abcdefghij" * 5
    for request, answer in zip(
        (ContinuationRequest(context, x) for x in ENDINGS),
        scores(text, [ContinuationRequest(context, x) for x in ENDINGS]),
        strict=True,
    ):
        tokens = [96, *TOKENIZER.encode(context)]
        continuation = TOKENIZER.encode(request.continuation)
        kept = tokens[-(longest + 1 - len(continuation)) :]
        wanted, _ = loop_over_prefixes(text, kept, continuation)
        assert answer.log_probability == pytest.approx(float(wanted.sum()), abs=1e-4)
        assert (answer.cut, answer.tokens) == (len(tokens) - len(kept), len(continuation))
    with pytest.raises(UserError, match="has 25 tokens, more than the 24"):
        scores(text, [ContinuationRequest("", "y" * 25)])


@pytest.mark.parametrize("length", [1, 7, 16])
def test_windows_score_each_token_once(one_device, length):
    text, words = read_model("llama2_gqa", length=length), "a text of 30 tokens, and a few"
    tokens = TOKENIZER.encode(words)
    windows = list(rolling_windows(tokens, (96,), length))
    assert [token for window in windows for token in window.continuation] == tokens
    assert all(len(c) + len(x) <= length + 1 and c for c, x in windows)
    wanted = sum(float(loop_over_prefixes(text, *window)[0].sum()) for window in windows)
    [found] = LikelihoodScorer(text).rolling([RollingRequest(words)])
    assert found.log_probability == pytest.approx(wanted, abs=1e-4)
    assert found.tokens == len(tokens)


@pytest.mark.parametrize(("length", "stride"), [(7, 3), (7, 1), (7, 9), (40, 2)])
def test_a_stride_scores_its_tokens_behind_all_that_there_is_room_for(one_device, length, stride):
    """Against a loop in which each token has its context by the number of windows before it."""
    text, words = read_model("llama2_gqa", length=length), "a text of 30 tokens, and a few"
    tokens, step = TOKENIZER.encode(words), min(stride, length)
    wanted = 0.0
    for n, token in enumerate(tokens):
        further = max(0, -(-(n + 1 - length) // step))
        end = min(len(tokens), length + step * further)  # of the window that scores it
        context = tokens[end - length - 1 : n] if further else [96, *tokens[:n]]
        wanted += float(loop_over_prefixes(text, context, [token])[0].sum())
    [found] = LikelihoodScorer(text).rolling([RollingRequest(words, stride)])
    assert found.log_probability == pytest.approx(wanted, abs=1e-4)
    assert found.tokens == len(tokens)


def test_one_window_is_the_loss_of_the_whole_text(one_device):
    text, words = read_model("gpt2"), "short and whole"
    wanted, _ = loop_over_prefixes(text, (96,), TOKENIZER.encode(words))
    found = LikelihoodScorer(text).rolling([RollingRequest(words), RollingRequest("x")])
    assert found[0].log_probability == pytest.approx(float(wanted.sum()), abs=1e-4)
    with pytest.raises(UserError, match="has no token to score"):
        LikelihoodScorer(text).rolling([RollingRequest("")])


def test_numbers_that_are_none_stop_the_evaluation(one_device):
    """Where a harness takes the first of several NaN for the best, all answers 0 are right."""
    text = read_model("gpt2")
    weights = jax.tree.map(lambda a: a * jnp.nan, text.generator.weights)
    text.generator.weights = weights
    with pytest.raises(UserError, match="NaN"):
        scores(text)
    with pytest.raises(UserError, match="NaN"):
        LikelihoodScorer(text).rolling([RollingRequest("abc")])


def test_tokens_that_the_model_lacks_are_refused(one_device):
    text = dataclasses.replace(read_model("gpt2"), tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="gives the token 256; the model's are 0 to 96"):
        scores(text)


def test_an_encoder_is_refused(one_device):
    config = TransformerConfig(
        vocab_size=257,
        hidden=16,
        num_layers=1,
        attention=AttentionConfig(num_heads=2, head_dim=8, causal=False),
        feed_forward=FeedForwardConfig(size=32),
    )
    _, params = initialize(config, generation_layout(), jax.random.key(0))
    with pytest.raises(UserError, match="encoder"):
        LikelihoodScorer(TextGenerator(Generator(config, params), ByteTokenizer()))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=40), st.integers(1, 64))
@settings(max_examples=50)
def test_batches_hold_every_row_once(lengths, size):
    parts = list(cut_in_batches(lengths, size))
    assert sorted(n for part, _ in parts for n in part) == list(range(len(lengths)))
    for part, columns in parts:
        assert max(lengths[n] for n in part) <= columns and len(part) <= size
        assert len(part) * columns <= max(size * 256, columns)


def test_little_is_padding_and_lengths_are_few():
    lengths = range(1, 2049)
    sizes = [padded_length(n) for n in lengths]
    assert all(n <= size <= max(n + 7, 1.125 * n) for n, size in zip(lengths, sizes))
    assert sizes == sorted(sizes) and len(set(sizes)) == 16 + 4 * 8
    rooms = [cache_length(n) for n in lengths]
    most = [max(64, 2 * n) if n <= 256 else 1.25 * n for n in lengths]
    assert all(n <= room <= limit for n, room, limit in zip(lengths, rooms, most))
    assert len(set(rooms)) == 3 + 3 * 4


def test_memory_is_that_of_a_forward_pass(one_device):
    """At most 1.2 times it, of the largest batch with all its logits: the compiler's numbers."""
    model = TransformerConfig(
        vocab_size=4096,
        hidden=64,
        num_layers=2,
        attention=AttentionConfig(num_heads=2, head_dim=32),
        feed_forward=FeedForwardConfig(size=256),
    )
    _, params = initialize(model, generation_layout(), jax.random.key(0))
    scorer = LikelihoodScorer(TextGenerator(Generator(model, params), ByteTokenizer()), 8)
    program, weights = scorer.program, scorer.generator.weights
    rows, columns = 8, 256
    batch = right_padded([[1] * columns] * rows, rows, columns)
    graph, _ = abstract(model, generation_layout())

    def forward(params, batch):
        whole = nnx.merge(graph, params)
        return whole.logits(whole(batch)[0])

    def memory(function, *arguments):
        leaves, tree = jax.tree.flatten(arguments)

        def flat(leaves):  # of classes that check what lowering puts into them
            return jax.tree.leaves(function(*tree.unflatten(leaves)))

        found = jax.jit(flat).lower(leaves).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    def last(weights, batch):
        sizes = {"length": cache_length(columns), "rows": rows}
        return program._last(weights, batch, None, **sizes)

    most = 1.2 * memory(forward, params, batch)
    assert memory(last, weights, batch) < most
    hidden, cache = last(weights, scorer.generator.put_on_devices(batch))
    assert memory(program._behind, weights, cache, np.zeros(rows, np.int32), batch) < most
    at = grouped(range(rows * columns), model.vocab_size)
    states = jnp.zeros((rows * columns, 64), hidden.dtype)
    taken = jax.eval_shape(program._taken, states, at)
    held = taken.size * taken.dtype.itemsize
    assert memory(program._scores, weights, taken, at[..., None]) + held < most
