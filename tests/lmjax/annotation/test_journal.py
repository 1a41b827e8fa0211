"""Judgements on disk: each whole or not at all, in order, never cut, also after a kill."""

import errno
import json
import os

import pytest

from lmjax.annotation.journal import Journal, annotator_name
from lmjax.config import UserError
from lmjax.data import Conversations
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.json_log import JsonLog
from tests.lmjax.annotation.desks import read_lines

RECORDS = [{"n": 0, "text": "a\nb"}, {"n": 1, "text": "素数 \u2028 é"}, {"n": 2, "text": ""}]


def ranked(item, **values):
    judged = {"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1], "reason": "", **values}
    return {"task": "rank", "event": "ranked", "item": item, **judged}


def other(event, item, task="rank"):
    return {"task": task, "event": event, "item": item}


def test_lines_are_kept(tmp_path):
    log = JsonLog(tmp_path / "new" / "log.jsonl")
    for record in RECORDS:
        log.append(record)
    assert JsonLog(log.path).records == log.records == RECORDS


def test_a_file_cut_anywhere_goes_on(tmp_path):
    """As a kill leaves it: what was acknowledged is there, and no line is ever half."""
    path = tmp_path / "log.jsonl"
    log = JsonLog(path)
    for record in RECORDS:
        log.append(record)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        log = JsonLog(path)
        assert log.records == RECORDS[:whole]
        log.append({"n": 9})
        assert read_lines(path) == [*RECORDS[:whole], {"n": 9}]


def test_a_line_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    """The file is synced with the line in it, and its folder once."""
    path, synced = tmp_path / "log.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(read_lines(path)))
    log = JsonLog(path)
    log.append({"n": 0})
    assert synced == [[{"n": 0}]] * 3
    log.append({"n": 1})
    assert synced[3:] == [[{"n": 0}, {"n": 1}]]


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_line_that_a_full_disk_does_not_take_leaves_nothing(tmp_path, monkeypatch, failing):
    log = JsonLog(tmp_path / "log.jsonl")
    log.append({"n": 0})
    before = log.path.read_bytes()
    write = os.write

    def fail(file, *data):
        if data:
            write(file, bytes(data[0][:4]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: No space left"):
            log.append({"n": 1})
    assert log.path.read_bytes() == before and log.records == [{"n": 0}]
    log.append({"n": 2})
    assert read_lines(log.path) == [{"n": 0}, {"n": 2}]


def test_a_file_that_another_program_changes_is_not_written(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.append({"n": 0})
    with log.path.open("a") as file:
        file.write('{"n": 7}\n')
    with pytest.raises(UserError, match="changed by another program"):
        log.append({"n": 1})
    assert read_lines(log.path) == [{"n": 0}, {"n": 7}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 0}\n[1]\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: not a JSON object"):
        JsonLog(path)
    (tmp_path / "judgements.jsonl").write_text('{"event": "ranked"}\n')
    with pytest.raises(UserError, match=r"judgements\.jsonl, line 1: no event"):
        Journal(tmp_path)


def test_what_holds_is_what_is_not_undone(tmp_path):
    journal = Journal(tmp_path / "ada")
    events = [
        ranked("x"),
        other("skipped", "y"),
        ranked("z", reason="better"),
        other("undone", "z"),
        ranked("z", ranks=[1, 0]),
        {**other("written", "x", "write"), "prompt": "p", "completion": "c"},
    ]
    for event in events:
        journal.append(event)
    for read in (journal, Journal(tmp_path / "ada")):
        assert read.turn == 6
        assert read.holding == {"rank": [events[0], events[1], events[4]], "write": [events[5]]}
        assert read.last_of("rank", "z") == events[4]
    assert read_lines(journal.path) == events
    assert read_lines(tmp_path / "ada" / "comparisons.jsonl") == [events[0], events[4]]
    assert read_lines(tmp_path / "ada" / "conversations.jsonl") == [events[5]]


def test_files_of_what_holds_are_made_again_after_a_kill(tmp_path):
    """Between the line of the journal and that of the other file, or inside the latter."""
    journal = Journal(tmp_path)
    journal.append(ranked("x"))
    journal.append(ranked("y"))
    path = tmp_path / "comparisons.jsonl"
    data = path.read_bytes()
    for cut in (0, 10, data.index(b"\n") + 1, len(data) - 1):
        path.write_bytes(data[:cut])
        Journal(tmp_path).complete()
        assert path.read_bytes() == data
    path.unlink()
    Journal(tmp_path).complete()
    assert path.read_bytes() == data


def test_no_empty_file_is_left(tmp_path):
    """Data sources refuse one."""
    journal = Journal(tmp_path)
    journal.append(ranked("x"))
    journal.append(other("undone", "x"))
    assert not (tmp_path / "comparisons.jsonl").exists()


def test_a_judgement_counts_where_the_other_file_cannot_be_written(tmp_path):
    journal = Journal(tmp_path)
    (tmp_path / "comparisons.jsonl").mkdir()
    with pytest.raises(UserError, match="is on disk, but"):
        journal.append(ranked("x"))
    (tmp_path / "comparisons.jsonl").rmdir()
    again = Journal(tmp_path)
    again.complete()
    assert [record["item"] for record in again.holding["rank"]] == ["x"]
    assert read_lines(tmp_path / "comparisons.jsonl") == [ranked("x")]
    (tmp_path / "comparisons.jsonl").unlink()
    journal.append(ranked("y"))  # the one that failed catches up
    assert read_lines(tmp_path / "comparisons.jsonl") == [ranked("x"), ranked("y")]


def test_data_sources_read_the_lines_as_they_are(tmp_path):
    """The best answer first, each as the conversation that prompt and answer make."""
    journal = Journal(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    judged = {"prompt": messages, "answers": ["a", "b", "c"], "ranks": [1, 0, 0]}
    journal.append(ranked("x", annotator="ada", **judged))
    for completion in ("b", "c", "a"):
        line = {"prompt": messages, "completion": completion}
        journal.append({**other("written", completion, "write"), **line})
    compared = Comparisons(path=str(tmp_path / "comparisons.jsonl"), metadata=("annotator",))
    talks = Conversations(path=str(tmp_path / "conversations.jsonl"))
    assert compared.layout() == "ranked answers" and talks.layout() == "prompts with completions"
    found, expected = list(compared.documents()), list(talks.documents())
    assert [document.text for document in found] == [document.text for document in expected]
    assert "hi" in found[0].text and "b" in found[0].text
    assert [document.labels for document in found] == [(0, 0, 0), (1, 0, 0), (2, 1, 0)]
    assert found[0].metadata == {"annotator": "ada"}


def test_names_of_annotators():
    assert [annotator_name(name) for name in ("Ada", " 張偉 ", "b.o-2")] == ["ada", "張偉", "b.o-2"]
    for name in ("", "..", "a/b", "a b", "x" * 41, ".hidden", "a\0"):
        with pytest.raises(UserError, match="a name has 1 to 40"):
            annotator_name(name)


def test_lines_are_plain_json(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.append({"text": "素\n"})
    assert (
        json.loads(log.path.read_bytes()) == {"text": "素\n"}
        and b"\\u" not in log.path.read_bytes()
    )
