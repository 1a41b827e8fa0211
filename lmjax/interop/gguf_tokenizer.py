"""A tokenizer of ours as the fields of a GGUF file, with which llama.cpp gives the same tokens."""

from __future__ import annotations

import json
from typing import Any

from lmjax.data.public_tokenizers import HUGGING_FACE_FILE
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.tokenizers.library_files import PATTERNS
from lmjax.data.tokenizers.subwords import MODEL_FILE
from lmjax.interop.library_tokenizer import Unwritable
from lmjax.interop.tokenizer_files import CHARACTERS, PUBLIC_FILE, public_files

PREFIX = "tokenizer.ggml"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens, those of SentencePiece
SENTENCEPIECE_BPE = 2  # its `model_type`
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp wants a merge. What this one would make is no token, and falls apart into bytes.
NO_MERGES = [f"{CHARACTERS[0]} {CHARACTERS[0]}"]
# Patterns that cut a text before bytes are merged, and llama.cpp's names of them.
CUTS = {PATTERNS["Qwen2Tokenizer"]: "qwen2", LLAMA3_PATTERN: "llama-bpe"}


def tokenizer_fields(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Fields of a file, by their names.

    Args:
      tokenizer: any of ours.
      rows: of the model's token table; what the tokenizer lacks is unused.

    Raises:
      Unwritable: llama.cpp has no such tokenizer.
    """
    if MODEL_FILE in (files := tokenizer.files()):
        fields, pieces = _of_sentencepiece(files[MODEL_FILE])
    elif "characters" in (settings := tokenizer.settings()):
        fields, pieces = _of_characters(settings["characters"])
    else:
        fields, pieces = _of_byte_pairs(tokenizer)
    for name, token in tokenizer.special.items():
        pieces[token] = (name, 0.0, CONTROL)
    if (count := max(pieces) + 1) > rows:
        raise Unwritable(f"it has {count} tokens, and the model's table {rows} rows")
    all_pieces = [pieces.get(n, (f"[UNUSED{n}]", 0.0, UNUSED)) for n in range(rows)]
    texts, scores, kinds = zip(*all_pieces, strict=True)
    fields |= {"tokens": list(texts), "token_type": list(kinds)}
    if fields["model"] == "llama":
        fields["scores"] = list(scores)
    ids = {"bos": tokenizer.begin, "eos": tokenizer.end}
    fields |= {f"{role}_token_id": token for role, token in ids.items() if token is not None}
    fields["add_bos_token"] = bool(tokenizer.opening)
    fields["add_eos_token"] = False
    return {f"{PREFIX}.{name}": value for name, value in fields.items()}


Pieces = dict[int, tuple[str, float, int]]  # text, score and kind of each token


def _of_sentencepiece(data: bytes) -> tuple[dict[str, Any], Pieces]:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE:
        raise Unwritable(
            "llama.cpp merges pairs, and this is another SentencePiece model (unigram)"
        )
    if not model.trainer_spec.byte_fallback:
        raise Unwritable("characters that it does not know are no bytes (byte_fallback)")
    normalizer = model.normalizer_spec
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        raise Unwritable("it changes texts before it cuts them, which llama.cpp does not")
    pieces = {n: (one.piece, one.score, one.type) for n, one in enumerate(model.pieces)}
    fields = {
        "model": "llama",
        "pre": "default",
        "add_space_prefix": normalizer.add_dummy_prefix,
        "unknown_token_id": model.trainer_spec.unk_id,
    }
    return fields, pieces


def _of_characters(characters: str) -> tuple[dict[str, Any], Pieces]:
    if not characters.isascii():
        raise Unwritable("llama.cpp cuts texts in bytes, and some of its characters have several")
    pieces = {n: (CHARACTERS[ord(one)], 0.0, NORMAL) for n, one in enumerate(characters)}
    return {"model": "gpt2", "pre": "gpt-2", "merges": NO_MERGES}, pieces


def _of_byte_pairs(tokenizer: Tokenizer) -> tuple[dict[str, Any], Pieces]:
    files, notes = public_files(tokenizer, None)
    data = tokenizer.files().get(HUGGING_FACE_FILE) or files.get(PUBLIC_FILE)
    if data is None:
        raise Unwritable("; ".join(notes) or "it has no tokenizer.json")
    written = json.loads(data)
    model = written["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise Unwritable(f"llama.cpp has no tokenizer of the kind {model.get('type')} in this form")
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    if written.get("normalizer") is not None:
        raise Unwritable("it changes texts before it cuts them, which llama.cpp does not")
    pieces = {token: (text, 0.0, NORMAL) for text, token in model["vocab"].items()}
    for added in written["added_tokens"]:
        kind = CONTROL if added["special"] else USER_DEFINED
        pieces[added["id"]] = (added["content"], 0.0, kind)
    pre = _cut(written["pre_tokenizer"]) if merges else "gpt-2"
    return {"model": "gpt2", "pre": pre, "merges": merges or NO_MERGES}, pieces


def _cut(entry: dict[str, Any] | None) -> str:
    """llama.cpp's name of the way in which a text is cut before pairs are merged."""
    steps = (entry or {}).get("pretokenizers", [entry])
    levels = [step for step in steps if step and step["type"] == "ByteLevel"]
    if len(levels) != 1 or levels[0].get("add_prefix_space"):
        raise Unwritable("it is no tokenizer of bytes, or puts a space before a text")
    others = [step for step in steps if step is not levels[0]]
    if not others and levels[0].get("use_regex", True):
        return "gpt-2"
    patterns = [step.get("pattern", {}).get("Regex") for step in others if step["type"] == "Split"]
    if len(patterns) == len(others) == 1 and patterns[0] in CUTS:
        return CUTS[patterns[0]]
    raise Unwritable("llama.cpp does not know the pattern by which it cuts texts")
