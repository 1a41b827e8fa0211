"""A tokenizer of ours as the files that transformers makes its own from.

All but Qwen's become a `tokenizer.json` of the Hugging Face `tokenizers` library, which gives the
same tokens; it is written here without that library. Like our generation it puts the token that
begins a document before a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmjax.data.public_tokenizers import BYTES, HUGGING_FACE_FILE, TiktokenTokenizer
from lmjax.data.subwords import MODEL_FILE, SPACE, SentencePieceTokenizer
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer

PUBLIC_FILE = "tokenizer.json"


def public_files(tokenizer: Tokenizer, max_length: int) -> tuple[dict[str, bytes], list[str]]:
    """The files of a tokenizer in a model folder, by name.

    Args:
      tokenizer: any of ours.
      max_length: tokens that the model can take.

    Returns:
      The files, and sentences for the user about what they cannot do.
    """
    files, notes = _vocabulary_files(tokenizer)
    names = {token: name for name, token in tokenizer.special.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **{role.removesuffix("_id"): names[token] for role, token in end_ids(tokenizer).items()},
    }
    if PUBLIC_FILE in files:
        files["tokenizer_config.json"] = _json(settings)
    return files, notes


def end_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What config.json says of the tokens that begin and end a document."""
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
    return {role: token for role, token in ids.items() if token is not None}


def _vocabulary_files(tokenizer: Tokenizer) -> tuple[dict[str, bytes], list[str]]:
    if HUGGING_FACE_FILE in tokenizer.files():
        return {PUBLIC_FILE: tokenizer.files()[HUGGING_FACE_FILE]}, []
    if isinstance(tokenizer, ByteTokenizer):
        return {PUBLIC_FILE: _json(_of_bytes(tokenizer))}, []
    if isinstance(tokenizer, CharacterTokenizer):
        note = "transformers passes over characters that the tokenizer lacks; here they are refused"
        return {PUBLIC_FILE: _json(_of_characters(tokenizer))}, [note]
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _of_sentencepiece(tokenizer)
    if isinstance(tokenizer, TiktokenTokenizer):
        note = "transformers needs Qwen's own program for qwen.tiktoken; only lmjax reads it here"
        return dict(tokenizer.files()), [note]
    kind = type(tokenizer).kind
    return {}, [f"the {kind} tokenizer has no form that transformers reads, and was left out"]


def _of_bytes(tokenizer: ByteTokenizer) -> dict[str, Any]:
    characters = {byte: character for character, byte in BYTES.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return _tokenizer(
        tokenizer,
        vocabulary={characters[byte]: byte for byte in range(256)},
        special=tokenizer.special,
        pre_tokenizer={**level, "use_regex": False},
        decoder={**level, "use_regex": False},
    )


def _of_characters(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    characters = tokenizer.settings()["characters"]
    return _tokenizer(
        tokenizer,
        vocabulary={character: token for token, character in enumerate(characters)},
        special=tokenizer.special,
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    )


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, bytes], list[str]]:
    from sentencepiece import sentencepiece_model_pb2

    data = tokenizer.files()[MODEL_FILE]
    files = {"tokenizer.model": data}
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if (
        trainer.model_type != trainer.BPE
        or not trainer.byte_fallback
        or normalizer.name != "identity"
        or normalizer.remove_extra_whitespaces
        or trainer.treat_whitespace_as_suffix
    ):
        note = (
            "transformers has to make its tokenizer from tokenizer.model, which is no byte-pair"
            " encoding of the text as it stands; set tokenizer_class in tokenizer_config.json"
        )
        return files, [note]
    prefix = normalizer.add_dummy_prefix
    written = _tokenizer(
        tokenizer,
        vocabulary={piece.piece: token for token, piece in enumerate(model.pieces)},
        merges=_merges(model),
        special=tokenizer.special,
        words={
            piece.piece: token
            for token, piece in enumerate(model.pieces)
            if piece.type == piece.USER_DEFINED
        },
        normalizer={
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": SPACE}] if prefix else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        unknown=trainer.unk_piece,
    )
    note = f"transformers takes the character U+2581 ({SPACE}) in a text for a space"
    return {**files, PUBLIC_FILE: _json(written)}, [note]


def _merges(model: Any) -> list[tuple[str, str]]:
    """The pairs that make a piece, the best piece first: SentencePiece keeps only the pieces."""
    ids = {piece.piece: token for token, piece in enumerate(model.pieces)}
    ordinary = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    ordinary.sort(key=lambda piece: (-piece.score, ids[piece.piece]))
    return [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in ordinary
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ids and piece.piece[cut:] in ids
    ]


def _tokenizer(
    tokenizer: Tokenizer,
    vocabulary: dict[str, int],
    special: Mapping[str, int],
    decoder: dict[str, Any],
    merges: Sequence[tuple[str, str]] = (),
    words: Mapping[str, int] = MappingProxyType({}),
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    unknown: str | None = None,
) -> dict[str, Any]:
    """A tokenizer.json of byte-pair encoding.

    Args:
      tokenizer: whose `begin` comes before a text.
      vocabulary: ids of pieces.
      special: ids of tokens that stand for no text.
      decoder: pieces to text.
      merges: pairs of pieces that become one, the first first.
      words: ids of tokens that are found in a text before anything else.
      normalizer: what is done to a text before.
      pre_tokenizer: how a text is cut before.
      unknown: the piece for what is in no vocabulary; with it, bytes are tried first.
    """
    added = sorted(
        [(token, name, True) for name, token in special.items()]
        + [(token, name, False) for name, token in words.items()]
    )
    begin = next((name for name, token in special.items() if token == tokenizer.begin), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": is_special,
            }
            for token, name, is_special in added
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None if begin is None else _begin_with(begin, special[begin]),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": unknown is not None,
            "byte_fallback": unknown is not None,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": list(merges),
        },
    }


def _begin_with(name: str, token: int) -> dict[str, Any]:
    """A post-processor that puts a token before a text, and before the second of a pair."""
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, begin, second],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
