"""SentencePiece models of public folders, and the tokens that their programs put behind them."""

import pathlib
from typing import Any

from lmjax.config import UserError
from lmjax.data.folder_settings import (
    GLM_ENDS,
    Added,
    added_tokens,
    check_places,
    folder_settings,
    lacks,
    read_json,
)
from lmjax.data.subwords import SentencePieceTokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.vocabulary import with_special

# ChatGLM2 and 3 name these in their program, not in a file; they lie behind the vocabulary.
CHATGLM_SPECIAL = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
SENTINELS = 100  # of T5, where the folder does not say


def read_sentencepiece(path: pathlib.Path) -> Tokenizer:
    """A SentencePiece model with the special tokens that the folder or its program has behind it.

    T5 and GLM's Chinese models normalise text: no newline, and no run of spaces, comes back.
    """
    folder, data = path.parent, path.read_bytes()
    try:
        bare = SentencePieceTokenizer(data, by_line=False)
        size = bare.vocab_size
        settings = folder_settings(folder)
        new = {name: entry for name, entry in added_tokens(folder).items() if entry.token >= size}
        names = _named_by_program(folder, settings)
        if bare.special.keys() >= set(names):  # they are in the file, as we write it
            names = ()
        named = {name: Added(token, True) for token, name in enumerate(names, size)}
        # A folder may list some of what its program names, as ChatGLM3's does once it is saved.
        if all(name in named and named[name].token == entry.token for name, entry in new.items()):
            new = named
        check_places(path, size, new)
        if ordinary := [name for name, entry in new.items() if not entry.special]:
            raise UserError(f"{path}: the added token {ordinary[0]!r} is text, not special")
        data = with_special(data, list(new))
        if ends := GLM_ENDS.get(settings.get("tokenizer_class")):
            data = _with_ends(folder, data, *ends)
        return SentencePieceTokenizer(data, by_line=False)
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None


def _named_by_program(folder: pathlib.Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """Tokens behind the vocabulary that no file names."""
    kind = settings.get("tokenizer_class")
    if kind == "ChatGLMTokenizer":
        return CHATGLM_SPECIAL
    t5 = kind in ("T5Tokenizer", "T5TokenizerFast") or "extra_ids" in settings
    if t5 or read_json(folder / "config.json").get("model_type") == "t5":
        count = settings.get("extra_ids", SENTINELS)
        return tuple(f"<extra_id_{number}>" for number in reversed(range(count)))
    return ()


def _with_ends(folder: pathlib.Path, data: bytes, begin: str, end: str) -> bytes:
    """The model file with other special tokens to begin and end a document."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    names = {piece.piece for piece in model.pieces}
    for name in (begin, end):
        if name not in names:
            raise UserError(lacks(folder, name))
    model.trainer_spec.bos_piece, model.trainer_spec.eos_piece = begin, end
    return model.SerializeToString()
