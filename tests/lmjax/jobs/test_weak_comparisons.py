"""Answers that a reward model compares, against a loop over single answers."""

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.config import UserError
from lmjax.data import Data, Domain, build_stores
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop.folder import load_trained_model
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.weak_comparisons import WeakComparisons
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    TransformerConfig,
    abstract,
    plain_batch,
)
from lmjax.parallel import Mesh, training_layout
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import write_base

LENGTH = 32
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
SETS = {
    "what?": ["abc", "ABC", "abC", "ABC"],  # the last one is there twice
    "and": ["fedcba", "F" * 40],  # of more tokens than the model reads
    "one": ["alone"],
    "é": ["e", "E", "Eé"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward model of comparisons in which small letters win, and answers to compare."""
    folder = tmp_path_factory.mktemp("weak")
    write_base(folder, MODEL)
    draw, lines = np.random.default_rng(0), []
    for n in range(120):
        word = "".join(draw.choice(list("abcdef"), 4))
        lines.append({"prompt": f"{n}", "chosen": word, "rejected": word.upper()})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = Comparisons(path=str(folder / "pairs.jsonl"))
    RewardModel(
        output=str(folder / "judge"),
        steps=8,
        begin_with=str(folder / "base"),
        data=Data(
            train=(Domain(name="pairs", source=source),),
            held_out=0.0,
            length=LENGTH,
            batch_size=16,
            rows="groups",
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
    ).run()
    lines = [{"prompt": prompt, "answers": answers} for prompt, answers in SETS.items()]
    (folder / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def job_of(folder, name, **settings):
    given = {"judge": str(folder / "judge"), "answers": str(folder / "answers.jsonl")} | settings
    return WeakComparisons(**given, output=str(folder / name))


def leads(folder, pairs):
    """Score of the first answer of each pair less that of the second, one answer at a time."""
    lines = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs]
    path = folder / "all.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    stores = build_stores(Comparisons(path=str(path)), ByteTokenizer(), folder / "store")
    store = stores["all"]
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        trained = load_trained_model(folder / "judge", training_layout())
        graph, _ = abstract(trained.config, training_layout())

        @jax.jit
        def scored(params, batch):
            model = nnx.merge(graph, params)
            return model.outputs("reward", model(batch)[0], batch)[0, 0, 0]

        scores = []
        for begin, end in itertools.pairwise(store.offsets):
            tokens = np.asarray(store.tokens[begin:end], np.int32)[-LENGTH:]
            scores.append(float(scored(trained.params, plain_batch(tokens[None]))))
    return np.array(scores[::2]) - np.array(scores[1::2])


def test_pairs_that_the_judge_is_sure_of_are_written(folder, capsys):
    """All of them, the better one first, as lines that are read as comparisons again."""
    pairs = [
        (prompt, *pair)
        for prompt, answers in SETS.items()
        for pair in itertools.combinations(dict.fromkeys(answers), 2)
    ]
    found = leads(folder, pairs)
    sure = 1 / (1 + np.exp(-np.abs(found)))
    least = float(np.sort(sure)[2:4].mean())  # three are below
    job_of(folder, "sure.jsonl", confidence=least, batch_size=3).run()
    assert f"{len(pairs) - 3} of {len(pairs)} pairs" in capsys.readouterr().out
    written = [json.loads(line) for line in (folder / "sure.jsonl").read_text().splitlines()]
    expected = [
        (prompt, *((a, b) if lead > 0 else (b, a)), pytest.approx(one, abs=2e-6))
        for (prompt, a, b), lead, one in zip(pairs, found, sure, strict=True)
        if one >= least
    ]
    read = [
        (line["prompt"][0]["content"], line["chosen"], line["rejected"], line["confidence"])
        for line in written
    ]
    assert sorted(read) == sorted(expected, key=lambda one: one[:3])
    documents = Comparisons(path=str(folder / "sure.jsonl")).documents()
    assert sum(1 for _ in documents) == 2 * len(written)


def test_mistakes(folder):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "answers": "b"}')
    (folder / "same.jsonl").write_text('{"prompt": "a", "answers": ["b", "b"]}')
    for message, settings in {
        "which reward model": {"judge": None},
        "confidence=0.4": {"confidence": 0.4},
        "no TextHead with one output": {"judge": str(folder / "base")},
        "request 1 should have 'answers'": {"answers": str(folder / "bad.jsonl")},
        "no prompt has two answers": {"answers": str(folder / "same.jsonl")},
    }.items():
        with pytest.raises(UserError, match=f"(?i){message}"):
            job_of(folder, "none.jsonl", **settings).run()
    assert not (folder / "none.jsonl").exists()
