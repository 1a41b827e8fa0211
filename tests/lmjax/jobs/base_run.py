"""A pretrained run that the tests of other jobs begin with, and parts of what a run does."""

import contextlib
import functools
import shutil

import jax
import jax.numpy as jnp
import pytest

from lmjax.config import replace
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Evaluation
from lmjax.jobs.training_job import TrainingJob
from lmjax.jobs.training_run import TrainingRun
from lmjax.models import initialize
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RESULTS, RunFolder
from lmjax.training.schedules import Constant


def base_job(folder, model, split="file", held_out=0.0):
    """A job that trains `model` for one step on bytes of `folder`/corpus.txt, which is made."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {n} and {n * n}\n" for n in range(300)))
    return Pretrain(
        output=str(folder / "base"),
        steps=1,
        model=model,
        data=Data(
            train=(Domain(name="lines", source=TextFiles(path=str(corpus), split=split)),),
            tokenizer=Bytes(),
            held_out=held_out,
            length=min(32, model.max_length),
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=Evaluation(prompts=()),
    )


def pretrain_base(folder, model, **settings):
    """Trains `model` for one step, in `folder`/base; see `base_job`."""
    base_job(folder, model, **settings).run()


def write_base(folder, model):
    """What the run would leave, but for its measures, and with random parameters: compiles less."""
    job = base_job(folder, model)
    run = RunFolder(job.output)
    run.path.mkdir()
    run.write_config(job)
    ByteTokenizer().save(run.tokenizer)
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        _, params = initialize(model, training_layout(), jax.random.key(0))
        with Checkpointer(run.checkpoints) as checkpointer:
            tree = {"params": params, "average": None, "step": jnp.int32(1)}
            checkpointer.save(1, tree, {"tokenizer": ByteTokenizer().fingerprint})


def go_on_from(job, step):
    """Cuts a finished run back to a checkpoint, as a kill after it would, and ends it again."""
    folder = RunFolder(job.output)
    for later in Checkpointer(folder.checkpoints).steps():
        if later > step:
            shutil.rmtree(folder.checkpoints / str(later))
    (folder.path / RESULTS).unlink()
    assert Checkpointer(folder.checkpoints).latest() == step
    job.run()
    assert folder.results()["step"] == job.steps


@contextlib.contextmanager
def shared_learners():
    """Jobs that differ in their output alone have one learner, and compile its programs once.

    So has a job that goes on; `test_kill` begins processes anew.
    """
    with pytest.MonkeyPatch.context() as patch:
        for kind in (TrainingJob, PolicyOptimization):
            patch.setattr(kind, "learner", _remembered(kind.learner))
        yield


def _remembered(make):
    """Gives for equal jobs on equal meshes what `make` gave for the first of them."""
    known = {}

    @functools.wraps(make)
    def learner(job):
        key = replace(job, output="any"), jax.sharding.get_abstract_mesh()
        if key not in known:
            known[key] = make(job)
        return known[key]

    return learner


class Ready(Exception):
    """Ends a run that is ready to train."""


def prepare_alone(job, monkeypatch, before="begin_or_resume"):
    """Runs a job up to the place where its newest checkpoint is read: mistakes are known then.

    With before="train" its parameters are there too.
    """

    def ready(*arguments):
        raise Ready

    with monkeypatch.context() as patch, pytest.raises(Ready):
        patch.setattr(TrainingRun, before, ready)
        patch.setattr(TrainingRun, "compile_in_background", lambda self: None)
        job.run()


def trace_step(job):
    """Shapes after a step of a job, and of its metrics; nothing is compiled."""
    with jax.set_mesh(job.mesh.build()):
        job = job.resolved()
        learner = job.learner()
        return jax.eval_shape(learner.step, learner.abstract(), job.abstract_example())
