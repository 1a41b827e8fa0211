"""What causal language modelling feeds the model."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.objectives import CausalLM
from lmjax.objectives.causal_lm import positions_in_segments
from lmjax.parallel import training_layout
from tests.whole_logits import program

SEEDS = np.zeros(1, np.uint64)


def test_inputs_targets_and_positions_of_a_packed_row():
    tokens = np.array([[9, 1, 2, 9, 3, 9, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 3, 0]], np.int32)
    example = CausalLM().prepare(tokens, segments, SEEDS)
    batch, targets = example.inputs, example.targets
    np.testing.assert_array_equal(batch.tokens, [[9, 1, 2, 9, 3, 9]])
    np.testing.assert_array_equal(targets.tokens, [[1, 2, 9, 3, 9, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 0, 1, 0]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 2, 2, 3]])
    np.testing.assert_array_equal(targets.weights, [[1, 1, 1, 1, 1, 0]])


def test_plain_concatenation_runs_across_documents():
    tokens = np.arange(6, dtype=np.int32)[None]
    segments = np.array([[1, 1, 2, 2, 0, 0]], np.int32)
    example = CausalLM(cross_documents=True).prepare(tokens, segments, SEEDS)
    batch, targets = example.inputs, example.targets
    np.testing.assert_array_equal(batch.positions[:, :4], [[0, 1, 2, 3]])
    np.testing.assert_array_equal(batch.segments, [[1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(targets.weights, [[1, 1, 1, 0, 0]])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12))
def test_positions_count_from_each_documents_start(lengths):
    """Against a loop over documents."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths).astype(np.int32)[None]
    expected = np.concatenate([np.arange(length) for length in lengths])
    np.testing.assert_array_equal(positions_in_segments(segments)[0], expected)


@pytest.mark.parametrize(
    ("softcap", "smoothing"), [(2.0, 0.0), (None, 0.1)], ids=["softcap", "label smoothing"]
)
def test_the_loss_is_the_formula_on_the_models_own_logits(one_device, softcap, smoothing):
    """Softly capped logits, the head's scale and rows of length 1, both auxiliary losses.

    With label smoothing the cross-entropy is that of the whole target distribution, written out.
    """
    config = TransformerConfig(
        vocab_size=50,
        hidden=16,
        num_layers=1,
        max_length=8,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(size=16),
        tied_head=False,
        normalized_head=True,
        head_scale=3.0,
        logit_softcap=softcap,
    )
    objective = CausalLM(z_loss=0.1, max_z_loss=0.2, label_smoothing=smoothing)
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
    segments = np.array([[1] * 9, [1] * 6 + [0] * 3], np.int32)
    example = objective.prepare(tokens, segments, np.zeros(2, np.uint64))
    sums = jax.jit(lambda p, e: objective.loss(nnx.merge(graph, p), e, None))(params, example)
    logits = np.asarray(program(graph, None, params, example.inputs), np.float64)[..., :50]
    assert np.abs(logits).max() > 1  # so the cap bends
    targets = example.targets
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, targets.tokens[..., None], -1)[..., 0]
    wanted = smoothing / 50 + (1 - smoothing) * (np.arange(50) == targets.tokens[..., None])
    smooth = -(wanted * (logits - log_z[..., None])).sum(-1)
    each = smooth + 0.1 * log_z**2 + 0.2 * logits.max(-1) ** 2
    assert sums.weight == 8 + 5
    np.testing.assert_allclose(sums.loss, (each * targets.weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(
        sums.extra["cross_entropy"], (nll * targets.weights).sum(), rtol=1e-6
    )


def test_label_smoothing_needs_logits_that_are_a_product():
    model = TransformerConfig(logit_softcap=30.0)
    with pytest.raises(UserError, match=r"logit_softcap=30\.0 bends them"):
        CausalLM(label_smoothing=0.1).check(model)
    CausalLM().check(model)
    with pytest.raises(UserError, match="below 1"):
        CausalLM(label_smoothing=1.0)
