"""BERT's objective: find hidden tokens, and tell whether two texts belong together."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, UInt64

from lmjax.config import UserError, config
from lmjax.models.batch import Array
from lmjax.models.infill import MaskFormat
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.compatibility import require_encoder
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example, TokenTargets
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Sums, class_losses, predict
from lmjax.objectives.rows import Rows, Sample, pieces, require_targets

NO_LABEL = -1  # of rows without a pair
MARKS = 3  # tokens of a pair that are no text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskedTargets(TokenTargets):
    """Hidden tokens, and the class of each pair.

    Attributes:
      labels: class of each row, -1 for a row without a pair; None where rows are no pairs.
    """

    labels: Int[Array, "*batch"] | None = None


@config
class MaskedLM(TextObjective):
    """Masked language modelling (Devlin et al. 2019, arXiv:1810.04805, section 3.1 and A.1).

    Of a row's tokens a share is to be found again: 80 percent of them are replaced by the mask, 10
    percent by a random token of text, 10 percent are left as they are.

    With `pair` a row holds two texts, [CLS] A [SEP] B [SEP], and its label says what they are.
    "next sentence": 0 where B follows A, 1, half of the time, where it is from another document of
    the stored tokens (where these are all of one document, from a later place in it).
    "sentence order" (ALBERT): 0 where B follows A, 1 where A follows B. The loss of labels has the
    weight of the row's hidden tokens.
    """

    share: float = 0.15  # of a row's tokens; rounded
    whole_words: bool = False  # all tokens of a word are hidden, or none
    cross_documents: bool = False  # documents of a row see each other
    pair: Literal["next sentence", "sentence order"] | None = None  # None: documents, packed
    short: float = 0.1  # how often a pair is shorter than the row, by any length
    mask: str = "[MASK]"  # token that hides others
    cls: str = "[CLS]"  # token that begins a pair
    sep: str = "[SEP]"  # token that ends each text of a pair

    def validate(self) -> None:
        if not 0 < self.share < 1 or not 0 <= self.short <= 1:
            raise UserError(
                f"share={self.share}, short={self.short}: they must lie between 0 and 1"
            )

    def row_length(self, length: int) -> int:
        """Tokens that the model reads; for next sentences twice that, the rest for random ones."""
        if self.pair is None:
            return length
        if length < MARKS + 2:
            raise UserError(f"data.length={length}: a pair has at least {MARKS + 2} tokens")
        return (length - MARKS) * (2 if self.pair == "next sentence" else 1)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for a causal model, or one that has no classes for pairs."""
        require_encoder(self, model)
        if self.pair is not None and (model.classifier is None or (model.token_types or 0) < 2):
            raise UserError(
                f"objective.pair={self.pair!r} needs a model that tells two texts apart "
                "(model.token_types=2) and has classes (model.classifier=Classifier), as model=bert"
            )

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
    ) -> Example:
        """Puts texts together and hides tokens.

        Raises:
          UserError: the tokenizer lacks a token.
        """
        mask = lexicon.token(self.mask)
        cls, sep = map(lexicon.token, (self.cls, self.sep)) if self.pair else (0, 0)
        rows = Rows(len(tokens), length, "token_types")
        labels = np.full(len(tokens), NO_LABEL, np.int32)
        for row, seed in enumerate(seeds):
            draws = RandomStream(seed)
            if self.pair is None:
                for piece in pieces(tokens[row], segments[row], self.cross_documents):
                    rows.add(row, self.hide(piece.tokens, lexicon, mask, draws))
                continue
            found = self.choose_pair(tokens[row], segments[row], length - MARKS, lexicon, draws)
            if found is not None:
                first, second, labels[row] = found
                both = np.concatenate([[cls], first, [sep], second, [sep]])
                sample = self.hide(both, lexicon, mask, draws, (cls, sep))
                types = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
                rows.add(row, dataclasses.replace(sample, token_types=types))
        targets = rows.targets()
        require_targets(targets.weights, segments, "hidden tokens")
        labels = None if self.pair is None else labels
        return Example(rows.batch(), MaskedTargets(targets.tokens, targets.weights, labels))

    def infill_format(self) -> MaskFormat:
        """See `Objective.infill_format`."""
        names = (None, None) if self.pair is None else (self.cls, self.sep)
        return MaskFormat(self.mask, *names)

    def hide(
        self,
        tokens: Int[np.ndarray, "text"],
        lexicon: TokenTable,
        mask: int,
        draws: RandomStream,
        marks: tuple[int, ...] = (),
    ) -> Sample:
        """The text with some of its tokens hidden; never those that begin or end documents."""
        chosen = self.choose(tokens, lexicon, draws, np.isin(tokens, marks))
        hidden = np.flatnonzero(chosen)
        inputs = tokens.astype(np.int32)
        luck = draws.uniform(len(hidden))
        inputs[hidden[luck < 0.8]] = mask
        random = lexicon.words[draws.integers(0, len(lexicon.words) - 1, len(hidden))]
        inputs[hidden[luck >= 0.9]] = random[luck >= 0.9]
        return Sample(inputs, tokens, chosen.astype(np.float32))

    def choose(
        self,
        tokens: Int[np.ndarray, "text"],
        lexicon: TokenTable,
        draws: RandomStream,
        marks: Bool[np.ndarray, "text"],
    ) -> Bool[np.ndarray, "text"]:
        """Mask of the tokens to be found again: words in random order, as long as there is room."""
        words = np.flatnonzero(~(lexicon.is_mark(tokens) | marks))
        wanted = max(1, round(self.share * len(tokens)))
        begins = lexicon.begins(tokens)[words] if self.whole_words else np.ones(len(words), bool)
        number = np.cumsum(begins) - 1  # of the word that a token is in
        sizes = np.bincount(number)
        order = draws.order(len(sizes))
        order = order[sizes[order] <= wanted]  # a word longer than all that is hidden stays
        taken = order[np.cumsum(sizes[order]) <= wanted]
        chosen = np.zeros(len(tokens), bool)
        chosen[words] = np.isin(number, taken)
        return chosen

    def choose_pair(
        self,
        tokens: Int[np.ndarray, "row_length"],
        segments: Int[np.ndarray, "row_length"],
        room: int,
        lexicon: TokenTable,
        draws: RandomStream,
    ) -> tuple[Int[np.ndarray, "first"], Int[np.ndarray, "second"], int] | None:
        """Two texts and their label; None where no document has two tokens.

        They are cut from the row's longest document, at the end of a sentence where there is one.
        """
        texts = [piece.tokens for piece in pieces(tokens, segments)]
        texts = [text[~lexicon.is_mark(text)] for text in texts]
        texts = sorted(texts, key=len, reverse=True)  # stable: the first of equals
        size = draws.integer(2, room) if draws.chance(self.short) else room
        if not texts or len(texts[0]) < 2:
            return None
        text = texts[0][:size]
        ends = 1 + np.flatnonzero(lexicon.ends_sentence[text[:-1]])
        if not len(ends):
            ends = np.arange(1, len(text))
        cut = ends[draws.integer(0, len(ends) - 1)]
        first, second = text[:cut], text[cut:]
        if not draws.chance(0.5):
            return first, second, 0
        if self.pair == "sentence order":
            return second, first, 1
        other = [*texts[1:], np.zeros(0, np.int32)][0]
        if not len(other):
            other = texts[0][len(text) + 1 :]
        if not len(other):
            return first, second, 0
        begin = draws.integer(0, max(0, len(other) - len(second)))
        return first, other[begin : begin + len(second)], 1

    def loss_of_hidden(
        self,
        model: Transformer,
        hidden: Float[Array, "batch seq width"],
        example: Example,
        key: PRNGKeyArray | None,
    ) -> Sums:
        """Cross-entropy of the hidden tokens in nats, and of the labels where there are any."""
        targets = example.targets
        sums = predict(model, hidden, targets)
        if targets.labels is None:
            return sums
        weights = jnp.sum(targets.weights, axis=1) * (targets.labels != NO_LABEL)
        labels = jnp.sum(class_losses(model.classes(hidden), targets.labels) * weights)
        return Sums(sums.loss + labels, sums.weight, sums.extra | {"label_cross_entropy": labels})
