"""Tokenizers as fields of GGUF files, with which llama.cpp gives the same tokens, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmjax.data.public_tokenizers import HUGGING_FACE_FILE
from lmjax.data.tokenizers import Tokenizer
from lmjax.data.tokenizers.library_files import PATTERNS
from lmjax.data.tokenizers.subwords import MODEL_FILE
from lmjax.interop.library_tokenizer import Unwritable, as_json
from lmjax.interop.tokenizer_files import CHARACTERS, CONFIG_FILE, PUBLIC_FILE, public_files

PREFIX = "tokenizer.ggml"
PUBLIC_MODEL = "tokenizer.model"  # SentencePiece's file in public folders
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


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of a model folder with the tokenizer of a GGUF file, by name.

    Args:
      fields: of the file.

    Raises:
      Unwritable: it has none, or one that is not known.
    """
    given = {
        name.removeprefix(f"{PREFIX}."): value
        for name, value in fields.items()
        if name.startswith(f"{PREFIX}.")
    }
    kind, texts = given.get("model", "no_vocab"), given.get("tokens")
    if kind == "no_vocab" or not texts:
        raise Unwritable("the file has none")
    kinds = given.get("token_type", [NORMAL] * len(texts))
    while kinds[-1] == UNUSED:  # rows of the table that no token has
        texts, kinds = texts[:-1], kinds[:-1]
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    ids = {ours: given.get(f"{theirs}_token_id") for theirs, ours in roles.items()}
    ids = {role: token for role, token in ids.items() if token is not None and token < len(texts)}
    settings = {f"{role}_token": texts[token] for role, token in ids.items()}
    if kind == "llama":
        begins = given.get("add_bos_token", True)
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": begins}
        settings["add_eos_token"] = given.get("add_eos_token", False)
        model = {PUBLIC_MODEL: _sentencepiece_model(given, texts, kinds, ids)}
    elif kind == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        begins = "bos" in ids and given.get("add_bos_token", False)
        model = {PUBLIC_FILE: as_json(_library_file(given, texts, kinds, ids, begins))}
    else:
        raise Unwritable(f"it is of the kind {kind}, and only llama and gpt2 can be read")
    return model | {CONFIG_FILE: as_json(settings)}


def _sentencepiece_model(
    given: Mapping[str, Any], texts: list[str], kinds: list[int], ids: dict[str, int]
) -> bytes:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    scores = given.get("scores", [0.0] * len(texts))
    for text, score, kind in zip(texts, scores, kinds):  # longer ones have rows of no token
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = SENTENCEPIECE_BPE, True
    trainer.vocab_size = len(texts)
    for role in ("unk", "bos", "eos", "pad"):
        setattr(trainer, f"{role}_id", ids.get(role, -1))
        if role in ids:
            setattr(trainer, f"{role}_piece", texts[ids[role]])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = given.get("add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def _library_file(
    given: Mapping[str, Any],
    texts: list[str],
    kinds: list[int],
    ids: dict[str, int],
    begins: bool,
) -> dict[str, Any]:
    """A tokenizer.json of byte pairs."""
    vocabulary = {
        text: token for token, (text, kind) in enumerate(zip(texts, kinds)) if kind == NORMAL
    }
    merges = [merge for merge in given.get("merges", []) if merge.replace(" ", "", 1) in vocabulary]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts = {name: pattern for pattern, name in CUTS.items()}
    pre = given.get("pre", "gpt-2")
    if pre == "gpt-2":
        cut = level | {"use_regex": True}
    elif pre in cuts:
        split = {"pattern": {"Regex": cuts[pre]}, "behavior": "Isolated", "invert": False}
        steps = [{"type": "Split"} | split, level | {"use_regex": False}]
        cut = {"type": "Sequence", "pretokenizers": steps}
    else:
        known = ", ".join(["gpt-2", *cuts])
        raise Unwritable(f"it cuts texts as {pre}, and only {known} are known")
    added = [
        {"id": token, "content": text, "special": kind == CONTROL, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for token, (text, kind) in enumerate(zip(texts, kinds))
        if kind in (CONTROL, USER_DEFINED)
    ]
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": pre == "llama-bpe"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": _opening(texts[ids["bos"]], ids["bos"]) if begins else None,
        "decoder": level | {"use_regex": True},
        "model": model,
    }


def _opening(name: str, token: int) -> dict[str, Any]:
    """A post-processor that puts a token before a text."""
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    text, other = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
