"""A tokenizer of ours as the files that transformers makes its own from.

All but Qwen's, icetk's and some of SentencePiece's become a `tokenizer.json` of the Hugging Face
`tokenizers` library, which gives the same tokens; it is written here without that library. Like our
generation it puts the token that begins a document before a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lmjax.data.folder_settings import library
from lmjax.data.icetk import END, ICE_FILE, PAD
from lmjax.data.public_tokenizers import (
    BYTES,
    HUGGING_FACE_FILE,
    HuggingFaceTokenizer,
    IceTokenizer,
    TiktokenTokenizer,
)
from lmjax.data.special_tokens import ExtendedTokenizer
from lmjax.data.subwords import MODEL_FILE, SPACE, SentencePieceTokenizer
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer
from lmjax.data.vocabulary import append_special

PUBLIC_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# What the published folders of ChatGLM-6B name: a text is followed by a blank's content.
ICE_ROLES = {
    "bos": "<sop>",
    "eos": "<eop>",
    "mask": "[MASK]",
    "gmask": "[gMASK]",
    "pad": PAD,
}
OWN_PROGRAM = "transformers needs the authors' own program for {}; only lmjax reads it here"


class _NoPlace(Exception):
    """Why a file cannot hold a new token beside the vocabulary."""


def public_files(tokenizer: Tokenizer, max_length: int) -> tuple[dict[str, bytes], list[str]]:
    """The files of a tokenizer in a model folder, by name.

    Args:
      tokenizer: any of ours.
      max_length: tokens that the model can take.

    Returns:
      The files, and sentences for the user about what they cannot do.
    """
    try:
        files, notes = _vocabulary_files(tokenizer)
    except _NoPlace as reason:
        return {}, [f"the tokenizer was left out: {reason}"]
    names = {token: name for name, token in tokenizer.special.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        **{role.removesuffix("_id"): names[token] for role, token in end_ids(tokenizer).items()},
    }
    if PUBLIC_FILE in files:
        files[CONFIG_FILE] = _json(settings)
    return files, notes


def end_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What config.json says of the tokens that begin and end a document, or icetk's blanks."""
    if isinstance(_taken_apart(tokenizer)[0], IceTokenizer):
        return {f"{role}_token_id": tokenizer.special[name] for role, name in ICE_ROLES.items()}
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
    return {role: token for role, token in ids.items() if token is not None}


def _taken_apart(tokenizer: Tokenizer) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer that others were added to, and the names of all that were."""
    names: tuple[str, ...] = ()
    while isinstance(tokenizer, ExtendedTokenizer):
        tokenizer, names = tokenizer.inner, (*tokenizer.names, *names)
    return tokenizer, names


def _vocabulary_files(tokenizer: Tokenizer) -> tuple[dict[str, bytes], list[str]]:
    """Raises _NoPlace."""
    inner, names = _taken_apart(tokenizer)
    kind = type(inner)  # what inherits from one of these may encode otherwise
    if kind is HuggingFaceTokenizer:
        return {PUBLIC_FILE: _of_library(inner, names)}, []
    if kind is ByteTokenizer:
        return {PUBLIC_FILE: _json(_of_bytes(tokenizer))}, []
    if kind is CharacterTokenizer:
        note = "transformers passes over characters that the tokenizer lacks; lmjax refuses them"
        characters = inner.settings()["characters"]
        return {PUBLIC_FILE: _json(_of_characters(tokenizer, characters))}, [note]
    if kind is SentencePieceTokenizer:
        return _of_sentencepiece(inner.with_model(_extended_model(inner, names)))
    if kind is IceTokenizer:
        return _of_icetk(inner, _extended_model(inner, names)), [OWN_PROGRAM.format(ICE_FILE)]
    if kind is TiktokenTokenizer:
        files = dict(inner.files())
        if names:
            added = {name: token for token, name in enumerate(names, inner.vocab_size)}
            files["added_tokens.json"] = _json(added)
        return files, [OWN_PROGRAM.format(*inner.files())]
    return {}, [f"the {kind.kind} tokenizer has no form that transformers reads, and was left out"]


def _check_new(names: Iterable[str], pieces: Iterable[str]) -> None:
    """Raises _NoPlace where a vocabulary of these pieces has one of the new names."""
    pieces = set(pieces)
    for name in names:
        if name in pieces:
            raise _NoPlace(f"{name!r} is a piece of text too, and no file keeps two of a name")


def _of_library(tokenizer: HuggingFaceTokenizer, names: tuple[str, ...]) -> bytes:
    """The tokenizer.json that it was made from, with more special tokens."""
    data = tokenizer.files()[HUGGING_FACE_FILE]
    if not names:
        return data
    extended = library("tokenizers").Tokenizer.from_str(data.decode("utf-8"))
    _check_new(names, extended.get_vocab())
    extended.add_special_tokens(list(names))
    if extended.token_to_id(names[-1]) != tokenizer.vocab_size + len(names) - 1:
        raise _NoPlace(f"its ids have gaps, and the file would give {names[0]!r} one of those")
    return extended.to_str().encode("utf-8")


def _extended_model(
    tokenizer: SentencePieceTokenizer | IceTokenizer, names: tuple[str, ...]
) -> bytes:
    """The model file with more special tokens."""
    from sentencepiece import sentencepiece_model_pb2

    data = tokenizer.files()[MODEL_FILE]
    if not names:
        return data
    pieces = sentencepiece_model_pb2.ModelProto.FromString(data).pieces
    _check_new(names, (piece.piece for piece in pieces))
    return append_special(data, names)


def _of_icetk(tokenizer: IceTokenizer, model: bytes) -> dict[str, bytes]:
    """As the last release of ChatGLM-6B has it: a file with all tokens, and how many ids of images
    stand before them."""
    settings = {
        "tokenizer_class": "ChatGLMTokenizer",
        **{f"{role}_token": name for role, name in ICE_ROLES.items()},
        "end_token": END,
        "num_image_tokens": tokenizer.settings()["images"],
    }
    return {ICE_FILE: model, CONFIG_FILE: _json(settings)}


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    characters = {byte: character for character, byte in BYTES.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    _check_new(tokenizer.special, characters.values())
    return _tokenizer(
        tokenizer,
        vocabulary={characters[byte]: byte for byte in range(256)},
        special=tokenizer.special,
        pre_tokenizer={**level, "use_regex": False},
        decoder={**level, "use_regex": False},
    )


def _of_characters(tokenizer: Tokenizer, characters: str) -> dict[str, Any]:
    _check_new(tokenizer.special, characters)
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
    return {**files, PUBLIC_FILE: _json(_of_byte_pairs(tokenizer, model))}, []


def _of_byte_pairs(tokenizer: SentencePieceTokenizer, model: Any) -> dict[str, Any]:
    """The tokenizer.json of SentencePiece's byte-pair encoding with byte fallback.

    Of a model that we trained its pieces have plain spaces, so that U+2581 in a text stays apart
    from them. For others, as in their own program, it is a space.
    """
    hidden, shown, prefix, strip = [], [], [], []
    if tokenizer.settings()["by_line"]:
        for piece in model.pieces:
            if piece.type == piece.NORMAL:
                piece.piece = piece.piece.replace(SPACE, " ")
    else:
        hidden = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
        shown = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    if model.normalizer_spec.add_dummy_prefix:
        prefix = [{"type": "Prepend", "prepend": SPACE}]
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return _tokenizer(
        tokenizer,
        vocabulary={piece.piece: token for token, piece in enumerate(model.pieces)},
        merges=_merges(model),
        special=tokenizer.special,
        words={
            piece.piece: token
            for token, piece in enumerate(model.pieces)
            if piece.type == piece.USER_DEFINED
        },
        normalizer={"type": "Sequence", "normalizers": [*prefix, *hidden]},
        decoder={
            "type": "Sequence",
            "decoders": [*shown, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        unknown=model.trainer_spec.unk_piece,
    )


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
