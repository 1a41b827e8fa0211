"""Beam search against brute force over all sequences, against a search in numpy, and greedy."""

from itertools import product

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError
from lmjax.generation import BeamSearch, Generator, Sampling
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    initialize,
)
from lmjax.models.batch import plain_batch
from lmjax.models.initializers import Normal
from lmjax.parallel import Mesh, generation_layout

VOCABULARY, END = 4, 3
CONFIG = TransformerConfig(
    vocab_size=VOCABULARY,
    hidden=16,
    num_layers=2,
    max_length=16,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
    initializer=Normal(std=0.5),  # distributions far from uniform
)
PROMPTS = [[1, 2, 0], [2], [0, 0, 1, 1, 2], [1, 0]]


@pytest.fixture(scope="module")
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


class Model:
    """A random model, its search, and its log-probabilities without a cache."""

    def __init__(self, seed):
        graph, self.params = initialize(CONFIG, generation_layout(), jax.random.key(seed))
        self.generator = Generator(CONFIG, self.params)
        self.search = BeamSearch(self.generator)
        graph, _ = abstract(CONFIG, generation_layout())

        @jax.jit
        def run(batch):
            model = nnx.merge(graph, self.params)
            return jax.nn.log_softmax(model.logits(model(batch)[0])[..., :VOCABULARY])

        self._run, self._known = run, {}

    def log_probabilities(self, tokens):
        """Of each possible next token."""
        if tuple(tokens) not in self._known:
            padded = np.array([list(tokens) + [0] * (CONFIG.max_length - len(tokens))], np.int32)
            found = np.asarray(self._run(plain_batch(padded)), np.float64)[0]
            self._known[tuple(tokens)] = found[len(tokens) - 1]
        return self._known[tuple(tokens)]


@pytest.fixture(scope="module", params=[0, 1])
def model(mesh, request):
    return Model(request.param)


def brute_force(model, prompt, length, end, penalty):
    """Score and tokens of every sequence that ends or has `length` tokens, the best first."""
    found = {}
    for sequence in product(range(VOCABULARY), repeat=length):
        tokens = sequence[: sequence.index(end) + 1] if end in sequence else sequence
        total = sum(
            model.log_probabilities([*prompt, *tokens[:place]])[token]
            for place, token in enumerate(tokens)
        )
        text = tokens[:-1] if tokens[-1] == end else tokens
        found[tokens] = total / len(tokens) ** penalty, list(text)
    return sorted(found.values(), key=lambda pair: -pair[0])


def numpy_search(model, prompt, beams, length, end, penalty):
    """Beam search with lists, as its description says."""
    running, ended = [(0.0, [])], []
    for place in range(1, length + 1):
        ranked = sorted(
            (
                (total + model.log_probabilities([*prompt, *tokens])[token], [*tokens, token])
                for total, tokens in running
                for token in range(VOCABULARY)
            ),
            key=lambda pair: -pair[0],
        )
        running = []
        for rank, (total, tokens) in enumerate(ranked):
            if tokens[-1] == end or place == length:
                if rank < beams:
                    text = tokens[:-1] if tokens[-1] == end else tokens
                    ended.append((total / place**penalty, text))
            else:
                running.append((total, tokens))
        running = running[:beams]
        ended = sorted(ended, key=lambda pair: -pair[0])[:beams]
        if len(ended) == beams and running and running[0][0] / place**penalty <= ended[-1][0]:
            break
    return ended


def compare(found, expected):
    """The same hypotheses; scores to 2e-5, float32 sums in another order."""
    assert [row.tokens for row in found] == [tokens for _, tokens in expected]
    scores = [row.score for row in found]
    np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=0, atol=2e-5)


@pytest.mark.parametrize("end", [END, None])
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_enough_beams_are_brute_force(model, end, penalty):
    """With a beam for each of the 64 sequences of 3 tokens nothing can be lost."""
    stop = [] if end is None else [end]
    found = model.search(PROMPTS, 64, penalty, max_tokens=3, stop_tokens=stop)
    for prompt, rows in zip(PROMPTS, found):
        expected = brute_force(model, prompt, 3, end, penalty)
        compare(rows, expected[:64])


@pytest.mark.parametrize("beams", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("end", [END, None])
def test_few_beams_are_those_of_a_search_with_lists(model, beams, end):
    """Prompts of different lengths in one batch, which end at different steps."""
    stop = [] if end is None else [end]
    for penalty in (0.0, 1.0):
        found = model.search(PROMPTS, beams, penalty, max_tokens=8, stop_tokens=stop)
        for prompt, rows in zip(PROMPTS, found):
            compare(rows, numpy_search(model, prompt, beams, 8, end, penalty))


def test_one_beam_is_greedy(model):
    greedy = Sampling(temperature=0.0)
    for stop in ([], [END]):
        expected = model.generator.generate(PROMPTS, greedy, max_tokens=10, stop_tokens=stop)
        found = model.search(PROMPTS, 1, max_tokens=10, stop_tokens=stop)
        if stop:  # an end token takes one of the ten
            assert [rows[0].tokens for rows in found] == expected
        else:
            assert [[row.tokens for row in rows] for rows in found] == [[row] for row in expected]


def test_hypotheses_end_where_the_context_does(model):
    """A context of 16: its last token is followed by one more, which nothing follows."""
    rows = model.search([[1] * 14, [1] * 16, [1]], 2, max_tokens=5)
    assert [[len(row.tokens) for row in best] for best in rows] == [[3, 3], [1, 1], [5, 5]]


def test_a_mesh_finds_what_one_device_does(mesh):
    """Rows that divide the mesh and prompts that do not; scores to 2e-5."""
    model = Model(0)
    expected = model.search(PROMPTS[:3], 4, max_tokens=6, stop_tokens=[END])
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        _, params = initialize(CONFIG, generation_layout(), jax.random.key(0))
        search = BeamSearch(Generator(CONFIG, params))
        found = search(PROMPTS[:3], 4, max_tokens=6, stop_tokens=[END])
    for rows, one_device in zip(found, expected):
        compare(rows, [(row.score, row.tokens) for row in one_device])


def test_mistakes_and_nothing(mesh):
    search = BeamSearch(Generator(CONFIG, Model(0).params))
    with pytest.raises(UserError, match="beams=0"):
        search(PROMPTS, 0)
    with pytest.raises(UserError, match="length_penalty=nan"):
        search(PROMPTS, 2, float("nan"))
    with pytest.raises(UserError, match="prompt 2 is empty"):
        search([[1], []])
    assert search([]) == [] and search([[1]], max_tokens=0) == [[]]
