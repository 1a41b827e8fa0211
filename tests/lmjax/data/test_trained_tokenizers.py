"""Tokenizers trained with the settings of LLaMA, Baichuan 2 and Qwen, and their fertility."""

from __future__ import annotations

import json
import unicodedata

import pytest

from lmjax.config import UserError, replace
from lmjax.data import JsonLines
from lmjax.data.tokenizers import (
    Bytes,
    TrainedByteBPE,
    TrainedSentencePiece,
    baichuan2_tokenizer,
    llama_tokenizer,
    load_tokenizer,
    qwen_tokenizer,
)
from lmjax.data.tokenizers.listed_texts import ListedTexts
from lmjax.data.tokenizers.trained import rank_table
from lmjax.jobs.fertility import Fertility, NamedText, NamedTokenizer, measured

ENGLISH = [
    f"The river runs through the old town, {n} houses of which stand near it." for n in range(300)
]
CHINESE = [f"河水慢慢上涨，城里的{n}户人家把家具搬到楼上。没有人抱怨。" for n in range(300)]
CODE = [
    f"def area_{n}(width):\n    if width > {n}:\n        return width * {n}\n" for n in range(200)
]
CORPUS = ListedTexts(ENGLISH + CHINESE + CODE)
TEXTS = [ENGLISH[7], CHINESE[7], CODE[7], " two  spaces\tand\n\nlines ", "2024 é ☃ 𝛼", ""]


@pytest.fixture(scope="module")
def built():
    return {
        "llama": llama_tokenizer(400).build(CORPUS),
        "baichuan2": baichuan2_tokenizer(400).build(CORPUS),
        "unigram": TrainedSentencePiece(vocab_size=322, model="unigram").build(CORPUS),
        "qwen": qwen_tokenizer(350).build(CORPUS),
    }


@pytest.mark.parametrize("name", ["llama", "baichuan2", "unigram", "qwen"])
def test_texts_come_back(built, tmp_path, name):
    tokenizer = built[name]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["llama", "baichuan2", "unigram", "qwen"])
def test_digits_stand_apart(built, name):
    tokenizer = built[name]
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        assert sum(48 <= byte <= 57 for byte in piece) <= 1


def test_settings_are_those_of_the_papers(built):
    llama, baichuan = llama_tokenizer(), baichuan2_tokenizer()
    assert (llama.vocab_size, llama.coverage, llama.longest) == (32_000, 0.99995, 16)
    assert (baichuan.vocab_size, baichuan.coverage, baichuan.longest) == (125_696, 0.9999, 32)
    assert (
        llama.space_before and not baichuan.space_before and qwen_tokenizer().vocab_size == 151_643
    )
    assert [built[n].vocab_size for n in ("llama", "baichuan2", "qwen")] == [400, 400, 350 + 208]
    # A space before the text is a part of LLaMA's first token, and not of Baichuan's.
    first = {n: built[n].token_bytes(built[n].encode("The")[0]) for n in ("llama", "baichuan2")}
    assert first["llama"].startswith(b" ") and first["baichuan2"].startswith(b"T")
    assert built["llama"].begin == 1 and built["llama"].end == 2
    # Blanks of code are one token.
    pieces = {built["baichuan2"].token_bytes(t) for t in range(400)}
    assert b"    " in pieces


def test_bytes_are_merged_and_a_table_has_them_in_order(built):
    tokenizer = built["qwen"]
    lengths = [len(tokenizer.encode(text)) for text in ENGLISH[:50]]
    assert max(lengths) < 0.4 * len(ENGLISH[0])  # merged, and not spelt in bytes
    assert tokenizer.token_bytes(0) == b"!" and len(tokenizer.encode("河水")) <= 2
    assert rank_table(["!", "Ġ", "Ċa"]) == b"IQ== 0\nIA== 1\nCmE= 2\n"


def test_texts_that_are_too_small():
    few = ListedTexts(["a b c"])
    with pytest.raises(UserError, match="too small for vocab_size=5000"):
        TrainedByteBPE(vocab_size=5000).build(few)
    with pytest.raises(UserError, match="too small for vocab_size=5000"):
        TrainedSentencePiece(vocab_size=5000).build(few)
    for wrong in (TrainedByteBPE(), TrainedSentencePiece()):
        with pytest.raises(UserError, match="vocab_size"):
            replace(wrong, vocab_size=100).validate()


def test_fertility_by_hand():
    tokens, size = measured([Bytes().build(CORPUS)], ["ab cd", "河"])
    # Of bytes 8, of words 3: two between blanks and a character.
    assert tokens == [pytest.approx(8 / 3)] and size == [1.0]
    with pytest.raises(UserError, match="without a word"):
        measured([], [""])


def test_the_job_compares_languages(tmp_path):
    def source(name, texts):
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return JsonLines(path=str(tmp_path / f"{name}.jsonl"))

    english, chinese = source("en", ENGLISH), source("zh", CHINESE)
    job = Fertility(
        output=str(tmp_path / "run"),
        tokenizers=(
            NamedTokenizer(name="bytes", tokenizer=Bytes()),
            NamedTokenizer(name="both", tokenizer=baichuan2_tokenizer(400)),
        ),
        texts=(NamedText(name="en", source=english), NamedText(name="zh", source=chinese)),
        learned=(english, chinese),
    )
    job.run()
    tables = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in tables[0]["rows"]}
    assert rows["zh"][0] > 2.5 and rows["zh"][1] < 1 and rows["en"][1] < 2
    assert {row[0]: row[1] for row in tables[1]["rows"]} == {"en": 1.0, "zh": 1.0}
    assert load_tokenizer(tmp_path / "run" / "tokenizers" / "both").vocab_size == 400
    with pytest.raises(UserError, match="give different names"):
        replace(job, texts=job.texts * 2).validate()
