"""Vocabularies of GLM, BERT and T5: published ids, whitespace, and transformers' own classes."""

import os

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from lmjax.config import UserError
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import load_tokenizer
from tests.lmjax.data.vocabulary_folders import (
    CONTROL,
    FOLDERS,
    GLM_CHINESE,
    GLM_GPT2,
    ICE,
    T5,
    TEXTS,
    UNCASED,
    bert_folder,
    byte_pairs,
    ice,
    last_release,
    put,
    trained,
)

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By name of the published model."""
    root = tmp_path_factory.mktemp("families")
    return {name: make(root / name) for name, make in FOLDERS.items()}


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
    model = sentencepiece_model_pb2.ModelProto.FromString(last_release(ice()))
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
    assert uncased.decode(uncased.encode("The\nDOG,  émigres")) == "the dog, emigres"
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
    """The classes are named, and asked for no special tokens: from transformers 4 to 5 they came to
    begin and end texts otherwise, and where there is a tokenizer.json some obey half of it.
    """
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


def test_a_folder_may_list_some_of_chatglms_tokens(tmp_path):
    model = trained()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()

    def folder(name, **places):
        listed = {
            str(size + place): {"content": token, "special": False}
            for token, place in places.items()
        }
        settings = {"tokenizer_class": "ChatGLMTokenizer", "added_tokens_decoder": listed}
        return put(tmp_path / name, tokenizer_model=model, tokenizer_config_json=settings)

    whole = read_tokenizer(folder("none"))
    some = read_tokenizer(folder("some", **{"[gMASK]": 1, "sop": 3, "<|user|>": 6}))
    assert some.fingerprint == whole.fingerprint and some.special["<|observation|>"] == size + 8
    with pytest.raises(UserError, match=rf"'sop' has the id {size + 4}, but the next id is {size}"):
        read_tokenizer(folder("other", sop=4))


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
