"""Written answers: the same in any batch and order, without their stop strings; no NaN."""

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.requests import WrittenRequest
from lmjax.generation import generator
from tests.lmjax.evaluation.scored_models import read_model

PROMPTS = ("Q: is it?\nA:", "once", "", "a longer one, of 30 characters", "x \n")


def written(text, size, requests):
    return [answer.texts for answer in Answering(text, size).answers(requests)]


def test_texts_depend_on_neither_batch_nor_order(one_device):
    """Greedy ones, and drawn ones: each request has draws of its own."""
    text = read_model("llama2_gqa")
    requests = [
        WrittenRequest(prompt, (), 6, temperature, seed=3)
        for prompt in PROMPTS
        for temperature in (0.0, 1.0)
    ]
    wanted = written(text, 64, requests)
    assert len(set(wanted)) > 5
    for size in (1, 2, 7):
        assert written(text, size, requests) == wanted
    assert written(text, 7, requests[::-1]) == wanted[::-1]


def test_no_text_has_its_stop_string(one_device):
    """Stop strings are looked for in the text: here each spans two tokens of a character."""
    text = read_model("gpt2")
    [[whole]] = written(text, 4, [WrittenRequest("once", (), 10)])
    for start in range(len(whole) - 1):
        stop = whole[start : start + 2]
        [[found]] = written(text, 4, [WrittenRequest("once", ("never", stop), 10)])
        assert stop not in found and found == whole[: whole.index(stop)]


def test_one_nan_among_numbers_stops_the_evaluation():
    with pytest.raises(UserError, match="NaN"):
        generator.require_numbers(np.array([-1.0, np.nan, -2.0]))
    with pytest.raises(UserError, match="NaN"):
        generator.require_numbers(np.asarray(jnp.array([[0.0, -1.0], [jnp.nan, -1.0]])))
    generator.require_numbers(np.array([-1.0, -2.0]))
