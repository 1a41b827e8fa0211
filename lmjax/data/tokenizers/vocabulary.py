"""New tokens for a SentencePiece tokenizer that keeps all its ids, as for Chinese on LLaMA."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from lmjax.config import UserError, config
from lmjax.data.tokenizers.base import Corpus, Tokenizer, TokenizerConfig
from lmjax.data.tokenizers.subwords import MODEL_FILE, SentencePieceTokenizer, TrainedBPE

RESERVED = re.compile(r"<reserved_\d+>|<\|[^|]+\|>")  # names of role tokens


@config
class MergedVocabulary(TokenizerConfig):
    """A SentencePiece tokenizer that keeps its ids, and tokens learnt from the text behind them.

    So a model learns a language that its tokenizer spells in bytes (`merge_tokenizers`).
    """

    tokenizer: TokenizerConfig  # whose ids all stay, such as LLaMA's SentencePiece model
    learnt: TrainedBPE = TrainedBPE(vocab_size=20_000)  # of the text; those that are there are left
    vocab_size: int  # most tokens in all: the last ones that were learnt are left out

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`."""
        old = self.tokenizer.build(corpus)
        if not isinstance(old, SentencePieceTokenizer):
            raise UserError(
                f"tokenizer={type(self.tokenizer).__name__}: only a SentencePiece model can be "
                "extended by tokens that are learnt"
            )
        return merge_tokenizers(old, self.learnt.build(corpus), self.vocab_size)


def add_words(tokenizer: SentencePieceTokenizer, words: Iterable[str]) -> SentencePieceTokenizer:
    """The tokenizer with a token for each word or character; those that it has are passed over.

    Byte-pair encoding builds a token from two others. So beginnings of a word are added too where
    it could not be reached without them. The old merges come first: a text that holds none of the
    new tokens keeps its ids.

    Args:
      tokenizer: byte-pair encoding made by SentencePiece; it stays as it is.
      words: what to add, in the order of the new ids. Where words stand apart, give the space too:
        " word".

    Raises:
      UserError: an empty word, one with a line break, or a tokenizer of another algorithm.
    """
    model = _byte_pairs(tokenizer)
    bare = _without_prefix(model)
    known = {piece.piece for piece in model.pieces}
    new: dict[str, None] = {}  # a set that keeps its order
    for word in words:
        symbols = _symbols(bare, word)  # of the normalised word, as a text's would be
        if not symbols or "\n" in word:
            raise UserError(f"cannot make a token of {word!r}: it is empty or holds a line break")
        for end in range(min(2, len(symbols)), len(symbols) + 1):
            new["".join(symbols[:end])] = None
    return _append(tokenizer, model, [piece for piece in new if piece not in known])


def merge_tokenizers(
    tokenizer: SentencePieceTokenizer, other: SentencePieceTokenizer, most: int | None = None
) -> SentencePieceTokenizer:
    """The tokenizer with the other one's tokens behind its own, less those that it has.

    With `most`, it has no more tokens than that.

    This is how Chinese-LLaMA joined its own vocabulary to LLaMA's (arXiv:2304.08177); there every
    new piece has score 0, here the new ones keep their order behind the old.

    Raises:
      UserError: one of them is no byte-pair encoding, or there is no room for a token.
    """
    model = _byte_pairs(tokenizer)
    known = {piece.piece for piece in model.pieces}
    added = [piece for piece in _byte_pairs(other).pieces if piece.type == piece.NORMAL]
    added.sort(key=lambda piece: -piece.score)
    room = None if most is None else most - len(known)
    if room is not None and room < 1:
        raise UserError(f"vocab_size={most}: the old tokenizer has {len(known)} tokens already")
    return _append(tokenizer, model, [p.piece for p in added if p.piece not in known][:room])


def old_pieces(old: SentencePieceTokenizer, new: SentencePieceTokenizer) -> list[list[int]]:
    """The tokens of `old` that spell each token that `new` has more, in the order of the ids.

    An empty list stands for a token without text.

    Raises:
      UserError: `new` does not begin with the vocabulary of `old`.
    """
    before, after = _parse(old), _parse(new)
    names = [piece.piece for piece in after.pieces]
    if names[: old.vocab_size] != [piece.piece for piece in before.pieces]:
        raise UserError("the new tokenizer does not keep the ids of the old one")
    bare = _without_prefix(before)
    return [
        bare.encode(piece.piece) if piece.type in (piece.NORMAL, piece.USER_DEFINED) else []
        for piece in after.pieces[old.vocab_size :]
    ]


def with_special(data: bytes, names: Sequence[str]) -> bytes:
    """A model file whose role tokens no text can make, with more special tokens behind the rest.

    Role tokens such as <reserved_106> are ordinary pieces in some public files: they become control
    pieces, which SentencePiece never finds in a text.

    Args:
      data: the model file.
      names: special tokens to append, in the order of their ids.
    """
    model = _proto(data)
    for piece in model.pieces:
        if piece.type in (piece.NORMAL, piece.USER_DEFINED) and RESERVED.fullmatch(piece.piece):
            piece.type = piece.CONTROL
    return append_special(model.SerializeToString(), names)


def append_special(data: bytes, names: Sequence[str]) -> bytes:
    """A model file with more special tokens behind the rest, in the order of their ids."""
    model = _proto(data)
    for name in names:
        piece = model.pieces.add(piece=name, score=0.0)
        piece.type = piece.CONTROL
    return model.SerializeToString()


def _append(
    tokenizer: SentencePieceTokenizer, model: Any, pieces: Sequence[str]
) -> SentencePieceTokenizer:
    lowest = min(piece.score for piece in model.pieces)
    for number, name in enumerate(pieces, 1):
        model.pieces.add(piece=name, score=lowest - number)
    model.trainer_spec.vocab_size = len(model.pieces)
    return tokenizer.with_model(model.SerializeToString())


def _byte_pairs(tokenizer: SentencePieceTokenizer) -> Any:
    model = _parse(tokenizer)
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise UserError("only SentencePiece models of byte-pair encoding can be extended")
    return model


def _symbols(bare: Any, word: str) -> list[str]:
    """Pieces that the old merges leave of a word, and characters that have none."""
    symbols, rest = [], b""
    for token, piece in zip(bare.encode(word), bare.encode(word, out_type=str)):
        if bare.is_byte(token):
            rest += bytes([int(piece[3:5], 16)])
            with contextlib.suppress(UnicodeDecodeError):  # not the character's last byte
                symbols.append(rest.decode("utf-8"))
                rest = b""
        else:
            symbols += list(piece) if bare.is_unknown(token) else [piece]
    return symbols


def _without_prefix(model: Any) -> Any:
    """A processor that neither puts a space before a text nor drops any."""
    import sentencepiece

    copy = type(model)()
    copy.CopyFrom(model)
    copy.normalizer_spec.add_dummy_prefix = False
    copy.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def _parse(tokenizer: SentencePieceTokenizer) -> Any:
    return _proto(tokenizer.files()[MODEL_FILE])


def _proto(data: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(data)
