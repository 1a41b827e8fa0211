"""Public vocabularies for the Hugging Face `tokenizers` library: tokenizer.json, vocab.json,
vocab.txt."""

import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.tokenizers.base import Tokenizer
from lmjax.data.tokenizers.classes import (
    BERT,
    FIRST_SPACE,
    GPT2,
    LIKE_BERT,
    PROGRAMS,
    ROBERTA,
    WORDS,
    Program,
    known_class,
    tokenizer_class,
)
from lmjax.data.tokenizers.folder_ends import Frame, folder_ends, template
from lmjax.data.tokenizers.folder_settings import (
    Added,
    added_tokens,
    check_positions,
    folder_settings,
    library,
    padding_of_text,
    read_text,
    special_tokens,
    token_name,
)
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.library_decoders import BYTES
from lmjax.data.tokenizers.subwords import SPACE
from lmjax.data.tokenizers.tiktoken_programs import CONTRACTIONS, QWEN_PATTERN, SPACES

# How Qwen's later models cut a text before they merge bytes; None is GPT-2's way.
PATTERNS = {
    **dict.fromkeys((*GPT2, *ROBERTA, "GPTNeoXTokenizer", "DebertaTokenizer")),
    "BlenderbotTokenizer": None,
    "Qwen2Tokenizer": QWEN_PATTERN,
    "Qwen3_5Tokenizer": "|".join(
        (
            *(CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}"),
            *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", *SPACES),
        )
    ),
}
NFC = ("Qwen2Tokenizer", "Qwen3_5Tokenizer", "GPTNeoXTokenizer")  # bring texts into this form
GPT1 = "OpenAIGPTTokenizer"
SPACE_FIRST = ("BlenderbotTokenizer",)  # put a space before a text unless told otherwise


def read_library_file(path: pathlib.Path) -> Tokenizer:
    """A tokenizer.json, with what the folder says of special tokens and, for classes that obey it,
    of letters' case, accents, Chinese characters and the space before a text."""
    folder = path.parent
    tokenizer = library("tokenizers").Tokenizer.from_file(str(path))
    kind, settings = tokenizer_class(folder), folder_settings(folder)
    if kind in (*BERT, *LIKE_BERT):
        _follow_bert(tokenizer, settings)
    elif kind in PATTERNS:
        _follow_prefix(tokenizer, kind, settings)
    elif kind in FIRST_SPACE:
        _follow_llama(tokenizer, settings.get("add_prefix_space"))
    elif kind in WORDS:
        _follow_words(tokenizer, kind, settings)
    return finished(folder, kind, tokenizer)


def _follow_bert(tokenizer: Any, settings: dict[str, Any]) -> None:
    """BERT's classes change the file's normalizer to what the folder says, or to their defaults."""
    normalizer = tokenizer.normalizer
    if type(normalizer).__name__ == "BertNormalizer":
        for name, value in _bert_settings(settings).items():
            setattr(normalizer, name, value)


def _bert_settings(settings: dict[str, Any]) -> dict[str, bool | None]:
    return {
        "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
        "strip_accents": settings.get("strip_accents"),  # none: where letters become lower-case
        "lowercase": settings.get("do_lower_case", True),
    }


def _follow_prefix(tokenizer: Any, kind: str, settings: dict[str, Any]) -> None:
    """Byte-level classes put a space before a text as the folder says."""
    said = settings.get("add_prefix_space")
    cutter = tokenizer.pre_tokenizer
    if type(cutter).__name__ == "ByteLevel":
        cutter.add_prefix_space = kind in SPACE_FIRST if said is None else said
    elif type(cutter).__name__ == "Sequence" and said is not None:
        for part in cutter:
            if type(part).__name__ == "ByteLevel":
                part.add_prefix_space = said


def _follow_llama(tokenizer: Any, said: bool | None) -> None:
    """LLaMA's classes put a space before a text, or do not, as the folder says."""
    if said is None:
        return
    tokenizers = library("tokenizers")
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    bare = normalizers.Replace(" ", SPACE)
    prefixed = normalizers.Sequence([normalizers.Prepend(SPACE), bare])
    cutter = tokenizer.pre_tokenizer
    if _state(tokenizer.normalizer) == _state(bare if said else prefixed):
        tokenizer.normalizer = prefixed if said else bare
    elif type(cutter).__name__ == "Metaspace" and (cutter.prepend_scheme == "never") == said:
        cutter.prepend_scheme = "first" if said else "never"
    else:  # it is so, or another kind of tokenizer
        return
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if said else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])


def _follow_words(tokenizer: Any, kind: str, settings: dict[str, Any]) -> None:
    """XLNet's and ALBERT's classes change case, and ALBERT's accents, as far as the folder says."""
    normalizers = library("tokenizers").normalizers
    if not isinstance(tokenizer.normalizer, normalizers.Sequence):
        return
    steps = list(tokenizer.normalizer)
    kept, lower = settings.get("keep_accents"), settings.get("do_lower_case")
    if kept is not None and kind == "AlbertTokenizer":
        steps = _with(steps, [normalizers.NFKD(), normalizers.StripAccents()], not kept)
    if lower is not None:
        steps = _with(steps, [normalizers.Lowercase()], lower)
    tokenizer.normalizer = normalizers.Sequence(steps)


def _with(steps: list[Any], some: list[Any], wanted: bool) -> list[Any]:
    """Normalizers with some, before a table of characters, or without them."""
    kinds = tuple(map(type, some))
    rest = [step for step in steps if not isinstance(step, kinds)]
    tables = [type(step).__name__ == "Precompiled" for step in rest]
    position = tables.index(True) if True in tables else len(rest)
    return [*rest[:position], *some, *rest[position:]] if wanted else rest


def _state(part: Any | None) -> bytes:
    return b"" if part is None else part.__getstate__()


def read_byte_pairs(path: pathlib.Path) -> Tokenizer:
    """Byte-level byte pairs, from vocab.json and merges.txt, cut as the folder's class does.

    That is GPT-2's, RoBERTa's, BART's, GPT-NeoX's, Qwen2's, the larger GLM's, ...; also GPT-1's.

    Raises:
      UserError: a class whose program is not known, or another kind of vocabulary.
    """
    folder = path.parent
    kind = known_class(path, (*PATTERNS, GPT1), "GPT2Tokenizer")
    vocabulary = json.loads(read_text(path))
    if kind != GPT1 and not BYTES.keys() <= vocabulary.keys():
        raise UserError(
            f"{path} is not GPT-2's kind of vocabulary: not every byte has a token in it"
        )
    lines = read_text(path.with_name("merges.txt")).split("\n")
    merges = [
        tuple(line.split(" ")) for line in lines if line.strip() and not line.startswith("#version")
    ]
    if kind == GPT1:
        return finished(folder, kind, _gpt1(vocabulary, merges))
    tokenizers = library("tokenizers")
    cutters, settings = tokenizers.pre_tokenizers, folder_settings(folder)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    said = settings.get("add_prefix_space")
    prefix = kind in SPACE_FIRST if said is None else said
    if kind in NFC:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    if pattern := PATTERNS.get(kind):
        tokenizer.pre_tokenizer = cutters.Sequence(
            [
                cutters.Split(tokenizers.Regex(pattern), "isolated"),
                cutters.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = cutters.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return finished(folder, kind, tokenizer)


def _gpt1(vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]]) -> Any:
    """GPT-1's: words of lower-case letters that end with a mark of their own."""
    tokenizers = library("tokenizers")
    model = tokenizers.models.BPE(
        vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=False
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def read_word_pieces(path: pathlib.Path) -> Tokenizer:
    """BERT's WordPiece, from vocab.txt: also the smaller GLM's.

    Spaces, and with an uncased vocabulary case and accents, are not given back.

    Raises:
      UserError: a class whose program is not BERT's, or another kind of vocabulary.
    """
    folder = path.parent
    kind, settings = known_class(path, BERT, "BertTokenizer"), folder_settings(folder)
    tokenizers = library("tokenizers")
    lines = read_text(path).split("\n")  # and at nothing else: U+2028 may be a piece
    pieces = {line.rstrip(" \t"): number for number, line in enumerate(lines)}
    pieces.pop("", None)
    unknown = token_name(settings.get("unk_token")) or "[UNK]"
    if unknown not in pieces:
        raise UserError(f"{path} is not BERT's kind of vocabulary: {unknown} is not in it")
    if "do_lower_case" not in settings:
        _tell_of_case(path, pieces)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token=unknown))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(**_bert_settings(settings))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    names = ("[PAD]", unknown, "[CLS]", "[SEP]", "[MASK]")
    tokenizer.add_special_tokens([name for name in names if name in pieces])
    return finished(folder, kind, tokenizer)


def _tell_of_case(path: pathlib.Path, pieces: dict[str, int]) -> None:
    """Warns where BERT's default, lower-case letters, does not fit the vocabulary."""
    cased = [
        piece for piece in pieces if piece != piece.lower() and not piece.startswith(("[", "<"))
    ]
    if cased:
        warnings.warn(
            f"{path} has {len(cased)} pieces with capital letters, such as {cased[-1]!r}, and no"
            " tokenizer_config.json says do_lower_case: texts are read in lower case, as BERT's"
            ' program does by default. Write {"do_lower_case": false} there if the model is cased',
            stacklevel=2,
        )


def finished(folder: pathlib.Path, kind: str | None, tokenizer: Any) -> HuggingFaceTokenizer:
    """Adds what the folder's settings and its class say about special tokens and a text's ends."""
    _add(folder, tokenizer, added_tokens(folder))
    settings, roles = folder_settings(folder), PROGRAMS.get(kind, Program()).roles
    usual = {name: {} for role, name in roles.items() if f"{role}_token" not in settings}
    _make_special(tokenizer, usual | special_tokens(settings))
    if (padding := padding_of_text(settings)) and tokenizer.token_to_id(padding) is not None:
        one = library("tokenizers").AddedToken
        tokenizer.add_tokens([one(padding, special=False, normalized=False)])
    said = template(tokenizer.post_processor)
    frame, ends = folder_ends(folder, kind, tokenizer.token_to_id, said)
    around = [tokenizer.id_to_token(token) for token in (*ends.opening, *ends.closing, ends.end)]
    if around[-1] is None:
        raise UserError(f"{folder}: the id {ends.end} is to end a document, but is no token")
    _make_special(tokenizer, {name: {} for name in around if name is not None})
    if frame != (said or Frame((), ())):
        tokenizer.post_processor = _processor(tokenizer, *frame)
    return HuggingFaceTokenizer(tokenizer, ends.begin, ends.end, ends.opening, ends.closing)


def _add(folder: pathlib.Path, tokenizer: Any, added: dict[str, Added]) -> None:
    """Adds tokens that lie behind the vocabulary; those of the file get the folder's flags."""
    one = library("tokenizers").AddedToken
    known = tokenizer.get_added_tokens_decoder()
    changed, new = [], {}
    for name, entry in added.items():
        position = tokenizer.token_to_id(name)
        token = one(name, special=entry.special, **entry.flags)
        if position is None:
            new[name] = entry
        elif entry.flags and (position not in known or _flags(known[position]) != _flags(token)):
            changed.append(token)
    tokenizer.add_tokens(changed)
    check_positions(folder, tokenizer.get_vocab_size(), new)
    tokenizer.add_tokens([one(name, special=e.special, **e.flags) for name, e in new.items()])


def _flags(added: Any) -> tuple[bool, ...]:
    return added.single_word, added.lstrip, added.rstrip, added.normalized, added.special


def _make_special(tokenizer: Any, tokens: dict[str, dict[str, bool]]) -> None:
    """Marks tokens as special, those that are not; names of no token are passed over.

    `tokens` has how texts match them, unless they are known already.
    """
    one = library("tokenizers").AddedToken
    known = tokenizer.get_added_tokens_decoder()
    for name, flags in tokens.items():
        token = tokenizer.token_to_id(name)
        if token is not None and not (token in known and known[token].special):
            tokenizer.add_special_tokens([one(name, special=True, **flags)])


def _processor(tokenizer: Any, opening: tuple[int, ...], closing: tuple[int, ...]) -> Any:
    """A post-processor that puts these around a text."""
    names = {token: tokenizer.id_to_token(token) for token in (*opening, *closing)}
    before, behind = ([names[token] for token in ids] for ids in (opening, closing))
    return library("tokenizers").processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        pair=[*before, "$A", *behind, *(f"{name}:1" for name in before), "$B:1"]
        + [f"{name}:1" for name in behind],
        special_tokens=[(name, token) for token, name in names.items()],
    )
