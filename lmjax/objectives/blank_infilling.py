"""GLM's objective: fill in what was cut out of a text, one blank after another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt64

from lmjax.config import UserError, config
from lmjax.data.spans import RowSpans
from lmjax.models.infill import BlankFormat
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.blanks import Blanks, Cut, DocumentBlank, TokenBlanks
from lmjax.objectives.compatibility import require_causal, require_linear_head
from lmjax.objectives.draws import RandomStream
from lmjax.objectives.example import Example
from lmjax.objectives.lexicon import TokenTable
from lmjax.objectives.objective import TextObjective
from lmjax.objectives.prediction import Regularisers, check_smoothing
from lmjax.objectives.rows import Rows, Sample, pieces, require_targets


@config
class BlankInfilling(TextObjective):
    """Autoregressive blank infilling (Du et al. 2022, arXiv:2103.10360).

    A text with blanks, part A, stands first and sees itself whole. Behind it stand the blanks'
    contents, part B, in random order: each sees part A, what stands before it in part B, and
    itself up to the token that is predicted. A blank's content has in `positions` the place of its
    mask in part A, and counts from 1 in `block_positions`, which are 0 in part A.

    Each document is a sample of its own, unless `cross_documents`. The last of a row is cut where
    the row has no room for all of it.

    With `answers`, documents may have a prompt and an answer (`lmjax.data.JsonPrompts`), as the
    multi-task instructions of Zeng et al. 2022 (arXiv:2210.02414, section 2.2). Such a document is
    a sample of its own, and its answer the only blank. Other pieces of a row that holds one, or its
    end, are left out: they are a prompt or an answer that the row's edge has cut off. Rows of whole
    documents (data.rows=whole_documents) lose no answer.
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
    answers: str | None = None  # token that stands for the answer to a prompt; none: all is text
    label_smoothing: float = 0.0  # share of the target that the whole vocabulary gets

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_smoothing(self.label_smoothing)
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: a row has at least one")
        if not 0 <= self.block_mask_share < 1:
            raise UserError(
                f"block_mask_share={self.block_mask_share}: a share is at least 0 and below 1"
            )
        marks = self.blanks.mask, self.sop, self.eop
        if len(set(marks)) < len(marks):
            raise UserError(
                f"blanks.mask={marks[0]!r}, sop={marks[1]!r}, eop={marks[2]!r}: give three tokens"
            )
        if self.answers in (self.sop, self.eop):
            raise UserError(
                f"answers={self.answers!r}, sop={self.sop!r}, eop={self.eop!r}: an answer's place "
                "needs a token of its own, such as '[MASK]'"
            )
        runs_on = self.running_positions or isinstance(self.blanks, DocumentBlank)
        if runs_on and self.answers == self.blanks.mask:
            raise UserError(
                f"answers={self.answers!r} stands for the text's rest already, which is filled in "
                "otherwise than an answer: name another token, such as '[MASK]'"
            )

    def infill_format(self) -> BlankFormat:
        """See `Objective.infill_format`; an answer's mask can be filled in too."""
        mask = self.blanks.mask
        return BlankFormat(
            masks=tuple(dict.fromkeys(filter(None, (mask, self.answers)))),
            rest=(mask,) if isinstance(self.blanks, DocumentBlank) else (),
            run_on=(mask,) if self.running_positions else (),
            sop=self.sop,
            eop=self.eop,
        )

    def unaware_of_answers(self) -> tuple[str, ...]:
        """See `TextObjective.unaware_of_answers`."""
        return super().unaware_of_answers() if self.answers is None else ()

    @property
    def reads_spans(self) -> bool:
        """See `TextObjective.reads_spans`: answers are spans."""
        return self.answers is not None

    def row_length(self, length: int) -> int:
        """As much as the row could hold; several samples, what they nearly always have room for."""
        return length if self.samples == 1 else self.samples * self.sample_length(length)

    def row_overlap(self, length: int) -> int:
        """All but what nearly always has room together with its blanks.

        How much more has room is known when they are drawn. The next row begins with it in any
        case, so that hardly any text is left out, and some of it is read twice in an epoch.
        """
        return 1 + self.row_length(length) - self.samples * self.sample_length(length)

    def sample_length(self, length: int) -> int:
        """Tokens of text that a sample nearly always has room for."""
        return self.blanks.text_length(length // self.samples)

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an encoder, or a head that the loss does not fit."""
        require_causal(self, model)
        require_linear_head(self, model)

    def regularisers(self) -> Regularisers:
        """See `TextObjective.regularisers`."""
        return Regularisers(label_smoothing=self.label_smoothing)

    def prepare(
        self,
        tokens: Int[np.ndarray, "rows row_length"],
        segments: Int[np.ndarray, "rows row_length"],
        seeds: UInt64[np.ndarray, "rows"],
        lexicon: TokenTable,
        length: int,
        spans: RowSpans | None = None,
    ) -> Example:
        """Cuts out and puts together; `spans` has the answers of the rows, None where none has any.

        Raises:
          UserError: the tokenizer lacks a token, or no text has room for a blank.
        """
        rows = Rows(len(tokens), length, "ranks", "block_positions")
        mask, sop, eop = map(lexicon.token, (self.blanks.mask, self.sop, self.eop))
        block_mask = lexicon.token(self.block_mask) if self.block_mask_share else 0
        answer = None if self.answers is None else lexicon.token(self.answers)
        has_answers = np.zeros(len(tokens), bool)
        for row, seed in enumerate(seeds):
            if answer is not None and spans is not None:
                found = spans.of(row, "answer")
                # Those that have a token in the row, or one of the two around them.
                found = found[(found[:, 1] >= 0) & (found[:, 0] <= (segments[row] > 0).sum())]
                has_answers[row] = len(found)
            if has_answers[row]:
                for text, cut in self.answered(tokens[row], segments[row], found, answer, eop):
                    rows.add(row, fill_in(text, cut, answer, sop, eop))
                continue
            draws = RandomStream(seed)
            for piece in pieces(tokens[row], segments[row], self.cross_documents, self.samples):
                text, cut = self.blanks.fit(piece, rows.room(row), lexicon, draws)
                if len(cut.spans):  # a text without blanks teaches nothing
                    sample = fill_in(text, cut, mask, sop, eop, self.running_positions)
                    hidden = draws.uniform(len(sample.tokens)) < self.block_mask_share
                    hidden &= sample.block_positions > 1
                    sample.tokens[hidden] = block_mask
                    rows.add(row, sample)
                if len(text) < len(piece.tokens):
                    break  # the row is full
        # A row of prompts may begin and end inside of one, and hold no whole answer.
        text = segments * ~has_answers[:, None]
        require_targets(rows.targets().weights, text, f"blanks ({type(self.blanks).__name__})")
        return rows.example()

    def answered(
        self,
        tokens: Int[np.ndarray, "row_length"],
        segments: Int[np.ndarray, "row_length"],
        spans: Int[np.ndarray, "answers 2"],
        mask: int,
        eop: int,
    ) -> Iterator[tuple[Int[np.ndarray, "text"], Cut]]:
        """The documents of a row that have an answer, without the tokens around it, and its place.

        In a row they are as `prompt mask answer eop prompt`; where the row ends in an answer, `eop`
        is missing. An answer is left out whose mask stands before the row or is its last token. The
        row has room for what `fill_in` makes of them: as many tokens as they have here.

        Raises:
          UserError: the source has put other tokens around the answers, or a document has several.
        """
        last = 0  # document that had an answer
        for first, end in spans.tolist():
            document = int(segments[first - 1]) if 0 < first <= len(tokens) else 0
            if not document:
                continue  # the prompt stands in another row
            if document == last:
                raise UserError(
                    f"answers={self.answers!r}: a document has several answers; give each answer a "
                    "document of its own, with what stands before it as the prompt"
                )
            last = document
            here = np.flatnonzero(segments == document)
            begin, stop = int(here[0]), int(here[-1]) + 1
            marks = [first - 1, end] if end < stop else [first - 1]
            if tokens[marks].tolist() != [mask, eop][: len(marks)]:
                raise UserError(
                    f"answers={self.answers!r}, eop={self.eop!r}: other tokens stand around the "
                    "answers in the data; give the source the same ones, as in "
                    f"JsonPrompts(mask={self.answers!r}, closing={self.eop!r})"
                )
            if first < min(end, stop):
                span = np.array([[first - 1, min(end, stop) - 1]]) - begin
                text = np.delete(tokens[begin:stop], np.array(marks) - begin)
                yield text, Cut(span, open=len(marks) == 1)


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
    mask_positions = (np.cumsum(kept) - 1)[first]  # of the masks in part A

    sizes = end - first + (not cut.open)
    blank = np.repeat(np.arange(len(first)), sizes)  # of each token of part B
    inside = np.arange(len(blank)) - (np.cumsum(sizes) - sizes)[blank]
    source = first[blank] + inside  # of its target in the text
    contents = np.append(tokens, eop)
    part_b = np.where(inside == 0, sop, contents[source - 1])
    targets = np.where(source == end[blank], eop, contents[source])

    size = len(part_a)
    after = size + np.arange(len(part_b))
    positions = after if running_positions else mask_positions[blank]
    return Sample(
        tokens=np.concatenate([part_a, part_b]),
        targets=np.concatenate([part_a, targets]),
        weights=np.repeat([0.0, 1.0], [size, len(part_b)]),
        positions=np.concatenate([np.arange(size), positions]),
        ranks=np.concatenate([np.zeros(size, np.int64), after]),
        block_positions=np.concatenate([np.zeros(size, np.int64), inside + 1]),
    )
