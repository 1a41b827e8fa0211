"""The job that compares replies: a small server is both models and the judge."""

import json

import pytest

from lmjax.config import UserError, replace
from lmjax.evaluation.chat_endpoint import LocalModel
from lmjax.jobs.judge_replies import JudgeReplies
from tests.lmjax.evaluation.test_judge import completion, served
from tests.lmjax.jobs.test_evaluate import table

REQUESTS = ["one", "two", "three", "four"]
# Of each request: whether the first model's reply is the good one; equal replies are a tie.
GOOD = {"one": (1, 0), "two": (1, 0), "three": (0, 1), "four": (1, 1)}


def answer(body):
    """Replies of `ours` and `theirs`, and verdicts of a judge who knows the good ones."""
    prompt = body["messages"][0]["content"]
    if body["model"] != "judge":
        good = GOOD[prompt][body["model"] == "theirs"]
        return completion(f"{'good' if good else 'bad'} {prompt}")
    first = prompt.index("good") < prompt.index("answer B\n")
    if "Scores:" in prompt:
        return completion(f"Well.\nScores: {'9 3' if first else '3 9'}")
    return completion(f"Well.\n[[{'A' if first else 'B'}]]")


def test_two_models_are_compared_and_nothing_is_asked_twice(tmp_path):
    lines = [json.dumps({"turns": [text, "And now?"]}) + "\n" for text in REQUESTS]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    with served(answer) as (judge, asked):
        job = JudgeReplies(
            output=str(tmp_path / "out"),
            requests=str(tmp_path / "asked.jsonl"),
            field="turns",
            ours=replace(judge, model="ours"),
            theirs=replace(judge, model="theirs"),
            judge=judge,
        )
        job.run()
        assert len(asked) == 4 + 4 + 2 * 3
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        wins = table(results, "Wins")["ours over theirs"]
        assert [wins[name] for name in ("wins", "losses", "ties", "win rate")] == [2, 1, 1, 0.625]
        assert wins["2.5 %"] < 0.625 < wins["97.5 %"] and wins["first"] == 0.5
        job.run()
        assert len(asked) == 14
        replace(job, form="scores").run()  # other verdicts on the same replies
        assert len(asked) == 14 + 7
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        scores = table(results, "Scores")["ours over theirs"]
        # 9, 9 and 3 of ours and 3, 3 and 9 of theirs; the equal pair has the mean of 9 and 3 twice.
        assert scores["ratio"] == pytest.approx(27 / 21)
        assert scores["2.5 %"] < scores["ratio"] < scores["97.5 %"]
        page = (tmp_path / "out" / "report.html").read_text()
        assert "good one" in page
        replies = [
            {"prompt": text, "answers": [f"bad {text}", f"good {text}"], "models": ["runs/a", "b"]}
            for text in REQUESTS
        ]
        (tmp_path / "replies.jsonl").write_text("".join(json.dumps(r) + "\n" for r in replies))
        again = JudgeReplies(
            output=str(tmp_path / "other"), replies=str(tmp_path / "replies.jsonl"), judge=judge
        )
        again.run()
        results = json.loads((tmp_path / "other" / "results.json").read_text())
        assert table(results, "Wins")["b over a"]["win rate"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "judge: give the model that compares"),
        ({"judge": LocalModel(folder="x")}, "requests is missing"),
        ({"judge": LocalModel(folder="x"), "requests": "a", "replies": "b"}, "leave requests"),
    ],
)
def test_settings_that_lack_something(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        JudgeReplies(output=str(tmp_path / "out"), **settings).run()
    assert not (tmp_path / "out").exists()
