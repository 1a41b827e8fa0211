"""Distillation on the student's own replies."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment.rollouts import inputs_of, make_rows, sample_replies
from lmjax.config import UserError, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.data.chat.requests import Requests
from lmjax.data.permutation import random_bits
from lmjax.generation.generator import Generator
from lmjax.interop.folder import model_folder, read_params
from lmjax.jobs.own_replies import OnPolicyDistillation
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Distillation, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, abstract
from lmjax.objectives.divergences import ReverseKL
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.feed import RequestFeed
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from

STUDENT = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=40,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher, a student of other parameters, and requests."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "corpus.txt").write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    source = TextFiles(path=str(folder / "corpus.txt"))
    data = Data(
        train=(Domain(name="lines", source=source),),
        tokenizer=Bytes(),
        held_out=0.0,
        length=32,
        batch_size=8,
        cache=str(folder / "cache"),
    )
    for name, hidden, steps in (("teacher", 32, 25), ("student", 16, 1)):
        Pretrain(
            output=str(folder / name),
            steps=steps,
            model=replace(STUDENT, hidden=hidden),
            data=data,
            optimizer=AdamW(),
            schedule=Constant(peak=1e-2, warmup=0),
            evaluation=Evaluation(prompts=()),
        ).run()
    records = [{"prompt": f"line {n}"} for n in range(40)]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def job(folder, name, **settings):
    data = Data(
        train=(Domain(name="asks", source=Requests(path=str(folder / "requests.jsonl"))),),
        held_out=0.0,
        length=24,
        batch_size=4,
        rows="groups",
        cache=str(folder / "cache"),
    )
    teacher = Distillation(teacher=str(folder / "teacher"), weight=1.0, divergence=ReverseKL())
    defaults = {
        "output": str(folder / name),
        "steps": 8,
        "begin_with": str(folder / "student"),
        "distillation": teacher,
        "data": data,
        "samples": 2,
        "reply_length": 12,
        "optimizer": AdamW(),
        "schedule": Constant(peak=1e-2, warmup=0),
        "checkpoint": Checkpoints(every=4),
    }
    return OnPolicyDistillation(**(defaults | settings))


def divergences(job):
    lines = [line for line in read_metrics(job.output) if line["split"] == "train"]
    return [line["teacher_divergence"] for line in lines]


@pytest.fixture(scope="module")
def whole(folder):
    """A run of eight steps."""
    whole = job(folder, "whole")
    whole.run()
    return whole


def test_the_student_comes_nearer(whole):
    """On what it writes itself, step by step new."""
    found = divergences(whole)
    assert len(found) == 8
    assert np.mean(found[-2:]) < 0.85 * found[0]


def test_the_first_step_in_numpy(folder, whole):
    """KL(student || teacher) over the vocabulary, in the mean over the tokens of its replies."""
    log_probs = []
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        layout, resolved = training_layout(), whole.resolved()
        models = {}
        for name in ("student", "teacher"):
            config = model_folder(str(folder / name))
            models[name] = config, read_params(str(folder / name), config, layout)
        feed = first_feed(resolved, whole)
        requests = feed.requests(0)
        assert all("line " in request.text for request in requests)
        seed = random_bits(whole.seed, 1).item() % 2**31
        how = whole.sampling, whole.reply_length, seed, whole.samples
        generator = Generator(*models["student"])
        found = sample_replies(generator, feed.tokenizer, feed.template, requests, *how)
        batch, targets = inputs_of(make_rows(found, whole.length))
        for config, params in models.values():
            graph, _ = abstract(config, layout)

            @jax.jit
            def run(params, batch, graph=graph):
                model = nnx.merge(graph, params)
                return model.logits(model(batch)[0])

            logits = np.asarray(run(params, batch), np.float64)[..., :257]
            log_probs.append(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
    student, teacher = log_probs
    each = np.sum(np.exp(student) * (student - teacher), axis=-1)
    mean = np.sum(each * targets.weights) / targets.weights.sum()
    np.testing.assert_allclose(divergences(whole)[0], mean, rtol=1e-4)


def first_feed(job, run):
    """The requests of a run that is done."""
    feed = job.prepare(RunFolder(run.output), RunLog(make_console()), {})
    assert isinstance(feed, RequestFeed)
    return feed


def test_a_run_that_goes_on_ends_alike(whole):
    """After four of eight steps, bit for bit."""
    expected = divergences(whole)
    go_on_from(whole, 4)
    assert divergences(whole) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin_with": None}, "begin_with: give the folder of the student"),
        ({"distillation": Distillation(teacher="x")}, "set distillation.weight=1"),
        ({"samples": 0}, "samples=0: it must be at least 1"),
        ({"model": STUDENT, "reply_length": 20}, "more than model's max_length=40"),
    ],
)
def test_settings_that_do_not_fit(folder, settings, message):
    with pytest.raises(UserError, match=message):
        job(folder, "x", **settings)
