"""What causal language modelling feeds the model."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmjax.objectives import CausalLM
from lmjax.objectives.causal_lm import positions_in_segments

SEEDS = np.zeros(1, np.uint64)


def test_inputs_targets_and_positions_of_a_packed_row():
    tokens = np.array([[9, 1, 2, 9, 3, 9, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 3, 0]], np.int32)
    batch = CausalLM().prepare(tokens, segments, SEEDS)
    np.testing.assert_array_equal(batch.tokens, [[9, 1, 2, 9, 3, 9]])
    np.testing.assert_array_equal(batch.targets, [[1, 2, 9, 3, 9, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 3]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 1, 1, 0]])


def test_plain_concatenation_runs_across_documents():
    tokens = np.arange(6, dtype=np.int32)[None]
    segments = np.array([[1, 1, 2, 2, 0, 0]], np.int32)
    batch = CausalLM(cross_documents=True).prepare(tokens, segments, SEEDS)
    np.testing.assert_array_equal(batch.positions[:, :4], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(batch.weights, [[1, 1, 1, 0, 0]])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_positions_count_from_each_documents_start(lengths):
    """Against a loop over documents."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)[None]
    expected = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(positions_in_segments(segments)[0], expected)
