"""Policies and reward models trained on pairs of answers beside TRL's trainers, on real weights.

    pip install -e .[parity] && python -m pytest -m slow tests/lmjax/jobs/test_trl_pairs.py

Both read the same folder and the same lines, tokenize them and make three updates by all of them,
without momentum. The reference policy is the model before the first.
"""

import functools
import json

import jax
import numpy as np
import pytest

from lmjax.alignment import DPO, IPO, PreferencePairs
from lmjax.alignment.reward_ranking import RewardRanking
from lmjax.data import Data, Domain, chat_template
from lmjax.data.chat.comparisons import Comparisons
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs.preference_optimization import PreferenceOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.metrics import read_metrics
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
UPDATES = 3
MESH = Mesh(fsdp=4, tensor=2)
PAIRS = [
    {
        "prompt": "The list",
        "chosen": " of the things",
        "rejected": " is sunny today",
        "margin": 1.0,
    },
    {"prompt": "What is", "chosen": " the weather in Paris?", "rejected": " no", "margin": 0.5},
    {"prompt": "22 degrees", "chosen": " in Paris", "rejected": " and no list", "margin": 0.0},
    {"prompt": "yes", "chosen": " and no", "rejected": " the answer is", "margin": 1.0},
]
POLICY = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
REWARD = {"accuracy": "accuracy", "margin": "margin"}


def job_of(kind, folder, output, rate, **settings):
    """Three updates of ours, each by all pairs."""
    path = output / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, PAIRS)))
    source = Comparisons(path=str(path), template=chat_template("bare"))
    return kind(
        output=str(output / "run"),
        steps=UPDATES,
        begin_with=str(folder),
        data=Data(
            train=(Domain(name="pairs", source=source),),
            held_out=0.0,
            length=32,
            batch_size=len(PAIRS),
            rows="groups",
            cache=str(output / "cache"),
        ),
        optimizer=PlainDescent(),
        schedule=Constant(peak=rate, warmup=0),
        gradient_clip=None,
        mesh=MESH,
        **settings,
    )


def check(job, trainer, names):
    """Losses, gradients and metrics to 1e-5 of them, parameters to 1e-6: float32 in two programs.

    Args:
      job: ours, not run yet.
      trainer: TRL's, not run yet.
      names: our name of a metric -> TRL's.
    """
    import datasets

    after = f"{job.output}_theirs"
    trainer = trainer(train_dataset=datasets.Dataset.from_list(PAIRS))
    trainer.train()
    trainer.save_model(after)
    job.run()
    ours = [line for line in read_metrics(job.output) if line["split"] == "train"]
    names = {"loss": "loss", "gradient_norm": "grad_norm", **names}
    for left, right in zip(ours, lines_of(trainer), strict=True):
        for own, other in names.items():
            assert left[own] == pytest.approx(right[other], rel=1e-5, abs=1e-6), own
    with jax.set_mesh(MESH.build()):
        model, layout = model_folder(job.output), training_layout()
        before, theirs, found = (
            jax.device_get(read_params(path, model, layout))
            for path in (job.begin_with, after, job.output)
        )
    for old, new, own in zip(*map(jax.tree.leaves, (before, theirs, found)), strict=True):
        assert np.abs(new - old).max() > 1e-3
        np.testing.assert_allclose(own, new, rtol=0, atol=1e-6)


# TRL's name of the loss: ours, where the reference is, the learning rate.
POLICIES = {
    "sigmoid": (DPO(beta=0.3), "cached", 0.05),
    "ipo": (IPO(beta=0.3), "in_memory", 0.05),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, tmp_path):
    """Beyond the first update policy and reference differ."""
    import transformers
    import trl

    loss, reference, rate = POLICIES[name]
    folder = write_llama(tmp_path)
    given = arguments(tmp_path / "out", UPDATES, rate, len(PAIRS))
    trainer = functools.partial(
        trl.DPOTrainer,
        model=transformers.LlamaForCausalLM.from_pretrained(folder),
        args=trl.DPOConfig(loss_type=[name], beta=0.3, **given),
        processing_class=tokenizer_of(folder),
    )
    objective = PreferencePairs(preference=loss)
    settings = {"objective": objective, "reference": reference}
    job = job_of(PreferenceOptimization, folder, tmp_path, rate, **settings)
    check(job, trainer, POLICY if name == "sigmoid" else {})


def test_reward_models(tmp_path):
    """With margins, and with scores kept around 0.

    The score is that of the last token that is no padding, so that padding is another one.
    """
    import transformers
    import trl

    folder = write_llama(tmp_path, "LlamaForSequenceClassification", num_labels=1)
    tokenizer = tokenizer_of(folder)
    tokenizer.pad_token = "<|im_start|>"
    given = arguments(tmp_path / "out", UPDATES, 0.02, len(PAIRS))
    trainer = functools.partial(
        trl.RewardTrainer,
        model=transformers.LlamaForSequenceClassification.from_pretrained(folder),
        args=trl.RewardConfig(center_rewards_coefficient=0.05, **given),
        processing_class=tokenizer,
    )
    job = job_of(
        RewardModel,
        folder,
        tmp_path,
        0.02,
        model=model_folder(str(folder)),
        objective=RewardRanking(head="label", centring=0.05),
    )
    check(job, trainer, REWARD)
