"""What the tests that compare with TRL share: their marks, a tiny model, settings of trainers."""

import importlib.metadata

import optax
import pytest

from lmjax.config import config
from lmjax.training.optimizers import Optimizer
from tests.lmjax.data.chat.chat_families import FAMILIES
from tests.lmjax.data.chat.chat_folders import write_folder

VERSION = "1.16.0"  # that these tests are known to hold with


def _installed() -> str | None:
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        return None


NEEDS_TRL = [
    pytest.mark.slow,
    pytest.mark.skipif(
        _installed() != VERSION,
        reason=f"compares with trl {VERSION}, and has {_installed()}: pip install trl=={VERSION}",
    ),
]


@config
class PlainDescent(Optimizer):
    """Gradient descent without momentum."""

    def build(self, schedule, params):
        """See `Optimizer.build`."""
        return optax.sgd(schedule)


def write_llama(folder, kind="LlamaForCausalLM", **settings):
    """A tiny LLaMA of one of transformers' classes, as that saves it, with a tokenizer."""
    import torch
    import transformers

    write_folder(folder, FAMILIES["qwen"])
    torch.manual_seed(0)
    size = len(tokenizer_of(folder))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), size - 1)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, **ends | settings,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def tokenizer_of(folder):
    """The tokenizer of a folder, in transformers."""
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def arguments(output, updates, rate, rows):
    """Settings of its trainers for updates of plain descent by the same rows, each logged."""
    return {
        "output_dir": str(output),
        "max_steps": updates,
        "per_device_train_batch_size": rows,
        "optim": "sgd",
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }


def lines_of(trainer):
    """What a trainer has logged of each update."""
    return [line for line in trainer.state.log_history if "loss" in line]
