"""Jobs with a teacher: it is learnt, resumed bit for bit, and refused where it does not fit."""

import json

import jax
import numpy as np
import pytest

from lmjax.config import UserError, replace
from lmjax.data import Bytes, Conversations, Data, Domain, TextFiles, TokenizerFolder, TrainedBPE
from lmjax.interop.folder import read_params
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, Distillation, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from, write_base

TEACHER = TransformerConfig(
    vocab_size=300,
    hidden=16,
    num_layers=2,
    max_length=32,
    attention=AttentionConfig(num_heads=2, head_dim=8),
    feed_forward=FeedForwardConfig(size=32),
)
STUDENT = replace(TEACHER, hidden=8, num_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher."""
    folder = tmp_path_factory.mktemp("distillation")
    write_base(folder, TEACHER)
    return folder


def student(folder, name, **settings):
    lines = TextFiles(path=str(folder / "corpus.txt"), split="line")
    data = Data(
        train=(Domain(name="lines", source=lines),),
        length=32,
        batch_size=8,
        held_out=0.1,
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 4,
        "model": STUDENT,
        "data": data,
        "distillation": Distillation(teacher=str(folder / "base"), weight=1.0),
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": Evaluation(every=4, prompts=()),
        "checkpoint": Checkpoints(every=2),
        "mesh": Mesh(fsdp=2, tensor=2, data=2),
    }
    return Pretrain(**(defaults | settings))


def params_of(folder, model=STUDENT):
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        return jax.device_get(read_params(folder, model, training_layout()))


def training(job):
    return [line for line in read_metrics(job.output) if line["split"] == "train"]


def test_a_student_learns_its_teacher_and_resumes_bit_for_bit(folder):
    """Its tokenizer is the teacher's; gone on after 20 steps it ends with the same bits."""
    before = params_of(folder / "base", TEACHER)
    whole = student(folder, "whole", steps=24)
    whole.run()
    with jax.set_mesh(whole.mesh.build()):
        assert whole.resolved().data.tokenizer == TokenizerFolder(
            path=str(folder / "base" / "tokenizer")
        )
    found = [line["teacher_divergence"] for line in training(whole)]
    assert found[-1] < 0.5 * found[0]
    expected = params_of(folder / "whole")
    go_on_from(whole, 20)
    jax.tree.map(np.testing.assert_array_equal, params_of(folder / "whole"), expected)
    jax.tree.map(np.testing.assert_array_equal, before, params_of(folder / "base", TEACHER))


def test_a_model_learns_to_reply_as_its_teacher(folder):
    """Finetune, of a model that is its own teacher: it says the same until it is trained."""
    talks = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(80)]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    source = Conversations(path=str(folder / "talks.jsonl"))
    job = Finetune(
        output=str(folder / "tuned"),
        begin_with=str(folder / "base"),
        steps=2,
        data=Data(
            train=(Domain(name="talks", source=source),),
            length=32,
            batch_size=8,
            rows="whole_documents",
            cache=str(folder / "cache"),
        ),
        distillation=Distillation(teacher=str(folder / "base")),
        schedule=Constant(peak=1e-3, warmup=0),
        evaluation=ChatEvaluation(prompts=()),
    )
    job.run()
    first, second = (line["teacher_divergence"] for line in training(job))
    assert abs(first) < 1e-6 < second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": replace(STUDENT, vocab_size=301)}, "300 tokens, the student one of 301"),
        ({"distillation": Distillation(teacher="/nowhere")}, r"distillation\.teacher: /nowhere"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(folder, settings, message):
    job = student(folder, "refused", **settings)
    with jax.set_mesh(job.mesh.build()), pytest.raises(UserError, match=message):
        job.learner()


def test_a_teacher_of_other_tokens_is_refused(folder):
    """Of as many tokens, which mean something else."""
    job = student(folder, "others")
    words = TrainedBPE(vocab_size=280, sample_bytes=5000)
    job = replace(job, data=replace(job.data, tokenizer=words))
    with pytest.raises(UserError, match="has another tokenizer than the text here"):
        job.run()


def test_a_text_that_the_teacher_cannot_read_is_refused(folder):
    job = student(folder, "long", model=replace(STUDENT, max_length=64))
    job = replace(job, data=replace(job.data, length=64, tokenizer=Bytes()))
    with (
        jax.set_mesh(job.mesh.build()),
        pytest.raises(UserError, match=r"reads at most 32 tokens; data\.length=64 is longer"),
    ):
        job.learner()
