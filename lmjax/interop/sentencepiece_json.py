"""A SentencePiece model as a tokenizer.json that gives the same ids.

SentencePiece normalises a text, then looks for user-defined pieces in it, then puts the rest
together; whitespace is written as U+2581. The library's own conversions leave parts of that out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from lmjax.data.tokenizers.subwords import SPACE
from lmjax.interop.charsmap import (
    Inexpressible,
    any_but,
    any_of,
    normalizing_steps,
    read_table,
    replace,
    replace_each,
)
from lmjax.interop.library_tokenizer import (
    Around,
    Entry,
    Unwritable,
    byte_pair_model,
    isolate,
    library_tokenizer,
    merges_of,
)

# Noncharacters, which no text should have: for a while at the end of one, and in names of no token.
END, UNNAMED = "\ufdd0\ufdef", "\ufdd1"
NEVER = -1e6  # the score of a piece that no text should have; real ones are above -100


def library_json(
    data: bytes,
    special: Mapping[str, int],
    around: Around,
    plain: bool = False,
    first: int = 0,
    written: Mapping[str, str] = MappingProxyType({}),
) -> Entry:
    """The tokenizer.json of a SentencePiece model.

    Args:
      data: the model file.
      special: ids of tokens that stand for no text.
      around: what is put around a text.
      plain: whether its pieces get plain spaces, so that U+2581 in a text stays apart from them.
        For other models, as in their own program, it is a space.
      first: the id of the model's first piece; those before stand for no text.
      written: what some pieces stand for, which is replaced by them in a text before all else.

    Raises:
      NoPlace: the library cannot do what the model does.
    """
    model = _Model(data, plain, first)
    entry, cuts = model.algorithm()
    added = model.normalizer.add_dummy_prefix and not model.trainer.treat_whitespace_as_suffix
    steps = [
        *(replace(piece, text) for piece, text in written.items()),
        *([] if plain else [replace(SPACE, " ")]),
        *({"type": "ByteFallback"}, {"type": "Fuse"}),
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if added else []),
    ]
    longest_first = sorted(written.items(), key=lambda item: -len(item[1]))
    return library_tokenizer(
        entry,
        special,
        around,
        decoder={"type": "Sequence", "decoders": steps},
        normalizers=[
            *(replace(text, piece) for piece, text in longest_first),
            *model.normalizers(),
        ],
        pre_tokenizers=[isolate(pattern) for pattern in cuts],
    )


class _Model:
    """A SentencePiece model, taken apart."""

    def __init__(self, data: bytes, plain: bool, first: int):
        """Raises NoPlace."""
        from sentencepiece import sentencepiece_model_pb2

        self.proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        self.plain, self.first = plain, first
        self.normalizer, self.trainer = self.proto.normalizer_spec, self.proto.trainer_spec
        self.ids = {piece.piece: token for token, piece in enumerate(self.proto.pieces, first)}
        kinds = type(self.proto.pieces[0])
        by_kind: dict[int, list[str]] = defaultdict(list)
        for piece in self.proto.pieces:
            by_kind[piece.type].append(piece.piece)
        self.normal = by_kind[kinds.NORMAL]
        self.symbols = by_kind[kinds.USER_DEFINED]
        if not by_kind[kinds.UNKNOWN]:
            raise Unwritable("it has no token for what is unknown")
        (self.unknown,) = by_kind[kinds.UNKNOWN]
        self.reserved = [*by_kind[kinds.CONTROL], self.unknown, *by_kind[kinds.BYTE]]
        self.text_pieces = {*self.normal, *self.symbols}
        if by_kind[kinds.UNUSED]:
            raise Unwritable(f"its piece {by_kind[kinds.UNUSED][0]!r} is switched off")
        if len(self.ids) < len(self.proto.pieces):
            raise Unwritable("two of its pieces have one name")
        if single := [name for name in self.reserved if len(name) == 1]:
            raise Unwritable(f"its special token {single[0]!r} is a character, and texts have that")
        if self.proto.denormalizer_spec.precompiled_charsmap:
            raise Unwritable("it changes texts again when it decodes them")
        if not self.normalizer.escape_whitespaces:
            raise Unwritable("its pieces have plain spaces")

    def algorithm(self) -> tuple[Entry, list[str]]:
        """The model, and patterns of what stands apart in a text. Raises NoPlace."""
        if self.trainer.model_type == self.trainer.UNIGRAM:
            return self._unigram()
        if self.trainer.model_type in (self.trainer.BPE, self.trainer.CHAR):
            return self._byte_pairs()
        raise Unwritable("its pieces are whole words")

    def normalizers(self) -> list[Entry]:
        """Steps of SentencePiece's normalisation. Raises NoPlace."""
        try:
            mapped = normalizing_steps(self.normalizer.precompiled_charsmap, self.symbols)
        except Inexpressible as reason:
            raise Unwritable(str(reason)) from None
        hidden = [] if self.plain else [replace(" ", SPACE)]
        spaces = [replace_each(r"\A +", ""), replace_each(" {2,}", " ")]
        behind = self.trainer.treat_whitespace_as_suffix
        added = self.normalizer.add_dummy_prefix
        if not self.normalizer.remove_extra_whitespaces:
            put = replace_each(r"\z", SPACE) if behind else {"type": "Prepend", "prepend": SPACE}
            return [*([put] if added else []), *mapped, *hidden]
        if added and behind:
            # Only to a text that does not begin as one of spaces alone.
            table = read_table(self.normalizer.precompiled_charsmap)
            blank = any_of(" ", *(source for source, target in table.items() if target == " "))
            put = [replace_each(rf"\A{blank}+", ""), replace_each(r"\z", END)]
            return [*put, *mapped, *spaces, replace_each(rf"[ {SPACE}]*{END}\z", SPACE), *hidden]
        put = [{"type": "Prepend", "prepend": SPACE}] if added else []
        return [*mapped, *spaces, replace_each(rf"[ {SPACE}]+\z", ""), *put, *hidden]

    def _unigram(self) -> tuple[Entry, list[str]]:
        scores = [piece.score for piece in self.proto.pieces]
        least = min(piece.score for piece in self.proto.pieces if piece.type == piece.NORMAL)
        characters = {piece for piece in self.text_pieces if len(piece) == 1}
        # The library's score of an unknown character follows from the least of all: where others
        # may be spelt otherwise that must stay as it is, else the names of special tokens and
        # bytes can get one at which no text has them.
        known = all(characters.issuperset(piece) for piece in self.normal)
        never = NEVER if known else least
        symbols, reserved = set(self.symbols), set(self.reserved)
        vocabulary = [[f"{UNNAMED}{token}", never] for token in range(self.first)]
        vocabulary += [
            [
                piece,
                never
                if piece in reserved
                else 0.1 * (len(piece.encode("utf-8")) - 1)  # as SentencePiece 0.2.3 has it
                if piece in symbols
                else score,
            ]
            for piece, score in zip(self.ids, scores)
        ]
        model = {
            "type": "Unigram",
            "unk_id": self.ids[self.unknown],
            "vocab": vocabulary,
            "byte_fallback": self.trainer.byte_fallback,
        }
        # Nor must a name be less bad than a character of it that is in no piece.
        spelt = set().union(*self.text_pieces)
        if (known or self.trainer.byte_fallback) and not spelt.issuperset("".join(self.reserved)):
            return model, [any_but(*spelt) + "+"]
        return model, []

    def _byte_pairs(self) -> tuple[Entry, list[str]]:
        symbols = [symbol for symbol in self.symbols if len(symbol) > 1]
        merges = [] if self.trainer.model_type == self.trainer.CHAR else self._merges()
        cuts = []
        if symbols:
            longest_first = sorted(symbols, key=lambda symbol: (-len(symbol), symbol))
            cuts = ["|".join(map(re.escape, longest_first)), *self._names()]
        shown = (lambda text: text.replace(SPACE, " ")) if self.plain else (lambda text: text)
        normal = set(self.normal)
        model = byte_pair_model(
            {
                shown(piece) if piece in normal else piece: token
                for piece, token in self.ids.items()
            },
            [(shown(left), shown(right)) for left, right in merges],
            unknown=self.unknown,
            byte_fallback=self.trainer.byte_fallback,
            whole_first=bool(symbols),
        )
        return model, cuts

    def _merges(self) -> list[tuple[str, str]]:
        """The pairs that make a piece, the best piece first: SentencePiece keeps only the pieces.

        Raises NoPlace where the file's order of pairs cannot say what is joined first.
        """
        scores = {piece.piece: piece.score for piece in self.proto.pieces}
        symbols = re.compile("|".join(map(re.escape, self.symbols)) or r"(?!)")
        normal = [piece for piece in self.normal if not symbols.search(piece)]
        for piece in normal:
            if missing := [character for character in piece if character not in self.text_pieces]:
                raise Unwritable(
                    f"its piece {piece!r} has the character {missing[0]!r}, which is no piece"
                )
        normal.sort(key=lambda piece: (-scores[piece], self.ids[piece]))
        symbols_alone = set(self.symbols)
        merges = merges_of(
            normal, self.ids, lambda part: part in self.text_pieces and part not in symbols_alone
        )
        _check_ties(merges, scores)
        return merges

    def _names(self) -> list[str]:
        """A pattern that cuts what is a whole part of a text and the name of a piece, but is not
        encoded as that piece."""
        bare, reserved = _bare(self.proto), set(self.reserved)
        texts = [*self.normal, *self.reserved]
        found: dict[str, list[str]] = defaultdict(list)
        for text, pieces in zip(texts, bare.encode(texts, out_type=str)):
            if pieces != [text] or text in reserved:
                first = pieces[0] if pieces and text.startswith(pieces[0]) else text[0]
                found[first].append(text[len(first) :])
        names = (
            rf"{re.escape(first)}(?=(?:{'|'.join(map(re.escape, rest))})\z)"
            for first, rest in found.items()
        )
        return [rf"\A(?:{'|'.join(names)})"] if found else []


def _check_ties(merges: Iterable[tuple[str, str]], scores: dict[str, float]) -> None:
    """Raises NoPlace where two pieces of one score compete: SentencePiece takes the left one, the
    library always the same."""
    by_score: dict[float, dict[str, list[tuple[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for left, right in merges:
        by_score[scores[left + right]][left + right].append((left, right))
    for pieces in by_score.values():
        if len(pieces) == 1:
            continue
        lefts = defaultdict(set)  # by left part: the pieces that begin with it
        for piece, pairs in pieces.items():
            for left, _ in pairs:
                lefts[left].add(piece)
        for piece, pairs in pieces.items():
            for _, right in pairs:
                if others := lefts[right] - {piece}:
                    both = f"{piece!r} and {min(others)!r}"
                    raise Unwritable(f"its pieces {both} have the same score")


def _bare(proto: Any) -> Any:
    """A processor of the model that leaves a text as it is."""
    import sentencepiece

    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.normalizer_spec.precompiled_charsmap = b""
    copy.normalizer_spec.add_dummy_prefix = False
    copy.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())
