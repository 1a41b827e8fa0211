"""The loop of the papers: comparisons, reward model, policy, comparisons of its replies, again."""

import json

import jax
import numpy as np
import pytest

from lmjax.alignment import FixedKL
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_functions import Reward
from lmjax.config import config
from lmjax.data import Conversations, Data, Domain
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.requests import Requests
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs.best_of_n import BestOfN, BestOfNRun
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import MetricsWriter, read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import pretrain_base

pytestmark = pytest.mark.slow  # six trainings compile, and again after each cut

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=32,
    num_layers=1,
    max_length=48,
    attention=AttentionConfig(num_heads=4, head_dim=8),
    feed_forward=FeedForwardConfig(size=64),
)
EVERY = Checkpoints(every=1)


class Cut(BaseException):
    """The end of a process in the middle of a job."""


@config
class LettersA(Reward):
    """Letters a in a reply: what the people of these rounds like."""

    def score(self, replies):
        return [float(reply.text.count("a")) for reply in replies]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a policy that ends its replies, comparisons of people, and requests."""
    folder = tmp_path_factory.mktemp("rounds")
    pretrain_base(folder, MODEL)
    letters = np.random.default_rng(0).choice(list("abc"), (320, 3))
    words = ["".join(row) for row in letters]
    files = {
        "talks": [{"prompt": f"{n % 10}?", "completion": one} for n, one in enumerate(words)],
        "pairs": [{"prompt": f"{n}?", "chosen": "aaa", "rejected": "bcb"} for n in range(24)],
        "asks": [{"prompt": f"{n}?"} for n in range(8)],
    }
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    Finetune(
        output=str(folder / "sft"),
        begin_with=str(folder / "base"),
        steps=80,
        data=read(folder, Conversations(path=str(folder / "talks.jsonl")), rows="whole_documents"),
        schedule=Constant(peak=2e-2, warmup=0),
        evaluation=ChatEvaluation(every=1000),
    ).run()
    return folder


def read(folder, *sources, **settings):
    domains = (Domain(name=f"set{n}", source=source) for n, source in enumerate(sources))
    defaults = {"held_out": 0.0, "length": 40, "batch_size": 8, "rows": "groups"}
    return Data(train=tuple(domains), cache=str(folder / "cache"), **(defaults | settings))


def rounds(folder, output):
    """Two rounds; the second reward model learns from the replies of the first policy too."""
    sft, asks = str(folder / "sft"), Requests(path=str(folder / "asks.jsonl"))
    people = Comparisons(path=str(folder / "pairs.jsonl"))
    replies = Comparisons(path="{output}/compared/replies/*.jsonl")

    def judge(number, *sources):
        return RewardModel(
            output=f"{{output}}/judge{number}",
            begin_with=sft,
            steps=3,
            data=read(folder, *sources),
            schedule=Constant(peak=1e-3, warmup=0),
            checkpoint=EVERY,
        )

    def policy(number, begin_with):
        return PolicyOptimization(
            output=f"{{output}}/policy{number}",
            begin_with=begin_with,
            steps=3,
            data=read(folder, asks, length=32),
            rewards=(ModelReward(folder=f"{{output}}/judge{number}"),),
            reward_kl=FixedKL(),
            samples=2,
            reply_length=12,
            schedule=Constant(peak=1e-3, warmup=0),
            evaluate_every=100,
            checkpoint=EVERY,
        )

    compared = BestOfN(
        output="{output}/compared",
        policy="{output}/policy1",
        requests=asks,
        rewards=(LettersA(),),
        samples=4,
        request_length=32,
        reply_length=12,
        batch_size=4,
    )
    jobs = (
        judge(1, people),
        policy(1, sft),
        compared,
        judge(2, people, replies),
        policy(2, "{output}/policy1"),
    )
    return Chain(output=str(output), jobs=jobs)


def made(chain):
    """All that the jobs have made: lines of metrics, lines of replies, and the last policy."""
    timing = ("tokens_per_second", "mfu", "peak_memory")
    found = {}
    for job in chain.resolved_jobs():
        folder = RunFolder(job.output)
        if isinstance(job, BestOfN):
            lines = {path.name: path.read_bytes() for path in folder.replies.iterdir()}
        else:
            lines = [
                {name: value for name, value in line.items() if name not in timing}
                for line in read_metrics(job.output)
            ]
        found[folder.path.name] = lines
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        params = read_params(job.output, model_folder(job.output), training_layout())
        return found, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def test_two_rounds_go_on_at_any_point(folder, tmp_path, monkeypatch):
    """Every job is cut once, in the middle; all bits are those of rounds that were left alone."""
    usual, cut = rounds(folder, tmp_path / "usual"), rounds(folder, tmp_path / "cut")
    usual.run()
    moments = {("judge1", 2), ("policy1", 1), ("compared", 1), ("judge2", 1), ("policy2", 2)}

    def cutting(moment):
        if moment in moments:
            moments.remove(moment)
            raise Cut

    write_line, write_replies = MetricsWriter.write, BestOfNRun.write

    def line(self, record):
        write_line(self, record)
        cutting((self.path.parent.name, record["step"]))

    def replies(self, path, lines):
        write_replies(self, path, lines)
        cutting((self.folder.path.name, 1))

    monkeypatch.setattr(MetricsWriter, "write", line)
    monkeypatch.setattr(BestOfNRun, "write", replies)
    while left := len(moments):
        with pytest.raises(Cut):
            cut.run()
        assert len(moments) == left - 1
    cut.run()
    expected = made(usual)
    assert made(cut) == expected
    learnt = [line["reward"] for line in expected[0]["policy2"] if line["split"] == "train"]
    assert len(learnt) == 3
    text = (RunFolder(f"{cut.output}/compared").replies / "00000000.jsonl").read_text()
    assert all(len(json.loads(line)["answers"]) > 1 for line in text.splitlines())
