"""No query sees what it is to predict: by changing the answer, and by gradients that are zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.config import replace
from lmjax.models import (
    AttentionConfig,
    EncoderDecoderConfig,
    FeedForwardConfig,
    Transformer,
    TransformerConfig,
    initialize,
    xlnet,
)
from lmjax.objectives import (
    BlankInfilling,
    CausalLM,
    DocumentBlank,
    MaskedLM,
    Mixed,
    PermutationLM,
    PrefixLM,
    SentenceBlanks,
    SpanCorruption,
    TokenBlanks,
)
from lmjax.parallel import training_layout
from pallas_kernels.cross_entropy import cross_entropy
from tests.lmjax.objectives.rows import (
    LEXICON,
    VOCABULARY,
    WORDS,
    answered_row,
    answers_of,
    full_batch,
    make_row,
)

LENGTH = 64
LETTERS = WORDS[~LEXICON.is_space[WORDS]]
BLANKS = BlankInfilling()
OBJECTIVES = {
    "causal": CausalLM(),
    "prefix": PrefixLM(),
    "blanks": BLANKS,
    "blanks of words": BlankInfilling(blanks=TokenBlanks(whole_words=True)),
    "blanks of joined documents": BlankInfilling(cross_documents=True, samples=2),
    "answers": BlankInfilling(answers="[MASK]", cross_documents=True, samples=2),
    "sentences": BlankInfilling(blanks=SentenceBlanks()),
    "documents": BlankInfilling(blanks=DocumentBlank()),
    "masked": MaskedLM(),
    "masked words": MaskedLM(whole_words=True, cross_documents=True),
    "masked pairs": MaskedLM(pair="next sentence"),
    "spans": SpanCorruption(),
    "spans of documents": SpanCorruption(cross_documents=False),
    "permutation": PermutationLM(),
    "mixed": Mixed(objectives=(CausalLM(), BLANKS, PrefixLM()), weights=(1.0, 1.0, 1.0)),
}


def rows_for(objective):
    """How rows are made that the objective is for."""
    return answered_row if getattr(objective, "answers", None) else make_row


def spans_for(objective, tokens, segments):
    """What the objective reads of the rows besides."""
    return [answers_of(tokens, segments)] if objective.reads_spans else []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_answer_changes_nothing_that_its_query_sees(name):
    """A word of the text becomes another one of its kind; queries with another answer see it not.

    Not even where masked language modelling leaves the word as it is: that one is known to the
    model, as the paper has it, and is not looked at here.
    """
    objective = OBJECTIVES[name]
    rng = np.random.default_rng(0)
    tokens, segments, seeds = full_batch(
        objective.row_length(LENGTH), rows=6, longest=60, make=rows_for(objective)
    )
    given = (LEXICON, LENGTH, *spans_for(objective, tokens, segments))
    before = objective.prepare(tokens, segments, seeds, *given)
    answers = 0
    for place in rng.permutation(tokens.shape[1])[:40]:
        changed = tokens.copy()
        for row, word in enumerate(tokens[:, place]):
            alike = LETTERS[(word % 10 == LETTERS % 10) & (word != LETTERS)]
            changed[row, place] = rng.choice(alike) if word in LETTERS else word
        after = objective.prepare(changed, segments, seeds, *given)
        batch, targets = before.inputs, before.targets
        np.testing.assert_array_equal(targets.weights, after.targets.weights)
        asked = (targets.tokens != after.targets.tokens) & (targets.weights > 0)
        if isinstance(objective, MaskedLM):
            asked &= batch.tokens != targets.tokens
        size = targets.tokens.shape[1]
        mask = batch.mask(causal=not isinstance(objective, MaskedLM)).dense(size, size)
        visible = np.asarray(mask)[:, 0]
        if isinstance(objective, PermutationLM):
            visible = visible & (batch.ranks[:, None, :] < batch.ranks[:, :, None])
        moved = batch.tokens != after.inputs.tokens
        for row, query in zip(*np.nonzero(asked), strict=True):
            answers += 1
            assert not moved[row, visible[row, query]].any()
            if batch.encoder is not None:
                source, other = batch.encoder, after.inputs.encoder
                same = source.segments[row] == batch.segments[row, query]
                assert not (source.tokens != other.tokens)[row, same].any()
    assert answers > 15


SMALL = dict(
    vocab_size=VOCABULARY,
    hidden=16,
    num_layers=2,
    max_length=LENGTH,
    feed_forward=FeedForwardConfig(size=16),
)
MODELS = {
    True: TransformerConfig(attention=AttentionConfig(num_heads=2, head_dim=8), **SMALL),
    False: TransformerConfig(
        attention=AttentionConfig(num_heads=2, head_dim=8, causal=False), **SMALL
    ),
}


# Others give models batches of the same kinds.
KINDS = (
    *("causal", "prefix", "blanks of joined documents", "answers", "documents", "masked"),
    *("masked pairs", "spans", "permutation"),
)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_zero_where_a_target_must_not_look(name, one_device, monkeypatch):
    """The loss of each of some targets, by the embeddings of every place: exactly zero or not.

    Rows of padding, which see nothing, have no gradient at all; what is seen has one.
    """
    objective = OBJECTIVES[name]
    is_masked, has_encoder = isinstance(objective, MaskedLM), isinstance(objective, SpanCorruption)
    config = MODELS[not is_masked]
    if is_permuted := isinstance(objective, PermutationLM):
        base = xlnet()
        attention = replace(base.attention, num_heads=2, head_dim=8)
        config = replace(base, attention=attention, **SMALL)
    if has_encoder:
        config = EncoderDecoderConfig(
            attention=AttentionConfig(num_heads=2, head_dim=8), encoder_layers=1, **SMALL
        )
    graph, params = initialize(config, training_layout(), jax.random.key(0))
    make = rows_for(objective)
    tokens, segments, seeds = full_batch(
        objective.row_length(LENGTH), rows=2, longest=20 if make is answered_row else 40, make=make
    )
    segments[1, segments.shape[1] // 2 :] = 0  # padding
    spans = spans_for(objective, tokens, segments)
    example = objective.prepare(tokens, segments, seeds, LEXICON, LENGTH, *spans)
    batch, targets = example.inputs, example.targets
    plain_embed = Transformer.embed

    def losses(moves, places):
        """Of one target a row; `moves` are added to the embeddings."""

        def embed(model, inputs, key=None):
            is_encoder = has_encoder and inputs.tokens.shape == batch.encoder.tokens.shape
            return plain_embed(model, inputs) + moves["encoder" if is_encoder else "decoder"]

        monkeypatch.setattr(Transformer, "embed", embed)
        model = nnx.merge(graph, params)
        hidden, _ = model(batch)
        answers = jnp.asarray(targets.tokens)
        nll, _ = cross_entropy(hidden, model.head_table(), answers, vocabulary=VOCABULARY)
        return jnp.sum(nll[jnp.arange(2), places])

    shape = (*batch.tokens.shape, config.hidden)
    moves = {"decoder": jnp.zeros(shape)}
    if has_encoder:
        moves["encoder"] = jnp.zeros((*batch.encoder.tokens.shape, config.hidden))
    gradient = jax.jit(jax.grad(losses))
    mask = np.asarray(batch.mask(causal=not is_masked).dense(shape[1], shape[1]))[:, 0]
    if is_permuted:
        mask = mask & (batch.ranks[:, None, :] < batch.ranks[:, :, None])
    rng = np.random.default_rng(0)
    for _ in range(6):
        places = np.array([rng.choice(np.flatnonzero(row > 0)) for row in targets.weights])
        found = gradient(moves, places)
        reached = {key: np.abs(np.asarray(g)).max(axis=2) > 0 for key, g in found.items()}
        for row, place in enumerate(places):
            # Through deeper layers too: ranks are transitive, so nothing else can be reached.
            np.testing.assert_array_equal(reached["decoder"][row], mask[row, place])
            if has_encoder:
                same = batch.encoder.segments[row] == batch.segments[row, place]
                np.testing.assert_array_equal(reached["encoder"][row], same)
