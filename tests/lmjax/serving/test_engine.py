"""The engine answers what `lmjax.generation` does, whatever else it does at the time."""

import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.generation import Sampling
from lmjax.serving.engine import UnknownModel
from lmjax.serving.request import CollectedAnswer
from lmjax.serving.weights import ServedWeights
from lmjax.serving.worker import QueueFull
from tests.lmjax.serving.engines import (
    SMALL,
    answered,
    assert_idle,
    expected,
    make_engine,
    make_generator,
    prompts,
    request,
)

pytestmark = pytest.mark.usefixtures("mesh")
TIGHT = replace(SMALL, cache_tokens=128)  # so that requests take pages from each other
GUESSING = replace(TIGHT, guesses=3)


def same(found, wanted):
    """Asserts that answers have the tokens, the probabilities and the ends of continuations."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.ids == theirs.tokens
        assert (ours.reason == "stop") == (theirs.stop is not None)
        scores = [token.log_probability for token in ours.tokens]
        # The order of sums in float32 is that of other shapes.
        np.testing.assert_allclose(scores, theirs.log_probabilities, atol=2e-4)


# Learned and plain rotary positions, ALiBi, windows of all layers: others have what these have.
@pytest.mark.parametrize(
    "family",
    [
        *("alibi_window", "windows_in_turn"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dynamic_ntk", "experts")),
    ],
)
def test_requests_that_come_and_go_are_answered_as_alone(family):
    requests = [request(tokens) for tokens in prompts(1, (3, 20, 31, 7, 25))]
    found = answered(make_engine(family), requests, [0, 1, 2, 2, 9])
    same(found, expected(requests, family))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_arrival_changes_an_answer(data):
    """Beginnings that are shared, pages that run out, stop tokens and guesses among them."""
    start = prompts(7, (24,))[0]
    requests, arrivals = [], []
    for seed in range(data.draw(st.integers(1, 5), "requests")):
        kept = data.draw(st.integers(0, 24), "beginning that is shared")
        own = prompts(seed, (data.draw(st.sampled_from((1, 4, 7)), "own tokens"),))[0]
        stops = data.draw(st.sampled_from(((), (0, 7, 18, 56))), "stop tokens")
        requests.append(request([*start[:kept], *own], 12, stop_tokens=stops))
        arrivals.append(data.draw(st.integers(0, 12), "arrival"))
    how = data.draw(st.sampled_from((SMALL, TIGHT, GUESSING)), "settings")
    how = replace(how, prefix_cache=data.draw(st.booleans(), "prefix cache"))
    engine = make_engine(settings=how)
    same(answered(engine, requests, arrivals), expected(requests))


def test_requests_without_room_go_on_later():
    requests = [request(tokens, 40) for tokens in prompts(3, (24, 25, 26))]
    engine = make_engine(settings=TIGHT)
    same(answered(engine, requests), expected(requests))
    assert engine.counts["suspended"] > 0


def test_draws_are_those_of_the_generator():
    """With its seed, whoever else draws in other ways."""
    ways = [
        Sampling(temperature=1.3, seed=5),
        Sampling(temperature=1.0, top_k=9, top_p=0.8, min_p=0.05, seed=8),
        Sampling(temperature=2.0, min_p=0.2, repetition_penalty=1.4, seed=9),
    ]
    texts = prompts(4, (5, 9, 12))
    requests = [request(text, 10, sampling=way) for text, way in zip(texts, ways)]
    wanted = expected(requests)
    engine = make_engine()
    same(answered(engine, requests, [0, 1, 4]), wanted)
    same(answered(engine, requests[::-1]), wanted[::-1])


def test_a_known_beginning_is_not_read_again():
    engine = make_engine()
    (text,) = prompts(5, (30,))
    requests = [request(text), request(text), request([*text[:17], 1, 2, 3])]
    (first,) = answered(engine, requests[:1])
    assert first.cached == 0 and engine.counts["read_tokens"] == 30
    others = answered(engine, requests[1:])
    assert [one.cached for one in others] == [28, 16]  # pages of 4; the last token is always read
    assert engine.counts["read_tokens"] == 30 + 2 + 4
    same([first, *others], expected(requests))


def test_several_answers_to_one_prompt_share_its_pages():
    engine = make_engine()
    (text,) = prompts(6, (30,))
    ways = [Sampling(temperature=1.0, seed=seed) for seed in range(3)]
    requests = [request(text, sampling=way) for way in ways]
    found = answered(engine, requests)
    same(found, expected(requests))
    assert [one.cached for one in found] == [0, 28, 28]
    assert len({tuple(one.ids) for one in found}) == 3


def test_known_pages_make_room_for_new_ones():
    """The least recently used goes first, and nothing leaks over many texts."""
    engine = make_engine(settings=TIGHT)
    texts = prompts(8, (30,) * 6)
    for text in texts:
        same(answered(engine, [request(text)]), expected([request(text)]))
    assert engine.load().known_pages <= 32
    (last,) = answered(engine, [request(texts[-1])])
    (first,) = answered(engine, [request(texts[0])])
    assert (last.cached, first.cached) == (28, 0)


def test_guesses_save_steps_and_change_nothing():
    (text,) = prompts(9, (6,))
    requests = [request(text * 4, 40), request([1, 2, 3], 20)]
    plain, guessing = make_engine(), make_engine(settings=replace(SMALL, guesses=3))
    wanted = expected(requests)
    same(answered(plain, requests), wanted)
    same(answered(guessing, requests), wanted)
    right = guessing.counts["guessed_right"]
    assert 0 < right <= guessing.counts["guessed"]
    assert guessing.counts["steps"] < plain.counts["steps"]


def test_a_smaller_model_guesses_and_changes_nothing():
    """The model itself guesses right always; another one sometimes; both leave the answers."""
    requests = [request(text, most) for text, most in zip(prompts(16, (6, 20, 9)), (30, 12, 3))]
    requests.append(request(prompts(17, (7,))[0], 12, sampling=Sampling(temperature=1.0, seed=3)))
    wanted = expected(requests)
    itself, another = make_generator(), make_generator("learned")
    for draft, always, sizes in ((itself, True, SMALL), (another, False, TIGHT)):
        engine = make_engine(settings=replace(sizes, guesses=3), draft=draft)
        same(answered(engine, requests, [0, 1, 3, 5]), wanted)
        guessed, right = (engine.counts[name] for name in ("guessed", "guessed_right"))
        assert guessed > 10 and (not always or right > 0.9 * guessed)


def test_a_prompt_is_scored():
    engine = make_engine()
    (text,) = prompts(10, (20,))
    (written,) = answered(engine, [request(text, tops=3)])
    scoring = request([*text, *written.ids], 0, score_prompt=True, tops=3)
    (scored,) = answered(engine, [scoring])
    assert scored.reason == "length" and scored.tokens == [] and scored.cached == 0
    assert [token.token for token in scored.prompt] == [*text, *written.ids]
    assert scored.prompt[0].log_probability is None
    for read, chosen in zip(scored.prompt[20:], written.tokens, strict=True):
        assert read.log_probability == pytest.approx(chosen.log_probability, abs=2e-4)
        assert [token for token, _ in read.tops] == [token for token, _ in chosen.tops]
        assert len(read.tops) == 3 and read.tops[0][0] == read.token


def test_penalties_and_bias_are_of_one_request_alone():
    text, other = prompts(11, (6, 7))
    plain, neighbour = expected([request(text), request(other)])
    forced = request(text, logit_bias={17: 100.0})
    repeated = request(text, frequency_penalty=100.0)
    present = request(text, presence_penalty=100.0)
    found = answered(make_engine(), [forced, request(other), repeated, present, request(text)])
    assert found[0].ids == [17] * 12
    assert found[1].ids == neighbour.tokens and found[4].ids == plain.tokens
    for one in found[2:4]:
        assert len(set(one.ids)) == 12 and one.ids[0] == plain.tokens[0]


def test_what_is_cancelled_holds_nothing():
    engine = make_engine()
    requests = [request(tokens, 40) for tokens in prompts(12, (30, 9, 8, 7, 6))]
    answers = [CollectedAnswer() for _ in requests]
    numbers = [engine.submit(*pair) for pair in zip(requests, answers)]
    for _ in range(4):
        engine.step()
    assert engine.load().waiting == 2
    for which in (0, 2, 4):  # one that is written, one that is read, one that waits
        engine.cancel(numbers[which])
    engine.cancel(10_000)
    while engine.step():
        pass
    assert [one.reason for one in answers] == ["cancelled", "length"] * 2 + ["cancelled"]
    assert_idle(engine)
    engine.cancel(numbers[0])  # it has ended
    engine.step()
    assert answers[0].reason == "cancelled"


def test_clients_take_turns():
    engine = make_engine(settings=replace(SMALL, slots=1))
    many = [request([1, 2, n], 3, client="a") for n in range(4)]
    one = request([1, 2, 9], 3, client="b")
    order = []

    class Noted(CollectedAnswer):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def finish(self, reason, error=""):
            order.append(self.name)

    for number, each in enumerate([*many, one]):
        engine.submit(each, Noted(f"{each.client}{number}"))
    while engine.step():
        pass
    assert order == ["a0", "b4", "a1", "a2", "a3"]


def test_what_cannot_be_answered_is_refused():
    engine = make_engine(settings=replace(SMALL, queue=2, cache_tokens=64))

    def refused(error, text, **changes):
        wrong = dataclasses.replace(request([1, 2, 3]), **changes)
        with pytest.raises(error, match=text):
            engine.submit(wrong, CollectedAnswer())

    refused(UserError, "prompt 1 is empty", tokens=[])
    refused(UserError, "has the token 61", tokens=[61])
    refused(UserError, "has 97 tokens", tokens=[1] * 97)
    refused(UserError, "room for 64", tokens=[1] * 70)
    refused(UserError, "logit_bias: 99", logit_bias={99: 1.0})
    refused(UnknownModel, "no model 'other', only tiny", model="other")
    for _ in range(2):
        engine.submit(request([1]), CollectedAnswer())
    refused(QueueFull, "2 requests wait")
    assert engine.counts["refused"] == 1


def test_what_takes_too_long_ends():
    engine = make_engine(settings=replace(SMALL, slots=1, queue_seconds=1e-6))
    late = CollectedAnswer()
    engine.submit(request([1]), late)
    engine.step()
    assert late.reason == "error" and "waited for too long" in late.error
    engine = make_engine()
    slow, other = answered(engine, [request([1], 40, seconds=1e-6), request([2])])
    assert slow.reason == "length" and len(slow.ids) < 40 and len(other.ids) == 12


def test_a_text_fills_the_context_and_no_more():
    requests = [request(tokens, 500) for tokens in prompts(13, (90, 96))]
    found = answered(make_engine(), requests)
    assert [len(one.ids) for one in found] == [7, 1]
    same(found, expected(requests))


def test_new_weights_are_for_new_requests():
    """What is written goes on with the weights that it began with, and with their pages."""
    engine = make_engine()
    (text,) = prompts(14, (30,))
    old, new = CollectedAnswer(), CollectedAnswer()
    engine.submit(request(text), old)
    for _ in range(4):
        engine.step()
    engine.set_weights("tiny", ServedWeights.of(make_generator(seed=1)))
    engine.submit(request(text), new)
    while engine.step():
        pass
    assert old.ids == expected([request(text)])[0].tokens
    assert new.ids == expected([request(text)], seed=1)[0].tokens and new.cached == 0


def test_several_weights_are_served_at_once():
    engine = make_engine(other=make_generator(seed=1))
    texts = prompts(15, (9, 12))
    requests = [request(text, model=name) for text in texts for name in ("tiny", "other")]
    found = answered(engine, requests)
    for name, seed in (("tiny", 0), ("other", 1)):
        own = [(answer, one) for answer, one in zip(found, requests) if one.model == name]
        same([a for a, _ in own], expected([one for _, one in own], seed=seed))


def test_the_next_step_begins_before_tokens_are_read():
    """While nothing needs them: then the devices have a step while the host is at the last one."""
    (text,) = prompts(16, (9,))
    ahead = request(text, 5), request(text, 5, sampling=Sampling(temperature=1.5, seed=3))
    for one in ahead:
        assert [bool(engine._open) for engine in stepped(one)] == [True] * 3
    penalty = request(text, 5, presence_penalty=1.0)
    for one, how in ((penalty, SMALL), (ahead[0], GUESSING)):
        assert not any(engine._open for engine in stepped(one, how))


def stepped(one, how=SMALL):
    """An engine after each step that gives the request a token."""
    engine = make_engine(settings=how)
    engine.submit(one, CollectedAnswer())
    engine.step()
    while engine.load().writing:
        yield engine
        engine.step()


def test_a_step_ahead_of_who_lost_its_pages_is_forgotten():
    """The second one's are taken while its step runs, and it is read again before that is seen."""
    engine = make_engine(settings=replace(SMALL, cache_tokens=32), other=make_generator(seed=1))
    texts = prompts(0, (2,)) + prompts(1, (8,))
    requests = request(texts[0], 12), request(texts[1], 16, model="other")
    first, second = answered(engine, requests, most=100)
    assert engine.counts["suspended"] == 1
    same([first], expected(requests[:1]))
    same([second], expected(requests[1:], seed=1))


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_steps_ahead_change_no_answer(data):
    """Of two weights that take each other's pages, while requests end, come and are cancelled."""
    few = replace(SMALL, cache_tokens=48)
    engine = make_engine(settings=few, other=make_generator(seed=1))
    requests, answers, numbers, when = [], [], [], []
    for seed in range(data.draw(st.integers(1, 5), "requests")):
        text = prompts(seed, (data.draw(st.sampled_from((4, 24)), "tokens"),))[0]
        name = data.draw(st.sampled_from(("tiny", "other")), "model")
        stops = data.draw(st.sampled_from(((), (0, 7, 18, 56))), "stop tokens")
        steps = st.integers(0, 15), st.one_of(st.none(), st.integers(1, 30))
        requests.append(request(text, 24, model=name, stop_tokens=stops))
        answers.append(CollectedAnswer())
        when.append([data.draw(one, "arrival, cancelled") for one in steps])
    for step in range(2000):
        for number, (arrival, cancelled) in enumerate(when):
            if step == arrival:
                numbers.append((number, engine.submit(requests[number], answers[number])))
            if cancelled is not None and step == arrival + cancelled:
                engine.cancel(dict(numbers)[number])
        busy = engine.step()
        engine._book.check()
        if not busy and step > 50:
            break
    assert_idle(engine)
    assert not engine._open
    for name, seed in (("tiny", 0), ("other", 1)):
        own = [(a, one) for a, one in zip(answers, requests) if one.model == name]
        wanted = expected([one for _, one in own], seed=seed)
        for (answer, _), alone in zip(own, wanted, strict=True):
            length = len(answer.ids) if answer.reason == "cancelled" else None
            assert answer.ids == alone.tokens[:length]


def test_the_thread_answers_and_ends(mesh):
    import jax

    engine, stop = make_engine(), threading.Event()

    def work():
        with jax.set_mesh(mesh):
            engine.run(stop)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert engine.call(lambda: 7).result(20) == 7
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda: 1 / 0).result(20)
        ended = threading.Event()

        class Waited(CollectedAnswer):
            def finish(self, reason, error=""):
                super().finish(reason, error)
                ended.set()

        answer = Waited()
        engine.submit(request([1, 2, 3]), answer)
        assert ended.wait(60) and answer.reason == "length"
    finally:
        stop.set()
        engine.wake()
        thread.join()


def test_short_prompts_are_read_together():
    """Three of 5 tokens fit into a chunk of 64; one that begins as another finds its pages."""
    engine = make_engine(settings=replace(SMALL, slots=4, chunk=64))
    texts = prompts(7, (5, 5, 5))
    texts.append(texts[0] + [1])
    requests = [request(tokens) for tokens in texts]
    answers = [CollectedAnswer() for _ in requests]
    for one, answer in zip(requests, answers):
        engine.submit(one, answer)
    engine.step()
    load = engine.load()
    assert (load.reading, load.writing, engine.counts["known_tokens"]) == (1, 3, 0)
    engine.step()
    assert (engine.load().reading, engine.counts["known_tokens"]) == (0, SMALL.page)
    while engine.step():
        pass
    same(answers, expected(requests))
