"""A desk: who is shown what in which order, and what is kept of it."""

import collections
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.annotation.answers import ItemAnswers
from lmjax.annotation.desk import Desk, StaleRequest
from lmjax.annotation.items import read_items
from lmjax.config import UserError
from lmjax.data.chat.comparisons import Comparisons
from tests.lmjax.annotation.desks import LINES, judge, make_desk, read_lines, write_lines


def accept(item):
    """Any item."""


def prompts(folder, *lines):
    return str(write_lines(folder / "prompts.jsonl", lines))


# ---- items ---------------------------------------------------------------------------------


def test_lines_are_items(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "old"}]
    path = prompts(tmp_path, *LINES, {"messages": talk}, LINES[0])
    items = read_items(path, accept)
    assert [item.prompt for item in items] == [*(line["prompt"] for line in LINES), talk[:1]]
    assert [item.answers for item in items] == [*(tuple(line["answers"]) for line in LINES), ()]
    assert len({item.identity for item in items}) == 4  # the last line repeats the first
    assert [item.messages[-1].content for item in items[2:]] == ["素数とは?", "q"]


def test_an_item_is_the_same_in_another_file(tmp_path):
    one = read_items(prompts(tmp_path, *LINES), accept)
    other = read_items(prompts(tmp_path, {"prompt": "more"}, *reversed(LINES)), accept)
    assert {item.identity for item in one} < {item.identity for item in other}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"question": "p"}, "has the key 'prompt' or 'messages'; the keys are 'question'"),
        ({"prompt": 3}, "the conversation is empty, or no list"),
        ({"prompt": []}, "the conversation is empty"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message to reply to"),
        ({"prompt": "p", "answers": ["a"]}, "'answers' has 1; 2 or more"),
        ({"prompt": "p", "answers": "ab"}, "should be a list of texts"),
        ({"prompt": "p", "answers": ["a", 1]}, "an answer is int, not text"),
        ({"prompt": "p", "answers": ["a", " "]}, "an answer is empty"),
        ({"prompt": "p\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_line_that_cannot_be_shown_is_told_with_file_and_line(tmp_path, line, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{json.dumps(line)}\n')
    with pytest.raises(UserError, match=rf"prompts\.jsonl, line 3: .*{words}") as caught:
        read_items(str(path), accept)
    assert "on_error" not in str(caught.value)  # no setting of the command


def test_a_check_that_fails_is_told_with_file_and_line(tmp_path):
    def check(item):
        raise UserError("too long")

    with pytest.raises(UserError, match=r"prompts\.jsonl, line 1: too long"):
        read_items(prompts(tmp_path, LINES[0]), check)


def test_a_file_that_is_not_there_or_empty_is_told(tmp_path):
    with pytest.raises(UserError, match=r"no file matches .*nowhere\.jsonl"):
        read_items(str(tmp_path / "nowhere.jsonl"), accept)
    with pytest.raises(UserError, match="there is no text"):
        read_items(prompts(tmp_path), accept)


# ---- order ---------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_annotator_and_item(tmp_path):
    desk, again = make_desk(tmp_path), make_desk(tmp_path)
    other = make_desk(tmp_path, seed=1)
    item, second = read_items(str(tmp_path / "prompts.jsonl"), accept)[:2]
    assert desk.shown_order("ada", item, 9) == again.shown_order("ada", item, 9)
    for different in (
        desk.shown_order("bo", item, 9),
        desk.shown_order("ada", second, 9),
        other.shown_order("ada", item, 9),
    ):
        assert sorted(different) == list(range(9))
        assert different != desk.shown_order("ada", item, 9)


def test_every_order_is_as_likely(tmp_path):
    """chi^2 of 6 orders with 5 degrees of freedom: above 20.5 in one of a thousand; no chance."""
    desk, item = make_desk(tmp_path), read_items(str(tmp_path / "prompts.jsonl"), accept)[0]
    found = collections.Counter(tuple(desk.shown_order(f"a{n}", item, 3)) for n in range(3000))
    assert {*found} == {*itertools.permutations(range(3))}
    assert sum((count - 500) ** 2 / 500 for count in found.values()) < 20.5


@given(
    st.permutations(range(4)), st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 9)
)
def test_ranks_come_back_in_the_order_of_the_answers(tmp_path_factory, order, ties, seed):
    """Whatever was shown: `Comparisons` reads them as the annotator meant them."""
    folder = tmp_path_factory.mktemp("desk")
    desk = make_desk(folder, LINES[:1], seed=seed)
    meant, rank = {}, 0
    for position, answer in enumerate(order):
        rank += position > 0 and not ties[position - 1]
        meant[LINES[0]["answers"][answer]] = int(rank)
    shown = desk.state("ada")["item"]["answers"]
    judge(desk, "ada", "ranked", ranks=[meant[answer] for answer in shown])
    path = folder / "out" / "ada" / "comparisons.jsonl"
    (line,) = read_lines(path)
    assert dict(zip(line["answers"], line["ranks"])) == meant
    assert line["answers"] == LINES[0]["answers"]
    assert [line["answers"][number] for number in line["shown"]] == shown
    read = [
        (document.text, document.labels[1]) for document in Comparisons(path=str(path)).documents()
    ]
    assert [rank for _, rank in read] == sorted(meant.values())
    for text, rank in read:
        assert [answer for answer in meant if answer in text and meant[answer] == rank]


# ---- judgements ----------------------------------------------------------------------------


def test_a_judgement_is_on_disk_before_the_next_is_shown(tmp_path):
    desk = make_desk(tmp_path)
    first = desk.state("Ada")
    assert (first["total"], first["judged"], first["undo"]) == (3, 0, False)
    after = judge(desk, "Ada", "ranked", ranks=[0, 1, 1, 2], reason="clear")
    assert (after["judged"], after["skipped"], after["undo"]) == (1, 0, True)
    assert after["item"]["id"] != first["item"]["id"]
    (line,) = read_lines(tmp_path / "out" / "ada" / "judgements.jsonl")
    assert line["item"] == first["item"]["id"] and line["annotator"] == "ada"
    assert line["reason"] == "clear" and sorted(line["ranks"]) == [0, 1, 1, 2]
    assert line["source"].endswith("prompts.jsonl:0") and line["time"].endswith("+00:00")


def test_all_goes_on_after_a_new_start(tmp_path):
    desk = make_desk(tmp_path)
    judge(desk, "ada", "ranked", ranks=[0, 1, 2, 3])
    judge(desk, "ada", "skipped", reason="both wrong")
    state = desk.state("ada")
    assert make_desk(tmp_path).state("ada") == state
    assert make_desk(tmp_path).state("bo")["judged"] == 0
    done = judge(make_desk(tmp_path), "ada", "ranked", ranks=[2, 1, 0])
    assert done["item"] is None and (done["judged"], done["skipped"]) == (2, 1)
    assert [line["event"] for line in read_lines(tmp_path / "out/ada/judgements.jsonl")] == [
        *("ranked", "skipped", "ranked")
    ]


def test_an_undo_shows_the_judgement_again_and_appends_the_correction(tmp_path):
    desk = make_desk(tmp_path)
    first = desk.state("ada")["item"]
    judge(desk, "ada", "ranked", ranks=[3, 1, 0, 2], reason="hasty")
    again = judge(desk, "ada", "undone")
    assert again["item"] == first | {"draft": {"ranks": [3, 1, 0, 2], "reason": "hasty"}}
    assert again["judged"] == 0 and not again["undo"]
    judge(desk, "ada", "ranked", ranks=[0, 0, 0, 0], reason="")
    judge(desk, "ada", "skipped")
    assert judge(desk, "ada", "undone")["skipped"] == 0  # a skip is undone like a judgement
    judge(desk, "ada", "skipped")
    events = read_lines(tmp_path / "out/ada/judgements.jsonl")
    assert [line["event"] for line in events] == [
        *("ranked", "undone", "ranked", "skipped", "undone", "skipped")
    ]
    (line,) = read_lines(tmp_path / "out/ada/comparisons.jsonl")
    assert line["ranks"] == [0, 0, 0, 0] and line == events[2]


def test_answers_that_are_written(tmp_path):
    desk = make_desk(tmp_path, task="write")
    assert desk.state("ada")["item"]["answers"] == []
    with pytest.raises(UserError, match="the answer is empty"):
        judge(desk, "ada", "written", completion=" \n")
    judge(desk, "ada", "written", completion="<i>\nScattering", reason="r")
    draft = judge(desk, "ada", "undone")["item"]["draft"]
    assert draft == {"completion": "<i>\nScattering", "reason": "r"}
    judge(desk, "ada", "written", completion="Rayleigh")
    (line,) = read_lines(tmp_path / "out/ada/conversations.jsonl")
    assert (line["prompt"], line["completion"]) == (LINES[0]["prompt"], "Rayleigh")
    assert make_desk(tmp_path).state("ada")["judged"] == 0  # ranking the same is another task


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ranks": [0, 1, 2]}, "each of the 4 answers"),
        ({"ranks": [0, 1, 2, 4]}, "no number left out"),
        ({"ranks": [1, 1, 2, 3]}, "no number left out"),
        ({"ranks": [0, 1, 2, "3"]}, "a whole number"),
        ({"ranks": [False, 1, 2, 3]}, "a whole number"),
        ({"ranks": [0.0, 1, 2, 3]}, "a whole number"),
        ({"ranks": None}, "ranks=None"),
        ({"ranks": [0, 1, 2, 3], "reason": 3}, "reason is int"),
        ({"ranks": [0, 1, 2, 3], "reason": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_wrong_judgement_is_not_kept(tmp_path, values, words):
    desk = make_desk(tmp_path)
    with pytest.raises(UserError, match=words):
        judge(desk, "ada", "ranked", **values)
    assert desk.state("ada")["turn"] == 0 and not (tmp_path / "out" / "ada").exists()


def test_a_wrong_event_or_name_is_told(tmp_path):
    desk = make_desk(tmp_path)
    for event in ("written", "erased", None):
        with pytest.raises(UserError, match="known here are ranked, skipped, undone"):
            judge(desk, "ada", event)
    with pytest.raises(UserError, match="nothing to undo"):
        judge(desk, "ada", "undone")
    with pytest.raises(UserError, match="a name has"):
        desk.state("../x")


def test_no_judgement_counts_twice(tmp_path):
    """Sent by two windows, again after a lost reply, or for an item that is not shown."""
    desk = make_desk(tmp_path)
    state = desk.state("ada")
    given = {"turn": 0, "item": state["item"]["id"], "event": "ranked", "ranks": [0, 1, 2, 3]}
    desk.submit("ada", given)
    for stale in (given, given | {"turn": 1}, given | {"turn": None}):
        with pytest.raises(StaleRequest, match="nothing was saved"):
            desk.submit("ada", stale)
    judge(desk, "ada", "undone")
    with pytest.raises(StaleRequest):  # the item is shown again, but this was sent before
        desk.submit("ada", given)
    assert len(read_lines(tmp_path / "out/ada/judgements.jsonl")) == 2


def test_many_at_once_save_one(tmp_path):
    desk = make_desk(tmp_path)
    given = {"turn": 0, "item": desk.state("ada")["item"]["id"], "event": "skipped"}

    def submit(_):
        try:
            return desk.submit("ada", given)["turn"]
        except StaleRequest:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(submit, range(40)), key=str) == [1] + [None] * 39
    assert len(read_lines(tmp_path / "out/ada/judgements.jsonl")) == 1


# ---- answers of a model --------------------------------------------------------------------

ASKED = ({"prompt": "x"}, {"prompt": "same"}, {"prompt": "given", "answers": ["a", "b"]})


def drawn(item):
    return ["same", "same"] if item.prompt == "same" else ["one", " ", "two", "one"]


def sampled_desk(folder, sample, sampled_by):
    items = read_items(prompts(folder, *ASKED), accept)
    answers = ItemAnswers(items, folder / "out", sample, sampled_by)
    return Desk(items, answers, folder / "out"), answers


def test_answers_are_drawn_once_and_shown_when_they_are_there(tmp_path):
    desk, answers = sampled_desk(tmp_path, drawn, {"model": "m"})
    assert desk.state("ada")["waiting"] and desk.state("ada")["total"] == 3
    with pytest.raises(UserError, match="no answers to this item yet"):
        item = read_items(prompts(tmp_path, *ASKED), accept)[0].identity
        desk.submit("ada", {"turn": 0, "item": item, "event": "ranked", "ranks": [0]})
    answers.write_missing(threading.Event())
    state = desk.state("ada")
    assert sorted(state["item"]["answers"]) == ["one", "two"] and not state["waiting"]
    assert state["total"] == 2  # answers that are all alike cannot be ranked

    def fail(item):
        raise AssertionError

    again, kept = sampled_desk(tmp_path, fail, {"model": "m"})
    assert kept.missing() == [] and again.state("ada") == state


def test_drawing_stops_when_it_should(tmp_path):
    stop = threading.Event()

    def draw(item):
        stop.set()
        return ["a", "b"]

    _, answers = sampled_desk(tmp_path, draw, {})
    answers.write_missing(stop)
    assert len(answers.missing()) == 1


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    _, answers = sampled_desk(tmp_path, drawn, {"model": "m", "seed": 0})
    answers.write_missing(threading.Event())
    with pytest.raises(UserError, match=r"drawn with seed=0 \(now 1\): choose another output"):
        sampled_desk(tmp_path, drawn, {"model": "m", "seed": 1})
