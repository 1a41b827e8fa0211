"""Mistakes in data and settings of alignment: one message, exit code 2, and nothing left behind."""

import json
import re

import pytest

from lmjax.alignment.model_reward import ModelReward
from lmjax.data import Data, Domain, LabelledTexts
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.conversations import Conversations
from lmjax.data.chat.requests import Requests
from lmjax.jobs.classify import Classify
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.preference_optimization import PreferenceOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import write_base

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=32,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
TALK = {"prompt": "1?", "completion": "2"}
PAIR = {"prompt": "1?", "chosen": "2", "rejected": "3"}
USER = {"role": "user", "content": "1?"}
TOOL = {"role": "tool", "content": "7"}
REPLY = {"role": "assistant", "content": "2"}
JOBS = {
    "sft": (Finetune, Conversations, {}),
    "reward": (RewardModel, Comparisons, {}),
    "dpo": (PreferenceOptimization, Comparisons, {}),
    "class": (Classify, LabelledTexts, {"labels": ("a", "b")}),
    "policy": (PolicyOptimization, Requests, {}),
}
# Of each mistake: job, line of its data, settings, and what is said. {base} is the run begun with.
CASES = {
    "empty conversation": (
        "sft",
        {"messages": []},
        [],
        r"data\.jsonl, line 1: the conversation is empty",
    ),
    "no such role": (
        "sft",
        {"messages": [USER, TOOL, REPLY]},
        [],
        r"data\.jsonl, line 1: .*no role 'observation'",
    ),
    "no assistant": (
        "sft",
        {"messages": [USER]},
        [],
        r"data\.jsonl, line 1: .*no message of an assistant",
    ),
    "answers cut off": (
        "sft",
        {"prompt": "x" * 60, "completion": "2"},
        ["data.long_documents=drop"],
        r"no document of .* fits into rows with room for \d+ tokens; .* or take longer rows",
    ),
    "one answer": (
        "reward",
        {"prompt": "1?", "answers": ["2"], "ranks": [0]},
        [],
        "texts: none of its comparisons says that an answer is better",
    ),
    "one sample": ("policy", TALK, ["samples=1"], "samples=1: advantage=group_relative compares"),
    "all ties": (
        "dpo",
        {"prompt": "1?", "answers": ["2", "3"], "ranks": [1, 1]},
        [],
        "texts: none of its comparisons says that an answer is better",
    ),
    "another tokenizer": (
        "policy",
        TALK,
        ["data.tokenizer=WithTokens(tokens=('<a>',))"],
        "the reward model in {base} and the policy in {base} have different tokenizers",
    ),
    "another reference": (
        "dpo",
        PAIR,
        ["model=model_folder:{base}", "model.hidden=32"],
        "the parameters in {base} do not fit the model",
    ),
    "no such layer": (
        "sft",
        TALK,
        ["model=model_folder:{base}", "model.lora=LoRA", "model.lora.layers=quary"],
        "lora.layers: 'quary' is for no dense layer of the blocks, which have attention.key",
    ),
    "no such label": (
        "class",
        {"text": "x", "label": "c"},
        [],
        r"data\.jsonl, line 1: field 'label' is 'c'; the labels are 'a', 'b'",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run."""
    folder = tmp_path_factory.mktemp("bad")
    write_base(folder, MODEL)
    return folder


def job_of(name, folder, tmp_path):
    """A job on one line of data."""
    kind, source, settings = JOBS[name]
    source = source(path=str(tmp_path / "data.jsonl"), **settings)
    further = {"steps": 1}
    if kind is PolicyOptimization:
        further |= {"rewards": (ModelReward(folder=str(folder / "base")),), "reply_length": 4}
        further["schedule"] = Constant(peak=1e-3, warmup=0)
    data = Data(
        train=(Domain(name="texts", source=source),),
        held_out=0.0,
        length=16 if further.get("rewards") else 32,
        batch_size=8,
        rows="whole_documents" if kind is Finetune else "groups",
        cache=str(tmp_path / "cache"),
    )
    base = str(folder / "base")
    return kind(output=str(tmp_path / "run"), begin_with=base, data=data, **further)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_message(case, folder, tmp_path, capsys):
    name, line, words, message = CASES[case]
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    *words, message = (one.replace("{base}", str(folder / "base")) for one in (*words, message))
    with pytest.raises(SystemExit) as ended:
        run(job_of(name, folder, tmp_path), words)
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(message, told) and "Traceback" not in told
    assert not (tmp_path / "run").exists()
