"""Small tokenizers of every kind that is written, trained on texts as people have them."""

import base64
import functools
import io
import json
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from lmjax.data.public_tokenizers import BYTES, TiktokenTokenizer, read_tokenizer
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Corpus
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer, TrainedBPE
from lmjax.data.tokenizers.tiktoken_programs import LLAMA3, LLAMA4, QWEN, TEKKEN
from tests.lmjax.data.real_strings import real_strings
from tests.lmjax.data.vocabulary_folders import FOLDERS

SAMPLE = real_strings()[::5]
CHARACTERS = "".join(sorted(set("".join(real_strings()[:1200]))))
SYMBOLS = ["<sep>", "abc", "\n", "①", "中文", "\n\n"]
SPELT = {"byte_fallback": True}
PLAIN = {"normalization_rule_name": "identity"}
SPACED = {"remove_extra_whitespaces": False}
ALONE = {"add_dummy_prefix": False}
BPE, UNIGRAM = {"model_type": "bpe"}, {"model_type": "unigram"}
# By name: settings of SentencePiece's trainer beside its defaults (nmt_nfkc, a space before a text,
# no extra spaces, unknown characters). Tables of one rule stand together: the last one is kept.
SENTENCEPIECE = {
    "byte pairs": BPE,
    "byte pairs with symbols": {**BPE, **SPELT, "user_defined_symbols": SYMBOLS},
    "byte pairs, spaces kept": {**BPE, **SPACED, "control_symbols": ["<cls>", "[MASK]"]},
    "byte pairs, space behind": {
        **{**BPE, **SPELT, "treat_whitespace_as_suffix": True},
        "user_defined_symbols": ["<sep>"],
    },
    "like T5": {**UNIGRAM, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "like mT5": {**UNIGRAM, **SPELT, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "like XLNet": {
        **{**UNIGRAM, "control_symbols": ["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"]},
        "user_defined_symbols": ["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"],
    },
    "unigram, space behind": {**UNIGRAM, **SPACED, "treat_whitespace_as_suffix": True},
    "unigram, nothing in front": {**UNIGRAM, **SPELT, **SPACED, **ALONE},
    "characters of SentencePiece": {"model_type": "char", "user_defined_symbols": ["<sep>"]},
    "byte pairs, nfkc": {**BPE, **SPELT, **SPACED, "normalization_rule_name": "nfkc"},
    "byte pairs, case folded": {**BPE, **SPACED, "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram, case folded": {**UNIGRAM, **SPELT, "normalization_rule_name": "nmt_nfkc_cf"},
    "like LLaMA": {**BPE, **SPELT, **PLAIN, **SPACED},
    "like LLaMA with symbols": {
        **{**BPE, **SPELT, **PLAIN, **SPACED},
        "user_defined_symbols": SYMBOLS,
    },
    "like Gemma": {
        **{**BPE, **SPELT, **PLAIN, **SPACED, **ALONE, "pad_id": 3},
        "user_defined_symbols": ["<mask>", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<table>", "[@BOS@]"],
    },
    "unigram, identity": {**UNIGRAM, **PLAIN, "user_defined_symbols": SYMBOLS},
    "unigram, identity, spaces kept": {**UNIGRAM, **SPELT, **PLAIN, **SPACED},
}


class Texts(Corpus):
    """The sample."""

    def sample(self, size):
        yield from SAMPLE

    def everything(self):
        yield from SAMPLE


def trained(**settings):
    """A SentencePiece model of some 1,000 pieces."""
    model = io.BytesIO()
    lines = [line for text in SAMPLE for line in text.split("\n") if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=1200,
        hard_vocab_limit=False,
        character_coverage=0.99,
        num_threads=2,
        minloglevel=3,
        **settings,
    )
    return model.getvalue()


@functools.cache
def ranks():
    """Pieces of byte-level byte pairs, in the order in which they were learnt."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SAMPLE, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    ordered = sorted(pieces, key=pieces.get)
    return [bytes(BYTES[character] for character in piece) for piece in ordered]


def table():
    """A table of ranks as Qwen and Meta have it."""
    return b"\n".join(base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(ranks()))


def tekken():
    """A tekken.json with Mistral's way to cut."""
    return json.dumps(
        {
            "config": {
                "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
                "default_vocab_size": len(ranks()) + 30,
                "default_num_special_tokens": 30,
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(piece).decode()}
                for rank, piece in enumerate(ranks())
            ],
        }
    ).encode()


def extended(tokenizer):
    """With new tokens, some of them behind others, and names that begin others."""
    return ExtendedTokenizer(ExtendedTokenizer(tokenizer, ("[NEW]", "qux")), ("[NEWER]", "quxx"))


def of_sentencepiece(name):
    return SentencePieceTokenizer(trained(**SENTENCEPIECE[name]), by_line=False)


KINDS = {name: functools.partial(of_sentencepiece, name) for name in SENTENCEPIECE} | {
    "ours": lambda: TrainedBPE(vocab_size=900, coverage=0.98).build(Texts()),
    "bytes": ByteTokenizer,
    "characters": lambda: CharacterTokenizer(CHARACTERS),
    "like Qwen": lambda: TiktokenTokenizer(table(), QWEN),
    "like Llama 3": lambda: TiktokenTokenizer(table(), LLAMA3),
    "like Llama 4": lambda: TiktokenTokenizer(table(), LLAMA4),
    "tekken": lambda: TiktokenTokenizer(tekken(), TEKKEN),
}
KINDS |= {
    f"{name}, extended": lambda name=name: extended(tokenizer_of(name))
    for name in ("ours", "bytes", "characters", "like T5", "like Gemma", "like Qwen", "tekken")
}
# Of public folders, whose own files are copied or written anew.
PUBLIC = ("glm-10b", "bert-base-uncased", "chatglm3-6b", "t5-base", "glm-130b")


@functools.cache
def tokenizer_of(name):
    """A tokenizer of one of the kinds, or of the public folders."""
    if name in KINDS:
        return KINDS[name]()
    with tempfile.TemporaryDirectory() as folder:
        return read_tokenizer(FOLDERS[name](Path(folder) / "made"))
