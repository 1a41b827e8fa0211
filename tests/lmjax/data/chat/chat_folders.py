"""Small folders of every chat family: a tokenizer of its kind, and its template."""

import functools
import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.lmjax.data.chat.chat_families import Family

LEARNT = [
    "system user assistant tool model You are a helpful assistant. Be brief and kind.\n",
    "The list of the things: what is the weather in Paris today? It is sunny, 22 degrees.\n\n",
    "[INST] <<SYS>> [/INST] User: Assistant: the answer is \n\n  yes  and  no  问答第轮今天天气\n",
] * 4


@functools.cache
def learnt(spaced: bool) -> tuple[dict, list]:
    """Pieces and merges of a byte-pair encoding, of bytes or of text with U+2581 for spaces."""
    tokenizer = Tokenizer(models.BPE())
    alphabet = [] if spaced else pre_tokenizers.ByteLevel.alphabet()
    if spaced:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.train_from_iterator(LEARNT, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def build(family: Family) -> Tokenizer:
    """A tokenizer of the family's kind.

    bytes: GPT-2's. The others have U+2581 for spaces: prepended (LLaMA's, before each text),
    first (before the first text alone), replaced (Gemma's: before none), stripped (Phi-3's: as
    prepended, and special tokens swallow the white space behind them).
    """
    pieces, merges = learnt(family.kind != "bytes")
    vocabulary = {name: token for token, name in enumerate(family.tokens)}
    if family.kind == "bytes":
        vocabulary = {}
    else:
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    for piece in sorted(pieces, key=pieces.get):
        vocabulary.setdefault(piece, len(vocabulary))
    settings = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    if family.kind == "bytes":
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, **settings))
        replace = normalizers.Replace(" ", "▁")
        if family.kind == "first":
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        elif family.kind == "replaced":
            tokenizer.normalizer = replace
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps)
    strips = family.kind == "stripped"
    tokenizer.add_special_tokens(
        [
            AddedToken(name, normalized=False, rstrip=strips and name[1] == "|")
            for name in family.tokens
        ]
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in family.words])
    return tokenizer


def write_folder(folder, family: Family, template: str | None = None) -> None:
    """tokenizer.json, tokenizer_config.json and a chat template in it."""
    build(family).save(str(folder / "tokenizer.json"))
    template = family.template if template is None else template
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.begin,
        "eos_token": family.end,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
