"""Decoding with the cache: equal to the model without it, row by row, on any mesh."""

from itertools import chain
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.generation import BeamSearch, Generator, Sampling
from lmjax.generation.beams import BeamDecoder
from lmjax.generation.decoder import Decoder
from lmjax.generation.prompts import left_padded
from lmjax.interop import huggingface
from lmjax.models import Batch, abstract, make_cache
from lmjax.models.batch import plain_batch
from lmjax.parallel import Mesh, generation_layout

PARITY = Path(__file__).parents[2] / "data" / "parity"
GREEDY = Sampling(temperature=0.0)
RANDOM = Sampling(temperature=1.3, top_k=30, top_p=0.95, seed=5)
PADDED, NEW = 16, 8  # tokens of a batch of prompts, and after them
PROGRAMS = Decoder.start, Decoder.go_on, BeamDecoder.start, BeamDecoder.finish


@pytest.fixture(scope="module")
def mesh():
    """One device, set for this module's tests."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def model(mesh):
    """A LLaMA with two key heads for four query heads: random weights, context of 64."""
    return huggingface.read(PARITY / "llama2_gqa", generation_layout())


@pytest.fixture(scope="module")
def generator(model):
    config, _, params = model
    return Generator(config, params)


def banded(config):
    """The same model with a band of 5 in every other layer."""
    return replace(config, attention=replace(config.attention, windows=(None, 5)))


def prompts(seed, lengths):
    """Random prompts."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 97, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def functions(model):
    """Logits of prompts through an empty cache, of more tokens, and of whole rows without one.

    The model has a band of 5 in its second layer, which padding must not shift, and of which the
    cache keeps no more.
    """
    config, _, params = model
    config = banded(config)
    graph, _ = abstract(config, generation_layout())

    def run(batch, cache):
        batch = jax.tree.map(lambda a: generation_layout().reshard(a, "batch", None), batch)
        hidden, cache = nnx.merge(graph, params)(batch, cache)
        return nnx.merge(graph, params).logits(hidden), cache

    empty = make_cache(config, generation_layout(), 3, PADDED + NEW)
    assert [keys.shape[2] for keys in empty.keys] == [PADDED + NEW, 5]
    prefill = jax.jit(lambda batch: run(batch, empty))
    return prefill, jax.jit(run), jax.jit(lambda batch: run(batch, None)[0])


@settings(max_examples=15)
@given(st.lists(st.integers(1, PADDED), min_size=3, max_size=3), st.integers(0, 99))
def test_cached_is_uncached(functions, lengths, seed):
    """2e-5 absolute on logits of about 2: the same sums in another order."""
    prefill, step, whole = functions
    rows = prompts(seed, [length + NEW for length in lengths])

    logits, cache = prefill(left_padded([row[:-NEW] for row in rows], PADDED))
    cached = [np.asarray(logits)[:, -1]]
    for place in range(NEW):
        index = np.array(lengths) + place
        batch = Batch(
            tokens=np.array([[row[i]] for row, i in zip(rows, index)], np.int32),
            positions=index[:, None].astype(np.int32),
            segments=np.ones((3, 1), np.int32),
        )
        logits, cache = step(batch, cache)
        cached.append(np.asarray(logits)[:, 0])

    # The same rows the other way round: from the left end, padding after them.
    tokens, segments = np.zeros((2, 3, PADDED + NEW), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    positions = np.broadcast_to(np.arange(PADDED + NEW, dtype=np.int32), tokens.shape)
    uncached = np.asarray(whole(Batch(tokens=tokens, positions=positions, segments=segments)))
    for i, length in enumerate(lengths):
        expected = uncached[i, length - 1 : length + NEW]
        np.testing.assert_allclose([row[i] for row in cached], expected, rtol=0, atol=2e-5)


@settings(max_examples=4)
@given(st.permutations([1, 3, 5, 7]), st.integers(0, 99))
def test_a_cache_is_filled_in_any_pieces(functions, pieces, seed):
    """Shorter and longer than the band, and as long; 2e-5 as above."""
    prefill, step, whole = functions
    tokens = np.random.default_rng(seed).integers(0, 97, (3, PADDED + NEW), np.int32)

    def batch(start, stop):
        shape = (3, stop - start)
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), shape)
        return Batch(tokens[:, start:stop], positions, np.ones(shape, np.int32))

    start = PADDED + NEW - sum(pieces)
    logits, cache = prefill(batch(0, start))
    found = [logits]
    for piece in pieces:
        logits, cache = step(batch(start, start + piece), cache)
        found.append(logits)
        start += piece
    expected = whole(batch(0, PADDED + NEW))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=2e-5)


def test_a_prefix_that_sees_itself_whole(functions):
    """Through the cache, the ring of the second layer's band too; 2e-5 as above.

    The prefix is read at once; two more pieces, in which all tokens see each other as well, follow.
    """
    prefill, step, whole = functions
    tokens = np.random.default_rng(0).integers(0, 97, (3, PADDED + NEW), np.int32)
    places = np.arange(PADDED + NEW)
    pieces = [(0, PADDED - 3), (PADDED - 3, PADDED + 4), (PADDED + 4, PADDED + 5)]
    ranks = np.array([max(start for start, _ in pieces if start <= place) for place in places])

    def batch(start, stop):
        positions, rank = (
            np.broadcast_to(a[start:stop].astype(np.int32), (3, stop - start))
            for a in (places, ranks)
        )
        rank = None if stop - start == 1 else rank  # a token alone sees all before it
        return Batch(tokens[:, start:stop], positions, np.ones_like(positions), ranks=rank)

    logits, cache = prefill(batch(*pieces[0]))
    found = [logits]
    for piece in pieces[1:]:
        logits, cache = step(batch(*piece), cache)
        found.append(logits)
    end = pieces[-1][1]
    expected = whole(batch(0, end))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=0, atol=2e-5)


def test_a_row_does_not_depend_on_its_batch(generator):
    """Row i of a batch is the prompt alone with the seed raised by i, whatever the padding."""
    batch = prompts(1, [3, 16, 9])
    together = generator.generate(batch, RANDOM, max_tokens=12)
    for i, prompt in enumerate(batch):
        alone = generator.generate([prompt], replace(RANDOM, seed=RANDOM.seed + i), max_tokens=12)
        assert alone == together[i : i + 1]
    assert together != generator.generate(batch, replace(RANDOM, seed=77), max_tokens=12)


def test_layers_scanned_or_apart_are_the_same(model, generator):
    """On CPUs they lie apart; the pattern of windows then is as long as the depth."""
    config, _, params = model
    apart, scanned = (Generator(banded(config), params, unstack=way) for way in (True, False))
    jax.tree.map(np.testing.assert_array_equal, apart.params, scanned.params)
    found = apart.generate(prompts(1, [3, 16]), RANDOM, max_tokens=12)
    assert found == scanned.generate(prompts(1, [3, 16]), RANDOM, max_tokens=12)
    assert found != generator.generate(prompts(1, [3, 16]), RANDOM, max_tokens=12)


def test_streaming_gives_the_same_tokens(generator):
    batch = prompts(1, [3, 16, 9])
    parts = list(generator.stream(batch, RANDOM, max_tokens=12, interval=1))
    assert [len(part[0]) for part in parts] == [1] * 12
    whole = generator.generate(batch, RANDOM, max_tokens=12)
    assert [list(chain(*rows)) for rows in zip(*parts)] == whole
    parts = generator.stream(batch, RANDOM, max_tokens=12)
    assert [list(chain(*rows)) for rows in zip(*parts)] == whole


def test_rows_end_before_a_stop_token(generator):
    batch = prompts(1, [3, 16, 9])
    free = generator.generate(batch, RANDOM, max_tokens=12)
    stop = [free[0][4], free[2][7]]
    stopped = generator.generate(batch, RANDOM, max_tokens=12, stop_tokens=stop)
    for row, cut in zip(free, stopped):
        places = [i for i, token in enumerate(row) if token in stop]
        assert cut == row[: places[0] if places else None]
    assert len(stopped[0]) <= 4 and len(stopped[2]) <= 7


def test_rows_end_where_the_context_does(generator):
    """A context of 64: its last token is followed by one more, which nothing follows."""
    rows = generator.generate(prompts(2, [64, 60, 5]), GREEDY, max_tokens=12)
    assert [len(row) for row in rows] == [1, 5, 12]


def test_padding_of_the_vocabulary_is_never_drawn(generator):
    """97 tokens, padded to 128: of 36 almost uniform draws none would miss the 31 others."""
    rows = generator.generate(prompts(3, [3, 16, 9]), Sampling(temperature=1e4), max_tokens=12)
    assert max(max(row) for row in rows) < 97
    assert len(set(chain(*rows))) > 20


@pytest.fixture(scope="module")
def uncached_logits(model):
    """Gives the logits after every token of one sequence, in float64, without a cache."""
    config, _, params = model
    graph, _ = abstract(config, generation_layout())

    @jax.jit
    def run(batch):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    def logits(tokens):
        padded = np.array([tokens + [0] * (config.max_length - len(tokens))], np.int32)
        found = np.asarray(run(plain_batch(padded)), np.float64)
        return found[0, : len(tokens), : config.vocab_size]

    return logits


def test_samples_of_a_prompt_are_its_copies(generator):
    """Three rows of each prompt, together, with the seeds of a batch that has each three times."""
    batch = prompts(1, [3, 16])
    copies = [prompt for prompt in batch for _ in range(3)]
    expected = generator.generate(copies, RANDOM, max_tokens=12)
    assert generator.generate(batch, RANDOM, max_tokens=12, samples=3) == expected
    assert len({tuple(row) for row in expected}) == 6
    with pytest.raises(UserError, match="samples=0"):
        generator.generate(batch, samples=0)


@pytest.mark.parametrize("sampling", [GREEDY, replace(RANDOM, repetition_penalty=1.5)])
def test_log_probabilities_are_the_models_own(generator, uncached_logits, sampling):
    """Whatever temperature, filters and penalty chose; 2e-5: float32 sums in another order."""
    batch = prompts(1, [3, 16])
    found = generator.continuations(batch, sampling, max_tokens=12)
    for prompt, row in zip(batch, found):
        logits = uncached_logits(prompt + row.tokens)[len(prompt) - 1 : -1]
        chosen = logits[range(len(row.tokens)), row.tokens]
        expected = chosen - np.log(np.exp(logits).sum(axis=1))
        np.testing.assert_allclose(row.log_probabilities, expected, rtol=0, atol=2e-5)


def test_log_probabilities_end_with_their_row(generator):
    batch = prompts(1, [3, 16, 9])
    free = generator.continuations(batch, RANDOM, max_tokens=12)
    rows = generator.continuations(batch, RANDOM, max_tokens=12, stop_tokens=[free[0].tokens[4]])
    assert len(rows[0].tokens) <= 4
    for row, longer in zip(rows, free):
        assert row.log_probabilities == longer.log_probabilities[: len(row.tokens)]


@pytest.mark.parametrize("penalty", [0.8, 1.3, 1e6])
def test_greedy_with_a_penalty_is_that_of_a_loop(generator, uncached_logits, penalty):
    """The next token worked out in numpy, one by one, from the model without a cache."""
    batch = prompts(1, [3, 16])
    found = generator.generate(batch, replace(GREEDY, repetition_penalty=penalty), max_tokens=8)
    for prompt, row in zip(batch, found):
        tokens = list(prompt)
        for _ in range(8):
            logits = uncached_logits(tokens)[-1]
            for token in set(tokens):
                logits[token] *= penalty if logits[token] < 0 else 1 / penalty
            tokens.append(int(logits.argmax()))
        assert row == tokens[len(prompt) :]
        if penalty == 1e6:  # every positive logit becomes 0: nothing comes twice
            assert len(set(tokens[len(prompt) :]) - set(prompt)) == 8


def test_new_numbers_do_not_compile_anew(generator):
    batch, sampling = prompts(1, [3]), replace(RANDOM, min_p=0.02, repetition_penalty=1.2)
    generator.generate(batch, sampling, max_tokens=4)
    compiled = [program._cache_size() for program in PROGRAMS]
    other = replace(sampling, temperature=0.7, top_p=0.8, min_p=0.1, repetition_penalty=1.4, seed=9)
    generator.generate(batch, other, max_tokens=4)
    assert [program._cache_size() for program in PROGRAMS] == compiled


def test_new_weights_do_not_compile_anew(generator):
    """A generator of other parameters has the programs of the first, and other texts."""
    batch = prompts(1, [3, 16, 9])  # compiled for the tests before
    first = generator.generate(batch, RANDOM, max_tokens=12)
    found = BeamSearch(generator)(batch, beams=2, max_tokens=4)
    compiled = [program._cache_size() for program in PROGRAMS]
    other = Generator(generator.config, jax.tree.map(lambda a: -a, generator.params))
    assert other.generate(batch, RANDOM, max_tokens=12) != first
    assert BeamSearch(other)(batch, beams=2, max_tokens=4) != found
    assert [program._cache_size() for program in PROGRAMS] == compiled


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 2 is empty"),
        ([1] * 65, "prompt 2 has 65 tokens, more than the 64"),
        ([1, 97], "prompt 2 has the token 97; the model's are 0 to 96"),
        ([-1], "token -1"),
    ],
)
def test_prompts_that_cannot_be_continued(generator, prompt, message):
    with pytest.raises(UserError, match=message):
        generator.generate([[1, 2], prompt], GREEDY)


def test_a_model_of_no_numbers_is_named(model, generator):
    """Otherwise NaN has its largest value in the first place, and token 0 looks like a choice."""
    broken = jax.tree.map(lambda a: a * np.nan, generator.params)
    generator = Generator(model[0], broken)
    for stop in ((), (0,)):
        with pytest.raises(UserError, match="no probabilities"):
            generator.generate([[1, 2]], GREEDY, 3, stop)
    with pytest.raises(UserError, match="no probabilities"):
        BeamSearch(generator)([[1, 2]], beams=2, max_tokens=3)


def test_nothing_asked_for_is_nothing_given(generator):
    assert generator.generate([]) == []
    assert generator.generate([[1]], max_tokens=0) == [[]]


def test_a_mesh_gives_the_tokens_of_one_device(model):
    """Rows over data x fsdp; the parity tests have two, which do not divide."""
    config, _, params = model
    generator = Generator(banded(config), params)
    batch = prompts(4, [3, 16])
    penalised = replace(RANDOM, repetition_penalty=1.3, min_p=0.01)
    samples = generator.continuations(batch, penalised, max_tokens=12, samples=4)
    with jax.set_mesh(Mesh(data=2, fsdp=2, tensor=2).build()):
        config, _, params = huggingface.read(PARITY / "llama2_gqa", generation_layout())
        generator = Generator(banded(config), params)
        found = generator.continuations(batch, penalised, max_tokens=12, samples=4)
    for row, one_device in zip(found, samples):
        assert row.tokens == one_device.tokens
        expected = one_device.log_probabilities  # 2e-5: sums in another order
        np.testing.assert_allclose(row.log_probabilities, expected, rtol=0, atol=2e-5)


def test_half_precision_computes_as_the_model_does(model):
    """Weights cast beforehand give the logits of weights cast where they are used, bit for bit."""
    config, _, params = model
    config = replace(config, dtype="bfloat16")
    generator = Generator(config, params)
    found = generator.params
    assert found["blocks"]["attention"]["query"]["weight"].dtype == jnp.bfloat16
    graph, _ = abstract(config, generation_layout())
    batch = left_padded(prompts(5, [16]), 16)

    def logits(params):
        model = nnx.merge(graph, params)
        return model.logits(model(batch)[0])

    expected = jax.jit(logits)(params)
    np.testing.assert_array_equal(jax.jit(logits)(found), expected)


@pytest.mark.parametrize(("kind", "bound", "size"), [("int8", 0.02, 0.4), ("fp8", 0.1, 0.25)])
def test_a_cache_in_8_bits_is_near_one_in_float32(model, kind, bound, size):
    """Logits after each token, to a share of the largest, and the bytes of the cache.

    A number of int8 is wrong by a 254th of the largest of its head, one of fp8 by a 16th of itself.
    Heads have 8 numbers, for which int8 needs a scale of 4 bytes. Rows put into another cache give
    the same.
    """
    config, _, params = model
    rows, found = prompts(5, [3, 11, PADDED]), {}
    more = np.random.default_rng(6).integers(0, 97, (NEW, 3), np.int32)
    for cache in (None, kind):
        decoder = Generator(banded(config), params, cache=cache)
        batch = decoder.put_on_devices(left_padded(rows, PADDED))
        logits, kept = decoder.decoder.prefill(decoder.weights, batch, length=PADDED + NEW)
        _, shorter = decoder.decoder.prefill(decoder.weights, batch)
        other = decoder.decoder.insert(decoder.decoder.free_rows(4, 32), [2, 0, 3], shorter)
        found[cache] = [logits]
        for tokens in more:
            logits, kept = decoder.decoder.step(decoder.weights, kept, tokens)
            found[cache].append(logits)
            spread = np.array([tokens[1], 0, tokens[0], tokens[2]], np.int32)
            logits, other = decoder.decoder.step(decoder.weights, other, spread)
            close = 2e-5 if cache is None else 2e-2  # a number may be rounded to another one
            again = np.asarray(logits)[[2, 0, 3]]
            np.testing.assert_allclose(again, found[cache][-1], rtol=0, atol=close)
        stacks = kept.keys, kept.values, kept.key_scales, kept.value_scales
        found[cache, "bytes"] = sum(a.nbytes for a in jax.tree.leaves(stacks))
    exact, near = (np.stack(found[cache]) for cache in (None, kind))
    np.testing.assert_array_equal(near[0], exact[0])  # a prompt sees what is computed of it
    worst = np.abs(near - exact).max() / np.abs(exact).max()
    assert 1e-4 < worst < bound
    assert found[kind, "bytes"] <= size * found[None, "bytes"]


def test_a_cache_in_int8_on_a_mesh(model):
    """Rows and heads on devices of their own: the texts of one device."""
    config, _, params = model
    expected = Generator(config, params, cache="int8").generate(prompts(2, [3, 7]), GREEDY, 8)
    with jax.set_mesh(Mesh(fsdp=2, tensor=2).build(jax.devices()[:4])):
        config, _, params = huggingface.read(PARITY / "llama2_gqa", generation_layout())
        found = Generator(config, params, cache="int8").generate(prompts(2, [3, 7]), GREEDY, 8)
    assert found == expected
