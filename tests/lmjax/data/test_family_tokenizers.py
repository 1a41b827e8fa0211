"""Vocabularies of GLM, BERT and T5: published ids, whitespace, and transformers' own classes.

Each folder is made here, of the layout and, where ids are compared, of the size of the published
one: what is trained is a few hundred pieces, the rest are pieces that no text has.
"""

import functools
import io
import json
import os

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, trainers

from lmjax.config import UserError
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import load_tokenizer

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "今天天气很好，我们去公园散步。",
    "if x:\n\treturn  y     # 12",
] * 20
PROMPTS = [
    *(
        "The dog",
        "  the  fox\n\n\tit ",
        "Émigrés, 2023.",
        "今天天气很好。",
        "x=1 ，！",
        "漢字 kana",
    ),
    "a" + " " * 200 + "b",
]
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name of the published model."""
    root = tmp_path_factory.mktemp("families")
    ice = filled(trained(**ICE), 130_000)
    return {
        "glm-10b": gpt2_folder(
            root / "glm-10b", 50_257, GLM_GPT2, ["<|endoftext|>"], GLM_GPT2_ADDED
        ),
        "glm-roberta-large": gpt2_folder(
            root / "glm-roberta-large",
            50_265,
            roles("GLMRobertaTokenizer"),
            ["<mask>"],
            ["<|startofpiece|>", "<|endofpiece|>"],
            ROBERTA,
        ),
        "glm-515m": bert_folder(
            root / "glm-515m",
            30_522,
            roles("GLMBertTokenizer") | {"do_lower_case": True},
            added_tokens_json={"<|endofpiece|>": 30_523, "<|startofpiece|>": 30_522},
        ),
        "glm-10b-chinese": put(
            root / "glm-10b-chinese",
            **{"cog__pretrain_model": filled(trained(), 50_000)},
            added_tokens_json={name: 50_000 + n for n, name in enumerate(GLM_CHINESE_ADDED)},
            tokenizer_config_json=GLM_CHINESE,
        ),
        "glm-130b": put(root / "glm-130b", ice_text_model=ice),
        "chatglm-6b, first": put(
            root / "chatglm-6b-first",
            ice_text_model=ice,
            tokenizer_config_json=roles("ChatGLMTokenizer", bos="<sop>", eos="</s>"),
        ),
        "chatglm-6b": put(
            root / "chatglm-6b",
            ice_text_model=last_release(ice),
            tokenizer_config_json=roles("ChatGLMTokenizer", bos="<sop>", eos="<eop>")
            | {"num_image_tokens": 0},
        ),
        "chatglm3-6b": put(
            root / "chatglm3-6b",
            tokenizer_model=filled(trained(), 64_789),
            tokenizer_config_json=roles("ChatGLMTokenizer"),
        ),
        "bert-base-uncased": bert_folder(
            root / "bert-base-uncased", 30_522, {"do_lower_case": True}
        ),
        "bert-base-chinese": bert_folder(
            root / "bert-base-chinese", 21_128, {"do_lower_case": False}
        ),
        "t5-base": put(
            root / "t5-base",
            spiece_model=filled(trained(**T5), 32_000),
            config_json={"model_type": "t5"},
        ),
    }


@pytest.fixture(scope="module")
def read(folders):
    return {name: read_tokenizer(folder) for name, folder in folders.items()}


PUBLISHED = {
    "glm-10b": {
        **{"<|endoftext|>": 50256, "<|startofpiece|>": 50257, "<|endofpiece|>": 50258},
        **{"[CLS]": 50259, "[MASK]": 50260, "[gMASK]": 50263, "[sMASK]": 50264},
    },
    "glm-roberta-large": {
        **{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 50264},
        **{"<|startofpiece|>": 50265, "<|endofpiece|>": 50266},
    },
    "glm-515m": {
        **{"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103},
        **{"<|startofpiece|>": 30522, "<|endofpiece|>": 30523},
    },
    "glm-10b-chinese": {
        **{"<|endoftext|>": 50000, "[SEP]": 50001, "[CLS]": 50002, "[MASK]": 50003},
        **{"<|startofpiece|>": 50006, "<|endofpiece|>": 50007},
        **{"[sMASK]": 50008, "[gMASK]": 50009},
    },
    "glm-130b": {
        **{"</s>": 20002, "<pad>": 20003, "[MASK]": 150000, "[gMASK]": 150001},
        **{"[sMASK]": 150002, "<sop>": 150004, "<eop>": 150005},
    },
    "chatglm-6b": {
        **{"</s>": 2, "<pad>": 3, "[MASK]": 130000, "[gMASK]": 130001},
        **{"<sop>": 130004, "<eop>": 130005},
    },
    "chatglm3-6b": {"[MASK]": 64789, "[gMASK]": 64790, "sop": 64792, "<|user|>": 64795},
    "bert-base-uncased": {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103},
    "t5-base": {"<pad>": 0, "</s>": 1, "<unk>": 2, "<extra_id_0>": 32099, "<extra_id_99>": 32000},
}
PUBLISHED["chatglm-6b, first"] = PUBLISHED["glm-130b"]
PUBLISHED["bert-base-chinese"] = PUBLISHED["bert-base-uncased"]
SIZES = {
    **{"glm-10b": 50265, "glm-roberta-large": 50267, "glm-515m": 30524, "glm-10b-chinese": 50010},
    **{"glm-130b": 150344, "chatglm-6b, first": 150344, "chatglm-6b": 130344},
    **{"chatglm3-6b": 64798, "bert-base-uncased": 30522, "bert-base-chinese": 21128},
    **{"t5-base": 32100},
}
ENDS = {
    "glm-10b": ("[CLS]", "<|endoftext|>"),
    "glm-roberta-large": ("<s>", "</s>"),
    "glm-515m": ("[CLS]", "[SEP]"),
    "glm-10b-chinese": ("[CLS]", "<|endoftext|>"),
    "glm-130b": (None, "</s>"),
    "chatglm-6b": (None, "</s>"),
    "t5-base": (None, "</s>"),
    "bert-base-chinese": ("[CLS]", "[SEP]"),
}


def test_special_tokens_have_the_published_ids(read):
    for name, tokenizer in read.items():
        wanted = PUBLISHED[name]
        assert {token: tokenizer.special.get(token) for token in wanted} == wanted, name
        assert tokenizer.vocab_size == SIZES[name], name
    for name, ends in ENDS.items():
        special = read[name].special
        assert (read[name].begin, read[name].end) == tuple(special.get(end) for end in ends), name


@given(st.text() | st.text(st.sampled_from("[gsMASKCLEP]<|/n>extra_id_0 sop")))
@example("a[MASK][gMASK][sMASK] <sop><eop> sop eop </s> <pad><s> <mask> [CLS] [SEP] [PAD]")
@example("<|startofpiece|><|endofpiece|> <extra_id_0> <extra_id_99> <|user|> <dBLOCK> <unused_0>")
def test_no_text_makes_a_special_token(read, text):
    for name, tokenizer in read.items():
        unknown = {tokenizer.special.get(unknown) for unknown in ("[UNK]", "<unk>")}
        made = set(tokenizer.encode(text)) & (set(tokenizer.special.values()) - unknown)
        assert not made, name


def spelt_by_the_authors(model, images, text):
    """icetk's ids, by its program: SentencePiece on a text whose whitespace has names."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for length in range(80, 1, -1):
        text = text.replace(" " * length, f"<|blank_{length}|>")
    return [images + token for token in model.encode(text)]


WHITESPACE = st.text(st.sampled_from(" \n\tab中"), max_size=200)


@given(st.text() | WHITESPACE)
@example(" a")
@example("  \n\t\t \n" + " " * 81 + "x" + " " * 160)
def test_icetk_keeps_every_text_with_its_whitespace(read, text):
    text = text.replace("\u2581", "")  # stands for a space
    for name in ("glm-130b", "chatglm-6b"):
        assert read[name].decode(read[name].encode(text)) == text


@pytest.mark.parametrize("name, images", [("glm-130b", 20_000), ("chatglm-6b", 0)])
def test_icetk_gives_the_ids_of_its_program(read, name, images):
    model = sentencepiece_model_pb2.ModelProto.FromString(
        last_release(filled(trained(**ICE), 130_000))
    )
    for piece in model.pieces:
        if piece.piece.startswith("["):
            piece.type = CONTROL
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in [*PROMPTS, *TEXTS[:3], "\x00 \r\ufeff"]:
        assert read[name].encode(text) == spelt_by_the_authors(theirs, images, text)
    # A newline and 80 spaces are one token each.
    assert [read[name].token_bytes(token) for token in read[name].encode("\n" + " " * 80)[-2:]] == [
        b"\n",
        b" " * 80,
    ]


def test_ids_of_images_stand_for_no_text(read):
    tokenizer = read["chatglm-6b, first"]
    assert tokenizer.decode([0, 19_999, *tokenizer.encode("dog"), 150_343 + 1]) == "dog"
    assert tokenizer.token_bytes(20_000 + 4) == b"\n"


@given(st.text())
def test_byte_pairs_keep_every_text(read, text):
    for name in ("glm-10b", "glm-roberta-large"):
        assert read[name].decode(read[name].encode(text)) == text


def test_what_the_others_do_not_give_back(read):
    for name in ("t5-base", "glm-10b-chinese"):  # what SentencePiece normalises
        assert read[name].decode(read[name].encode(" a\n  dog，")) == "a dog,"
    uncased = read["bert-base-uncased"]
    assert uncased.decode(uncased.encode("The\nDOG,  émigres")) == "the dog , emigres"
    chinese = read["bert-base-chinese"]
    assert chinese.decode(chinese.encode("今天天气很好。")) == "今 天 天 气 很 好 。"


@pytest.mark.parametrize("name", PUBLISHED)
def test_saved_and_read_again(read, name, tmp_path):
    read[name].save(tmp_path)
    for again in (load_tokenizer(tmp_path), read_tokenizer(tmp_path)):
        assert again.fingerprint == read[name].fingerprint
        assert (again.special, again.begin, again.end) == (
            read[name].special,
            read[name].begin,
            read[name].end,
        )
        assert again.encode_batch(PROMPTS) == read[name].encode_batch(PROMPTS)


LIVE = {
    "bert-base-uncased": "BertTokenizer",
    "bert-base-chinese": "BertTokenizer",
    "glm-515m": "BertTokenizer",
    "t5-base": "T5Tokenizer",
    "glm-10b": "GPT2Tokenizer",
}


@pytest.mark.parametrize("name", LIVE)
def test_as_the_class_of_transformers(folders, read, name):
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    theirs = getattr(transformers, LIVE[name]).from_pretrained(str(folders[name]))
    ours = read[name]
    assert len(theirs) == ours.vocab_size
    for token, number in PUBLISHED[name].items():
        assert theirs.convert_tokens_to_ids(token) == number == ours.special[token]
    for text in [*PROMPTS, *TEXTS[:3], "Unwanted HOTELS don't\u2028x", "İstanbul ǅ ß"]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == ids, text


def test_sentinels_between_texts_as_in_transformers(folders, read):
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    theirs = transformers.T5Tokenizer.from_pretrained(str(folders["t5-base"]))
    text = "The <extra_id_0> jumps over<extra_id_1>, and it"
    assert read["t5-base"].encode_special(text) == theirs(text, add_special_tokens=False).input_ids


def test_lines_of_a_vocabulary_end_at_newlines_alone(tmp_path):
    words = [*UNCASED, "\u2028", "\x85", "last"]
    put(tmp_path / "bert", vocab_txt="\r\n".join(words))
    tokenizer = read_tokenizer(tmp_path / "bert")
    assert tokenizer.vocab_size == len(words)
    assert tokenizer.encode("last") == [len(words) - 1]


def test_wordpiece_follows_the_folders_settings(tmp_path):
    settings = {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}
    tokenizer = read_tokenizer(bert_folder(tmp_path / "a", 200, settings))
    unknown = tokenizer.special["[UNK]"]
    assert tokenizer.encode("émigres") == [unknown] != tokenizer.encode("EMIGRES")
    assert tokenizer.encode("今天") == [unknown]


def test_sentinels_of_a_t5_folder(tmp_path):
    model = trained(**T5)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    for number, settings in enumerate(
        [{"tokenizer_class": "T5Tokenizer", "extra_ids": 3}, {"extra_ids": 3}]
    ):
        folder = put(tmp_path / str(number), spiece_model=model, tokenizer_config_json=settings)
        assert read_tokenizer(folder).special["<extra_id_0>"] == size + 2
        assert read_tokenizer(folder).vocab_size == size + 3
    plain = put(tmp_path / "plain", spiece_model=model)  # as ALBERT's file is named too
    assert read_tokenizer(plain).vocab_size == size
    listed = {
        str(size + place): {"content": f"<extra_id_{1 - place}>", "special": True}
        for place in range(2)
    }
    folder = put(
        tmp_path / "listed",
        spiece_model=model,
        tokenizer_config_json={
            "tokenizer_class": "T5Tokenizer",
            "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}, **listed},
        },
    )
    assert read_tokenizer(folder).special["<extra_id_0>"] == size + 1


def test_what_a_folder_lacks_is_said(tmp_path):
    pairs, merges = byte_pairs()
    files = {"vocab_json": {**pairs, "<|endoftext|>": len(pairs)}, "merges_txt": merges}
    folder = put(tmp_path / "a", **files, tokenizer_config_json=GLM_GPT2)
    with pytest.raises(UserError, match=r"lacks the token '\[CLS\]'.*added_tokens.json: put that"):
        read_tokenizer(folder)
    files = {"cog__pretrain_model": trained(), "tokenizer_config_json": GLM_CHINESE}
    with pytest.raises(UserError, match=r"lacks the token '\[CLS\]'.*added_tokens.json: put that"):
        read_tokenizer(put(tmp_path / "b", **files))
    with pytest.raises(UserError, match=r"not icetk's vocabulary: <n> is not in it"):
        read_tokenizer(put(tmp_path / "c", ice_text_model=trained()))
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        read_tokenizer(put(tmp_path / "d", ice_text_model=b"x"))
    files = {"ice_text_model": trained(**ICE), "tokenizer_config_json": {"num_image_tokens": -1}}
    with pytest.raises(UserError, match="num_image_tokens is -1; it must be 0 or more"):
        read_tokenizer(put(tmp_path / "e", **files))
