"""The recipe of InstructGPT: divergence in the reward, a critic, pretraining text."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

from lmjax.alignment import AdaptiveKL, ClippedPolicy, FixedKL
from lmjax.alignment.gated_reward import GatedReward
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_functions import Reply, Reward
from lmjax.alignment.rollouts import RolloutRows, ValueScorer
from lmjax.alignment.row_packing import RowPacking
from lmjax.alignment.value_network import ValueNetwork
from lmjax.config import UserError, config, replace
from lmjax.data import Data, Domain, TextFiles, chat_template
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.requests import Requests
from lmjax.generation.sampling import Sampling
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs import policy_step
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import Checkpoints
from lmjax.models import AttentionConfig, FeedForwardConfig, LoRA, TransformerConfig
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import Objects
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests import object_store
from tests.compilations import counted_compilations
from tests.lmjax.jobs.base_run import go_on_from, write_base

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
class LowercaseShare(Reward):
    """Share of small letters in a reply."""

    def score(self, replies):
        return [sum(map(str.islower, r.text)) / max(1, len(r.text)) for r in replies]


def lines_of(folder):
    """Domain of a text of numbered lines."""
    return (Domain(name="lines", source=TextFiles(path=str(folder / "corpus.txt"))),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, and requests."""
    folder = tmp_path_factory.mktemp("critic")
    write_base(folder, MODEL)
    records = [{"prompt": f"{n}?"} for n in range(40)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def optimization(folder, name, **settings):
    data = Data(
        train=(Domain(name="asks", source=Requests(path=str(folder / "requests.jsonl"))),),
        held_out=0.2,
        length=32,
        batch_size=4,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 4,
        "begin_with": str(folder / "base"),
        "data": data,
        "rewards": (LowercaseShare(),),
        "samples": 2,
        "reply_length": 6,
        "allow_cut_off": True,
        "reward_kl": AdaptiveKL(beta=0.1, target=0.01, horizon=20),
        "schedule": Constant(peak=3e-2, warmup=0),
        "evaluate_every": 100,
        "evaluate_requests": 2,
        "checkpoint": Checkpoints(every=2),
    }
    return PolicyOptimization(**(defaults | settings))


def numbers(job):
    """All lines of a run but for times."""
    timing = ("tokens_per_second", "mfu", "peak_memory")
    return [
        {name: value for name, value in line.items() if name not in timing}
        for line in read_metrics(job.output)
    ]


@pytest.mark.slow
def test_the_price_of_divergence_goes_on_bit_for_bit(folder):
    job = optimization(folder, "adaptive")
    job.run()
    found = numbers(job)
    train = [line for line in found if line["split"] == "train"]
    assert train[0]["beta"] == pytest.approx(0.1)
    # The rule in float64, to rounding in float32.
    for before, line in itertools.pairwise(train):
        error = np.clip(before["reply_kl"] / 0.01 - 1, -0.2, 0.2)
        assert line["beta"] == pytest.approx(before["beta"] * (1 + error * 8 / 20), rel=1e-6)
    assert len({line["beta"] for line in train}) == 4
    go_on_from(job, 2)
    assert numbers(job) == found


@pytest.mark.slow
def test_the_price_of_divergence_goes_on_in_a_store(folder, tmp_path, monkeypatch):
    """From the metrics in the store, where no copy is left on this machine; not without it."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(object_store.FOLDER, str(tmp_path))
    warm = {"sampling": Sampling(temperature=0.5), "objective": ClippedPolicy(temperature=0.5)}
    url = "late://bucket/policy"
    job = optimization(folder, "-", output=url, steps=1, checkpoint=Checkpoints(every=1), **warm)
    job.run()
    objects, further = Objects(url), replace(job, steps=2)
    metrics = objects.read("metrics.jsonl")
    objects.write("metrics.jsonl", metrics.replace(b'"beta"', b'"other"'))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=r"metrics\.jsonl lacks beta of step 1"):
        further.run()
    objects.write("metrics.jsonl", metrics)
    shutil.rmtree(tmp_path / "cache")
    further.run()
    first, second = [line for line in numbers(job) if line["split"] == "train"]
    error = np.clip(first["reply_kl"] / 0.01 - 1, -0.2, 0.2)
    assert second["beta"] == pytest.approx(first["beta"] * (1 + error * 8 / 20), rel=1e-6)
    assert second["beta"] != first["beta"]
    assert "sampler_gap" not in first  # the sampler gives none at this temperature


@pytest.mark.slow
def test_pretraining_text_goes_on_bit_for_bit(folder):
    """Beside a critic that warms up, in two updates of a step."""
    text = Data(
        train=lines_of(folder), held_out=0.0, length=24, batch_size=16, cache=str(folder / "cache")
    )
    job = optimization(
        folder,
        "text",
        advantage="gae",
        value_warmup=1,
        samples=4,
        updates=2,
        pretraining=text,
        checkpoint=Checkpoints(every=1),
    )
    job.run()
    found = numbers(job)
    first, *train = [line for line in found if line["split"] == "train"]
    assert "loss_2" not in first
    for line in train:  # the weighted sum, to rounding in float32
        assert line["loss"] == pytest.approx(line["loss_1"] + 27.8 * line["loss_2"], rel=1e-5)
    assert train[-1]["loss_2"] < train[0]["loss_2"] < 1.1 * np.log(257)
    go_on_from(job, 2)
    assert numbers(job) == found


@pytest.mark.slow
def test_updates_with_text_end_where_the_policy_has_left(folder):
    """In parts; metrics of the policy have the names that they have without text."""
    text = {"held_out": 0.0, "length": 24, "batch_size": 48, "cache": str(folder / "cache")}
    settings = {"steps": 1, "samples": 12, "updates": 2, "stop_kl": 1e-6, "accumulation": 3}
    text = Data(train=lines_of(folder), **text)
    job = optimization(folder, "stop", pretraining=text, epochs=2, **settings)
    job.run()
    line = numbers(job)[0]
    assert line["updates"] == 2 and line["approximate_kl"] > 1e-6
    assert [name for name in line if name.endswith("_1")] == ["loss_1"] and "loss_2" in line
    assert line["policy_loss"] == line["loss_1"]


def params_of(job):
    """Parameters at the end of a run, by path."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout = training_layout()
        config = model_folder(job.output)
        return flat(read_params(job.output, config, layout))


def flat(params):
    """Parameters in numpy, by path."""
    found = traverse_util.flatten_dict(params, sep=".")
    return {path: np.asarray(leaf) for path, leaf in found.items()}


def states_of(job, steps):
    """States of a run after some steps."""
    with jax.set_mesh(job.mesh.build()):
        learner = job.resolved().learner()
        checkpointer = Checkpointer(RunFolder(job.output).checkpoints)
        return [checkpointer.restore(step, learner.abstract())[0] for step in steps]


def test_ppo_with_a_critic_warms_up(folder):
    """The first step trains the critic alone, the second both.

    The first leaves the policy bit for bit, weight decay included; the critic's head learns.
    """
    critic = {"advantage": "gae", "value_warmup": 1, "samples": 4, "updates": 2}
    often = Checkpoints(every=1)
    job = optimization(folder, "critic", reward_kl=FixedKL(), steps=2, checkpoint=often, **critic)
    given = replace(job, model=replace(MODEL, lora=LoRA())).resolved().model
    assert given == replace(job.resolved().model, lora=LoRA())
    job.run()
    first, second = [line for line in numbers(job) if line["split"] == "train"]
    assert "policy_loss" not in first and "policy_loss" in second
    assert first["value_loss"] > 0 and second["value_loss"] > 0
    assert second["approximate_kl"] > 0 and first["gradient_norm"] > 0
    [state] = states_of(job, (1,))
    base, found = params_of(replace(job, output=job.begin_with)), flat(state.params)
    assert found.keys() - base.keys() == {"heads.value.outputs.weight", "heads.value.outputs.bias"}
    for path, leaf in base.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert found["heads.value.outputs.bias"] != 0


@pytest.fixture(scope="module")
def judge(folder):
    """The run folder of a reward model, of which adapters and the head were trained."""
    records = [{"prompt": f"{n}", "chosen": "abc", "rejected": "ABC"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = Comparisons(path=str(folder / "pairs.jsonl"))
    RewardModel(
        output=str(folder / "judge"),
        steps=1,
        model=replace(MODEL, lora=LoRA(rank=2)),
        begin_with=str(folder / "base"),
        data=Data(
            train=(Domain(name="pairs", source=source),),
            length=32,
            batch_size=8,
            rows="groups",
            cache=str(folder / "cache"),
        ),
    ).run()
    return str(folder / "judge")


def test_a_reward_model_scores_in_the_job(folder, judge, monkeypatch, capsys):
    """The reward of training and of held-out requests has its name.

    A sampler that is half a nat off is told of, once; an average of the parameters is evaluated.
    """
    sampled = policy_step.sampled_log_probs
    monkeypatch.setattr(policy_step, "sampled_log_probs", lambda *given: sampled(*given) + 0.5)
    reward = ModelReward(folder=judge, weight=2.0)
    often = {"steps": 2, "ema_decay": 0.75, "checkpoint": Checkpoints(every=1)}
    job = optimization(folder, "judged", rewards=(reward,), **often)
    job.run()
    for line in numbers(job):
        assert line["reward"] == pytest.approx(2 * line["reward_ModelReward"], rel=1e-6)
        assert line["reward"] != 0
    words = (
        "step 1: log-probabilities of the sampler and of the trainer differ by 0.500 nats a token"
    )
    told = capsys.readouterr().err
    assert words in told and told.count("log-probabilities of the sampler") == 1
    expected = params_of(replace(job, output=job.begin_with))
    for state in states_of(job, (1, 2)):
        for path, leaf in flat(state.params).items():
            expected[path] = 0.75 * expected[path] + 0.25 * leaf
        for path, leaf in flat(state.average).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, atol=1e-8)
    for path, leaf in params_of(job).items():  # the run's model
        np.testing.assert_array_equal(leaf, flat(state.average)[path])


def test_a_value_network_begins_as_the_reward_model(judge, one_device):
    """Its value at a token is the score of the text up to there; to float32's rounding."""
    network, layout = ValueNetwork(folder=judge), training_layout()
    tokens = np.random.default_rng(0).integers(1, 256, (2, 12)).astype(np.int32)
    rows = RolloutRows(tokens, np.full(2, 3, np.int32), np.full(2, 9, np.int32))
    packing = RowPacking.one_each(np.full(2, 12), 12)
    values = ValueScorer(network.model, layout).score(network.params(layout), rows, packing, 24)
    for end in (1, 5, 12):
        replies = [Reply("", "", True, {}, row[:end].tolist()) for row in tokens]
        expected = ModelReward(folder=judge).score(replies)
        np.testing.assert_allclose(values[:, end - 1], expected, rtol=0, atol=1e-5)
    assert np.std(values) > 1e-3


def test_a_value_network_warms_up_alone_and_goes_on_bit_for_bit(folder, judge):
    """The policy is the base until then, bit for bit; the critic has learnt meanwhile."""
    network = ValueNetwork(folder=judge, schedule=Constant(peak=1e-2, warmup=0))
    settings = {"advantage": "gae", "value_network": network, "samples": 4}
    settings |= {"steps": 2, "value_warmup": 1, "checkpoint": Checkpoints(every=1)}
    job = optimization(folder, "network", reward_kl=FixedKL(), updates=2, **settings)
    job.run()
    lines, states = numbers(job), states_of(job, (1, 2))
    base, found = params_of(replace(job, output=job.begin_with)), flat(states[0].params)
    assert found.keys() == base.keys()
    for path, leaf in base.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    go_on_from(job, 1)
    assert numbers(job) == lines
    first, second = [line for line in lines if line["split"] == "train"]
    assert "policy_loss" not in first and "policy_loss" in second
    assert first["value_loss"] > 0 and second["value_loss"] > 0
    assert second["approximate_kl"] >= 0 and second["value_gradient_norm"] > 0
    found = [state.critic.params for state in states]
    with jax.set_mesh(job.mesh.build()):
        found = [job.resolved().learner().critic_params(), *found]
    for before, after in itertools.pairwise(map(jax.device_get, found)):
        changed = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
        assert all(jax.tree.leaves(changed["heads"]) + jax.tree.leaves(changed["blocks"]))


def test_whitened_rewards_have_no_scale(folder):
    """The divergence beside them has one; means are reported as the rewards are."""
    lines = {}
    for weight in (1.0, 64.0):
        settings = {"advantage": "leave_one_out", "whiten_rewards": True, "samples": 4}
        rewards = (LowercaseShare(weight=weight),)
        job = optimization(folder, f"white-{weight}", steps=1, rewards=rewards, **settings)
        job.run()
        lines[weight] = [line for line in numbers(job) if line["split"] == "train"]
    for small, large in zip(lines[1.0], lines[64.0], strict=True):
        assert large["reward"] == pytest.approx(64 * small["reward"], rel=1e-4)
        # What is added to the variance, 1e-8, counts in the sixth digit of the smaller ones.
        assert large["gradient_norm"] == pytest.approx(small["gradient_norm"], rel=1e-4)
    assert lines[1.0][0]["gradient_norm"] > 0


@pytest.mark.slow
def test_the_gate_in_the_job(folder, judge):
    """A request's line says whether it was written to provoke unsafe replies."""
    (folder / "tagged.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{n}?", "safety": n % 2 == 0}) for n in range(40))
    )
    source = Requests(path=str(folder / "tagged.jsonl"), metadata=("safety",))
    job = optimization(folder, "gated", steps=1)
    domains = (Domain(name="asks", source=source),)
    gate = GatedReward(
        helpful=ModelReward(folder=judge), safety=ModelReward(folder=judge), tag="safety"
    )
    job = replace(job, data=replace(job.data, train=domains), rewards=(gate,))
    job.run()
    line = numbers(job)[0]
    assert line["reward"] == pytest.approx(line["reward_GatedReward"], rel=1e-6)
    with pytest.raises(UserError, match="has safety=None, not true or false"):
        replace(job, output=f"{job.output}-bad", data=optimization(folder, "x").data).run()


def test_mistakes(folder):
    text = Data(train=lines_of(folder), length=24, batch_size=7)
    for message, settings in {
        "batch_size=7 must divide into updates=2 x accumulation=1": {
            "pretraining": text,
            "updates": 2,
        },
        "pretraining.length=64 is more than model.max_length=48": {
            "pretraining": replace(text, length=64),
            "model": MODEL,
        },
        "value_warmup=3: advantage=gae alone has a critic": {"value_warmup": 3},
        "value_network=ValueNetwork: advantage=gae alone": {
            "value_network": ValueNetwork(folder="judge")
        },
        "samples=1: advantage=group_relative compares": {"samples": 1},
        "gae_lambda=1.5": {"gae_lambda": 1.5},
    }.items():
        with pytest.raises(UserError, match=message):
            optimization(folder, "bad", **settings)
    with pytest.raises(UserError, match="the divergence would count twice"):
        optimization(folder, "bad", reward_kl=FixedKL(), objective=ClippedPolicy(kl=0.04))


@pytest.mark.slow
def test_nothing_is_compiled_after_the_second_step(folder, judge):
    """PPO with a critic of its own and text, on requests of two lengths: counted step by step."""
    asks = ("1?", "2?", "how much is thirty and three?", "and how much is forty and four?")
    (folder / "mixed.jsonl").write_text("\n".join(json.dumps({"prompt": ask}) for ask in asks))
    source = Requests(path=str(folder / "mixed.jsonl"), template=chat_template("bare"))
    counts = []

    class Counted(LowercaseShare):
        """Notes how much has been compiled whenever replies are scored."""

        def score(self, replies):
            counts.append((len(found), {len(reply.request) > 16 for reply in replies}))
            return super().score(replies)

    text = Data(
        train=lines_of(folder), held_out=0.0, length=24, batch_size=8, cache=str(folder / "cache")
    )
    job = optimization(
        folder,
        "count",
        steps=5,
        rewards=(config(Counted)(),),
        advantage="gae",
        value_network=ValueNetwork(folder=judge),
        pretraining=text,
    )
    asked = (Domain(name="asks", source=source),)
    with counted_compilations() as found:
        replace(job, data=replace(job.data, train=asked, held_out=0.0)).run()
    assert len(counts) == 5 and all(kinds == {False, True} for _, kinds in counts)
    assert counts[2] == counts[4]
