"""Best of n: the best replies are kept, after a kill too, and other commands read the lines."""

import json
import shutil

import numpy as np
import pytest

from lmjax.alignment.candidates import divergence_of_best
from lmjax.alignment.ghost_attention import GhostAttention
from lmjax.alignment.reward_functions import Reward
from lmjax.config import UserError, config, replace, to_json
from lmjax.data import Conversations, Data, Domain, chat_template
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.requests import Requests
from lmjax.generation.sampling import Sampling
from lmjax.jobs.best_of_n import BestOfN, read_lines
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh
from lmjax.remote import Objects
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Constant
from tests import object_store
from tests.lmjax.jobs.base_run import pretrain_base
from tests.lmjax.jobs.test_several_processes import outcome, pair, start

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=32,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=4, head_dim=8),
    feed_forward=FeedForwardConfig(size=64),
)
REQUESTS = 12
INSTRUCTION = "Be brief."


@config
class SmallLetterShare(Reward):
    """Share of small letters in a reply, read off the line's limit in the metadata."""

    def score(self, replies):
        assert all(reply.metadata["number"] < REQUESTS for reply in replies)
        return [sum(map(str.islower, r.text)) / max(1, len(r.text)) for r in replies]


@config
class StopsLater(Reward):
    """The same share, but the second batch of replies is never scored."""

    def score(self, replies):
        if min(reply.metadata["number"] for reply in replies) >= 8:
            raise KeyboardInterrupt
        return SmallLetterShare().score(replies)


@config
class Words(Reward):
    """Notes what the policy was asked."""

    def score(self, replies):
        ASKED.extend(reply.request for reply in replies)
        return [float(len(reply.text)) for reply in replies]


@config
class Infinite(Reward):
    """No number."""

    def score(self, replies):
        return [float("inf")] * len(replies)


ASKED: list[str] = []
# Of any tokens, so that some reply ends to a request that is unlike those of training.
HOT = Sampling(temperature=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a policy that has learnt to end its replies, and requests."""
    folder = tmp_path_factory.mktemp("best")
    pretrain_base(folder, MODEL)
    letters = np.random.default_rng(0).choice(list("abcABC"), (320, 3))
    records = [
        {"prompt": f"{n % REQUESTS}?", "completion": "".join(row)} for n, row in enumerate(letters)
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    Finetune(
        output=str(folder / "sft"),
        begin_with=str(folder / "base"),
        steps=80,
        data=Data(
            train=(Domain(name="talks", source=Conversations(path=str(folder / "talks.jsonl"))),),
            held_out=0.0,
            length=64,
            batch_size=16,
            rows="whole_documents",
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=2e-2, warmup=0),
        evaluation=ChatEvaluation(every=1000),
    ).run()
    asks = [{"prompt": f"{n}?", "number": n} for n in range(REQUESTS)]
    (folder / "asks.jsonl").write_text("\n".join(map(json.dumps, asks)))
    return folder


def best(folder, name, **settings):
    usual = {
        "output": str(folder / name),
        "policy": str(folder / "sft"),
        "requests": Requests(path=str(folder / "asks.jsonl"), metadata=("number",)),
        "rewards": (SmallLetterShare(),),
        "samples": 4,
        "request_length": 72,
        "reply_length": 12,
        "batch_size": 8,
        "mesh": Mesh(data=2, fsdp=2, tensor=2),
    }
    return BestOfN(**usual | settings)


def lines_of(job):
    return [
        line
        for path in sorted(RunFolder(job.output).replies.iterdir())
        for line in read_lines(path)
    ]


def contents(job):
    return {path.name: path.read_bytes() for path in RunFolder(job.output).replies.iterdir()}


@pytest.fixture(scope="module")
def whole(folder):
    """The command, run to its end."""
    job = best(folder, "whole")
    job.run()
    return job


def test_lines_have_the_best_reply_and_all_others(whole):
    lines = lines_of(whole)
    assert REQUESTS / 2 < len(lines) <= REQUESTS
    for line in lines:
        asked, reply = line["messages"]
        assert [asked] == line["prompt"] and asked["content"] == f"{line['number']}?"
        assert len(line["answers"]) == len(line["scores"]) == 4 - line["left_out"]
        assert reply["content"] == line["answers"][int(np.argmax(line["scores"]))]
        assert not any("User:" in answer or not answer for answer in line["answers"])
    [table] = RunFolder(whole.output).results()["tables"]
    (_, _, every), (_, _, top) = table["rows"]
    assert every == pytest.approx(np.mean([np.mean(line["scores"]) for line in lines]))
    assert top == pytest.approx(np.mean([max(line["scores"]) for line in lines]))
    assert top > every


def test_other_commands_read_the_lines(whole):
    path, lines = f"{whole.output}/replies/*.jsonl", lines_of(whole)
    talks = [document.text for document in Conversations(path=path).documents()]
    assert talks == [
        f"User: {line['number']}?\n\nAssistant: {line['messages'][-1]['content']}\n\n"
        for line in lines
    ]
    compared = list(Comparisons(path=path).documents())
    assert [-document.labels[1] for document in compared] == [
        score for line in lines for score in sorted(line["scores"], reverse=True)
    ]
    asked = [dialogue.messages[0].content for dialogue in Requests(path=path).dialogues()]
    assert asked == [f"{line['number']}?" for line in lines]


def test_after_a_kill_it_goes_on_to_the_same_bytes(folder, whole):
    """A file that is there is not made again."""
    job = best(folder, "killed", rewards=(StopsLater(),))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert list(contents(job)) == ["00000000.jsonl"]
    [made] = RunFolder(job.output).replies.iterdir()
    before = made.stat().st_mtime_ns
    RunFolder(job.output).write_config(again := replace(job, rewards=whole.rewards))
    again.run()
    assert contents(job) == contents(whole)
    assert made.stat().st_mtime_ns == before
    again.run()  # nothing is left to do
    assert contents(job) == contents(whole)


def test_it_goes_on_in_a_store(folder, whole, tmp_path, monkeypatch):
    """What a killed command has sent there is not made again, and the bytes are the same."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(object_store.FOLDER, str(tmp_path))
    job = best(folder, "-", output="late://bucket/best", rewards=(StopsLater(),))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    shutil.rmtree(tmp_path / "cache")
    first = contents(job)
    assert list(first) == ["00000000.jsonl"]
    objects = Objects(job.output, write=True)
    objects.write("config.json", to_json(again := replace(job, rewards=whole.rewards)).encode())
    again.run()
    assert contents(job) == contents(whole)
    for _ in range(object_store.LATE):
        objects.listed()
    path = f"{job.output}/replies/*.jsonl"
    assert len(list(Conversations(path=path).documents())) == len(lines_of(whole))


def test_earlier_rounds_are_candidates_too(folder, whole):
    """Their best reply stays where no new one is better, scored anew."""
    job = best(folder, "round", seed=1, samples=1, earlier=(f"{whole.output}/replies/*.jsonl",))
    job.run()
    before = {line["number"]: line for line in lines_of(whole)}
    lines = {line["number"]: line for line in lines_of(job)}
    assert before.keys() <= lines.keys()
    assert {line["earlier"] for line in lines.values()} <= {0, 1}
    for number, line in before.items():
        assert lines[number]["earlier"] == 1
        assert lines[number]["answers"][-1] == line["messages"][-1]["content"]
        # The text without the white space that a reply has around it.
        assert max(lines[number]["scores"]) >= max(line["scores"])
    assert "earlier rounds" in RunFolder(job.output).results()["tables"][0]["notes"][0]


def test_ghost_attention_repeats_the_instruction_while_sampling_alone(folder):
    talk = [("user", "1?"), ("assistant", "no"), ("user", "2?"), ("assistant", "left out")]
    record = {"messages": [{"role": role, "content": text} for role, text in talk]}
    (folder / "turns.jsonl").write_text(json.dumps(record))
    requests = Requests(path=str(folder / "turns.jsonl"))
    ghost = GhostAttention(instructions=(INSTRUCTION,))
    one = {"requests": requests, "rewards": (Words(),), "mesh": Mesh(fsdp=1, data=8)}
    one |= {"ghost_attention": ghost, "samples": 32, "reply_length": 24, "sampling": HOT}
    job = best(folder, "ghost", **one)
    ASKED.clear()
    job.run()
    [line] = lines_of(job)
    turns = f"{INSTRUCTION}\n\nUser: 1?\n\nAssistant: no\n\nUser: {{}}2?\n\nAssistant:"
    assert set(ASKED) == {turns.format(f"{INSTRUCTION}\n\n")}
    text = next(Conversations(path=f"{job.output}/replies/*.jsonl").documents()).text
    assert text == turns.format("") + f" {line['messages'][-1]['content']}\n\n"


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(folder):
    def command(name, devices, **environment):
        words = {
            "output": folder / name,
            "policy": folder / "sft",
            "requests": f'Requests(path="{folder}/asks.jsonl")',
            "rewards": "(CutOff(),)",
            "request_length": 72,
            "reply_length": 12,
            "samples": 4,
            "batch_size": 8,
            "mesh.fsdp": 2,
            "mesh.tensor": 2,
        }
        settings = [f"{key}={value}" for key, value in words.items()]
        return start("lmjax.jobs.best_of_n", *settings, devices=devices, **environment)

    printed = outcome(*pair(command, "two"))
    outcome(command("one", devices=4))
    found = [
        {path.name: path.read_bytes() for path in (folder / name / "replies").iterdir()}
        for name in ("one", "two")
    ]
    assert found[0] == found[1] and len(found[0]) == 2
    assert "Best of n" in printed[0] and printed[1] == ""


@pytest.mark.parametrize("samples", [2, 4, 16])
def test_the_divergence_of_the_best(samples):
    """Of the best of n draws from many equally likely replies of different rewards, by sums."""
    count = 4000
    below = np.arange(count + 1) / count
    chosen = np.diff(below**samples)
    exact = np.sum(chosen * np.log(chosen * count, where=chosen > 0, out=np.zeros(count)))
    bound = divergence_of_best(samples)
    assert bound - 1e-3 < exact <= bound
    few = np.diff((np.arange(4) / 3) ** samples)
    assert np.sum(few * np.log(3 * few)) < bound


def test_mistakes(folder, whole, capsys):
    for message, settings in {
        "samples=0": {"samples": 0},
        "give seed=3": {"sampling": Sampling(seed=3)},
        "'scores' is a field": {"requests": replace(whole.requests, metadata=("scores",))},
    }.items():
        with pytest.raises(UserError, match=message):
            best(folder, "mistakes", **settings)
    for message, settings in {
        "policy: give it": {"policy": None},
        "requests: give it": {"requests": None},
        "rewards: give it": {"rewards": ()},
        "are more than the 96 tokens": {"reply_length": 40},
        "Infinite gives inf for the reply": {"rewards": (Infinite(),)},
        "all 32 replies to the first requests were cut off after reply_length=1": {
            "reply_length": 1
        },
        "all 12 requests are longer than request_length=3 tokens": {"request_length": 3},
    }.items():
        job = best(folder, "mistakes", **settings)
        with pytest.raises(SystemExit) as ended:
            run(job, [])
        assert ended.value.code == 2 and message in capsys.readouterr().err
        assert not RunFolder(job.output).path.exists()
    with pytest.raises(UserError, match="holds another run"):
        replace(whole, samples=5).run()
    (folder / "others.jsonl").write_text('{"prompt": "other", "number": 0}')
    others = replace(whole.requests, path=str(folder / "others.jsonl"))
    RunFolder(whole.output).write_config(job := replace(whole, requests=others))
    with pytest.raises(UserError, match="replies to other requests than"):
        job.run()
    RunFolder(whole.output).write_config(whole)


def test_another_format_than_the_policys_is_told(folder, whole, capsys):
    requests = replace(whole.requests, template=chat_template("alpaca"))
    with pytest.raises(UserError, match="all 12 requests are longer"):
        best(folder, "format", requests=requests, request_length=3).run()
    told = capsys.readouterr().out
    assert "sft has the chat format plain, and the text here is written as alpaca" in told


def test_a_damaged_file_is_told(folder, whole):
    job = replace(whole, output=str(folder / "damaged"))
    found = RunFolder(job.output)
    found.replies.mkdir(parents=True)
    found.write_config(job)
    for text in ("{", "{}\n", "7\n"):
        (found.replies / "00000000.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"00000000\.jsonl is damaged"):
            job.run()
