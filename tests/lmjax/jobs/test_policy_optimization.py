"""Learning from rewards of a policy's own replies."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from lmjax.alignment import ClippedPolicy
from lmjax.alignment.kl import FixedKL
from lmjax.alignment.reward_functions import CutOff, Reply, Reward, make_ready, total_rewards
from lmjax.config import UserError, config, replace, to_json
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
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, LoRA, TransformerConfig
from lmjax.objectives import PrefixLM
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from tests.compilations import counted_compilations
from tests.lmjax.jobs.base_run import go_on_from, write_base
from tests.lmjax.jobs.test_several_processes import ROOT, outcome, pair, start

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
    write_base(folder, MODEL)
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
        "allow_cut_off": True,
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
def counted(folder):
    """A run of six steps, and how much was compiled whenever replies were scored."""
    counts = []

    class Counting(SmallLetters):
        """Notes how much has been compiled."""

        def score(self, replies):
            counts.append(len(found))
            return super().score(replies)

    job = optimization(folder, "whole", rewards=(config(Counting)(),), stop_kl=1e6)
    with counted_compilations() as found:
        job.run()
    return job, tuple(counts)


@pytest.fixture(scope="module")
def whole(counted):
    """The run."""
    return counted[0]


def test_the_reward_rises(whole):
    """By more than twice its standard error, from the first evaluation to the last."""
    _, last = (line["reward"] for line in lines(whole, "held_out/asks"))
    [rewards] = [t for t in RunFolder(whole.output).results()["tables"] if t["title"] == "Rewards"]
    [(_, error, reward)] = rewards["rows"]
    assert reward == last
    train = lines(whole, "train")
    assert last - train[0]["reward"] > 2 * error > 0
    assert [line["updates"] for line in train] == [2] * 6  # none was left out


def test_nothing_is_compiled_after_the_third_step(counted):
    """Rollouts, scores, rewards, updates, counted from the evaluation after the third step on."""
    *_, fourth, fifth, sixth, _ = counted[1]
    assert len(counted[1]) == 8 and fourth == fifth == sixth


@pytest.mark.parametrize("scored", [False, True])
def test_before_the_first_update_the_policy_is_the_one_that_sampled(folder, scored):
    """With dropout in the model: the ratio is 1, and the divergence from the reference 0.

    So it is where the one update takes its own numbers as those before it, and where the policy
    scores the replies in a program of its own; there with adapters: the reference shares the rest.
    """
    further = {"steps": 1, "updates": 1}
    if scored:
        further |= {"objective": ClippedPolicy(), "reward_kl": FixedKL(beta=0.01)}
        further["model"] = replace(MODEL, lora=LoRA(rank=2))
    job = optimization(folder, f"first_{scored}", **further)
    assert job.scores_replies == scored
    job.run()
    [line] = lines(job, "train")
    # Both are squares of differences between two programs, which round in float32.
    assert max(line["approximate_kl"], line["kl"]) < 1e-10
    assert line["clip_fraction"] == 0
    # The sampler's own, with a cache and layers apart, to float32's rounding.
    assert line["sampler_gap"] < 1e-4


def test_a_run_goes_on_bit_for_bit_rollouts_included(whole):
    names = "step", "split", "reward", "loss"
    expected = [[line.get(name) for name in names] for line in read_metrics(whole.output)]
    go_on_from(whole, 3)
    assert [[line.get(name) for name in names] for line in read_metrics(whole.output)] == expected
    assert len(expected) == 8


def test_updates_end_where_the_policy_has_left_the_one_that_sampled(folder):
    """It is the one that sampled before the first update, and not before the second."""
    settings = {"steps": 1, "samples": 8, "updates": 4, "stop_kl": 1e-6}
    job = optimization(folder, "stop", **settings)
    job.run()
    [line] = lines(job, "train")
    assert line["updates"] == 2 and line["approximate_kl"] > 1e-6


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


def test_mistakes(folder, capsys):
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
    with pytest.raises(SystemExit) as ended:
        run(replace(job, rewards=(Broken(),)), [])
    assert ended.value.code == 2
    assert "reward Broken gives nan for the reply" in capsys.readouterr().err
    words = "all 16 replies of the first step were cut off after reply_length=1 tokens"
    with pytest.raises(UserError, match=words):
        replace(job, reply_length=1, allow_cut_off=False).run()
    assert not (folder / "mistakes").exists()


def test_a_policy_that_reads_prompts_from_both_sides_is_refused(folder):
    """Its replies would be sampled, and learnt, by another reading than its own."""
    shutil.copytree(folder / "base", folder / "prefix")
    before = RunFolder(folder / "prefix").experiment()
    (folder / "prefix" / "config.json").write_text(to_json(replace(before, objective=PrefixLM())))
    job = optimization(folder, "refused", begin_with=str(folder / "prefix"))
    with pytest.raises(UserError, match="learned to read prompts from both sides"):
        job.run()


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


def prepared(job):
    """The feed of a job."""
    with jax.set_mesh(job.mesh.build()):
        log = RunLog(make_console())
        return job.resolved().prepare(RunFolder(f"{job.output}-unused"), log, {})


def test_a_request_keeps_the_fields_that_rewards_read(folder):
    for request in prepared(optimization(folder, "fields")).requests(0):
        assert request.text == f"User: {request.metadata['answer']}?\n\nAssistant:"


@pytest.mark.parametrize("long", ["cut", "drop"])
def test_requests_that_are_too_long_are_told(folder, capsys, long):
    """Those of two digits by one token; of training and held out."""
    job = optimization(folder, "long")
    job = replace(job, data=replace(job.data, length=20, long_documents=long))
    feed = prepared(job)
    told = " ".join(capsys.readouterr().out.split())
    done = {"cut": "cut at their beginning", "drop": "left out"}[long]
    words = f"documents have more than 20 tokens, and are {done} (long_documents={long})"
    numbers = re.findall(rf"(asks: \d+ of \d+) {re.escape(words)}", told)
    assert len(numbers) == 2 and f"held_out/{numbers[1]}" in told
    assert sum(int(one.split()[1]) for one in numbers) == 30
    for requests in feed.requests(0), feed.held_out("asks", 100):
        whole = [request.text.startswith("User: ") for request in requests]
        assert all(whole) if long == "drop" else not all(whole)


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


# kill -9 when the line of the fifth step has been written, after which a checkpoint was begun.
KILLED = """
import os, signal
from lmjax.launch import run
from lmjax.runs.metrics import MetricsWriter
from tests.lmjax.jobs.policy_experiment import experiment
write = MetricsWriter.write
def killing(self, record):
    write(self, record)
    if record["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsWriter.write = killing
run(experiment)
"""


@pytest.mark.slow  # three processes
def test_killed_and_resumed_it_has_the_same_bits(folder, monkeypatch):
    """Rollouts included, with a critic and a price of divergence that follows the last one."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.same_run import differences

    importlib.import_module("tests.lmjax.jobs.policy_experiment")  # has the reward of the runs

    def run_policy(name, *command):
        words = {
            "output": folder / name,
            "begin_with": folder / "base",
            "data.train.0.source.path": folder / "requests.jsonl",
            "data.cache": folder / "cache-killed",
            "steps": 6,
            "checkpoint.every": 2,
            "advantage": "gae",
            "value_warmup": 1,
        }
        command = [sys.executable, *command, *(f"{key}={value}" for key, value in words.items())]
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    usual = "-m", "tests.lmjax.jobs.policy_experiment"
    alone = run_policy("alone", *usual)
    assert alone.returncode == 0, alone.stderr
    assert run_policy("killed", "-c", KILLED).returncode == -signal.SIGKILL
    resumed = run_policy("killed", *usual)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search("after step [24]", resumed.stdout)
    timing = ("tokens_per_second", "mfu", "peak_memory")
    lines_of = [
        [{k: v for k, v in line.items() if k not in timing} for line in read_metrics(folder / name)]
        for name in ("alone", "killed")
    ]
    assert lines_of[0] == lines_of[1] and len(lines_of[0]) == 7
    assert differences(folder / "alone", folder / "killed", 6) == []
