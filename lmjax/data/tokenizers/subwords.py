"""SentencePiece tokenizers: trained on the corpus, or an existing model file."""

import collections
import functools
import io
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer

from lmjax.config import UserError, config
from lmjax.data.tokenizers.base import SEPARATOR, Corpus, Ends, Tokenizer, TokenizerConfig
from lmjax.data.tokenizers.byte_words import SPACE, ByteWords, safe_kinds
from lmjax.remote import check_path, local_copy

MODEL_FILE = "sentencepiece.model"
FEW = 1 << 12  # characters for which it is not worth to look up words
LONGEST = 1 << 16  # characters that are encoded at once; the time grows faster than the length
LONGEST_SENTENCE = 1 << 14  # bytes of a line that the trainer reads; it passes over longer ones
# Its sign for the unknown: it passes over lines that have it.
RESERVED = "\u2585"
# SentencePiece's model file names it, and a unigram model comes out otherwise with another number:
# it must not depend on the machine.
THREADS = 4
SPACE_BEHIND = re.compile("(?<=[^ ]) ")
SPECIAL = 260  # unknown, separator, newline, tab, and the 256 bytes


@config
class TrainedBPE(TokenizerConfig):
    """Byte-pair encoding trained on the corpus by SentencePiece; what it lacks is spelt in bytes.

    The text is not normalised, so that decoding gives back every character. Newline and tab are
    tokens of their own, runs of spaces may become one token. Every line counts, however long: the
    trainer reads long ones in parts. It always runs in the same number of threads, so that the same
    text gives the same tokens on every machine.
    """

    vocab_size: int = 8192  # tokens, with 260 special ones: bytes, separator, newline, tab, unknown
    sample_bytes: int = 20_000_000  # how much of the training text to learn from
    split_digits: bool = True  # a token never holds more than one digit
    coverage: float = 0.9995  # share of the text's characters that get a token of their own

    def validate(self) -> None:
        if self.vocab_size <= SPECIAL:
            raise UserError(f"vocab_size is {self.vocab_size}; it must be above {SPECIAL}")
        if not 0.98 <= self.coverage <= 1:
            raise UserError(f"coverage is {self.coverage}; it must lie between 0.98 and 1")

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`."""
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=split_sentences(corpus.sample(self.sample_bytes)),
                model_writer=model,
                model_type="bpe",
                vocab_size=self.vocab_size,
                character_coverage=self.coverage,
                split_digits=self.split_digits,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n", "\t"],
                unk_id=0,
                bos_id=1,
                bos_piece=SEPARATOR,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=LONGEST_SENTENCE,
                num_threads=THREADS,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(explain_training(error, self.vocab_size)) from None
        return SentencePieceTokenizer(model.getvalue(), by_line=True)


def split_sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines without the characters that are tokens by themselves, none longer than the trainer
    reads."""
    for text in texts:
        for sentence in re.split(f"[\n\t{RESERVED}]", text):
            if len(sentence.encode("utf-8")) > LONGEST_SENTENCE:
                yield from _cut(sentence, LONGEST_SENTENCE // 4)  # bytes of a character at most
            elif sentence:
                yield sentence


def explain_training(error: RuntimeError, vocab_size: int) -> str:
    most = re.search(r"<= (\d+)", str(error))
    if most and "too high" in str(error):
        return (
            f"the training text is too small for vocab_size={vocab_size}; "
            f"it gives at most {most[1]} tokens"
        )
    if "too small" in str(error) or "required_chars" in str(error):
        return f"vocab_size={vocab_size} does not even hold the characters of the text: {error}"
    return f"SentencePiece cannot train a tokenizer on this text: {error}"


@config
class SentencePiece(TokenizerConfig):
    """An existing SentencePiece model file, such as LLaMA's tokenizer.model."""

    path: str  # the model file

    def validate(self) -> None:
        """Raises UserError for a URL that cannot be served."""
        check_path(self.path, "path")

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`."""
        data = self._data()
        try:
            return SentencePieceTokenizer(data, by_line=False)
        except RuntimeError as error:
            raise UserError(f"{self.path} is not a SentencePiece model: {error}") from None

    def origin(self) -> str | None:
        from hashlib import sha256

        return sha256(self._data()).hexdigest()

    def _data(self) -> bytes:
        try:
            return local_copy(self.path, "path").read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {self.path}: {error.strerror}") from None


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    A model that we trained gives every text back exactly. Others do so as far as their own
    normalisation allows; the space that they put before a text is taken away again.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, by_line: bool, ends: Ends | None = None):
        """
        Args:
          model: the model file.
          by_line: newline is a token by itself, so lines can be encoded apart.
          ends: what stands around a text; None: the model's begin and end, as far as it has them.
        """
        import sentencepiece

        self._model = model
        self._by_line = by_line
        self._ends = ends
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._prefix = not by_line and self._processor.encode("a", out_type=str)[0][0] == SPACE
        self.vocab_size = self._processor.vocab_size()
        begin, end = self._processor.bos_id(), self._processor.eos_id()
        if begin < 0 and end < 0 and ends is None:
            raise UserError("the SentencePiece model has neither a begin nor an end token")
        self.begin = begin if begin >= 0 else None
        self.end = end if end >= 0 else begin
        self.unknown = self._processor.unk_id()  # every model has one
        if ends is not None:
            self.begin, self.end = ends.begin, ends.end
        self._words: ByteWords | None = None
        if by_line and (kinds := safe_kinds(model)) is not None:
            self._words = ByteWords(kinds, self._encode_words, LONGEST)

    @property
    def opening(self) -> tuple[int, ...]:
        return super().opening if self._ends is None else self._ends.opening

    @property
    def closing(self) -> tuple[int, ...]:
        return super().closing if self._ends is None else self._ends.closing

    def with_model(self, model: bytes) -> "SentencePieceTokenizer":
        """The same for another model file whose special tokens have the ids of this one's."""
        return SentencePieceTokenizer(model, self._by_line, self._ends)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if (found := self._by_words(texts)) is not None:
            return [tokens.tolist() for tokens in found]
        pieces: list[str] = []
        counts = []
        for text in texts:
            before = len(pieces)
            pieces += _pieces(text) if self._by_line else [text]
            counts.append(len(pieces) - before)
        encoded = self._processor.encode(pieces, num_threads=self.threads)
        if self._by_line and SPACE in pieces:
            encoded = [
                self._space if piece == SPACE else tokens for piece, tokens in zip(pieces, encoded)
            ]
        rest = iter(encoded)
        return [[token for _ in range(count) for token in next(rest)] for count in counts]

    def encode_arrays(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]]:
        """See `Tokenizer.encode_arrays`."""
        found = self._by_words(texts)
        return super().encode_arrays(texts) if found is None else found

    def _by_words(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]] | None:
        """The tokens of each text by those of its words; None where that is not for these texts."""
        if self._words is None or sum(map(len, texts)) < FEW:
            return None
        return self._words.encode_arrays(texts)

    def _encode_words(self, words: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(words, num_threads=self.threads)

    def token_bytes(self, token: int) -> bytes:
        return self._table[token] if 0 <= token < self.vocab_size else b""

    def decode(self, tokens: Sequence[int]) -> str:
        text = b"".join(map(self._by_token.__getitem__, tokens)).decode("utf-8", "replace")
        return text[1:] if self._prefix and text.startswith(" ") else text

    @functools.cached_property
    def special(self) -> dict[str, int]:
        processor = self._processor
        return {
            processor.id_to_piece(token): token
            for token in range(self.vocab_size)
            if processor.is_control(token) or processor.is_unknown(token)
        }

    @functools.cached_property
    def _space(self) -> list[int]:
        """The bytes of U+2581 itself, which SentencePiece would take for a space."""
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode("utf-8")]

    @functools.cached_property
    def _by_token(self) -> Mapping[int, bytes]:
        """The same as `token_bytes`, for many in a row."""
        return collections.defaultdict(bytes, enumerate(self._table))

    @functools.cached_property
    def _table(self) -> list[bytes]:
        table = []
        for token in range(self.vocab_size):
            piece = self._processor.id_to_piece(token)
            if self._processor.is_byte(token):
                table.append(bytes([int(piece[3:5], 16)]))
            elif self._processor.is_control(token) or self._processor.is_unknown(token):
                table.append(b"")
            else:
                table.append(piece.replace(SPACE, " ").encode("utf-8"))
        return table

    def settings(self) -> dict[str, Any]:
        settings = {"kind": self.kind, "by_line": self._by_line}
        return settings if self._ends is None else settings | {"ends": list(self._ends)}

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "SentencePieceTokenizer":
        model = (folder / MODEL_FILE).read_bytes()
        opening, closing, end = settings.get("ends", (None, None, None))
        ends = None if end is None else Ends(tuple(opening), tuple(closing), end)
        return cls(model, settings["by_line"], ends)


def _pieces(text: str) -> list[str]:
    """Cuts a text where no token can cross: after newlines, and before spaces in endless lines.

    U+2581 comes as a piece of its own.
    """
    pieces = text.split("\n")
    pieces = [piece + "\n" for piece in pieces[:-1]] + pieces[-1:]
    if SPACE in text:
        pieces = [cut for piece in pieces for cut in re.split(f"({SPACE})", piece)]
    if len(text) > LONGEST:
        pieces = [cut for piece in pieces for cut in _cut(piece, LONGEST)]
    return pieces


def _cut(line: str, longest: int) -> Iterator[str]:
    """A line in parts of no more characters than that, cut before spaces where it has some."""
    begin = 0
    while len(line) - begin > longest:
        end = begin + longest
        spaces = [match.start() for match in SPACE_BEHIND.finditer(line, begin + 1, end)]
        end = spaces[-1] if spaces else end
        yield line[begin:end]
        begin = end
    yield line[begin:]
