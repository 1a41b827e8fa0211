"""Comparisons of answers: the layouts of preference data, and rows of them."""

import json

import numpy as np
import pytest

from lmjax.alignment.comparison_accuracy import require_pairs
from lmjax.config import UserError, replace
from lmjax.data import ChatTemplate, TextFiles, build_stores
from lmjax.data.chat.comparisons import GRADES, LARGE_MARGINS, Comparisons, Grades
from lmjax.data.groups import Groups
from lmjax.data.mixture import Mixture
from lmjax.data.rows import EvaluationRows, Ring
from lmjax.data.spans import KINDS
from lmjax.data.tokenizers import ByteTokenizer

TEMPLATE = ChatTemplate(user=("<{content}>",), assistant=("{content}",))
END = 256


def messages(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def source_of(folder, *records, **settings):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return Comparisons(path=str(path), template=TEMPLATE, **settings)


def found(folder, *records):
    """Text and labels of every document."""
    return [(d.text, d.labels) for d in source_of(folder, *records).documents()]


PAIRS = {
    "hh-rlhf": {
        "chosen": "\n\nHuman: a?\n\nAssistant: yes",
        "rejected": "\n\nHuman: a?\n\nAssistant: no",
    },
    "texts": {"prompt": "a?", "chosen": "yes", "rejected": "no"},
    "messages": {
        "prompt": messages("a?"),
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "messages with the prompt": {
        "prompt": "a?",
        "chosen": messages("a?", "yes"),
        "rejected": messages("a?", "no"),
    },
    "without a prompt": {"chosen": messages("a?", "yes"), "rejected": messages("a?", "no")},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, tmp_path):
    assert found(tmp_path, PAIRS[name]) == [("<a?>yes", (0, 0, 0)), ("<a?>no", (1, 1, 0))]


def test_the_best_answer_comes_first(tmp_path):
    """Ties keep their rank; of scores the highest is best."""
    ranked = {"prompt": "a?", "answers": ["x", "y", "z"], "ranks": [2, 1, 2]}
    scored = {"prompt": "b?", "answers": ["x", "y"], "scores": [0.5, 2.0], "margin": 3}
    completions = [{"response": t, "overall_score": s} for t, s in (("p", 1), ("q", 7.5))]
    ultra = {"instruction": "c?", "completions": completions}
    label = {"prompt": "d?", "completion": "no", "label": False}
    assert found(tmp_path, ranked, scored, ultra, label) == [
        ("<a?>y", (0, 1, 0)),
        ("<a?>x", (1, 2, 0)),
        ("<a?>z", (2, 2, 0)),
        ("<b?>y", (0, -2, 3)),
        ("<b?>x", (1, -0.5, 3)),
        ("<c?>q", (0, -7.5, 0)),
        ("<c?>p", (1, -1, 0)),
        ("<d?>no", (0, 1, 0)),
    ]


def test_grades_become_margins(tmp_path):
    """LLaMA 2's, in words; and numbers whose sign says which answer is better (HelpSteer2)."""
    words = [
        {"prompt": "a?", "chosen": "x", "rejected": "y", "preference": grade, "margin": 9}
        for grade in ("Significantly better", "better", "slightly better", "negligibly better")
    ]
    source = source_of(tmp_path, *words, grades=Grades(field="preference"))
    assert [d.labels[2] for d in source.documents()][::2] == [1, 2 / 3, 1 / 3, 0]
    numbers = [{**PAIRS["texts"], "preference_strength": number} for number in (-3, 1, 0, 2.0)]
    strength = Grades(
        field="preference_strength", names=("3", "2", "1", "0"), margins=LARGE_MARGINS
    )
    source = source_of(tmp_path, *numbers, grades=strength)
    assert [d.labels[2] for d in source.documents()] == [3, 3, 1, 1, 0, 0, 2, 2]
    with pytest.raises(UserError, match=r"'preference_strength' is -3; the grades are 'sig"):
        list(replace(source, grades=replace(strength, names=GRADES)).documents())
    with pytest.raises(UserError, match=r"line 1: 'strength' is None; the grades are '3', '2'"):
        list(replace(source, grades=replace(strength, field="strength")).documents())
    with pytest.raises(UserError, match="give each grade once, and a margin for each"):
        replace(strength, names=("3", "2"))
    with pytest.raises(UserError, match="give numbers of 0 or more"):
        replace(strength, margins=(1.0, 0.0, -1.0, 0.0))


def test_a_tree_gives_the_replies_to_each_of_its_messages(tmp_path):
    def node(role, text, *replies, rank=None):
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    more = node("prompter", "c", node("assistant", "d", rank=0), node("assistant", "e", rank=1))
    tree = node(
        "prompter", "a", node("assistant", "B", rank=1), node("assistant", "b", more, rank=0)
    )
    assert found(tmp_path, {"message_tree_id": "1", "prompt": tree}) == [
        ("<a>b", (0, 0, 0)),
        ("<a>B", (1, 1, 0)),
        ("<a>b<c>d", (0, 0, 0)),
        ("<a>b<c>e", (1, 1, 0)),
    ]


BAD = {
    "keys 'chosen'": {"chosen": "x"},
    "does not begin with a turn of 'Human:'": {"chosen": "x", "rejected": "y"},
    "2 answers have 3 ranks": {"prompt": "a", "answers": ["x", "y"], "ranks": [1, 2, 3]},
    "should be a list of numbers": {"prompt": "a", "answers": ["x"], "ranks": "1"},
    "score is nan, not a finite": {"prompt": "a", "answers": ["x"], "scores": [float("nan")]},
    "rank or a score is 'a'": {"prompt": "a", "answers": ["x"], "ranks": ["a"]},
    "score is '1000000000": {"prompt": "a", "answers": ["x"], "scores": [10**400]},
    "score is 1e+39, not a finite": {"prompt": "a", "answers": ["x"], "scores": [1e39]},
    "'margin' is nan": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
    "not end with a reply": {"chosen": messages("a", "b", "c"), "rejected": messages("a", "d")},
    "'completions' should be a list": {"instruction": "a", "completions": 5},
    "'overall_score' is 'N/A'": {
        "instruction": "a",
        "completions": [{"response": "x", "overall_score": "N/A"}],
    },
    "is list, not a JSON object": {"message_tree_id": "1", "prompt": []},
    "should be a list of JSON objects": {
        "message_tree_id": "1",
        "prompt": {"role": "prompter", "text": "a", "replies": [5]},
    },
    "has the role ['x']": {
        "prompt": [{"role": ["x"], "content": "a"}],
        "chosen": "",
        "rejected": "",
    },
    "no answer": {"prompt": "a", "answers": [], "ranks": []},
    "'label' is 1, not true or false": {"prompt": "a", "completion": "b", "label": 1},
    "'margin' is 'big'": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"},
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_named(message, tmp_path):
    with pytest.raises(UserError) as error:
        found(tmp_path, PAIRS["texts"], BAD[message])
    assert f"{tmp_path}/pairs.jsonl, line 2: " in str(error.value)
    assert message in str(error.value)


def test_a_comparison_is_on_one_side_of_the_held_out_split(tmp_path):
    """Also where the two sides have different requests, or none."""
    asked = {"chosen": messages("a?", "yes"), "rejected": messages("b?", "no")}
    begun = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    unasked = {"chosen": begun[0], "rejected": begun[1]}
    for record in (asked, unasked):
        groups = {document.group for document in source_of(tmp_path, record).documents()}
        assert len(groups) == 1 and "" not in groups


# ---- rows ----------------------------------------------------------------------------------------


def stored(folder, *records):
    source = source_of(folder, *records)
    return build_stores(source, ByteTokenizer(), folder / "store")["all"]


def decoded(tokens):
    return "".join("." if token == END else chr(token) for token in tokens if token)


@pytest.fixture
def store(tmp_path):
    return stored(
        tmp_path,
        {"prompt": "a", "answers": ["x", "yy", "z"], "ranks": [0, 1, 1]},
        {"prompt": "b", "answers": ["good", "a very long answer"], "ranks": [0, 1]},
        {"prompt": "c", "chosen": "1", "rejected": "0", "margin": 2},
    )


def test_each_answer_of_a_row_has_a_slot(store):
    rows = Groups(store, 30, slots=3)
    number = np.arange(3)
    tokens, segments = rows.read(number, np.zeros_like(number))
    slots = tokens.reshape(3, 3, 10)
    assert [[decoded(slot) for slot in row] for row in slots] == [
        ["<a>x.", "<a>yy.", "<a>z."],
        ["<b>good.", "ng answer.", ""],
        ["<c>1.", "<c>0.", ""],
    ]
    np.testing.assert_array_equal(segments[2], [1] * 5 + [0] * 5 + [2] * 5 + [0] * 15)
    labels = rows.labels(number, np.zeros_like(number))
    np.testing.assert_array_equal(labels[0, :, 1], [0, 1, 1])
    np.testing.assert_array_equal(labels[2, :, 2], [2, 2, np.nan])
    replies = rows.spans(number, np.zeros_like(number)).of_kind("assistant").mask(tokens.shape)
    assert [decoded(row[mask]) for row, mask in zip(tokens, replies, strict=True)] == [
        "x.yy.z.",
        "good.ng answer.",
        "1.0.",
    ]
    assert KINDS[0] == "answer"
    assert rows.warning().startswith("1 of 3 groups have documents of more than 10 tokens, and are")


def test_too_long_and_too_many_answers_are_told(store):
    dropped = Groups(store, 30, slots=3, long="drop")
    assert dropped.count == 2
    assert "left out (long_documents=drop)" in dropped.warning()
    two = Groups(store, 60, slots=2)
    assert "1 of 3 groups have more than 2 documents, of which the first are taken" in two.warning()
    tokens, _ = two.read(np.array([0]), np.array([0]))
    assert decoded(tokens[0]) == "<a>x.<a>yy."
    with pytest.raises(UserError, match=r"no group of documents in .* with 2 tokens a document"):
        Groups(store, 6, slots=3, long="drop")


def test_comparisons_without_a_better_answer_are_refused(tmp_path):
    ties = {"prompt": "a", "answers": ["x", "yy", "z"], "ranks": [1, 1, 2]}
    store = stored(tmp_path, ties, {"prompt": "b", "completion": "c", "label": True})
    require_pairs({"pairs": store}, slots=3)
    with pytest.raises(UserError, match="held-out pairs: none of its comparisons says"):
        require_pairs({"held-out pairs": store}, slots=2)


def test_an_epoch_has_every_comparison_once(store):
    rows = Groups(store, 30, slots=3)
    mixture = Mixture({"pairs": rows}, {"pairs": 1.0})
    number = np.arange(6)
    tokens, _ = mixture.read(number, seed=3)
    labels = mixture.labels(number, seed=3)
    for epoch in (slice(0, 3), slice(3, 6)):
        found = sorted(map(decoded, tokens[epoch]))
        assert found == ["<a>x.<a>yy.<a>z.", "<b>good.ng answer.", "<c>1.<c>0."]
    for row, label in zip(tokens, labels, strict=True):
        assert (label[0, 2] == 2) == decoded(row).startswith("<c>")


def test_rows_after_the_last_have_no_labels(store):
    rows = EvaluationRows(Groups(store, 30, slots=3))
    labels = rows.labels(2, 3)
    assert not np.isnan(labels[0, :2]).any()
    assert np.isnan(labels[1:]).all()


def test_rows_of_text_have_no_labels(store, tmp_path):
    with pytest.raises(UserError, match=r"set data.rows=groups"):
        Ring(store, 8).labels(np.array([0]), np.array([0]))
    path = tmp_path / "text"
    path.mkdir()
    (path / "a.txt").write_text("text")
    plain = build_stores(TextFiles(path=f"{path}/a.txt"), ByteTokenizer(), path / "store")["all"]
    with pytest.raises(UserError, match="Take a source of comparisons"):
        Groups(plain, 8, slots=2)
