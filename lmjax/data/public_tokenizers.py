"""Tokenizers of public model folders, whatever library they were made for."""

import json
import os
import pathlib

from lmjax.config import UserError, config
from lmjax.data.huggingface_tokenizers import (
    BYTES,
    HUGGING_FACE_FILE,
    HuggingFaceTokenizer,
    read_bert,
    read_gpt2,
    read_library_file,
)
from lmjax.data.icetk import ICE_FILE, IceTokenizer, read_icetk
from lmjax.data.sentencepiece_folders import read_sentencepiece
from lmjax.data.tiktoken_tokenizer import TiktokenTokenizer, read_ranks
from lmjax.data.tokenizers import (
    SETTINGS_FILE,
    Corpus,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
)

__all__ = [
    "BYTES",
    "HUGGING_FACE_FILE",
    "HuggingFaceTokenizer",
    "IceTokenizer",
    "TiktokenTokenizer",
    "TokenizerFolder",
    "read_tokenizer",
]

READERS = {  # in this order: the more complete description first
    "tokenizer.json": read_library_file,
    "*.tiktoken": read_ranks,
    ICE_FILE: read_icetk,
    "*.model": read_sentencepiece,
    "vocab.json": read_gpt2,
    "vocab.txt": read_bert,
}


@config
class TokenizerFolder(TokenizerConfig):
    """The tokenizer of a public model's folder, or one that was saved before."""

    path: str  # the folder

    def build(self, corpus: Corpus) -> Tokenizer:
        return read_tokenizer(self.path)

    def origin(self) -> str | None:
        return read_tokenizer(self.path).fingerprint


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a folder: one that we saved, or the first of these public kinds.

    `tokenizer.json` (Hugging Face), `*.tiktoken` (Qwen), `ice_text.model` (GLM-130B and
    ChatGLM-6B), `*.model` (SentencePiece: LLaMA, T5, GLM's Chinese, ChatGLM2 and 3), `vocab.json`
    with `merges.txt` (GPT-2's byte-level byte-pair encoding, also the large GLM's), `vocab.txt`
    (WordPiece: BERT, the small GLM's). Special tokens are read from `tokenizer_config.json`,
    `special_tokens_map.json` and `added_tokens.json` where these are there.

    Raises:
      UserError: there is none of these, it is damaged or of an unknown kind, or its library is not
        installed.
    """
    folder = pathlib.Path(folder).expanduser()
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
        return "kind" in json.loads((folder / SETTINGS_FILE).read_bytes())
    except (OSError, ValueError, TypeError):
        return False
