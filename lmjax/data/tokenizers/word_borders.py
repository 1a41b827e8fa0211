"""Borders at which texts may be cut without changing tokens (Hugging Face tokenizers).

It follows from the tokenizer's parts. Only what is known here is used; the texts of any other
tokenizer are encoded whole.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lmjax.data.tokenizers.byte_words import SPACE

# Normalizers that change characters by themselves or together with marks behind them.
BY_CHARACTER = ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Nmt")
# Pre-tokenizers after which spaces are gone, and others that only cut further.
DROP_SPACES = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
CUT_FURTHER = (*DROP_SPACES, "Punctuation", "Digits")
# Parts of the patterns by which public byte-level tokenizers cut. None of them matches a space or
# tab behind another character, and none a line break behind a letter or digit of ASCII.
PATTERN_PARTS = {
    *("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    *(r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r" ?\p{L}+", r" ?\p{N}+"),
    *(r"\p{N}", r"\p{N}{1,3}", r"\p{N}+", r"[0-9]", r"[0-9]{1,3}", "[0-9][0-9][0-9]"),
    *(r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),
    *(r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]"),
    *(r"\s+(?!\S)", r"\s+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+", "[一-龥\u3040-ゟ゠-ヿ]+"),
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    *(
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]{first}"
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]{then}{contraction}"
        for first, then in ("*+", "+*")
        for contraction in ("", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
    ),
}
PLAIN = r"[!-~\w]"  # a character that no normalizer makes a space of
ALNUM = "[0-9A-Za-z]"
COMPILED_WORDS = re.compile(rf" +(?={PLAIN})")
GPT2 = "GPT-2's own pattern"
# Splits that make a piece of every match: the rest stays too, or is dropped.
WHOLE = (("Isolated", False), ("Removed", True))
MANY = 200  # characters that may not stand left of a border
Splitter = Callable[[str], list[str]]  # some of its pieces may be empty


def word_borders(tokenizer: Any, pieces: Iterable[str]) -> Splitter | None:
    """Pattern of the pieces of a text that a tokenizer of the library may encode one by one.

    Args:
      tokenizer: of the tokenizers library.
      pieces: its vocabulary.

    Returns:
      What splits a text; None for a tokenizer whose texts are not known to fall apart.
    """
    model = tokenizer.model
    if getattr(model, "dropout", None) is not None or _any(getattr(model, "alpha", None)):
        return None  # it does not always give the same tokens
    added = tokenizer.get_added_tokens_decoder().values()
    words = [entry for entry in added if not entry.special]
    if any(entry.rstrip or entry.single_word for entry in words):
        return None
    parts = _Parts(
        _states(tokenizer.normalizer, "normalizers"),
        _states(tokenizer.pre_tokenizer, "pretokenizers"),
        [entry.content for entry in added],
        tuple(entry.content for entry in words),
        model,
    )
    for find in (_words, _byte_words, _metaspace_words):
        if (borders := find(parts)) is not None:
            return borders
    return _spaced_words(parts, pieces)


class _Parts(NamedTuple):
    """Parts of a tokenizer."""

    normalizers: list[dict[str, Any]]
    cutters: list[dict[str, Any]]  # pre-tokenizers
    names: list[str]  # of added tokens
    words: tuple[str, ...]  # names of those that are not special
    model: Any

    def kinds(self) -> list[str]:
        return [cutter["type"] for cutter in self.cutters]

    def named(self, pattern: str) -> bool:
        """Returns whether an added token has this in its name."""
        return any(re.search(pattern, name) for name in self.names)


def _any(value: Any) -> bool:
    return value is not None and value != 0


def _states(part: Any | None, several: str) -> list[dict[str, Any]]:
    """The states of a normalizer or pre-tokenizer, or of those in a sequence."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    if state["type"] != "Sequence":
        return [state]
    return [inner for one in state[several] for inner in one.get(several, [one])]


def _local(state: dict[str, Any]) -> bool:
    """Returns whether a normalizer changes nothing across a space after another character."""
    if state["type"] == "Replace":
        pattern = state["pattern"].get("String", " ")
        return not any(character.isspace() for character in pattern + state["content"])
    return state["type"] in BY_CHARACTER


def _words(parts: _Parts) -> Splitter | None:
    """BERT's kind: white space only parts words."""
    kinds = parts.kinds()
    if not kinds or kinds[0] not in DROP_SPACES or parts.named(r"\s"):
        return None
    compiled = [state for state in parts.normalizers if state["type"] == "Precompiled"]
    if not all(state in compiled or _local(state) for state in parts.normalizers):
        return None
    words = COMPILED_WORDS.split if compiled else _between_spaces
    if kinds[1:] == ["Metaspace"]:
        known = parts.cutters[1]["prepend_scheme"] == "always" and not parts.named(SPACE)
        return words if known else None
    return words if all(kind in CUT_FURTHER for kind in kinds) else None


def _byte_words(parts: _Parts) -> Splitter | None:
    """GPT-2's kind: a word takes the space before it along."""
    kinds = parts.kinds()
    if kinds[-1:] != ["ByteLevel"] or not all(map(_local, parts.normalizers)):
        return None
    if parts.named(r"\S\s") or not set(kinds) <= {"Split", "Digits", "ByteLevel"}:
        return None
    choices = [GPT2] if any(c.get("use_regex") for c in parts.cutters) else []
    for cutter in parts.cutters:
        if cutter["type"] == "Split":
            written = cutter["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
            if (cutter["behavior"], cutter["invert"]) not in WHOLE:
                return None
            choices += _choices(written)
    if not {*PATTERN_PARTS, GPT2}.issuperset(choices) or not {GPT2, r"\s+"} & {*choices}:
        return None
    kept = all(state["type"] == "NFC" for state in parts.normalizers)
    left = r"\S" if kept else PLAIN
    if any(cutter.get("add_prefix_space") for cutter in parts.cutters):
        return _cut_before({" ": left})
    return _cut_before({r" \t": left, r"\n": ALNUM})


def _choices(pattern: str) -> list[str]:
    """The alternatives of a regular expression."""
    found, depth, in_class, begin, position = [], 0, False, 0, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif in_class:
            in_class = character != "]"
        elif character == "[":
            in_class = True
        elif character in "()":
            depth += 1 if character == "(" else -1
        elif character == "|" and not depth:
            found.append(pattern[begin:position])
            begin = position + 1
        position += 1
    return [*found, pattern[begin:]]


def _metaspace_words(parts: _Parts) -> Splitter | None:
    """T5's kind: every word begins with U+2581."""
    if parts.kinds() != ["Metaspace"] or not parts.cutters[0].get("split", True):
        return None
    if parts.cutters[0]["replacement"] != SPACE or parts.named(rf"\S[\s{SPACE}]"):
        return None
    for state in parts.normalizers:
        ends = state["type"] == "Strip" and not state["strip_left"]
        runs = state["type"] == "Replace" and state["pattern"].get("Regex") == " {2,}"
        if not (ends or runs or state["type"] == "Precompiled" or _local(state)):
            return None
    return _cut_before({" ": PLAIN})


def _spaced_words(parts: _Parts, pieces: Iterable[str]) -> Splitter | None:
    """LLaMA's and Gemma's kind: a text is one piece, but no token has U+2581 behind another
    character, or few have."""
    model, cutters = parts.model, parts.cutters
    if getattr(model, "ignore_merges", False) or type(model).__name__ not in ("BPE", "Unigram"):
        return None
    to_space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepended = parts.normalizers[:1] == [{"type": "Prepend", "prepend": SPACE}]
    rest = parts.normalizers[prepended:]
    if parts.kinds() == ["Metaspace"]:
        known = not rest and not prepended and cutters[0]["replacement"] == SPACE
    else:  # Gemma's file cuts at spaces when they are gone
        known = rest == [to_space] and all(c.get("pattern") == {"String": " "} for c in cutters)
    if not known or model.token_to_id(SPACE) is None:
        return None
    if (prepended and parts.words) or parts.named(rf"[^\s{SPACE}][ {SPACE}]"):
        return None
    crossing = set(re.findall(f"([^{SPACE}\n]){SPACE}", "\n".join(pieces)))
    if len(crossing) > MANY:
        return None
    left = f"[^\\s{SPACE}{re.escape(''.join(sorted(crossing)))}]"
    if prepended:  # the space before a word is as good as the one that would be put before it
        return re.compile(rf"(?<={left}) (?=\S)").split
    return _cut_before({" ": left})


def _between_spaces(text: str) -> list[str]:
    """Pattern of the text between spaces and line breaks."""
    return text.replace("\n", " ").split(" ")


def _cut_before(behind: Mapping[str, str]) -> Splitter:
    """Splitter that cuts a text before some white space, and keeps all of it.

    Args:
      behind: by characters of white space, inside of [], the class of characters of no white space
        behind which a text is cut before them.
    """
    stays = [f"(?<!{left})[{space}]" for space, left in behind.items() if left != r"\S"]
    stays.append(rf"[^\S{''.join(behind)}]")
    return re.compile(rf"\s*+(?:\S++(?:{'|'.join(stays)})\s*+)*+\S*+").findall
