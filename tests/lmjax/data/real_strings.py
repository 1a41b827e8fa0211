"""Texts as people have them, for tests of tokenizers: languages, code, white space, names."""

import functools
import gzip
import itertools
import json
import os
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "data" / "texts" / "xquad_sample.json"
# The whole of what the sample is from; where it is not, the list is shorter by its strings.
SHARED = Path(__file__).parents[4] / "shared" / "data" / "xquad"

LONGEST = 250  # characters of a piece of code
LIBRARY = Path(os.__file__).parent
# Modules of Python whose text every version has, though not the same.
MODULES = (
    *("abc", "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "configparser"),
    *("copy", "csv", "dataclasses", "difflib", "enum", "fractions", "functools", "heapq"),
    *("inspect", "json/decoder", "locale", "mimetypes", "ntpath", "pickle", "pprint"),
    *("random", "shutil", "socket", "statistics", "string", "textwrap", "threading"),
    *("tokenize", "typing", "unittest/mock", "urllib/parse", "uuid"),
)  # fmt: skip
SPECIAL_NAMES = (
    *("<s>", "</s>", "<unk>", "<pad>", "<mask>", "<bos>", "<eos>", "<|endoftext|>"),
    *("<|im_start|>", "<|im_end|>", "[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]", "[gMASK]"),
    *("<sop>", "sop", "<eop>", "<extra_id_0>", "<extra_id_99>", "<0x0A>", "<0xFF>"),
    *("<|begin_of_text|>", "<|eot_id|>", "[INST]", "<start_of_turn>", "<end_of_turn>"),
    *("<think>", "<tool_call>", "<n>", "<|blank_2|>", "<|user|>", "<reserved_106>"),
    *("<|reserved_special_token_0|>", "<fim_prefix>", "##ing", "</w>", "Ġthe", "▁the"),
)  # fmt: skip
WHITE = (
    *(" ", "\n", "\t", "\r\n", "\r", "\x0b", "\x0c"),
    *("\x85", "\xa0", "\u2003", "\u2028", "\u3000"),
)
HARD = (
    *("", "a", ".", "\x00", "a\x00b", "\x01\x1f\x7f", "\ufeffbegin", "soft\xadhyphen"),
    *("\u200bzero\u200cwidth", "▁", "▁▁", " ▁ ", "a▁b", "▁a", "a▁", "a ▁ b", "Ġ", "Ċ", "ĠaĊ"),
    *("##", "@@ ", "</w>a", "😀", "👩\u200d👩\u200d👧\u200d👦", "🇺🇦🇬🇧", "👍🏽", "❤️ and ❤"),
    *("🏴󠁧󠁢󠁥󠁮󠁧󠁿", "é", "é", "ñ ñ", "Å Å Å", "ﬁ ﬂ ǆ", "Ａ１！　ｶﾞ", "각 각"),
    *("हिन्दी क्षत्रिय", "ไทยไม่มีช่องว่าง", "العَرَبِيَّة", "עִבְרִית", "a\u202eb\u202c"),
    *("İstanbul ı ß ẞ ſ", "Ǆungla ǅ ǆ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙", "龘龘 𠀀𠮷", "\U0010ffff", "\ufffd"),
    *("x̶y̶", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A", "it's we'll I'M they'RE y’all d'être"),
    *("word's 's's 'S 'lL", "1234567890 3.14159 1,000,000 ½ ² ٣ ۴ 四", "wow !\n", " !!\n\n"),
    *("...,,,;;;", "-----=====", "https://a.b/c?d=e&f#g", "user@example.org", "C:\\dir\\n"),
    *("$x^2_{i}$ \\frac{a}{b}", "<b>html &amp; &lt;</b>", "don't do n't ca n't ."),
    *("a , b ! c ? d .", "CamelCaseWord snake_case_word", "if x:\n\treturn  y     # 12\n"),
    *("{\n  \"k\": [1, 2,\n         3]\n}\n", "\n\n\n\n", "a\n\n\nb", "trailing  "),
    *("  leading", " a ", "\tTab\tand  two   three    four", "line\r\nline\r\n\r\n"),
    *("x\n \n  \n", " \n", "\n ", "\t\n\t", "a" * 300, "ab" * 200, "é" * 100),
    *("中文没有空格，也没有词。", "日本語の文章です。カタカナ", "한국어 문장입니다"),
    *("Смешанный text 混合 テキスト", "Ελληνικά ΟΔΥΣΣΕΥΣ"),
)  # fmt: skip


@functools.cache
def real_strings() -> tuple[str, ...]:
    """At least 2,000 different strings: hard cases first, then languages, then code and its prose.

    All are valid Unicode without surrogates. Which pieces of code they hold depends on Python's
    version; the languages are more where the whole of XQuAD lies beside the repository.
    """
    found = [*HARD, *_white_space(), *_special_names(), *_languages(), *_shared(), *_code()]
    return tuple(dict.fromkeys(found))


def _white_space() -> list[str]:
    runs = [white * length for white in WHITE for length in (1, 2, 3, 4, 7, 8, 16, 31, 33, 80)]
    mixed = ["".join(pair) for pair in itertools.permutations(WHITE, 2)]
    return [
        *runs,
        *mixed,
        *(f"def f():{run}return 1{run}x" for run in runs[::3]),
        *(f"a{run}" for run in mixed),
    ]


def _special_names() -> list[str]:
    """Names alone, in sentences, beside each other, and cut short."""
    pairs = itertools.pairwise(SPECIAL_NAMES)
    return [
        *SPECIAL_NAMES,
        *(f"a text with {name} and goes on" for name in SPECIAL_NAMES),
        *(f"{name}begins, ends{name}" for name in SPECIAL_NAMES),
        *(f"x {first}{second} y" for first, second in pairs),
        *(name[:-1] for name in SPECIAL_NAMES),
    ]


def _languages() -> list[str]:
    by_language = json.loads(SAMPLE.read_text("utf-8"))
    return [text for texts in by_language.values() for text in texts]


def _shared() -> list[str]:
    found = []
    for path in sorted(SHARED.glob("xquad.*.json.gz")):
        articles = json.loads(gzip.decompress(path.read_bytes()))["data"]
        found += [
            paragraph["context"] for article in articles for paragraph in article["paragraphs"]
        ][::4]
    return found


def _code() -> list[str]:
    """Pieces of Python's own modules, code and comments, each the beginning of a paragraph."""
    found = []
    for name in MODULES:
        source = (LIBRARY / f"{name}.py").read_text("utf-8")
        pieces = [piece[:LONGEST] for piece in source.split("\n\n") if piece.strip()]
        found += pieces[:: max(1, len(pieces) // 40)]
    return found
