"""Jobs that are run one after another."""

import json
import re

import pytest

from lmjax.alignment.reward_functions import Reward
from lmjax.config import UserError, config, from_json, replace, to_json
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.data.chat.requests import Requests
from lmjax.generation.sampling import Sampling
from lmjax.jobs.assistant_recipes import llama2_chat
from lmjax.jobs.chain import Chain
from lmjax.jobs.job import Job
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.jobs.side_by_side import ANSWERS, SideBySide
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=48,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)


@config
class Vowels(Reward):
    """Number of vowels in a reply."""

    def score(self, replies):
        return [float(sum(letter in "aeiou" for letter in reply.text)) for reply in replies]


@config
class Stop(Job):
    """Ends the process where its file is missing, as Ctrl-C does, and makes the file."""

    def run(self):
        folder = RunFolder(self.output)
        if not folder.config.is_file():
            folder.path.mkdir()
            folder.write_config(self)
            raise SystemExit(130)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with text, and with requests."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    lines = [json.dumps({"prompt": f"{n}?", "answer": str(n)}) for n in range(30)]
    (folder / "requests.jsonl").write_text("\n".join(lines))
    return folder


def pretrain(texts, output, **settings):
    source = TextFiles(path=str(texts / "corpus.txt"))
    defaults = {
        "output": output,
        "steps": 2,
        "model": MODEL,
        "data": Data(
            train=(Domain(name="lines", source=source),),
            tokenizer=Bytes(),
            held_out=0.0,
            length=32,
            batch_size=8,
            cache=str(texts / "cache"),
        ),
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": Evaluation(prompts=()),
        "checkpoint": Checkpoints(every=2),
    }
    return Pretrain(**(defaults | settings))


def side_by_side(texts, output, models, **settings):
    source = Requests(path=str(texts / "requests.jsonl"), metadata=("answer",))
    defaults = {
        "output": output,
        "models": models,
        "data": Data(
            train=(Domain(name="asks", source=source),),
            held_out=0.5,
            length=24,
            rows="groups",
            cache=str(texts / "cache"),
        ),
        "judges": (Vowels(),),
        "requests": 6,
        "reply_length": 8,
        "sampling": Sampling(temperature=1.0),
    }
    return SideBySide(**(defaults | settings))


def chain(texts, folder, *between):
    jobs = (
        pretrain(texts, "{output}/first"),
        *between,
        pretrain(texts, "{output}/second", begin_with="{output}/first"),
        side_by_side(texts, "{output}/compared", ("{output}/first", "{output}/second")),
    )
    return Chain(output=str(folder), jobs=jobs, about="Two toys.")


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A chain that was run without interruption."""
    job = chain(texts, tmp_path_factory.mktemp("whole") / "chain")
    job.run()
    return job


def losses(folder):
    return [(line["step"], line["split"], line["loss"]) for line in read_metrics(folder)]


def page_data(folder):
    page = (folder / "report.html").read_text("utf-8")
    return json.loads(re.search(r'type="application/json" id="data">(.*?)</script>', page)[1])


def test_each_job_begins_with_what_an_earlier_one_made(whole):
    folder = RunFolder(whole.output)
    assert RunFolder(folder.path / "second").experiment().begin_with == f"{folder.path}/first"
    first, second = (losses(folder.path / name) for name in ("first", "second"))
    # The same data with the same learning rate: it goes on where the first one ended.
    assert second[0][2] < first[0][2]


def test_the_report_has_all_jobs_also_where_the_folder_was_moved(whole, tmp_path):
    folder = RunFolder(whole.output)
    data = page_data(folder.path)
    assert [run["title"] for run in data["runs"]] == ["1. first", "2. second", "3. compared"]
    assert data["summary"] == "3 jobs, one after another. Two toys."
    assert [len(run["train"]) for run in data["runs"]] == [2, 2, 0]
    titles = [table["title"] for table in data["runs"][2]["tables"]]
    assert titles == ["Scores by Vowels", "Wins by Vowels", "Replies"]
    assert from_json(folder.config.read_text()) == whole

    from lmjax.jobs.report import write_report

    moved = folder.path.rename(tmp_path / "moved")
    write_report(RunFolder(moved))
    assert [run["tables"] for run in page_data(moved)["runs"]] == [
        r["tables"] for r in data["runs"]
    ]
    moved.rename(folder.path)


def test_after_an_interruption_it_goes_on(whole, texts, tmp_path):
    """The metrics are those of the chain that was not interrupted, bit for bit."""
    job = chain(texts, tmp_path / "chain", Stop(output="{output}/stop"))
    with pytest.raises(SystemExit):
        job.run()
    assert not (tmp_path / "chain/second").exists()
    assert [run["title"] for run in page_data(tmp_path / "chain")["runs"]] == ["1. first"]
    job.run()
    for name in ("first", "second"):
        assert losses(tmp_path / "chain" / name) == losses(f"{whole.output}/{name}")
    replies = [(RunFolder(o).path / "compared" / ANSWERS) for o in (whole.output, job.output)]
    answers = [[json.loads(x)["answers"] for x in one.read_text().splitlines()] for one in replies]
    assert answers[0] == answers[1]


def test_a_finished_chain_trains_nothing(whole, capsys):
    before = (RunFolder(whole.output).path / "second/metrics.jsonl").read_text()
    whole.run()
    assert (RunFolder(whole.output).path / "second/metrics.jsonl").read_text() == before
    assert capsys.readouterr().out.count("finished") >= 2


def test_the_scores_are_those_of_the_replies(whole):
    """Computed again from the file of replies."""
    folder = RunFolder(f"{whole.output}/compared")
    lines = [json.loads(line) for line in (folder.path / ANSWERS).read_text().splitlines()]
    scores = [[sum(c in "aeiou" for c in text) for text in line["answers"]] for line in lines]
    tables = {table["title"]: table["rows"] for table in folder.results()["tables"]}
    means = [sum(column) / len(column) for column in zip(*scores, strict=True)]
    assert [row[-1] for row in tables["Scores by Vowels"]] == pytest.approx(means)
    wins = sum((after > before) + 0.5 * (after == before) for before, after in scores)
    [(name, low, high, rate)] = tables["Wins by Vowels"]
    assert (name, rate) == ("second over first", pytest.approx(wins / len(scores)))
    assert low <= rate <= high and len(lines) == 6
    assert all(line["prompt"].endswith("Assistant:") and "answer" in line for line in lines)


def test_explain_makes_nothing(texts, tmp_path, capsys):
    chain(texts, tmp_path / "chain").explain()
    assert "begins with" in capsys.readouterr().out
    assert not (tmp_path / "chain").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"jobs": ()}, "at least one"),
        ({"output": "memory://chain"}, "on this machine"),
    ],
)
def test_chains_that_cannot_be_are_refused(texts, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        replace(chain(texts, tmp_path / "chain"), **change)


def test_a_job_reads_what_an_earlier_one_makes(texts, tmp_path):
    first, second = (pretrain(texts, "{output}/" + name) for name in ("first", "second"))
    lost = replace(second, begin_with="{output}/frist")
    with pytest.raises(UserError, match=r"jobs\.1\.begin_with=\{output\}/frist: no earlier job"):
        Chain(output=str(tmp_path), jobs=(first, lost))
    with pytest.raises(UserError, match=r"jobs\.1\.output=\{output\}/first: an earlier job"):
        Chain(output=str(tmp_path), jobs=(first, first))


def test_a_folder_of_something_else_is_left_alone(whole, texts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no chain"):
        chain(texts, tmp_path).run()
    with pytest.raises(UserError, match="holds a run of Pretrain"):
        chain(texts, f"{whole.output}/first").run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": ("a",)}, "at least two models"),
        ({"models": ("a", "a")}, "must differ"),
        ({"judges": ()}, "and a judge"),
        ({"judges": (Vowels(), Vowels(weight=2.0))}, "must differ"),
        ({"requests": 0}, "requests=0"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(texts, tmp_path, change, message):
    job = side_by_side(texts, str(tmp_path / "compared"), ("a", "b"))
    with pytest.raises(UserError, match=message):
        replace(job, **change)


def test_a_model_that_is_not_there_leaves_nothing_behind(whole, texts, tmp_path):
    job = side_by_side(texts, str(tmp_path / "compared"), (f"{whole.output}/first", "absent"))
    with pytest.raises(UserError, match="absent"):
        job.run()
    assert not (tmp_path / "compared").exists()


def test_a_chain_is_kept_as_json(whole):
    assert from_json(to_json(whole)) == whole


def test_rounds_of_llama_2_chat_follow_each_other():
    """Each begins with the model of the one before, and PPO with that of the last."""
    chain = llama2_chat("7B", "runs/chat", Mesh(fsdp=32), accumulation=16, rounds=3)
    sft, *rounds, policy = chain.jobs
    assert len(rounds) == 12
    last, end = sft.output, ""
    for number in range(3):
        helpful, safety, samples, rejection = rounds[4 * number : 4 * number + 4]
        end = f"_{number + 1}" if number else ""
        names = ("helpful", "safety", "samples", "rejection")
        outputs = [job.output for job in (helpful, safety, samples, rejection)]
        assert outputs == [f"{{output}}/{name}{end}" for name in names]
        gate = samples.rewards[0]
        assert [gate.helpful.folder, gate.safety.folder] == outputs[:2]
        assert samples.policy == rejection.begin_with == last
        assert len(samples.earlier) == number
        of_people = {domain.name: domain.source.path for domain in helpful.data.train}
        assert isinstance(of_people["open"], str)
        assert number == 0 or len(of_people["safety"]) == number + 1
        last = rejection.output
    assert policy.begin_with == last and policy.value_network.folder == f"{{output}}/helpful{end}"
