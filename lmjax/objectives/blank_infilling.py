"""GLM's objective: fill in what was cut out of a text, one blank after another."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.blanks import Blanks, Cut, TokenBlanks
from lmjax.objectives.draws import Draws
from lmjax.objectives.fitting import require_causal
from lmjax.objectives.lexicon import Lexicon
from lmjax.objectives.objective import Objective
from lmjax.objectives.rows import Piece, Rows, Sample, pieces, require_targets


@config
class BlankInfilling(Objective):
    """Autoregressive blank infilling (Du et al. 2022, arXiv:2103.10360).

    A text with blanks, part A, stands first and sees itself whole. Behind it stand the blanks'
    contents, part B, in random order: each sees part A, what stands before it in part B, and
    itself up to the token that is predicted. A blank's content has in `positions` the place of its
    mask in part A, and counts from 1 in `block_positions`, which are 0 in part A.

    Each document is a sample of its own, unless `cross_documents`. The last of a row is cut where
    the row has no room for all of it.
    """

    blanks: Blanks = TokenBlanks()  # what is cut out
    cross_documents: bool = False  # a sample may hold several documents, which see each other
    samples: int = 1  # equal parts that a row's text is cut into first (GLM-130B's [MASK]: 4)
    # Positions of part B count on from part A, as in GLM-130B with [gMASK].
    running_positions: bool = False
    sop: str = "<|startofpiece|>"  # token that begins a blank's content, as input
    eop: str = "<|endofpiece|>"  # token that ends it, as target
    block_mask: str = "[dBLOCK]"  # token that hides inputs of part B
    block_mask_share: float = 0.0  # of part B's inputs that are hidden (GLM 10B: 0.1)

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: a row has at least one")
        if not 0 <= self.block_mask_share < 1:
            raise UserError(
                f"block_mask_share={self.block_mask_share}: a share is at least 0 and below 1"
            )

    def row_length(self, length: int) -> int:
        """What fills the row in nearly all cases; where more is drawn, blanks are left out."""
        return self.samples * self.blanks.text_length(length // self.samples)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder."""
        require_causal(self, model)

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: Lexicon,
        length: int,
    ) -> Batch:
        """Cuts out and puts together.

        Raises:
          UserError: the tokenizer lacks a token, or no text has room for a blank.
        """
        rows = Rows(len(tokens), length, "ranks", "block_positions")
        mask, sop, eop = map(lexicon.token, (self.blanks.mask, self.sop, self.eop))
        block_mask = lexicon.token(self.block_mask) if self.block_mask_share else 0
        for row, seed in enumerate(seeds):
            draws = Draws(seed)
            for piece in pieces(tokens[row], segments[row], self.cross_documents, self.samples):
                room = rows.room(row)
                if len(piece.tokens) > (most := self.blanks.text_length(room)):
                    piece = Piece(piece.tokens[:most], closed=False, documents=piece.documents)
                cut = self.blanks.choose(piece, lexicon, draws)
                number = (room - len(piece.tokens) + cut.open) // 2  # each adds a mask and a token
                cut = cut._replace(spans=cut.spans[: max(number, 0)])
                if not len(cut.spans):
                    continue  # a text without blanks teaches nothing
                sample = fill_in(piece.tokens, cut, mask, sop, eop, self.running_positions)
                hidden = draws.uniform(len(sample.tokens)) < self.block_mask_share
                hidden &= sample.block_positions > 1
                sample.tokens[hidden] = block_mask
                rows.add(row, sample)
        batch = rows.batch()
        require_targets(batch.weights, segments, f"blanks ({type(self.blanks).__name__})")
        return batch


def fill_in(
    tokens: Int[np.ndarray, "text"],
    cut: Cut,
    mask: int,
    sop: int,
    eop: int,
    running_positions: bool = False,
) -> Sample:
    """Parts A and B of a text from which spans are cut out; tokens are given as ids."""
    first, end = cut.spans.T
    is_blank = np.zeros(len(tokens), bool)
    is_blank[first] = True
    edges = np.zeros(len(tokens) + 1, np.int64)
    np.add.at(edges, first, 1)
    np.add.at(edges, end, -1)
    kept = is_blank | (np.cumsum(edges[:-1]) == 0)
    part_a = np.where(is_blank, mask, tokens)[kept]
    places = (np.cumsum(kept) - 1)[first]  # of the masks in part A

    sizes = end - first + (not cut.open)
    blank = np.repeat(np.arange(len(first)), sizes)  # of each token of part B
    inside = np.arange(len(blank)) - (np.cumsum(sizes) - sizes)[blank]
    source = first[blank] + inside  # of its target in the text
    contents = np.append(tokens, eop)
    part_b = np.where(inside == 0, sop, contents[source - 1])
    targets = np.where(source == end[blank], eop, contents[source])

    size = len(part_a)
    after = size + np.arange(len(part_b))
    return Sample(
        tokens=np.concatenate([part_a, part_b]),
        targets=np.concatenate([part_a, targets]),
        weights=np.repeat([0.0, 1.0], [size, len(part_b)]),
        positions=np.concatenate([np.arange(size), after if running_positions else places[blank]]),
        ranks=np.concatenate([np.zeros(size, np.int64), after]),
        block_positions=np.concatenate([np.zeros(size, np.int64), inside + 1]),
    )
