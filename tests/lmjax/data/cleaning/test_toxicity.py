"""Classifiers of toxic text by class, and the audit of the classifier of quality."""

from __future__ import annotations

import json
import random

import pytest

from lmjax.config import UserError, replace
from lmjax.data import JsonLines
from lmjax.data.cleaning.quality import keep_probability
from lmjax.data.cleaning.toxicity import (
    ToxicityFilter,
    classes_of,
    load_toxicity,
    train_toxicity,
)
from lmjax.data.documents import BadRecord, Document
from lmjax.jobs.quality_audit import audit_tables
from lmjax.jobs.train_toxicity import TrainToxicity

KINDS = {
    "": ["the", "river", "and", "town", "were", "quiet", "in", "morning", "of", "that", "day"],
    "insult": ["you", "are", "such", "an", "awful", "stupid", "fool", "nobody", "likes"],
    "threat": ["i", "will", "find", "you", "and", "hurt", "tonight", "watch", "your", "back"],
}


def labelled(count, seed):
    rng = random.Random(seed)
    return [
        (" ".join(rng.choices(words, k=25)), name)
        for _ in range(count)
        for name, words in KINDS.items()
    ]


def test_the_job_trains_and_the_step_drops_by_class(tmp_path):
    lines = [json.dumps({"text": text, "labels": [n] if n else []}) for text, n in labelled(80, 0)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    source = JsonLines(path=str(tmp_path / "texts.jsonl"))
    job = TrainToxicity(output=str(tmp_path / "run"), texts=source, bits=12, held_out=0.3)
    job.run()
    job.run()
    (table,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    assert {row[0] for row in table["rows"]} == {"insult", "threat"}
    assert all(row[1] > 5 and row[2] >= 0.98 for row in table["rows"])
    step = ToxicityFilter(model=str(tmp_path / "run" / "toxicity.npz"), most_score=0.5)
    for text, name in labelled(5, 1):
        result = step(Document(text, "d", metadata={"url": "u"}))
        if name:
            assert result.reason == f"toxic: {name}" and result.measured > 0.5
        else:
            assert set(result.metadata["toxicity"]) == {"insult", "threat"}
    lenient = replace(step, limits=(("threat", 1.0),))
    threat = Document(" ".join(KINDS["threat"]), "d")
    assert lenient(threat).metadata["toxicity"]["threat"] > 0.5
    with pytest.raises(UserError, match=r"the classes of .* are insult, threat"):
        replace(step, limits=(("spam", 0.5),))(threat)
    with pytest.raises(UserError, match="most_score=2"):
        replace(step, most_score=2.0).validate()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", set()),
        ("insult", {"insult"}),
        (["a", "b"], {"a", "b"}),
        ({"a": 0.5, "b": 0.49, "c": 1}, {"a", "c"}),
    ],
)
def test_layouts_of_labels(value, expected):
    assert classes_of(value, "labels") == expected


def test_labels_that_are_none():
    with pytest.raises(BadRecord, match="'labels' is '3'"):
        classes_of(3, "labels")
    with pytest.raises(UserError, match="no text has a class"):
        train_toxicity(["a"], [frozenset()])
    with pytest.raises(UserError, match="all 1 texts are of the class a"):
        train_toxicity(["a"], [frozenset({"a"})])


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"none")
    with pytest.raises(UserError, match="no model of toxicity"):
        load_toxicity(tmp_path / "t.npz")


def by_mark(text):
    """Scores a text by the digit at its end."""
    return int(text[-1]) / 10


def test_the_audit_by_language_source_and_length():
    english = "The committee decided that the bridge would not be rebuilt. "
    documents = [
        Document(english + "9", "f:1", metadata={"url": f"https://a.org/{n}"}) for n in range(30)
    ]
    documents += [
        Document("委员会决定明年春天之前不重建这座桥。" * 20 + "1", "g:1") for _ in range(30)
    ]
    tables = {table.title: table for table in audit_tables(by_mark, documents)}
    assert set(tables) == {"Quality by language", "Quality by source", "Quality by length"}
    by_language = {row[0]: row[1:] for row in tables["Quality by language"].rows}
    for code, score in (("en", 0.9), ("zh", 0.1)):
        assert by_language[code] == pytest.approx((30, score, keep_probability(score)))
    assert {row[0] for row in tables["Quality by source"].rows} == {"a.org", "g"}
    lengths = [row[0] for row in tables["Quality by length"].rows]
    assert lengths == ["0 to 199 characters", "200 to 499 characters"]
    every = (keep_probability(0.9) + keep_probability(0.1)) / 2
    assert tables["Quality by language"].notes == (
        f"Of zh {keep_probability(0.1):.3f} are kept, of all documents {every:.3f}.",
    )
