"""Ids that no model has are found on the host, wherever in a batch they are."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lmjax.config import UserError
from lmjax.models import Batch, check_tokens, plain_batch
from lmjax.objectives import Example, TokenTargets
from lmjax.objectives.example import check_example
from lmjax.parallel import Mesh, training_layout
from lmjax.training.placement import to_devices

VOCABULARY = 50
weights = arrays(np.float32, (2, 3), elements=st.sampled_from([0.0, 0.5]))
ids = arrays(np.int32, (2, 3), elements=st.integers(-2, VOCABULARY + 1))


def example(tokens, targets, source, weights=None):
    """An example of these; without a source it has no encoder, and without weights they are 1."""
    encoder = None if source is None else plain_batch(source)
    weights = np.ones(targets.shape, np.float32) if weights is None else weights
    inputs = dataclasses.replace(plain_batch(tokens), encoder=encoder)
    return Example(inputs, TokenTargets(targets, weights))


@given(ids, ids, ids | st.none(), weights | st.none())
def test_every_id_is_looked_at(tokens, targets, source, weights):
    named = {"tokens": tokens, "encoder.tokens": source, "targets": targets}
    wrong = {
        f"{name}{list(place)}": value
        for name, values in named.items()
        if values is not None
        for place, value in np.ndenumerate(values)
        if value not in range(VOCABULARY)
        and (name != "targets" or weights is None or weights[place] > 0)
    }
    try:
        check_example(example(tokens, targets, source, weights), VOCABULARY)
    except UserError as error:
        place, value = next(iter(wrong.items()))  # the first
        assert str(error).startswith(f"{place} of the batch is {value}; ")
        assert "the tokens 0 to 49" in str(error)
    else:
        assert not wrong


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 127, 128, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("where", ["tokens", "targets", "encoder.tokens"])
def test_they_do_not_reach_the_devices(one_device, where, wrong):
    """Rows up to 128 are in the padded table: they were never trained."""
    arrays = {name: np.zeros((2, 3), np.int32) for name in ("tokens", "targets", "encoder.tokens")}
    arrays[where][1, 2] = wrong
    with pytest.raises(UserError, match=rf"^{where}\[1, 2\] of the batch is {wrong};"):
        to_devices(example(*arrays.values()), training_layout(), VOCABULARY)


def test_what_is_right_is_placed():
    with jax.set_mesh(Mesh(fsdp=2).build(jax.devices()[:2])):
        tokens = np.array([[0, 1], [48, 49]])
        placed = to_devices(example(tokens, tokens, None), training_layout(), VOCABULARY).inputs
        assert isinstance(placed, Batch) and isinstance(placed.tokens, jax.Array)
        np.testing.assert_array_equal(np.asarray(placed.tokens), tokens)
    check_tokens(plain_batch(np.zeros((0, 4), np.int32)), VOCABULARY)  # nothing is wrong in nothing
