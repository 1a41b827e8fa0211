"""Updates of a policy beside those of TRL's GRPO trainer, where TRL 1.16.0 is installed.

    pip install -e .[parity] && python -m pytest -m slow tests/lmjax/jobs/test_trl_policy.py

Both begin with the same folder and are given the same replies, whose rewards, advantages and
log-probabilities each finds out by itself. Three updates by the replies of one step follow, without
momentum, so that the second and third have ratios beyond the clip.
"""

import json

import jax
import numpy as np
import pytest

from lmjax.alignment import AnswerMean, ClippedPolicy, FixedLengthMean, TokenMean, shared_rows
from lmjax.alignment.reward_functions import Reward
from lmjax.alignment.rollouts import row_multiple
from lmjax.config import config
from lmjax.data import Data, Domain, chat_template
from lmjax.data.chat.requests import Requests
from lmjax.generation.generator import Continuation, Generator
from lmjax.generation.sampling import Sampling
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs import policy_step
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.parallel import Mesh, training_layout
from lmjax.training.schedules import Constant
from tests.trl_cases import (
    NEEDS_TRL,
    PlainDescent,
    arguments,
    lines_of,
    tokenizer_of,
    write_llama,
)

pytestmark = NEEDS_TRL
UPDATES, SAMPLES, LONGEST = 3, 4, 12
TEMPERATURE = 0.7
CLIP, CLIP_HIGH = 0.2, 0.28
MESH = Mesh(fsdp=4, tensor=2)
# The last word says whether a reply has come to its end.
REPLIES = {
    "The list": [" of things|", " is sunny today", "|", " the answer is yes|"],
    "What is": [" it?|", " the weather in Paris?|", " 22 degrees", " no no no no|"],
}


def score(text):
    """What a reply is worth: the share of two letters in it, less a little for its length."""
    return sum(letter in "es" for letter in text) / (len(text) + 1) - 0.01 * len(text)


@config
class LetterShare(Reward):
    """The score of a text."""

    def score(self, replies):
        """See `Reward.score`."""
        return [score(reply.text) for reply in replies]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA as transformers writes it."""
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def written(folder):
    """Tokens of the replies to each prompt's tokens, and whether each has ended."""
    tokenizer, found = tokenizer_of(folder), {}
    for prompt, texts in REPLIES.items():
        tokens = [(tokenizer.encode(text.removesuffix("|")), text[-1] == "|") for text in texts]
        found[tuple(tokenizer.encode(prompt))] = tokens
    return found


def updates_of_trl(folder, output, written, name, beta, parts, rate):
    """Its trainer after the updates, with the log line of each."""
    import datasets
    import transformers
    import trl

    tokenizer = tokenizer_of(folder)

    class Scripted(trl.GRPOTrainer):
        """Writes the replies that are given."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            end = [tokenizer.eos_token_id]
            both = [written[tuple(tokens)] for tokens in prompt_ids[::SAMPLES]]
            return [tokens + end * ended for replies in both for tokens, ended in replies], None

    trainer = Scripted(
        model=transformers.LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: list(map(score, completions)),
        args=trl.GRPOConfig(
            loss_type=name,
            beta=beta,
            epsilon=CLIP,
            epsilon_high=CLIP_HIGH,
            scale_rewards=name != "dr_grpo",
            temperature=TEMPERATURE,
            use_bias_correction_kl=False,  # whose gradient is that of another divergence
            num_iterations=UPDATES,
            gradient_accumulation_steps=parts,
            num_generations=SAMPLES,
            max_completion_length=LONGEST,
            **arguments(output, UPDATES, rate, SAMPLES * len(REPLIES) // parts),
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in REPLIES]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(output / "after"))
    return lines_of(trainer)


def job_of(folder, output, average, beta, parts, rate):
    """One step of ours, of as many updates."""
    path = output / "requests.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in REPLIES))
    source = Requests(path=str(path), template=chat_template("bare"))
    fixed = isinstance(average, FixedLengthMean)  # Dr. GRPO, which has no deviation either
    losses = {"average": average, "kl": beta, "temperature": TEMPERATURE}
    return PolicyOptimization(
        output=str(output / "run"),
        steps=1,
        begin_with=str(folder),
        data=Data(
            train=(Domain(name="asks", source=source),),
            held_out=0.0,
            length=16,
            batch_size=len(REPLIES),
            rows="groups",
            cache=str(output / "cache"),
        ),
        rewards=(LetterShare(),),
        samples=SAMPLES,
        reply_length=LONGEST,
        sampling=Sampling(temperature=TEMPERATURE),
        advantage="group_centred" if fixed else "group_relative",
        epochs=UPDATES,
        accumulation=parts,
        objective=ClippedPolicy(clip=CLIP, clip_high=CLIP_HIGH, **losses),
        optimizer=PlainDescent(),
        schedule=Constant(peak=rate, warmup=0),
        gradient_clip=None,
        mesh=MESH,
    )


def updates_of_ours(job, written, share, monkeypatch):
    """Metrics of each update of the step."""

    class Scripted(Generator):
        """Writes the replies that are given."""

        def __init__(self, *_, **__):
            pass

        def continuations(self, prompts, sampling, length, stops, samples, *_):
            for prompt in prompts:
                assert len(written[tuple(prompt)]) == samples
                for tokens, ended in written[tuple(prompt)]:
                    stop = stops[0] if ended else None
                    yield Continuation(tokens, [0.0] * len(tokens), stop)

    def in_branches(batch, written, request, longest, layout, most):
        """Rows that share requests, also where they are no shorter."""
        return shared_rows.shared_rows(written, request, longest, row_multiple(layout))

    updates = []

    def kept(found):
        updates.extend(found)
        return mean_metrics(found)

    mean_metrics = policy_step.mean_metrics
    monkeypatch.setattr(policy_step, "Generator", Scripted)
    if share:
        monkeypatch.setattr(policy_step, "arrange", in_branches)
        monkeypatch.setattr(shared_rows, "MULTIPLE", 1)
    monkeypatch.setattr(policy_step, "mean_metrics", kept)
    job.run()
    return updates


# TRL's name of the loss: the average, the weight of the divergence, the parts that a batch is
# computed in, the learning rate.
CASES = {
    "grpo": (AnswerMean(), 0.2, 2, 0.03),
    "dr_grpo": (FixedLengthMean(length=LONGEST), 0.0, 2, 0.2),
    "dapo": (TokenMean(), 0.0, 2, 0.03),
    "bnpo": (TokenMean(), 0.2, 1, 0.03),  # which averages over each part by itself
}
SHARED = ("bnpo",)  # whose replies share their request in a row


@pytest.mark.parametrize("name", CASES)
def test_updates_are_those_of_trl(name, folder, written, tmp_path, monkeypatch):
    """Losses and gradients to 1e-5 of them, parameters to 1e-6: float32 in two programs."""
    average, beta, parts, rate = CASES[name]
    theirs = updates_of_trl(folder, tmp_path, written, name, beta, parts, rate)
    job = job_of(folder, tmp_path, average, beta, parts, rate)
    ours = updates_of_ours(job, written, name in SHARED, monkeypatch)
    names = {"loss": "loss", "gradient_norm": "grad_norm"}
    if parts == 1:  # of several, TRL has means of the parts' means
        names |= {"entropy": "entropy", "clip_fraction": "clip_ratio/region_mean"}
        names |= {"kl": "kl"} if beta else {}
    for left, right in zip(ours, theirs, strict=True):
        for own, other in names.items():
            assert left[own] == pytest.approx(right[other], rel=1e-5, abs=1e-6), own
    for left, right in zip(ours[1:], theirs[1:], strict=True):
        assert 0 < left["clip_fraction"] < 1 and 0 < right["clip_ratio/region_mean"] < 1
    with jax.set_mesh(MESH.build()):
        model, layout = model_folder(str(folder)), training_layout()
        before, after, found = (
            jax.device_get(read_params(str(path), model, layout))
            for path in (folder, tmp_path / "after", tmp_path / "run")
        )
    for old, new, own in zip(*map(jax.tree.leaves, (before, after, found)), strict=True):
        assert np.abs(new - old).max() > 1e-3
        np.testing.assert_allclose(own, new, rtol=0, atol=1e-6)
