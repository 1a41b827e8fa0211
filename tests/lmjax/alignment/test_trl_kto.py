"""The loss of KTO beside TRL's trainer, where TRL 1.16.0 is installed.

    pip install -e .[parity] && python -m pytest -m slow tests/lmjax/alignment/test_trl_kto.py

Its trainer makes the first step on the same weights of policy and reference and the same tokens,
mismatched answers of the batch included.
"""

import jax
import numpy as np
import pytest

from lmjax.alignment import KTO, LabelledAnswers
from lmjax.data.spans import KINDS, RowSpans
from lmjax.interop import huggingface
from lmjax.models import abstract
from lmjax.parallel import training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from tests.lmjax.data.chat.chat_families import FAMILIES
from tests.lmjax.data.chat.chat_folders import write_folder
from tests.trl_cases import NEEDS_TRL, arguments, lines_of

LENGTH = 64
WEIGHTS = {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.5}
ANSWERS = [
    {"prompt": "The list", "completion": " is sunny today", "label": True},
    {"prompt": "What is", "completion": " the weather in Paris?", "label": False},
    {"prompt": "a", "completion": "bc", "label": True},
    {"prompt": "22 degrees", "completion": " in Paris, and no list", "label": False},
    {"prompt": "yes", "completion": " and no", "label": False},
]


pytestmark = NEEDS_TRL


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tiny GPT-2 as transformers writes them: the policy and the reference."""
    import torch
    import transformers

    found = []
    for seed, name in enumerate(("policy", "reference")):
        folder = tmp_path_factory.mktemp(name)
        write_folder(folder, FAMILIES["qwen"])
        torch.manual_seed(seed)
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id"), len(tokenizer) - 1)
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4,
            initializer_range=0.3, **none, **ends,
        )  # fmt: skip
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def trainer(folders, tmp_path_factory):
    """Its trainer after a step without a change."""
    import datasets
    import transformers
    import trl

    policy, reference = (transformers.GPT2LMHeadModel.from_pretrained(f) for f in folders)
    trainer = trl.KTOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.KTOConfig(
            train_sampling_strategy="sequential",
            **arguments(tmp_path_factory.mktemp("trl"), 1, 0.0, len(ANSWERS)),
            **WEIGHTS,
        ),
        train_dataset=datasets.Dataset.from_list(ANSWERS),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folders[0]),
    )
    trainer.train()
    return trainer


def example_of(lines, objective):
    """The tokens of its data set, as rows of a store with one answer each."""
    tokens, segments = np.zeros((2, len(lines), LENGTH), np.int32)
    spans = []
    for row, line in enumerate(lines):
        prompt, completion = line["prompt_ids"], line["completion_ids"]
        end = len(prompt) + len(completion)
        tokens[row, :end], segments[row, :end] = prompt + completion, 1
        spans.append((row, len(prompt), end, KINDS.index("assistant")))
    labels = np.array([[[0, 1 - line["label"], 0]] for line in lines], np.float32)
    spans = RowSpans(*(np.array(column) for column in zip(*spans, strict=True)))
    seeds = np.zeros(len(lines), np.uint64)
    return objective.prepare(tokens, segments, seeds, spans=spans, labels=labels)


def test_loss_gradient_and_divergence_are_those_of_trl(folders, trainer, one_device):
    """To 1e-5; the divergence is a small difference of sums of log-probabilities."""
    layout = training_layout()
    model, _, policy = huggingface.read(folders[0], layout)
    reference = huggingface.read(folders[1], layout)[2]
    names = {"beta": "beta", "desirable_weight": "desirable", "undesirable_weight": "undesirable"}
    loss = KTO(**{names[name]: value for name, value in WEIGHTS.items()})
    objective, graph = LabelledAnswers(preference=loss), abstract(model, layout)[0]
    rate = lambda step: 1e-3  # noqa: E731
    frozen = {"reference": graph}
    learner = Learner(model, objective, AdamW(), rate, layout, frozen=frozen)
    example = to_devices(example_of(trainer.train_dataset, objective), layout, model.vocab_size)
    state = learner.init(0, policy)
    _, found = jax.device_get(learner.compiled_step(state, example, {"reference": reference}))
    [logged] = lines_of(trainer)
    assert found["answers"] == len(ANSWERS)
    assert found["kl"] == pytest.approx(logged["kl"], abs=1e-4)
    assert found["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert logged["kl"] > 0.01
