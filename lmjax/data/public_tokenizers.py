"""Tokenizers of public model folders, whatever library they were made for."""

import json
import os
import pathlib
import re

from lmjax.config import UserError, config
from lmjax.data.tokenizers.base import (
    SETTINGS_FILE,
    Corpus,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)
from lmjax.data.tokenizers.huggingface import HUGGING_FACE_FILE, HuggingFaceTokenizer
from lmjax.data.tokenizers.icetk import ICE_FILE, IceTokenizer, read_icetk
from lmjax.data.tokenizers.library_decoders import BYTES
from lmjax.data.tokenizers.library_files import read_byte_pairs, read_library_file, read_word_pieces
from lmjax.data.tokenizers.sentencepiece_folders import read_sentencepiece
from lmjax.data.tokenizers.tiktoken_tokenizer import (
    TiktokenTokenizer,
    is_table,
    read_ranks,
    read_tekken,
)
from lmjax.remote import check_path, local_copy

__all__ = [
    "BYTES",
    "HUGGING_FACE_FILE",
    "HuggingFaceTokenizer",
    "IceTokenizer",
    "TiktokenTokenizer",
    "TokenizerFolder",
    "read_tokenizer",
]


LIBRARY_HEAD = re.compile(rb'\s*{\s*"version"')  # of a tokenizer.json of the Hugging Face library


def read_model(path: pathlib.Path) -> Tokenizer:
    """A file that SentencePiece models and Meta's tables of ranks share a name with."""
    return read_ranks(path) if is_table(path.read_bytes()) else read_sentencepiece(path)


READERS = {  # in this order: the more complete description first
    ICE_FILE: read_icetk,
    "tokenizer.json": read_library_file,
    "*.tiktoken": read_ranks,
    "*tekken*.json": read_tekken,
    "*.model": read_model,
    "*.model.v*": read_model,
    "vocab.json": read_byte_pairs,
    "vocab.txt": read_word_pieces,
}


@config
class TokenizerFolder(TokenizerConfig):
    """The tokenizer of a public model's folder, or one that was saved before."""

    path: str  # the folder

    def validate(self) -> None:
        """Raises UserError for a URL that cannot be served."""
        check_path(self.path, "path")

    def build(self, corpus: Corpus) -> Tokenizer:
        return read_tokenizer(self.path)

    def origin(self) -> str | None:
        return read_tokenizer(self.path).fingerprint


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a folder: one that we saved, or the first of these public kinds.

    `ice_text.model` (GLM-130B and ChatGLM-6B), `tokenizer.json` (Hugging Face), `*.tiktoken`
    (Qwen), `*tekken*.json` (Mistral), `*.model` and `*.model.v1` to `.v7` (SentencePiece: LLaMA,
    Mistral, Gemma, T5, XLNet, GLM's Chinese, ChatGLM2 and 3; or Meta's table for Llama 3 and 4),
    `vocab.json` with `merges.txt` (byte-level byte-pair encoding: GPT-2, RoBERTa, Qwen2, the large
    GLM's), `vocab.txt` (WordPiece: BERT, the small GLM's).

    Special tokens are read from `tokenizer_config.json`, `special_tokens_map.json` and
    `added_tokens.json` where these are there. `tokenizer_class` in `tokenizer_config.json` or
    `config.json`, else the latter's `model_type`, says which program a vocabulary is for. What
    tokenizer_config.json says is followed as transformers does: `add_bos_token`, `add_eos_token`,
    `add_prefix_space`, `do_lower_case`, `strip_accents`, `tokenize_chinese_chars`, `keep_accents`,
    `extra_ids`, `added_tokens_decoder` and the names of special tokens.

    Raises:
      UserError: there is none of these, it is damaged or of an unknown kind, its class is one whose
        program is not known, or its library is not installed.
    """
    folder = local_copy(folder, "folder")
    if _is_ours(folder):
        return load_tokenizer(folder)
    for pattern, read in READERS.items():
        if paths := sorted(folder.glob(pattern)):
            if len(paths) > 1:
                names = ", ".join(path.name for path in paths)
                raise UserError(f"{folder} holds several tokenizers: {names}; leave only one")
            try:
                return read(paths[0])
            except UserError:
                raise
            except Exception as error:  # the tokenizers library raises nothing narrower
                raise UserError(f"the tokenizer in {paths[0]} is damaged: {error}") from error
    raise UserError(f"there is no tokenizer in {folder}: none of {', '.join(READERS)}")


def _is_ours(folder: pathlib.Path) -> bool:
    try:
        with open(folder / SETTINGS_FILE, "rb") as file:
            head = file.read(64)
            if LIBRARY_HEAD.match(head):  # tens of megabytes, perhaps
                return False
            return "kind" in json.loads(head + file.read())
    except (OSError, ValueError, TypeError):
        return False
