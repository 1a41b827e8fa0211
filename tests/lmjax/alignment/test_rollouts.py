"""Replies as they are sampled: what ends them, and what their tokens are worth."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.alignment.rollouts import RolloutRows, divergence_rewards, sample_replies
from lmjax.data.chat.templates import PLAIN
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.generation.generator import Continuation
from lmjax.generation.prompts import tokens_of
from lmjax.generation.sampling import Sampling
from lmjax.models import Batch
from lmjax.training.feed import RolloutRequest

STOP = "\n\nUser:"


class Scripted:
    """A generator that writes given texts, and ends them where they end with a dot."""

    def __init__(self, texts):
        self.texts = texts

    def continuations(self, prompts, sampling, length, stops, samples, *_):
        assert len(prompts) * samples == len(self.texts)
        self.prompts = prompts
        found = []
        for text in self.texts:
            stop = ByteTokenizer().end if text.endswith(".") else None
            tokens = list(text.encode())
            found.append(Continuation(tokens, [-float(n) for n in range(len(tokens))], stop))
        return found


def replies(texts, template=PLAIN):
    request = RolloutRequest([1, 2], "", {"n": 1})
    settings = [request], Sampling(), 100, 0, len(texts)
    return sample_replies.__wrapped__(Scripted(texts), ByteTokenizer(), template, *settings)


@given(st.text("ab\n U"), st.text("abU:"))
def test_a_reply_ends_at_the_first_stop_string(before, after):
    """With the token that completes it, and as many log-probabilities as tokens."""
    text = before + STOP + after
    [found] = replies([text])
    assert found.reply.ended and found.reply.text == text[: text.index(STOP)]
    written = text[: text.index(STOP) + len(STOP)].encode()
    assert found.reply.tokens == [1, 2, *written]
    assert found.continuation.tokens == list(written)
    assert len(found.continuation.log_probabilities) == len(written)
    assert found.continuation.stop is None


@given(st.lists(st.text("abé.\n", max_size=20), min_size=1, max_size=4))
def test_other_replies_end_with_their_token_or_are_cut_off(texts):
    for template in (PLAIN, None):
        for text, found in zip(texts, replies(texts, template), strict=True):
            ended = text.endswith(".")
            assert (found.reply.text, found.reply.ended) == (text, ended)
            end = [ByteTokenizer().end] * ended
            assert found.reply.tokens == [1, 2, *text.encode(), *end]
            assert found.reply.metadata == {"n": 1}


def test_requests_are_read_as_the_model_learned_to():
    """From both sides: all tokens of a request have one rank."""
    for prefix in (False, True):
        writer, request = Scripted(["a"]), RolloutRequest([1, 2], "", {})
        settings = [request], Sampling(), 100, 0, 1, prefix
        sample_replies.__wrapped__(writer, ByteTokenizer(), None, *settings)
        [prompt] = writer.prompts
        assert list(tokens_of(prompt)) == [1, 2] and isinstance(prompt, Batch) == prefix
    assert prompt.ranks.tolist() == [0, 0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_rewards_of_tokens_are_those_of_a_loop(estimator):
    """The score at the last token of a reply, whatever stands in requests and padding."""
    generator = np.random.default_rng(0)
    policy, reference = generator.normal(size=(2, 3, 8)).astype(np.float32)
    scores = np.array([1.0, 0.0, -2.0])
    requests, replies = np.array([2, 3, 1], np.int32), np.array([3, 5, 1], np.int32)
    rows = RolloutRows(np.full((3, 8), 5, np.int32), requests, replies)
    expected, total = np.zeros((3, 8)), 0.0
    real = np.zeros((3, 8), bool)
    for row in range(3):
        for token in range(requests[row], requests[row] + replies[row]):
            lead = float(policy[row, token - 1]) - float(reference[row, token - 1])
            kl = {"k1": lead, "k2": lead**2 / 2, "k3": np.exp(-lead) - 1 + lead}[estimator]
            expected[row, token - 1], total = -0.5 * kl, total + kl / 3
            real[row, token - 1] = True
        expected[row, token - 1] += scores[row]
    spoilt = (np.where(real, a, np.float32(np.nan)) for a in (policy, reference))
    found, kl = divergence_rewards(rows, scores, *spoilt, jnp.float32(0.5), estimator)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert float(kl) == pytest.approx(total, rel=1e-6, abs=1e-6)
