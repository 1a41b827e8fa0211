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
    "de": "Der Ausschuss beschloss, dass die Br\u00fccke nicht vor dem n\u00e4chsten Jahr gebaut wird.",
    "es": "El comit\u00e9 decidi\u00f3 que el puente no ser\u00eda reconstruido antes de la primavera.",
    "ro": "Comitetul a hot\u0103r\u00e2t c\u0103 podul nu va fi reconstruit \u00eenainte de prim\u0103vara viitoare.",
    "tr": "Komite, k\u00f6pr\u00fcn\u00fcn gelecek bahardan \u00f6nce yeniden yap\u0131lmamas\u0131na karar verdi.",
    "vi": "\u1ee6y ban quy\u1ebft \u0111\u1ecbnh r\u1eb1ng c\u00e2y c\u1ea7u s\u1ebd kh\u00f4ng \u0111\u01b0\u1ee3c x\u00e2y l\u1ea1i tr\u01b0\u1edbc m\u00f9a xu\u00e2n.",
    "ru": "\u041a\u043e\u043c\u0438\u0442\u0435\u0442 \u0440\u0435\u0448\u0438\u043b \u043d\u0435 \u0441\u0442\u0440\u043e\u0438\u0442\u044c \u043c\u043e\u0441\u0442 \u0434\u043e \u0432\u0435\u0441\u043d\u044b.",
    "zh": "\u59d4\u5458\u4f1a\u51b3\u5b9a\u660e\u5e74\u6625\u5929\u4e4b\u524d\u4e0d\u91cd\u5efa\u8fd9\u5ea7\u6865\u3002",
    "ja": "\u59d4\u54e1\u4f1a\u306f\u6765\u5e74\u306e\u6625\u307e\u3067\u6a4b\u3092\u518d\u5efa\u3057\u306a\u3044\u3068\u6c7a\u3081\u305f\u3002",
    "ko": "\uc704\uc6d0\ud68c\ub294 \ub0b4\ub144 \ubd04\uae4c\uc9c0 \ub2e4\ub9ac\ub97c \uc7ac\uac74\ud558\uc9c0 \uc54a\uae30\ub85c \ud588\ub2e4.",
    "th": "\u0e04\u0e13\u0e30\u0e01\u0e23\u0e23\u0e21\u0e01\u0e32\u0e23\u0e15\u0e31\u0e14\u0e2a\u0e34\u0e19\u0e43\u0e08\u0e44\u0e21\u0e48\u0e2a\u0e23\u0e49\u0e32\u0e07\u0e2a\u0e30\u0e1e\u0e32\u0e19",
    "el": "\u0397 \u03b5\u03c0\u03b9\u03c4\u03c1\u03bf\u03c0\u03ae \u03b1\u03c0\u03bf\u03c6\u03ac\u03c3\u03b9\u03c3\u03b5 \u03bd\u03b1 \u03bc\u03b7\u03bd \u03c7\u03c4\u03af\u03c3\u03b5\u03b9 \u03c4\u03b7 \u03b3\u03ad\u03c6\u03c5\u03c1\u03b1.",
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
