"""Tokenizers of every kind; each registers itself, so that saved ones are read again."""

from lmjax.data.tokenizers import huggingface, icetk, tiktoken_tokenizer  # noqa: F401  # kinds
from lmjax.data.tokenizers.base import (
    SEPARATOR,
    SETTINGS_FILE,
    Bytes,
    ByteTokenizer,
    Characters,
    CharacterTokenizer,
    Corpus,
    Ends,
    TextPiece,
    Tokenizer,
    TokenizerConfig,
    cut_at_names,
    load_tokenizer,
    name_pattern,
    token_type,
)
from lmjax.data.tokenizers.special_tokens import WithTokens
from lmjax.data.tokenizers.subwords import SentencePiece, TrainedBPE
from lmjax.data.tokenizers.trained import (
    TrainedByteBPE,
    TrainedSentencePiece,
    baichuan2_tokenizer,
    llama_tokenizer,
    qwen_tokenizer,
)
from lmjax.data.tokenizers.vocabulary import (
    MergedVocabulary,
    add_words,
    merge_tokenizers,
    old_pieces,
)

__all__ = [
    "SEPARATOR",
    "SETTINGS_FILE",
    "ByteTokenizer",
    "Bytes",
    "CharacterTokenizer",
    "Characters",
    "Corpus",
    "Ends",
    "MergedVocabulary",
    "SentencePiece",
    "TextPiece",
    "Tokenizer",
    "TokenizerConfig",
    "TrainedBPE",
    "TrainedByteBPE",
    "TrainedSentencePiece",
    "WithTokens",
    "add_words",
    "baichuan2_tokenizer",
    "cut_at_names",
    "llama_tokenizer",
    "load_tokenizer",
    "merge_tokenizers",
    "name_pattern",
    "old_pieces",
    "qwen_tokenizer",
    "token_type",
]
