"""SentencePiece models of public folders, and the tokens that their programs put behind them."""

import pathlib
from typing import Any

from lmjax.config import UserError
from lmjax.data.tokenizers.base import Ends, Tokenizer
from lmjax.data.tokenizers.classes import (
    FIRST_SPACE,
    GENERIC,
    LLAMA,
    WORDS,
    known_class,
    tokenizer_class,
)
from lmjax.data.tokenizers.folder_ends import folder_ends
from lmjax.data.tokenizers.folder_settings import (
    GLM_ENDS,
    Added,
    added_tokens,
    check_positions,
    folder_settings,
    lacks,
    library,
    special_tokens,
)
from lmjax.data.tokenizers.library_files import finished
from lmjax.data.tokenizers.subwords import SPACE, SentencePieceTokenizer
from lmjax.data.tokenizers.vocabulary import with_special

# ChatGLM2 and 3 name these in their program, not in a file; they lie behind the vocabulary.
CHATGLM_SPECIAL = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
CHATGLM_OPENING = ("[gMASK]", "sop")
SENTINELS = 100  # of T5, where the folder does not say
PLAIN = (*LLAMA, *GENERIC, "GemmaTokenizer", "GLMChineseTokenizer")  # the model alone
KNOWN = (*PLAIN, *WORDS, "T5Tokenizer", "ChatGLMTokenizer")


def read_sentencepiece(path: pathlib.Path) -> Tokenizer:
    """A SentencePiece model with the special tokens that the folder or its program has behind it.

    T5 and GLM's Chinese models normalise text: no newline, and no run of spaces, comes back.

    Raises:
      UserError: no SentencePiece model, or one for a program that is not known.
    """
    folder, data = path.parent, path.read_bytes()
    bare = open_model(path, data)
    kind = tokenizer_class(folder)
    if kind is not None:
        known_class(path, KNOWN, kind)
    if kind in WORDS:
        return finished(folder, kind, _words(data, kind, folder_settings(folder)))
    size = bare.get_piece_size()
    new = {name: entry for name, entry in added_tokens(folder).items() if entry.token >= size}
    names = _named_by_program(folder, kind)
    if all(bare.is_control(bare.piece_to_id(name)) for name in names):
        names = ()  # they are in the file, as we write it
    named = {name: Added(token, True, {}) for token, name in enumerate(names, size)}
    # A folder may list some of what its program names, as ChatGLM3's does once it is saved, and
    # tokens behind that.
    if all(
        entry.token == named[name].token if name in named else entry.token >= size + len(named)
        for name, entry in new.items()
    ):
        new = dict(sorted((new | named).items(), key=lambda item: item[1].token))
    check_positions(path, size, new)
    if ordinary := [name for name, entry in new.items() if not entry.special]:
        raise UserError(f"{path}: the added token {ordinary[0]!r} is text, not special")
    data = with_special(_as_said(data, folder, kind), list(new))
    if names := GLM_ENDS.get(kind):
        data = _with_ends(folder, data, *names)
    return SentencePieceTokenizer(data, by_line=False, ends=_ends(path, kind, data))


def open_model(path: pathlib.Path, data: bytes) -> Any:
    """SentencePiece's own processor. UserError for a file that is no model of it."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise UserError(
            f"{path} is not a SentencePiece model, and no table of ranks that is known. If the"
            " model's folder has a tokenizer.json, take that"
        ) from None


def _named_by_program(folder: pathlib.Path, kind: str | None) -> tuple[str, ...]:
    """Tokens behind the vocabulary that no file names."""
    if kind == "ChatGLMTokenizer":
        return CHATGLM_SPECIAL
    settings = folder_settings(folder)
    if kind == "T5Tokenizer" or "extra_ids" in settings:
        count = settings.get("extra_ids", SENTINELS)
        return tuple(f"<extra_id_{number}>" for number in reversed(range(count)))
    return ()


def _as_said(data: bytes, folder: pathlib.Path, kind: str | None) -> bytes:
    """The model file with the folder's names for its pieces and its first space.

    Some files keep pieces free that the folder names, as InternLM2's. No text makes those that the
    folder calls special. LLaMA's classes put a space before a text, or do not, as the folder says.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    settings = folder_settings(folder)
    said = settings.get("add_prefix_space")
    if said is not None and (kind is None or kind in FIRST_SPACE):
        model.normalizer_spec.add_dummy_prefix = said
    pieces = {piece.piece: piece for piece in model.pieces}
    special = [*special_tokens(settings)]
    for name, entry in added_tokens(folder).items():
        if entry.token < len(model.pieces) and name not in pieces:
            pieces[name] = _renamed(model, entry.token, name)
        special += [name] if entry.special else []
    for name in special:
        if name in pieces and pieces[name].type in (pieces[name].NORMAL, pieces[name].USER_DEFINED):
            pieces[name].type = pieces[name].CONTROL
    return model.SerializeToString()


def _renamed(model: Any, token: int, name: str) -> Any:
    """A model's piece under a new name; those of bytes keep theirs, which says the byte."""
    piece, spec = model.pieces[token], model.trainer_spec
    if piece.type == piece.BYTE:
        return piece
    for role in ("bos_piece", "eos_piece", "unk_piece", "pad_piece"):
        if getattr(spec, role) == piece.piece:
            setattr(spec, role, name)
    piece.piece = name
    if piece.type == piece.NORMAL:
        piece.type = piece.USER_DEFINED
    return piece


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


def _ends(path: pathlib.Path, kind: str | None, data: bytes) -> Ends | None:
    """Tokens around a text; None where they are those of the model file."""
    model = SentencePieceTokenizer(data, by_line=False)
    if kind == "ChatGLMTokenizer":
        opening = tuple(model.special[name] for name in CHATGLM_OPENING)
        return Ends(opening, (model.end,), model.end)
    names = {token: name for name, token in model.special.items()}
    own = {"bos": names.get(model.begin), "eos": names.get(model.end)}
    # A model file alone is read as LLaMA's, which begins a text.
    default = "LlamaTokenizer" if kind is None or kind in GENERIC else kind
    _, ends = folder_ends(path.parent, default, model.special.get, None, own)
    return None if ends == Ends(model.opening, model.closing, model.end) else ends


def _words(data: bytes, kind: str, settings: dict[str, Any]) -> Any:
    """XLNet's and ALBERT's program: quotes, accents and case are changed, words stand apart.

    They take accents off unless keep_accents is true, ALBERT makes letters lower-case unless
    do_lower_case is false, XLNet if it is true.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    tokenizers = library("tokenizers")
    normalizers, cutters = tokenizers.normalizers, tokenizers.pre_tokenizers
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not settings.get("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.get("do_lower_case", kind == "AlbertTokenizer"):
        steps.append(normalizers.Lowercase())
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram(pieces, model.trainer_spec.unk_id, False)
    )
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = cutters.Sequence(
        [cutters.WhitespaceSplit(), cutters.Metaspace(SPACE, "always")]
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace(SPACE, "always")
    special = [piece.piece for piece in model.pieces if piece.type in (2, 3, 4)]
    tokenizer.add_special_tokens(special)
    return tokenizer
