"""Folders of public vocabularies, made here: the layout and the size of the published ones.

What is trained is a few hundred pieces, the rest are pieces that no text has.
"""

import functools
import io
import json

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "今天天气很好，我们去公园散步。",
    "if x:\n\treturn  y     # 12",
] * 20
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # types of a SentencePiece model's pieces


@functools.cache
def trained(**settings):
    """A small SentencePiece model; settings are the trainer's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n")]),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=3,
        **{"model_type": "unigram", "vocab_size": 120, **settings},
    )
    return model.getvalue()


T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
ICE = {
    "pad_id": 3,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "user_defined_symbols": "<n>",
}


def filled(data, size):
    """A model file with as many pieces."""
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    for number in range(size - len(model.pieces)):
        model.pieces.add(piece=f"\ue000{number}", score=-99.0)
    return model.SerializeToString()


def last_release(data):
    """What the authors made of ice_text.model for ChatGLM-6B's last release."""
    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    model.trainer_spec.byte_fallback = True
    commands = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    blanks = [f"<|blank_{length}|>" for length in range(2, 81)]
    for name in [*commands, "<|tab|>", *blanks]:
        model.pieces.add(piece=name, score=0.0, type=USER_DEFINED)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=BYTE)
    return model.SerializeToString()


def put(folder, **files):
    """Writes files; a dictionary as JSON. `_json` and its like in a name is its ending."""
    folder.mkdir()
    for name, content in files.items():
        base, _, ending = name.rpartition("_")
        content = json.dumps(content) if isinstance(content, dict) else content
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (folder / f"{base.replace('__', '-')}.{ending}").write_bytes(data)
    return folder


def roles(kind, **names):
    """A tokenizer_config.json."""
    return {"tokenizer_class": kind, **{f"{role}_token": name for role, name in names.items()}}


@functools.cache
def byte_pairs():
    """GPT-2's kind of vocabulary and merges."""
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    return model["vocab"], "#version: 0.2\n" + merges


def gpt2_folder(folder, size, kind, last, added, first=()):
    """A folder of GLM's with byte-level byte pairs: `first`, the vocabulary, and `last` at its end.

    `added` are the names in added_tokens.json.
    """
    pairs, merges = byte_pairs()
    names = [*first, *sorted(pairs, key=pairs.get)]
    names += [f"\ue000{number}" for number in range(size - len(names) - len(last))] + list(last)
    return put(
        folder,
        vocab_json={name: number for number, name in enumerate(names)},
        merges_txt=merges,
        added_tokens_json={name: size + number for number, name in enumerate(added)},
        tokenizer_config_json=kind,
    )


GLM_GPT2 = roles(
    "GLMGPT2Tokenizer",
    **{"eos": "<|endoftext|>", "pad": "<|endoftext|>", "cls": "[CLS]", "mask": "[MASK]"},
    **{"unk": "[UNK]", "sep": "[SEP]"},
)
GLM_CHINESE = GLM_GPT2 | {"tokenizer_class": "GLMChineseTokenizer"}
GLM_GPT2_ADDED = (
    *("<|startofpiece|>", "<|endofpiece|>", "[CLS]", "[MASK]", "[SEP]", "[UNK]"),
    *("[gMASK]", "[sMASK]"),
)
GLM_CHINESE_ADDED = (
    *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
    *("<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
)
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
# BERT's file begins so; the words are ours.
WORDS = (
    "the dog fox do ##es ##n ' t em ##ig ##res , . 2 ##0 ##2 ##3 x = 1 ! ， 今 天 气 很 好 。 "
    "漢 字 ka ##na a b un ##want ##ed hotels"
)
UNCASED = [
    *("[PAD]", *(f"[unused{number}]" for number in range(99))),
    *("[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *WORDS.split(" "),
]


def bert_folder(folder, size, settings, **files):
    names = UNCASED + [f"\ue000{number}" for number in range(size - len(UNCASED))]
    lines = "".join(f"{name}\n" for name in names)
    return put(folder, vocab_txt=lines, tokenizer_config_json=settings, **files)


def ice():
    """icetk's ice_text.model as it is downloaded."""
    return filled(trained(**ICE), 130_000)


FOLDERS = {
    "glm-10b": lambda folder: gpt2_folder(
        folder, 50_257, GLM_GPT2, ["<|endoftext|>"], GLM_GPT2_ADDED
    ),
    "glm-roberta-large": lambda folder: gpt2_folder(
        folder,
        50_265,
        roles("GLMRobertaTokenizer"),
        ["<mask>"],
        ["<|startofpiece|>", "<|endofpiece|>"],
        ROBERTA,
    ),
    "glm-515m": lambda folder: bert_folder(
        folder,
        30_522,
        roles("GLMBertTokenizer") | {"do_lower_case": True},
        added_tokens_json={"<|endofpiece|>": 30_523, "<|startofpiece|>": 30_522},
    ),
    "glm-10b-chinese": lambda folder: put(
        folder,
        **{"cog__pretrain_model": filled(trained(), 50_000)},
        added_tokens_json={name: 50_000 + n for n, name in enumerate(GLM_CHINESE_ADDED)},
        tokenizer_config_json=GLM_CHINESE,
    ),
    "glm-130b": lambda folder: put(folder, ice_text_model=ice()),
    "chatglm-6b, first": lambda folder: put(
        folder,
        ice_text_model=ice(),
        tokenizer_config_json=roles("ChatGLMTokenizer", bos="<sop>", eos="</s>"),
    ),
    "chatglm-6b": lambda folder: put(
        folder,
        ice_text_model=last_release(ice()),
        tokenizer_config_json=roles("ChatGLMTokenizer", bos="<sop>", eos="<eop>")
        | {"num_image_tokens": 0},
    ),
    "chatglm3-6b": lambda folder: put(
        folder,
        tokenizer_model=filled(trained(), 64_789),
        tokenizer_config_json=roles("ChatGLMTokenizer"),
    ),
    "bert-base-uncased": lambda folder: bert_folder(folder, 30_522, {"do_lower_case": True}),
    "bert-base-chinese": lambda folder: bert_folder(folder, 21_128, {"do_lower_case": False}),
    "t5-base": lambda folder: put(
        folder,
        spiece_model=filled(trained(**T5), 32_000),
        config_json={"model_type": "t5"},
    ),
}
