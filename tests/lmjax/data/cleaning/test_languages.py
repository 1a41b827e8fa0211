"""The language of a text: by script, by the model that is shipped, and by one that is trained."""

import gzip
import json
from pathlib import Path

import pytest

from lmjax.config import UserError
from lmjax.data.cleaning.languages import (
    UNKNOWN,
    LanguageFilter,
    language_of,
    load_languages,
    train_languages,
)
from lmjax.data.documents import Document
from lmjax.jobs.train_language import TrainLanguage

SHARED = Path(__file__).parents[5] / "shared" / "data"
EXAMPLES = {
    "en": "The committee decided that the bridge would not be rebuilt before next spring.",
    "de": "Der Ausschuss beschloss, dass die Brücke nicht vor dem nächsten Jahr gebaut wird.",
    "es": "El comité decidió que el puente no sería reconstruido antes de la primavera.",
    "ro": "Comitetul a hotărât că podul nu va fi reconstruit înainte de primăvara viitoare.",
    "tr": "Komite, köprünün gelecek bahardan önce yeniden yapılmamasına karar verdi.",
    "vi": "Ủy ban quyết định rằng cây cầu sẽ không được xây lại trước mùa xuân.",
    "ru": "Комитет решил не строить мост до весны.",
    "zh": "委员会决定明年春天之前不重建这座桥。",
    "ja": "委員会は来年の春まで橋を再建しないと決めた。",
    "ko": "위원회는 내년 봄까지 다리를 재건하지 않기로 했다.",
    "th": "คณะกรรมการตัดสินใจไม่สร้างสะพาน",
    "el": "Η επιτροπή αποφάσισε να μην χτίσει τη γέφυρα.",
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_sentences(code):
    assert language_of(EXAMPLES[code])[0] == code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("iPhone 15 \u624b\u673a \u4ef7\u683c", "zh"),
        ("\u5929\u5730\u7384\u9ec3\u5b87\u5b99\u6d2a\u8352", "zh"),
        ("\u4f7f\u7528 Python \u8bed\u8a00", "zh"),
        ("", UNKNOWN),
        ("12:30 - 14:00", UNKNOWN),
        ("!!!", UNKNOWN),
        ("\ud800", UNKNOWN),
    ],
)
def test_mixed_lines_and_texts_without_letters(text, code):
    assert language_of(text)[0] == code


def test_the_step_keeps_languages_and_notes_them():
    step = LanguageFilter(keep=("en", "zh"))
    kept = step(Document(EXAMPLES["en"], "d", metadata={"url": "u"}))
    assert kept.metadata == {"url": "u", "language": "en"}
    assert step(Document(EXAMPLES["zh"], "d")).metadata == {"language": "zh"}
    assert step(Document(EXAMPLES["de"], "d")) == ("another language", "de")
    assert LanguageFilter(field="")(Document(EXAMPLES["de"], "d")).metadata is None
    assert (
        LanguageFilter(least_score=1.01)(Document("x y", "d")).reason == "the language is not sure"
    )
    assert step(Document("1234 !!!", "d")) == ("another language", UNKNOWN)
    with pytest.raises(UserError, match=r"keep: english, xx: known are ar, de, el, en, .*zh"):
        LanguageFilter(keep=("english", "en", "xx"))


def test_a_model_is_trained_saved_and_read(tmp_path):
    texts = {"en": [EXAMPLES["en"]] * 3, "de": [EXAMPLES["de"]] * 3}
    model = train_languages(texts, bits=10)
    assert model.names == ("de", "en") and model.table.shape == (1024, 2)
    model.save(tmp_path / "own.npz")
    step = LanguageFilter(model=str(tmp_path / "own.npz"), least_score=0.5)
    for code in texts:
        assert step(Document(EXAMPLES[code], "d")).metadata == {"language": code}
    with pytest.raises(UserError, match="at least two are needed"):
        train_languages({"en": ["one"]})
    (tmp_path / "other.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="no model of languages"):
        load_languages(tmp_path / "other.npz")


@pytest.mark.skipif(not SHARED.is_dir(), reason="XQuAD and poems are not there")
def test_held_out_paragraphs_and_sentences_of_xquad(tmp_path):
    """By a model that has not seen these articles in any language."""
    job = TrainLanguage(output=str(tmp_path / "run"), path=str(SHARED / "xquad/xquad.{}.json.gz"))
    job.run()
    (table,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert len(rows) == 13 and rows["all"][0] > 4000
    assert all(paragraphs == 1 for _, paragraphs, _ in rows.values())
    assert rows["all"][2] >= 0.998 and rows["zh"][2] == rows["th"][2] == 1
    assert LanguageFilter(model=str(tmp_path / "run" / "languages.npz"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="XQuAD and poems are not there")
def test_poems_are_chinese():
    poems = []
    for path in sorted((SHARED / "chinese-poetry").glob("poet.tang.*.json.gz")):
        poems += json.loads(gzip.decompress(path.read_bytes()))
    texts = ["".join(poem["paragraphs"]) for poem in poems[:1000]]
    assert sum(language_of(text)[0] == "zh" for text in texts) / len(texts) >= 0.98
