"""The loss of supervised fine-tuning beside TRL's trainer, where TRL 1.16.0 is installed.

    pip install -e .[parity] && python -m pytest -m slow tests/lmjax/objectives/test_trl_sft.py

Both read the same folder and the same lines; TRL pads a conversation a row, we pack them.
"""

import json

import numpy as np
import pytest

from lmjax.data import Conversations, FolderTemplate, WholeDocuments, build_stores, chat_template
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.interop import huggingface
from lmjax.objectives import ChatLM
from lmjax.parallel import training_layout
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from tests.lmjax.data.chat.chat_families import FAMILIES
from tests.lmjax.data.chat.chat_folders import write_folder
from tests.trl_cases import NEEDS_TRL, arguments, lines_of

LENGTH = 127


pytestmark = NEEDS_TRL
# As the format's other templates, with the tags that TRL finds replies by.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPTS = [
    {"prompt": "The list", "completion": " is sunny today"},
    {"prompt": "What is", "completion": " the weather in Paris?"},
    {"prompt": "a", "completion": "bc"},
]
TALKS = [
    {
        "messages": [
            {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(talk)
        ]
    }
    for talk in (["Hello", "It is sunny."], ["a", "b c", "yes and no", "22 degrees\nin Paris"])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 as transformers writes it, with a chat template."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gpt2")
    write_folder(folder, FAMILIES["qwen"])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    vocab_size = read_tokenizer(folder).vocab_size
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), vocab_size - 1)
    none = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=32, n_layer=2, n_head=4, **none, **ends
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def step_of_trl(folder, output, records, **settings):
    """Loss and gradient norm of the first step of its trainer, over all records."""
    import datasets
    import transformers
    import trl

    trainer = trl.SFTTrainer(
        model=transformers.GPT2LMHeadModel.from_pretrained(folder),
        args=trl.SFTConfig(**arguments(output, 1, 0.0, len(records)), **settings),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(folder),
    )
    trainer.train()
    [line] = lines_of(trainer)
    return np.array([line["loss"], line["grad_norm"]])


def step_of_ours(folder, output, records, template, objective):
    """Loss and gradient norm over all records, in packed rows."""
    path = output / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source, tokenizer = Conversations(path=str(path), template=template), read_tokenizer(folder)
    rows = WholeDocuments(build_stores(source, tokenizer, output / "store")["all"], LENGTH + 1)
    assert rows.count == 1
    number = np.arange(1)
    tokens, segments = rows.read(number, number)
    seeds, spans = np.zeros(1, np.uint64), rows.spans(number, number)
    example = objective.prepare(tokens, segments, seeds, None, LENGTH, spans=spans)
    config, _, params = huggingface.read(folder, training_layout())
    learner = Learner(config, objective, AdamW(), lambda step: 0.0, training_layout())
    example = to_devices(example, learner.layout, config.vocab_size)
    _, found = learner.compiled_step(learner.init(0, params), example)
    return np.array([found["loss"], found["gradient_norm"]])


CASES = {
    "completions": (PROMPTS, chat_template("bare"), "assistant", {}),
    "messages": (TALKS, None, "assistant", {"assistant_only_loss": True}),
    "all of messages": (TALKS, None, "all", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_trl(name, folder, tmp_path, one_device):
    """To 1e-5: float32 in two programs."""
    records, template, loss_on, settings = CASES[name]
    theirs = step_of_trl(folder, tmp_path / "out", records, **settings)
    if loss_on == "all":
        # TRL divides by the first token of each row too, which nothing predicts
        # (findings/trl-sft-loss-divides-by-labels-of-first-tokens.sh).
        theirs *= 51 / 49
    template = template or FolderTemplate(path=str(folder))
    ours = step_of_ours(folder, tmp_path, records, template, ChatLM(loss_on=loss_on))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
