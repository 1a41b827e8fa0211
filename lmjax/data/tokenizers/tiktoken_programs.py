"""Programs with tables of ranks: how they cut a text, and their special tokens."""

from typing import NamedTuple

from lmjax.data.tokenizers.base import SEPARATOR

QWEN_SPECIAL = (SEPARATOR, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"
# How programs cut a text before they merge bytes: contractions, words, digits, signs, spaces.
QWEN_PATTERN, LLAMA3_PATTERN = (
    "|".join(
        (
            *(CONTRACTIONS, r"[^\r\n\p{L}\p{N}]?\p{L}+", digits),
            *(r" ?[^\s\p{L}\p{N}]+[\r\n]*", *SPACES),
        )
    )
    for digits in (r"\p{N}", r"\p{N}{1,3}")
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA4_PATTERN = "|".join(
    (
        *(
            rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}{some}{LOWER}{more}{CONTRACTIONS}?"
            for some, more in ("*+", "+*")
        ),
        *(r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", *SPACES),
    )
)


def _reserved(kind: str, first: int, count: int) -> tuple[str, ...]:
    return tuple(f"<|{kind}reserved_special_token_{n}|>" for n in range(first, first + count))


LLAMA3_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", *_reserved("", 0, 2), "<|finetune_right_pad_id|>"),
    *("<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
    *("<|python_tag|>", "<|image|>", *_reserved("", 2, 244)),
)
LLAMA4_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"),
    *(*_reserved("text_post_train_", 0, 6), "<|python_start|>", "<|python_end|>"),
    *("<|finetune_right_pad|>", *_reserved("text_post_train_", 8, 61)),
    *("<|image_start|>", "<|image_end|>", *_reserved("vision_", 0, 2), "<|tile_x_separator|>"),
    *("<|tile_y_separator|>", *_reserved("vision_", 2, 4), "<|image|>"),
    *(*_reserved("vision_", 6, 1), "<|patch|>", *_reserved("vision_", 7, 1041)),
    *(*_reserved("reasoning_", 0, 8), "<|reasoning_thinking_start|>"),
    *("<|reasoning_thinking_end|>",),
)
LLAMA4_SPECIAL += _reserved("", 0, 2048 - len(LLAMA4_SPECIAL))
# What tekken.json names since version 7; before, the program had these names.
TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)


class TiktokenProgram(NamedTuple):
    """A program with a table of ranks.

    Attributes:
      name: of the program, in saved settings.
      file: what its table is called.
      pattern: how it cuts a text.
      special: names of special tokens, in the order of their ids.
      first: whether these come before the table's tokens.
      begin: the token that is put before a text, if there is one.
      end: the token that ends a document.
      nfc: whether it brings a text into this form of Unicode first.
    """

    name: str
    file: str
    pattern: str
    special: tuple[str, ...]
    first: bool
    begin: str | None
    end: str
    nfc: bool = False


QWEN = TiktokenProgram(
    "qwen", "qwen.tiktoken", QWEN_PATTERN, QWEN_SPECIAL, False, None, SEPARATOR, nfc=True
)
LLAMA3 = TiktokenProgram(
    *("llama3", "tokenizer.model", LLAMA3_PATTERN, LLAMA3_SPECIAL, False),
    *("<|begin_of_text|>", "<|end_of_text|>"),
)
LLAMA4 = LLAMA3._replace(name="llama4", pattern=LLAMA4_PATTERN, special=LLAMA4_SPECIAL)
TEKKEN = TiktokenProgram("tekken", "tekken.json", "", TEKKEN_SPECIAL, True, "<s>", "</s>")
PROGRAMS = {program.name: program for program in (QWEN, LLAMA3, LLAMA4, TEKKEN)}
# Tokens in the tables of Qwen 1 to 3, Llama 3 to 3.3 and Llama 4: nothing else in them tells
# which program they are for.
RANKS = {151_643: QWEN, 128_000: LLAMA3, 200_000: LLAMA4}
