"""Every experiment's training step, traced on meshes that need no devices.

An experiment is a training job, a chain of jobs of which each training job is checked, or a job of
another kind, which has no step. No folder is read: the model in one that a job begins with is that
of the experiment or earlier job whose output it is, or of a public folder in `PUBLIC`.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from lmjax.alignment import value_network
from lmjax.alignment.value_network import ActorCriticLearner
from lmjax.config import replace
from lmjax.jobs import begin_with, teacher
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.training_job import TrainingJob
from lmjax.models import abstract, bert
from lmjax.objectives import Example
from lmjax.parallel import Mesh, training_layout

FOLDER = Path(__file__).parents[1] / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
MESHES = {
    "one device": (Mesh(), 1),
    "fsdp=4 tensor=2": (Mesh(fsdp=4, tensor=2), 8),
}
PUBLIC = {"models/bert-base-uncased": bert()}  # of folders, where jobs do not give the model
STEPS = 1000  # of a job whose data would say how many


def load(name):
    return importlib.import_module(f"experiments.{name}").experiment


# They differ from another experiment in the sizes of the models alone: their parameters are laid
# out, which finds sizes that do not divide, and their steps are not traced.
SIZES = {"instructgpt_1_3b", "instructgpt_6b", "llama2_chat_7b", "llama2_chat_13b", "llama_65b"}
# Their models and their kinds of jobs are those of others, if not together.
SLOW = {f"instructgpt_175b/{name}" for name in ("start", "sft", "sft_6b", "reward", "policy")}
SLOW |= {"vicuna_7b", "alpaca_7b", "chinese_llama_7b", "chinese_llama_7b_embeddings", "llama2_70b"}
SLOW |= {"llama2_chat_70b/helpful", "llama2_chat_70b/sft", "baichuan2_chat/reward", "skywork_13b"}
SLOW |= {"t5_translate", "glm_10b", "qwen_72b"}
SLOW |= {f"qwen_chat/{name}" for name in ("sft", "reward", "preference_pretrained", "policy")}
SLOW |= {"baichuan2_chat/policy", "llama2_chat_70b/safety", "lima_65b"}
SLOW |= {f"skills/width-{width}" for width in (32, 48, 64)}


def jobs_of(name):
    """The training jobs of an experiment by their outputs, as they are run."""
    experiment = load(name)
    jobs = experiment.resolved_jobs() if isinstance(experiment, Chain) else (experiment,)
    return {str(job.output): job for job in jobs if isinstance(job, TrainingJob)}


def is_among(output, names):
    """Returns whether a job or its experiment is among the names."""
    _, experiment, *_ = output.split("/")
    return experiment in names or output.removeprefix("runs/") in names


JOBS = {output: job for name in NAMES for output, job in jobs_of(name).items()}
UNEVEN = {"runs/skills/width-8", "runs/skills/width-24"}  # of one head and three, not cut in two
OUTPUTS = [
    pytest.param(output, marks=[pytest.mark.slow] if is_among(output, SLOW | SIZES) else [])
    for output in JOBS
    if output not in UNEVEN
]
TRACED = [param for param in OUTPUTS if not is_among(*param.values, SIZES)]
# Of those that run on one device, and of those that no larger mesh can cut.
ALONE = ["runs/quickstart", "runs/quickstart_glm", *sorted(UNEVEN)]
LARGE = "fsdp=4 tensor=2"  # the mesh with more to go wrong


def model_in(folder):
    """The model that a folder would have."""
    return PUBLIC[folder] if folder in PUBLIC else settled(str(folder)).model


@contextlib.contextmanager
def without_folders():
    """Models of folders come from `model_in`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin_with, "model_folder", model_in)
        patch.setattr(begin_with, "tokenizer_folder", Path)
        patch.setattr(value_network, "model_folder", model_in)
        patch.setattr(teacher, "model_folder", model_in)
        yield


@functools.cache
def settled(output):
    """A job with the settings that follow from folders, and steps in place of epochs."""
    job = JOBS[output]
    with without_folders():
        if not isinstance(job, Finetune):
            return job.resolved()
        job = job.with_model()
    return replace(job, steps=STEPS, epochs=None) if job.steps is None else job


def learners_of(job):
    """The learner of a job with its example, and that of a value network."""
    learner, example = job.learner(), job.abstract_example()
    if not isinstance(learner, ActorCriticLearner):
        return {"model": (learner, example)}
    replies = example
    if job.pretraining is not None:
        replies = Example(example.inputs[0], example.targets[0])
    targets = replies.targets
    values = dataclasses.replace(targets, values=targets.log_probs, returns=targets.log_probs)
    critic = learner.critic, Example(replies.inputs, values)
    return {"model": (learner.policy, example), "critic": critic}


def frozen_of(job):
    """Parameters of the models that the loss reads and that are not trained, as shapes."""
    models, layout = job.all_frozen_models(), training_layout(job.context)
    return {name: abstract(model.config, layout)[1] for name, model in models.items()} or None


@contextlib.contextmanager
def on_mesh(output, mesh):
    """Gives a job on a mesh, which is set."""
    mesh, devices = MESHES[mesh]
    with jax.sharding.use_abstract_mesh(mesh.abstract(devices)), without_folders():
        yield replace(settled(output), mesh=mesh)


def described(leaf):
    """Shape, type and place of an array; a traced scalar may come without a place."""
    spec = leaf.sharding.spec if leaf.ndim else PartitionSpec()
    return leaf.shape, leaf.dtype, spec


def test_there_are_experiments():
    assert {"quickstart", "debug", "shakespeare_char", "gpt2_124m", "llama_1b"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_command_and_hardware(name):
    words = importlib.import_module(f"experiments.{name}").__doc__
    assert f"python -m experiments.{name}" in words
    assert any(unit in words for unit in ("second", "minute", "hour", "day"))


@pytest.mark.parametrize("name", NAMES)
def test_has_the_output_that_it_is_called_by(name):
    assert load(name).output == f"runs/{name}"
    assert all(output.split("/")[:2] == ["runs", name] for output in jobs_of(name))


@pytest.mark.parametrize("output", JOBS)
def test_has_the_settings_that_all_share(output):
    job = settled(output)
    assert (job.steps > 0, job.seed) == (True, 0)


@pytest.mark.parametrize("output", TRACED)
def test_step_traces(output):
    check_step(output, LARGE)


@pytest.mark.parametrize("output", ALONE)
def test_step_traces_on_one_device(output):
    check_step(output, "one device")


def check_step(output, mesh):
    """A step gives back what it was given, lying where it lay: it can be donated and repeated."""
    with on_mesh(output, mesh) as job:
        for learner, example in learners_of(job).values():
            before = learner.abstract()
            after, metrics = jax.eval_shape(learner.step, before, example, frozen_of(job))
            assert jax.tree.structure(after) == jax.tree.structure(before)
            found = [[*map(described, jax.tree.leaves(state))] for state in (before, after)]
            assert found[1] == found[0]
            assert all(metric.shape == () for metric in metrics.values())
            assert {"loss", "gradient_norm", "learning_rate", "tokens"} <= metrics.keys()


@pytest.mark.parametrize("output", OUTPUTS)
def test_parameters_are_cut_over_the_mesh(output):
    with on_mesh(output, LARGE) as job:
        for learner, _ in learners_of(job).values():
            leaves = jax.tree.leaves(abstract(learner.model, learner.layout)[1])
            whole = sum(leaf.size for leaf in leaves)
            part = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
            # An eighth, and what norms and biases add that every device holds.
            assert whole / 8 <= part < whole / 5
