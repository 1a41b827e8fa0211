"""A tokenizer of ours as the files that transformers makes its own from.

They are a `tokenizer.json` of the Hugging Face `tokenizers` library that gives the same ids, and
what transformers has to know beside it. Where there is no such file, the notes say why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmjax.data.public_tokenizers import (
    BYTES,
    HUGGING_FACE_FILE,
    HuggingFaceTokenizer,
    IceTokenizer,
    TiktokenTokenizer,
)
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer
from lmjax.data.tokenizers.folder_settings import library, read_json
from lmjax.data.tokenizers.icetk import END, ICE_FILE, PAD, WHITESPACE
from lmjax.data.tokenizers.library_files import PATTERNS
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.subwords import MODEL_FILE, SentencePieceTokenizer
from lmjax.data.tokenizers.vocabulary import append_special
from lmjax.interop.library_tokenizer import (
    Around,
    Entry,
    Unwritable,
    as_json,
    byte_pair_model,
    check_new,
    isolate,
    library_tokenizer,
    merges_of,
)
from lmjax.interop.sentencepiece_json import library_json

PUBLIC_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
# What the published folders of ChatGLM-6B name: a text is followed by a blank's content.
ICE_ROLES = {
    "bos": "<sop>",
    "eos": "<eop>",
    "mask": "[MASK]",
    "gmask": "[gMASK]",
    "pad": PAD,
}
# Special tokens whose usual name says their role.
USUAL = {
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
CHARACTERS = {byte: character for character, byte in BYTES.items()}


def public_files(
    tokenizer: Tokenizer, max_length: int | None, closed: bool = False
) -> tuple[dict[str, bytes], list[str]]:
    """The files of a tokenizer in a model folder, by name.

    Args:
      tokenizer: any of ours.
      max_length: tokens that the model can take; None: any number.
      closed: whether a text has the token behind it that ends a document, as T5's have.

    Returns:
      The files, and sentences for the user about what they cannot do.
    """
    around = _around(tokenizer, closed)
    try:
        files, notes = _vocabulary_files(tokenizer, around)
    except Unwritable as reason:
        return {}, [f"the tokenizer was left out: {reason}"]
    if PUBLIC_FILE in files:
        settings = _settings(tokenizer, json.loads(files[PUBLIC_FILE]), around, max_length)
        files[CONFIG_FILE] = as_json(settings)
    return files, notes


def own_class_notes(folder: Path) -> list[str]:
    """Notes on a written model folder whose tokenizer transformers reads as another one.

    For some types of model it takes the class of the family, whatever tokenizer_config.json says.
    """
    kind = read_json(folder / "config.json").get("model_type")
    written = read_json(folder / PUBLIC_FILE)
    cut = json.dumps([written.get("normalizer"), written.get("pre_tokenizer")])
    if kind != "qwen2" or not written or json.dumps(PATTERNS["Qwen2Tokenizer"]) in cut:
        return []
    return [
        "for a model of type qwen2 AutoTokenizer of transformers 5 takes Qwen2's tokenizer, which"
        " cuts texts otherwise: read this one with PreTrainedTokenizerFast.from_pretrained(FOLDER)"
    ]


def end_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids in config.json of the tokens that begin and end a document, or of icetk's blanks."""
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


def _vocabulary_files(tokenizer: Tokenizer, around: Around) -> tuple[dict[str, bytes], list[str]]:
    """Raises NoPlace."""
    inner, names = _taken_apart(tokenizer)
    kind = type(inner)  # what inherits from one of these may encode otherwise
    if kind is HuggingFaceTokenizer:
        return {PUBLIC_FILE: _of_library(inner, names)}, []
    if kind is ByteTokenizer:
        return {PUBLIC_FILE: as_json(_of_bytes(tokenizer, around))}, []
    if kind is CharacterTokenizer:
        note = "transformers passes over characters that the tokenizer lacks; lmjax refuses them"
        characters = inner.settings()["characters"]
        return {PUBLIC_FILE: as_json(_of_characters(tokenizer, characters, around))}, [note]
    if kind is SentencePieceTokenizer:
        return _of_sentencepiece(tokenizer, _extended_model(inner, names), around)
    if kind is IceTokenizer:
        return _of_icetk(tokenizer, _extended_model(inner, names), around)
    if kind is TiktokenTokenizer:
        return _of_ranks(tokenizer, around)
    return {}, [f"the {kind.kind} tokenizer has no form that transformers reads, and was left out"]


def _around(tokenizer: Tokenizer, closed: bool) -> Around:
    """Names of what is put around a text."""
    names = {token: name for name, token in tokenizer.special.items()}
    closing = tokenizer.closing if closed else ()
    return Around(*(tuple(names[token] for token in ids) for ids in (tokenizer.opening, closing)))


def _settings(
    tokenizer: Tokenizer, written: Entry, around: Around, max_length: int | None
) -> dict[str, Any]:
    """The tokenizer_config.json with which transformers takes a tokenizer.json as it stands.

    The class of a family would leave out what that family's tokenizers do not have.
    """
    inner = _taken_apart(tokenizer)[0]
    names = {token: name for name, token in tokenizer.special.items()}
    roles = {
        "bos": names.get(tokenizer.begin),
        "eos": names[tokenizer.end],
        "unk": _unknown(written["model"], tokenizer),
    }
    for role, usual in USUAL.items():
        roles[role] = next((name for name in usual if name in tokenizer.special), None)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if max_length is not None:
        settings["model_max_length"] = max_length
    if _is_like_bert(written["post_processor"]):
        settings["model_input_names"].insert(1, "token_type_ids")
    if type(inner) is not HuggingFaceTokenizer and len(around.before) < 2:
        # From these transformers makes a post-processor in place of the file's: the same.
        settings["add_bos_token"] = bool(around.before)
        settings["add_eos_token"] = bool(around.behind)
    if type(inner) is IceTokenizer:
        settings |= {"end_token": END, "num_image_tokens": inner.settings()["images"]}
        roles |= ICE_ROLES
    return settings | {f"{role}_token": name for role, name in roles.items() if name is not None}


def _unknown(model: Entry, tokenizer: Tokenizer) -> str | None:
    """The special token for what is in no vocabulary."""
    name = model.get("unk_token")
    if (unknown_id := model.get("unk_id")) is not None:
        name = model["vocab"][unknown_id][0]
    return name if name in tokenizer.special else None


def _is_like_bert(processor: Entry | None) -> bool:
    """Returns whether a post-processor marks the two texts of a pair for BERT's segments."""
    if processor is None:
        return False
    template = json.dumps(processor)
    return processor["type"] == "BertProcessing" or (
        '"[CLS]"' in template and '"type_id": 1' in template
    )


def _of_library(tokenizer: HuggingFaceTokenizer, names: tuple[str, ...]) -> bytes:
    """The tokenizer.json that it was made from, with more special tokens."""
    data = tokenizer.files()[HUGGING_FACE_FILE]
    if not names:
        return data
    extended = library("tokenizers").Tokenizer.from_str(data.decode("utf-8"))
    check_new(names, extended.get_vocab())
    extended.add_special_tokens(list(names))
    if extended.token_to_id(names[-1]) != tokenizer.vocab_size + len(names) - 1:
        raise Unwritable(f"its ids have gaps, and the file would give {names[0]!r} one of those")
    return extended.to_str().encode("utf-8")


def _of_bytes(tokenizer: Tokenizer, around: Around) -> Entry:
    check_new(tokenizer.special, CHARACTERS.values())
    level = BYTE_LEVEL | {"use_regex": False}
    vocabulary = {CHARACTERS[byte]: byte for byte in range(256)}
    return library_tokenizer(
        byte_pair_model(vocabulary),
        tokenizer.special,
        around,
        decoder=level,
        pre_tokenizers=[level],
    )


def _of_characters(tokenizer: Tokenizer, characters: str, around: Around) -> Entry:
    check_new(tokenizer.special, characters)
    vocabulary = {character: token for token, character in enumerate(characters)}
    decoders = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    return library_tokenizer(
        byte_pair_model(vocabulary),
        tokenizer.special,
        around,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _extended_model(
    tokenizer: SentencePieceTokenizer | IceTokenizer, names: tuple[str, ...]
) -> bytes:
    """The model file with more special tokens. Raises NoPlace."""
    from sentencepiece import sentencepiece_model_pb2

    data = tokenizer.files()[MODEL_FILE]
    if not names:
        return data
    pieces = sentencepiece_model_pb2.ModelProto.FromString(data).pieces
    check_new(names, (piece.piece for piece in pieces))
    return append_special(data, names)


def _of_sentencepiece(
    tokenizer: Tokenizer, model: bytes, around: Around
) -> tuple[dict[str, bytes], list[str]]:
    """The model file too: other programs read it."""
    plain = _taken_apart(tokenizer)[0].settings()["by_line"]
    try:
        written = library_json(model, tokenizer.special, around, plain)
    except Unwritable as reason:  # under a name with which transformers takes it for no other one
        return {MODEL_FILE: model}, [
            f"transformers has no tokenizer that does the same as this SentencePiece model:"
            f" {reason}; only lmjax reads it here"
        ]
    notes = []
    if written["model"]["type"] == "Unigram":
        notes = [
            "where two ways to cut a text are equally likely, as in long runs of one sign,"
            " transformers may take another one than SentencePiece"
        ]
    return {"tokenizer.model": model, PUBLIC_FILE: as_json(written)}, notes


def _of_icetk(
    tokenizer: Tokenizer, model: bytes, around: Around
) -> tuple[dict[str, bytes], list[str]]:
    """Also as the last release of ChatGLM-6B has it: a model file with all tokens, and how many ids
    of images stand before them."""
    images = _taken_apart(tokenizer)[0].settings()["images"]
    written = library_json(model, tokenizer.special, around, first=images, written=WHITESPACE)
    note = (
        "transformers puts nothing behind a prompt; GLM-130B and ChatGLM-6B were trained with"
        " [gMASK] and <sop> there, which lmjax puts"
    )
    return {ICE_FILE: model, PUBLIC_FILE: as_json(written)}, [note]


def _never_parts(special: Mapping[str, int]) -> Mapping[str, int]:
    """Special tokens for a vocabulary of parts that a text was cut into: by its signs each name is
    cut, or it is refused with NoPlace."""
    for name in special:
        if not any(map(str.isalnum, name)) or name[-1].isalnum():
            raise Unwritable(f"its special token {name!r} may be found in a text")
    return special


def _of_ranks(tokenizer: Tokenizer, around: Around) -> tuple[dict[str, bytes], list[str]]:
    """The table of ranks too: the authors' own program reads it."""
    inner, names = _taken_apart(tokenizer)
    files = dict(inner.files())
    if names:
        added = {name: token for token, name in enumerate(names, inner.vocab_size)}
        files["added_tokens.json"] = as_json(added)
    tokens = sorted(set(range(inner.vocab_size)) - set(inner.special.values()))
    ids = {inner.token_bytes(token): token for token in tokens}
    spelt = {piece: "".join(map(CHARACTERS.__getitem__, piece)) for piece in ids}
    check_new(tokenizer.special, spelt.values())
    vocabulary = {spelt[piece]: token for piece, token in ids.items()}
    if inner.program.first:  # the library has no ids before the vocabulary's
        vocabulary = {**_never_parts(inner.special), **vocabulary}
    model = byte_pair_model(
        vocabulary,
        [(spelt[left], spelt[right]) for left, right in merges_of(ids, ids)],
        whole_first=True,
    )
    level = BYTE_LEVEL | {"use_regex": False}
    written = library_tokenizer(
        model,
        tokenizer.special,
        around,
        decoder=level,
        normalizers=[{"type": "NFC"}] if inner.program.nfc else [],
        pre_tokenizers=[isolate(inner.program.pattern), level],
    )
    return {**files, PUBLIC_FILE: as_json(written)}, []
