"""Tokenizers trained with the settings of published models: SentencePiece, byte-level BPE."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Literal

from lmjax.config import UserError, config, preset
from lmjax.data.tokenizers.base import Corpus, Tokenizer, TokenizerConfig
from lmjax.data.tokenizers.folder_settings import library
from lmjax.data.tokenizers.subwords import (
    LONGEST_SENTENCE,
    SPECIAL,
    THREADS,
    SentencePieceTokenizer,
    explain_training,
    split_sentences,
)
from lmjax.data.tokenizers.tiktoken_programs import QWEN
from lmjax.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

BYTES = 256


@config
class TrainedSentencePiece(TokenizerConfig):
    """SentencePiece trained on the corpus with the settings of a published model.

    Where `TrainedBPE` gives back every text and encodes line by line, this makes what SentencePiece
    itself makes: a text begins with a space where `space_before`, and a newline is spelt in bytes.
    The tokens <unk>, <s> and </s> have the ids 0, 1 and 2.
    """

    vocab_size: int = 32_000  # tokens, with 259 special ones: bytes, unknown, begin, end
    model: Literal["bpe", "unigram"] = "bpe"  # how pieces are learned
    sample_bytes: int = 100_000_000  # how much of the training text to learn from
    coverage: float = 0.99995  # share of the text's characters that get a token of their own
    longest: int = 16  # characters of a piece
    split_digits: bool = True  # a token never holds more than one digit
    space_before: bool = True  # put a space before a text (a "dummy prefix")
    blanks: bool = True  # pieces of spaces alone, as code has them
    normalize: Literal["identity", "nfkc"] = "identity"  # of the text, before it is encoded

    def validate(self) -> None:
        """Raises UserError for settings that make no tokenizer."""
        if self.vocab_size <= SPECIAL:
            raise UserError(f"vocab_size is {self.vocab_size}; it must be above {SPECIAL}")
        if not 0.98 <= self.coverage <= 1 or self.longest < 1:
            raise UserError(
                f"coverage={self.coverage}, longest={self.longest}: must lie between 0.98 and 1, "
                "and be 1 or more"
            )

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`."""
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=split_sentences(corpus.sample(self.sample_bytes)),
                model_writer=model,
                model_type=self.model,
                vocab_size=self.vocab_size,
                character_coverage=self.coverage,
                max_sentencepiece_length=self.longest,
                split_digits=self.split_digits,
                byte_fallback=True,
                normalization_rule_name=self.normalize,
                remove_extra_whitespaces=False,
                add_dummy_prefix=self.space_before,
                allow_whitespace_only_pieces=self.blanks,
                max_sentence_length=LONGEST_SENTENCE,
                num_threads=THREADS,
                minloglevel=3,
            )
        except RuntimeError as error:
            raise UserError(explain_training(error, self.vocab_size)) from None
        return SentencePieceTokenizer(model.getvalue(), by_line=False)


@config
class TrainedByteBPE(TokenizerConfig):
    """Byte-level byte-pair encoding trained on the corpus, cut as Qwen's program cuts a text.

    (Bai et al. 2023, arXiv:2309.16609, section 2.2: cl100k's way with single digits.) Needs the
    extra `tokenizers`, for training and for use. Qwen's 208 special tokens follow the vocabulary.
    """

    vocab_size: int = 151_643  # tokens without the special ones; 256 are the bytes
    sample_bytes: int = 100_000_000  # how much of the training text to learn from
    least: int = 2  # times that a pair occurs in order to be merged

    def validate(self) -> None:
        """Raises UserError for a vocabulary without the bytes."""
        if self.vocab_size < BYTES or self.least < 1:
            raise UserError(
                f"vocab_size={self.vocab_size}, least={self.least}: must be {BYTES} or more, and 1 "
                "or more"
            )

    def build(self, corpus: Corpus) -> Tokenizer:
        """See `TokenizerConfig.build`. UserError: the text is too small for the vocabulary."""
        trainer = library("tokenizers")
        alphabet = sorted(trainer.pre_tokenizers.ByteLevel.alphabet())
        learner = trainer.Tokenizer(trainer.models.BPE())
        learner.normalizer = trainer.normalizers.NFC()
        learner.pre_tokenizer = trainer.pre_tokenizers.Sequence(
            [
                trainer.pre_tokenizers.Split(trainer.Regex(QWEN.pattern), "isolated"),
                trainer.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        settings = trainer.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.least,
            initial_alphabet=alphabet,
            show_progress=False,
        )
        learner.train_from_iterator(corpus.sample(self.sample_bytes), settings)
        vocabulary = learner.get_vocab()
        if len(vocabulary) < self.vocab_size:
            raise UserError(
                f"the training text is too small for vocab_size={self.vocab_size}; "
                f"it gives at most {len(vocabulary)} tokens"
            )
        pieces = sorted(vocabulary, key=vocabulary.__getitem__)
        return TiktokenTokenizer(rank_table(pieces), QWEN)


def rank_table(pieces: Sequence[str]) -> bytes:
    """A table of ranks, in tiktoken's layout, of pieces that are spelt in GPT-2's alphabet.

    Bytes that are no printable characters are written there as others (Radford et al. 2019).
    """
    lines = []
    for rank, piece in enumerate(pieces):
        data = bytes(_BYTE_OF[sign] for sign in piece)
        lines.append(base64.b64encode(data) + b" " + str(rank).encode())
    return b"\n".join(lines) + b"\n"


def _alphabet() -> Iterator[tuple[str, int]]:
    """The character for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    yield from ((chr(byte), byte) for byte in printable)
    yield from ((chr(BYTES + number), byte) for number, byte in enumerate(others))


_BYTE_OF = dict(_alphabet())


@preset
def llama_tokenizer(vocab_size: int = 32_000) -> TrainedSentencePiece:
    """LLaMA's settings (Touvron et al. 2023, arXiv:2302.13971, section 2.1).

    BPE of SentencePiece, digits apart, unknown characters in bytes.

    Args:
        vocab_size: tokens.
    """
    return TrainedSentencePiece(vocab_size=vocab_size)


@preset
def baichuan2_tokenizer(vocab_size: int = 125_696) -> TrainedSentencePiece:
    """Baichuan 2's settings (Yang et al. 2023, arXiv:2309.10305, section 2.2).

    BPE of SentencePiece without normalisation or a space before the text, digits apart, pieces of
    spaces for code, coverage 0.9999, pieces of up to 32 characters for Chinese phrases.

    Args:
        vocab_size: tokens.
    """
    return TrainedSentencePiece(
        vocab_size=vocab_size, coverage=0.9999, longest=32, space_before=False
    )


@preset
def qwen_tokenizer(vocab_size: int = 151_643) -> TrainedByteBPE:
    """Qwen's settings (Bai et al. 2023, arXiv:2309.16609, section 2.2).

    The paper begins with cl100k's vocabulary and adds Chinese; here all is learned from the corpus.

    Args:
        vocab_size: tokens without the special ones.
    """
    return TrainedByteBPE(vocab_size=vocab_size)
