"""Scores of replies by a reward model in a folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment import whiten
from lmjax.alignment.gated_reward import GatedReward
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_functions import Reply, total_rewards
from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TextHeadConfig,
    TransformerConfig,
    abstract,
    plain_batch,
)
from lmjax.parallel import Mesh, training_layout

LENGTH = 48
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    heads=(TextHeadConfig(name="reward", outputs=1, bias=False),),
    word_head=False,
    dropout=0.1,
)


class OtherTokenizer(ByteTokenizer):
    """Bytes under another name."""

    fingerprint = "other"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folder of a reward model."""
    folder = tmp_path_factory.mktemp("judge")
    records = [{"prompt": f"{n}", "chosen": "abc", "rejected": "ABC"} for n in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    RewardModel(
        output=str(folder / "run"),
        steps=1,
        model=MODEL,
        data=Data(
            train=(Domain(name="pairs", source=Comparisons(path=str(folder / "pairs.jsonl"))),),
            tokenizer=Bytes(),
            held_out=0.3,
            length=LENGTH,
            batch_size=8,
            rows="groups",
            cache=str(folder / "cache"),
        ),
        evaluation=ChatEvaluation(every=100),
    ).run()
    return str(folder / "run")


def texts(sizes):
    """Replies of random tokens."""
    generator = np.random.default_rng(0)
    return [Reply("", "", True, {}, generator.integers(1, 256, n).tolist()) for n in sizes]


def test_scores_are_those_of_each_text_alone_on_any_mesh(folder):
    """Whatever padding and neighbours; with dropout in the model. To float32's rounding."""
    replies = texts((3, 16, 17, LENGTH))
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout = training_layout()
        config = model_folder(folder)
        graph, params = abstract(config, layout)[0], read_params(folder, config, layout)

        @jax.jit
        def alone(params, batch):
            model = nnx.merge(graph, params)
            return model.outputs("reward", model(batch)[0], batch)[0, 0, 0]

        batches = [plain_batch(np.array([reply.tokens], np.int32)) for reply in replies]
        expected = [float(alone(params, batch)) for batch in batches]
    assert np.std(expected) > 0.01
    for mesh in (Mesh(fsdp=1), Mesh(data=2, fsdp=2, tensor=2)):
        devices = jax.devices()[: 8 if mesh.data == 2 else 1]
        with jax.set_mesh(mesh.build(devices)):
            reward = ModelReward(folder=folder, batch_size=4)
            score = reward.prepare(ByteTokenizer(), LENGTH, "policy")
            np.testing.assert_allclose(score(replies), expected, rtol=0, atol=1e-5)
            assert score(replies) == score(replies)


def test_it_is_a_reward_by_itself_too(folder, one_device):
    replies, reward = texts((5, 6)), ModelReward(folder=folder, weight=2.0)
    total, means = total_rewards((reward,), replies)
    np.testing.assert_allclose(total, 2 * np.array(reward.score(replies)))
    assert means.keys() == {"ModelReward"}


def test_the_gate_chooses_and_whitening_follows(monkeypatch):
    """In the order of LLaMA 2: the gate, the logit of a probability, whitening over the batch."""
    generator = np.random.default_rng(0)
    helpful, safety = 3 * generator.normal(size=(2, 40))
    helpful[0], safety[0] = 30.0, 2.0  # a log-odds that is limited
    tagged = generator.random(40) < 0.3
    replies = [Reply("", "", True, {"unsafe": bool(tag)}, []) for tag in tagged]
    found = {"helpful": helpful, "safety": safety}
    monkeypatch.setattr(ModelReward, "score", lambda self, _: found[self.folder].tolist())
    gate = GatedReward(
        helpful=ModelReward(folder="helpful"), safety=ModelReward(folder="safety"), tag="unsafe"
    )
    scores = np.asarray(gate.score(replies), np.float32)
    unsafe = 1 / (1 + np.exp(-safety)) < 0.15
    assert 0 < unsafe.sum() < 40 and 0 < tagged.sum() < 40
    chosen = np.where(tagged | unsafe, safety, helpful)
    np.testing.assert_allclose(scores[1:], chosen[1:], rtol=1e-6)
    probability = np.minimum(1 / (1 + np.exp(-chosen)), 1 - 1e-6)
    logit = np.log(probability / (1 - probability))
    white = whiten(jnp.asarray(scores), jnp.ones(40, bool))
    # The largest logit has been rounded to three digits.
    np.testing.assert_allclose(white, (logit - logit.mean()) / logit.std(), atol=5e-3)
    found["safety"] = np.full(40, np.nan)
    with pytest.raises(UserError, match="reward GatedReward gives nan"):
        total_rewards((gate,), replies)


def test_the_gate_refuses_what_it_cannot_read():
    judge = ModelReward(folder="judge")
    with pytest.raises(UserError, match=r"threshold=1.0: must be above 0"):
        GatedReward(helpful=judge, safety=judge, threshold=1.0)
    with pytest.raises(UserError, match="has unsafe='no', not true or false"):
        GatedReward(helpful=judge, safety=judge, tag="unsafe")._is_tagged(
            Reply("ask", "", True, {"unsafe": "no"}, [])
        )


def test_mistakes_name_both_folders(folder, one_device):
    reward = ModelReward(folder=folder)
    whose = f"{folder} and the policy in p/q"
    with pytest.raises(UserError, match=f"{whose} have different tokenizers"):
        reward.prepare(OtherTokenizer(), LENGTH, "p/q")
    with pytest.raises(UserError, match=f"{whose}: the one reads at most 48"):
        reward.prepare(ByteTokenizer(), LENGTH + 1, "p/q")
    with pytest.raises(UserError, match=f"{whose}: the one has no TextHead"):
        replace(reward, head="other").prepare(ByteTokenizer(), LENGTH, "p/q")
    with pytest.raises(UserError, match="batch_size=0"):
        replace(reward, batch_size=0)
