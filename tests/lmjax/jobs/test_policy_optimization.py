"""Learning from rewards of a policy's own replies."""

import json

import jax
import numpy as np
import pytest

from lmjax.alignment import ClippedPolicy
from lmjax.alignment.kl import FixedKL
from lmjax.alignment.reward_functions import CutOff, Reply, Reward, make_ready, total_rewards
from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Data, Domain
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.requests import Requests
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.generation.sampling import Sampling
from lmjax.jobs.fisher import Fisher
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import Checkpoints, ElasticPenalty
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from tests.compilations import counted_compilations
from tests.lmjax.jobs.base_run import pretrain_base
from tests.lmjax.jobs.test_several_processes import outcome, pair, start

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=48,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.1,
)


@config
class SmallLetters(Reward):
    """Share of small letters in a reply."""

    def score(self, replies):
        return [sum(map(str.islower, r.text)) / max(1, len(r.text)) for r in replies]


@config
class Broken(Reward):
    """NaN for every reply."""

    def score(self, replies):
        return [float("nan")] * len(replies)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, and requests."""
    folder = tmp_path_factory.mktemp("policy")
    pretrain_base(folder, MODEL)
    records = [{"prompt": f"{n}?", "answer": str(n)} for n in range(40)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def optimization(folder, name, **settings):
    source = Requests(path=str(folder / "requests.jsonl"), metadata=("answer",))
    data = Data(
        train=(Domain(name="asks", source=source),),
        held_out=0.2,
        length=32,
        batch_size=4,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 6,
        "begin_with": str(folder / "base"),
        "data": data,
        "rewards": (SmallLetters(),),
        "samples": 4,
        "reply_length": 6,
        "updates": 2,
        "optimizer": AdamW(),
        "objective": ClippedPolicy(kl=0.01),
        "schedule": Constant(peak=3e-2, warmup=0),
        "evaluate_every": 3,
        "evaluate_requests": 8,
        "checkpoint": Checkpoints(every=3),
    }
    return PolicyOptimization(**(defaults | settings))


def lines(job, split):
    return [line for line in read_metrics(job.output) if line["split"] == split]


@pytest.fixture(scope="module")
def whole(folder):
    """A run of six steps."""
    job = optimization(folder, "whole")
    job.run()
    return job


def test_the_reward_rises(whole):
    """By more than twice its standard error, from the first evaluation to the last."""
    _, last = (line["reward"] for line in lines(whole, "held_out/asks"))
    [rewards] = [t for t in RunFolder(whole.output).results()["tables"] if t["title"] == "Rewards"]
    [(_, error, reward)] = rewards["rows"]
    assert reward == last
    begin = lines(whole, "train")[0]["reward"]
    assert last - begin > 2 * error > 0


@pytest.mark.parametrize("scored", [False, True])
def test_before_the_first_update_the_policy_is_the_one_that_sampled(folder, scored):
    """With dropout in the model: the ratio is 1, and the divergence from the reference 0.

    So it is where the one update takes its own numbers as those before it, and where the policy
    scores the replies in a program of its own.
    """
    further = {"steps": 1, "updates": 1}
    if scored:
        further |= {"objective": ClippedPolicy(), "reward_kl": FixedKL(beta=0.01)}
    job = optimization(folder, f"first_{scored}", **further)
    assert job.scores_replies == scored
    job.run()
    [line] = lines(job, "train")
    # Both are squares of differences between two programs, which round in float32.
    assert max(line["approximate_kl"], line["kl"]) < 1e-10
    assert line["clip_fraction"] == 0
    # The sampler's own, with a cache and layers apart, to float32's rounding.
    assert line["sampler_gap"] < 1e-4


def test_a_run_goes_on_bit_for_bit_rollouts_included(whole, folder):
    parts = optimization(folder, "parts", steps=3)
    parts.run()
    replace(parts, steps=6).run()
    found, expected = (
        [(m["step"], m["split"], m["reward"], m.get("loss")) for m in read_metrics(job.output)]
        for job in (parts, whole)
    )
    assert found == expected
    assert len(found) == 8


def test_updates_end_where_the_policy_has_left_the_one_that_sampled(folder):
    """It is the one that sampled before the first update, and not before the second."""
    counts = {}
    for stop_kl in (1e-6, 1e6):
        settings = {"steps": 1, "samples": 8, "updates": 4, "stop_kl": stop_kl}
        job = optimization(folder, f"stop-{stop_kl}", **settings)
        job.run()
        [line] = lines(job, "train")
        counts[stop_kl] = line["updates"]
        assert line["approximate_kl"] > 1e-6
    assert counts == {1e-6: 2, 1e6: 4}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"advantage": "gae", "value_warmup": 1}])
def test_a_policy_is_held_by_what_an_older_task_needs(folder, settings):
    """With an elastic penalty, which the critic's new head and its warm-up do not have."""
    fisher = folder / "fisher"
    Fisher(source=str(folder / "base"), output=str(fisher), rows=8).run()
    elastic = ElasticPenalty(folder=str(fisher), strength=1e5)
    name = settings.get("advantage", "held")
    job = optimization(folder, name, steps=2, elastic=elastic, **settings)
    job.run()
    first, second = lines(job, "train")
    assert second["elastic_penalty"] > 0
    assert ("elastic_penalty" in first) == (not settings)


def test_nothing_is_compiled_after_the_second_step(folder):
    """Counted from the second step's end: rollouts, scores, rewards, updates."""
    counts = []

    class Counting(SmallLetters):
        """Notes how much has been compiled whenever replies are scored."""

        def score(self, replies):
            counts.append(len(found))
            return super().score(replies)

    job = optimization(folder, "count", steps=5, evaluate_every=100, evaluate_requests=4)
    with counted_compilations() as found:
        replace(job, rewards=(config(Counting)(),)).run()
    assert counts[2] == counts[4]


def test_mistakes(folder):
    job = optimization(folder, "mistakes")
    for message, settings in {
        "give at least one": {"rewards": ()},
        "the temperature alone may be set": {"sampling": Sampling(top_k=5)},
        "must be the same": {"sampling": Sampling(temperature=0.5)},
        "do not divide into updates=3": {"updates": 3},
        "samples=0": {"samples": 0},
        "stop_kl=0.0": {"stop_kl": 0.0},
        "read with data.rows=groups": {"data": replace(job.data, rows="ring")},
        "begin_with: the policy": {"begin_with": None},
        "are more than model.max_length=48": {"model": MODEL, "reply_length": 17},
    }.items():
        with pytest.raises(UserError, match=message):
            replace(job, **settings)
    with pytest.raises(UserError, match="reward Broken gives nan for the reply"):
        replace(job, rewards=(Broken(),)).run()
    assert not (folder / "mistakes").exists()


def test_rewards_are_summed_by_weight():
    replies = [Reply("a", "bb", True, {}, []), Reply("a", "BB", False, {}, [])]
    total, means = total_rewards((SmallLetters(weight=2.0), CutOff(weight=0.5)), replies)
    np.testing.assert_array_equal(total, [2.0, -0.5])
    assert means == {"SmallLetters": 0.5, "CutOff": -0.5}


def test_rewards_of_one_name_are_told_apart():
    rewards = SmallLetters(), CutOff(), SmallLetters(weight=3.0), SmallLetters()
    ready = make_ready(rewards, ByteTokenizer(), 48, "policy")
    names = ["SmallLetters", "CutOff", "SmallLetters_2", "SmallLetters_3"]
    assert [one.name for one in ready] == names
    total, means = total_rewards(ready, [Reply("a", "bb", False, {}, [])])
    assert list(means) == names and total == [1 - 1 + 3 + 1]


def test_a_request_keeps_the_fields_that_rewards_read(folder):
    job = optimization(folder, "fields")
    with jax.set_mesh(job.mesh.build()):
        resolved = job.resolved()
        feed = resolved.prepare(RunFolder(folder / "unused"), RunLog(make_console()), {})
        for request in feed.requests(0):
            assert request.text == f"User: {request.metadata['answer']}?\n\nAssistant:"


@pytest.mark.slow
def test_two_processes_learn_as_one(folder):
    """With a critic of its own: to 1e-4, as sums over devices are taken in another order."""
    (folder / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}", "chosen": "1", "rejected": "a"}) for n in range(40))
    )
    pairs = Domain(name="pairs", source=Comparisons(path=str(folder / "pairs.jsonl")))
    data = optimization(folder, "unused").data
    RewardModel(
        output=str(folder / "judge"),
        steps=1,
        begin_with=str(folder / "base"),
        data=replace(data, train=(pairs,), batch_size=8),
    ).run()

    def start_policy(name, devices, **environment):
        words = {
            "output": folder / name,
            "begin_with": folder / "base",
            "data.train.0.source.path": folder / "requests.jsonl",
            "data.cache": folder / f"cache-{name}",
            "mesh.fsdp": 2,
            "mesh.tensor": 2,
            "rewards": f'(ModelReward(folder="{folder}/judge"),)',
            "advantage": "gae",
            "value_network": f'ValueNetwork(folder="{folder}/judge")',
            "value_warmup": 1,
        }
        settings = [f"{key}={value}" for key, value in words.items()]
        command = "tests.lmjax.jobs.policy_experiment", *settings
        return start(*command, devices=devices, **environment)

    outcome(*pair(start_policy, "two"))
    outcome(start_policy("one", devices=4))
    one, two = (read_metrics(folder / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    timing = {"tokens_per_second", "mfu", "peak_memory"}
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys() and left["split"] == right["split"]
        for name in left.keys() - timing - {"split"}:
            assert right[name] == pytest.approx(left[name], rel=1e-4, abs=1e-6), name
