"""Models that read prompts from both sides (PrefixLM), served: what `lmjax.generation` gives."""

import pytest

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.generation import TextGenerator
from lmjax.generation.prompts import prefix_row
from lmjax.serving.engine import Engine
from lmjax.serving.request import CollectedAnswer
from lmjax.serving.start import served_model
from lmjax.serving.weights import ServedWeights
from tests.lmjax.serving.engines import (
    SMALL,
    answered,
    expected,
    make_generator,
    prompts,
    request,
)
from tests.lmjax.serving.test_engine import same

pytestmark = pytest.mark.usefixtures("mesh")
TIGHT = replace(SMALL, cache_tokens=128, guesses=3)  # so that requests take each other's pages


def prefix_engine(family="rotary", settings=SMALL, draft=None):
    weights = {"tiny": ServedWeights.of(make_generator(family), True)}
    return Engine(weights, settings, draft)


# A window is shorter than the prompts; scores of ALiBi go by distance.
@pytest.mark.parametrize(
    "family", ["windows_in_turn", pytest.param("alibi", marks=pytest.mark.slow)]
)
def test_answers_are_those_of_generation(family):
    requests = [request(tokens) for tokens in prompts(1, (3, 20, 31, 1, 25))]
    engine = prefix_engine(family)
    found = answered(engine, requests, [0, 1, 2, 2, 9])
    same(found, expected(requests, family, read=prefix_row))
    from_the_left = [row.tokens for row in expected(requests, family)]
    assert [one.ids for one in found] != from_the_left


@pytest.mark.parametrize("drafts", [False, True])
def test_texts_are_read_anew_and_guesses_checked(drafts):
    """A text without room is read again, prompt and answer each in its way; no pages are known."""
    requests = [request(tokens, 30) for tokens in prompts(3, (24, 25, 26, 24))]
    requests[3] = request(requests[0].tokens, 30)
    draft = ServedWeights.of(make_generator("rotary"), True) if drafts else None
    engine = prefix_engine(settings=TIGHT, draft=draft)
    found = answered(engine, requests)
    same(found, expected(requests, read=prefix_row))
    counts = engine.counts
    assert counts["suspended"] > 0 and counts["guessed_right"] > 0 and counts["known_tokens"] == 0
    if drafts:  # by the model itself: wrong where its own last guess was not read, and seldom else
        assert counts["guessed_right"] > 0.8 * counts["guessed"]


def test_what_cannot_be_had_is_refused():
    with pytest.raises(UserError, match=r"from both sides \(PrefixLM\).*set echo=false"):
        prefix_engine().submit(request([1, 2], score_prompt=True), CollectedAnswer())
    draft = ServedWeights.of(make_generator("rotary"))
    with pytest.raises(UserError, match="draft: one of the two models reads prompts from both"):
        prefix_engine(settings=TIGHT, draft=draft)


def test_a_server_says_how_it_reads(capsys):
    text = TextGenerator(make_generator(), ByteTokenizer(), reads_prefix=True)
    served = served_model("tiny", text, "no chat", SMALL, 10)
    assert "tiny reads prompts from both sides (PrefixLM): each is read at once" in (
        capsys.readouterr().err
    )
    requests = [request(tokens) for tokens in prompts(1, (20,))]
    same(answered(served.engine, requests), expected(requests, read=prefix_row))
