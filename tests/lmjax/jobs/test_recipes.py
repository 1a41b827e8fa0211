"""Recipes against what the papers print, typed here a second time and in the papers' units.

Rates are asked for at tokens, not at steps: the tests walk the batches that the plan gives.
"""

import importlib
import inspect
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax import models
from lmjax.config import UserError, from_json, replace, to_json
from lmjax.data import make_plan
from lmjax.jobs import recipes
from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import (
    baichuan2_recipe,
    bert_recipe,
    bloom_recipe,
    falcon_recipe,
    glm_recipe,
    gpt3_recipe,
    llama2_recipe,
    llama_recipe,
    opt_recipe,
    palm_recipe,
    qwen_recipe,
    skywork_recipe,
    t5_recipe,
)
from lmjax.objectives import glm_objective
from lmjax.parallel import Mesh
from lmjax.scaling.flops import count_parameters, training_flops_per_token
from lmjax.training.optimizers import AdamW

FLAGSHIPS = {
    "gpt3_175b": gpt3_recipe("175B"),
    "opt_175b": opt_recipe("175B"),
    "bloom_176b": bloom_recipe("176B"),
    "llama_65b": llama_recipe("65B"),
    "llama2_70b": llama2_recipe("70B"),
    "baichuan2_13b": baichuan2_recipe("13B"),
    "qwen_72b": qwen_recipe("72B"),
    "skywork_13b": skywork_recipe("13B"),
    "falcon_40b": falcon_recipe("40B"),
    "palm_540b": palm_recipe("540B"),
    "glm_10b": glm_recipe("10B"),
    "glm_130b": glm_recipe("130B"),
    "bert_base": bert_recipe("base"),
    "t5_base": t5_recipe("base"),
}
RECIPES = [name for name, _ in inspect.getmembers(recipes) if name.endswith("_recipe")]


class Course:
    """A recipe's run by tokens."""

    def __init__(self, recipe):
        self.recipe = recipe
        self.plan = make_plan(0, recipe.batch_size, recipe.ramp)
        experiment = recipe.experiment(text(1000, corpus=1), output="nowhere")
        self._rate = jax.jit(experiment.rate(recipe.steps))

    def tokens(self, steps):
        """Tokens that so many steps train on."""
        return self.plan.row0(steps) * self.recipe.length

    def step(self, tokens):
        """The 0-based step that trains on the token of this number."""
        low, high = 0, self.recipe.steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tokens(middle) < tokens else (low, middle)
        return low

    def rate(self, tokens):
        """The learning rate there."""
        return float(self._rate(self.step(tokens)))

    def batch(self, tokens):
        """Tokens of a batch there."""
        return self.plan.batch_size(self.step(tokens)) * self.recipe.length


# Batch in tokens as it is printed, and the peak in units of 1e-4. M is a million or 2^20.
GPT3 = [
    ("125M", 0.5e6, 6.0),
    ("350M", 0.5e6, 3.0),
    ("760M", 0.5e6, 2.5),
    ("1.3B", 1e6, 2.0),
    ("2.7B", 1e6, 1.6),
    ("6.7B", 2e6, 1.2),
    ("13B", 2e6, 1.0),
    ("175B", 3.2e6, 0.6),
]
OPT = [
    ("125M", 0.5e6, 6.0),
    ("350M", 0.5e6, 3.0),
    ("1.3B", 1e6, 2.0),
    ("2.7B", 1e6, 1.6),
    ("6.7B", 2e6, 1.2),
    ("13B", 4e6, 1.0),
    ("30B", 4e6, 1.0),
    ("66B", 2e6, 0.8),
    ("175B", 2e6, 1.2),
]


@pytest.mark.parametrize(("size", "batch", "peak"), GPT3)
def test_gpt3(size, batch, peak):
    course = Course(gpt3_recipe(size))
    peak = peak * 1e-4
    assert course.tokens(course.recipe.steps) == pytest.approx(300e9, rel=1e-4)
    assert course.batch(1) == 32 * 1024
    assert course.batch(12.01e9) == pytest.approx(batch, rel=0.06)
    sizes = [course.batch(tokens) for tokens in np.linspace(1, 12e9, 50)]
    assert sizes == sorted(sizes)
    # Half a step of the small batches, and a rounding of 375 M tokens to full ones: 1 %.
    assert course.rate(375e6 / 4) == pytest.approx(peak / 4, rel=0.01)
    assert course.rate(400e6) == pytest.approx(peak, rel=0.01)
    middle = (375e6 + 260e9) / 2
    assert course.rate(middle) == pytest.approx(0.55 * peak, rel=1e-3)
    # The batch was still growing a moment ago, and yet the rate is where the tokens put it.
    fall = (1 - math.cos(math.pi * (12e9 - 375e6) / (260e9 - 375e6))) / 2
    assert course.rate(12e9) == pytest.approx(peak * (1 - 0.9 * fall), rel=1e-4)
    for tokens in (260.1e9, 280e9, 300e9):
        assert course.rate(tokens) == pytest.approx(0.1 * peak, rel=1e-4)


@pytest.mark.parametrize(("size", "batch", "peak"), OPT)
def test_opt(size, batch, peak):
    course = Course(opt_recipe(size))
    peak = peak * 1e-4
    assert course.tokens(course.recipe.steps) == pytest.approx(300e9, rel=1e-4)
    assert course.batch(1) == course.batch(300e9) == pytest.approx(batch, rel=0.05)
    warmup = 2000 * 2**21 if size == "175B" else 375e6
    assert course.rate(warmup) == pytest.approx(peak, rel=0.01)
    assert course.rate(warmup / 2) == pytest.approx(peak / 2, rel=0.02)
    assert course.rate((warmup + 300e9) / 2) == pytest.approx(0.55 * peak, rel=1e-3)
    assert course.rate(300e9) == pytest.approx(0.1 * peak, rel=1e-3)
    assert course.recipe.gradient_clip == 1.0 and course.recipe.model.dropout == 0.1


@pytest.mark.parametrize(
    ("size", "rows", "peak", "last"),
    [
        ("560M", 256, 3e-4, 1e-5),
        ("1.1B", 256, 2.5e-4, 1e-5),
        ("1.7B", 512, 2e-4, 1e-5),
        ("3B", 512, 1.6e-4, 1e-5),
        ("7.1B", 512, 1.2e-4, 1e-5),
        ("176B", 2048, 6e-5, 6e-6),
    ],
)
def test_bloom(size, rows, peak, last):
    course = Course(bloom_recipe(size))
    samples = lambda number: number * 2048  # noqa: E731
    assert course.tokens(course.recipe.steps) == pytest.approx(samples(220e6), rel=1e-4)
    assert course.tokens(course.recipe.steps) == pytest.approx(450e9, rel=2e-3)
    # Megatron's ramp: 16 rows more after every 9,765,625 / ((rows - 192) / 16) samples.
    increments = (rows - 192) // 16
    for increment in range(increments + 1):
        begun = 9_765_625 * increment / increments
        assert course.batch(samples(begun + 2 * rows)) == samples(192 + 16 * increment)
    assert course.rate(samples(183_105)) == pytest.approx(peak, rel=0.01)
    assert course.rate(samples(200e6)) == pytest.approx(last, rel=1e-3)
    assert course.rate(samples(215e6)) == pytest.approx(last, rel=1e-3)
    fall = (1 - math.cos(math.pi * (9_765_625 - 183_105) / (200e6 - 183_105))) / 2
    there = peak - (peak - last) * fall
    assert course.rate(samples(9_765_625)) == pytest.approx(there, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "tokens", "peak", "epsilon"),
    [
        (llama_recipe("7B"), 1.0e12, 3e-4, None),
        (llama_recipe("13B"), 1.0e12, 3e-4, None),
        (llama_recipe("33B"), 1.4e12, 1.5e-4, None),
        (llama_recipe("65B"), 1.4e12, 1.5e-4, None),
        (llama2_recipe("7B"), 2.0e12, 3e-4, 1e-5),
        (llama2_recipe("13B"), 2.0e12, 3e-4, 1e-5),
        (llama2_recipe("70B"), 2.0e12, 1.5e-4, 1e-5),
        (baichuan2_recipe("7B"), 2.6e12, 2e-4, None),
        (baichuan2_recipe("13B"), 2.6e12, 1.5e-4, None),
        (qwen_recipe("1.8B"), 2.2e12, 3e-4, 1e-8),
        (qwen_recipe("7B"), 2.4e12, 3e-4, 1e-8),
        (qwen_recipe("14B"), 3.0e12, 3e-4, 1e-8),
        (qwen_recipe("72B"), 3.0e12, None, None),
    ],
)
def test_four_million_tokens_and_a_cosine_to_a_tenth(recipe, tokens, peak, epsilon):
    course = Course(recipe)
    assert course.tokens(recipe.steps) == pytest.approx(tokens, rel=1e-4)
    assert course.batch(1) == pytest.approx(4e6, rel=0.05)
    top = course.rate(2000 * course.batch(1))
    if peak is not None:
        assert top == pytest.approx(peak, rel=1e-6)
    assert course.rate(1) == pytest.approx(top / 2000, rel=1e-5)
    assert course.rate(tokens) == pytest.approx(top / 10, rel=1e-4)
    assert isinstance(recipe.optimizer, AdamW)
    assert (recipe.optimizer.b1, recipe.optimizer.b2) == (0.9, 0.95)
    assert recipe.optimizer.weight_decay == 0.1
    assert epsilon in (None, recipe.optimizer.epsilon)


def test_clipping_and_losses_of_their_own():
    clips = {name: recipe.gradient_clip for name, recipe in FLAGSHIPS.items()}
    assert clips.pop("baichuan2_13b") == 0.5
    assert clips.pop("t5_base") is None
    assert set(clips.values()) == {1.0}
    shrunk = {name: recipe.embedding_gradient for name, recipe in FLAGSHIPS.items()}
    assert shrunk.pop("glm_130b") == ((0, 0.1),)
    assert set(shrunk.values()) == {()}
    weights = {name: recipe.objective.regularisers() for name, recipe in FLAGSHIPS.items()}
    assert weights.pop("palm_540b") == weights.pop("falcon_40b") == (1e-4, 0.0, 0.0)
    assert weights.pop("baichuan2_13b") == (0.0, 2e-4, 0.0)
    assert set(weights.values()) == {(0.0, 0.0, 0.0)}


def test_skywork_and_its_second_stage():
    course = Course(skywork_recipe())
    assert course.batch(1) == pytest.approx(16e6, rel=0.05)
    assert course.rate(2000 * course.batch(1)) == pytest.approx(6e-4, rel=1e-6)
    for tokens in (2.001e12, 2.5e12, 3e12, 3.13e12):
        assert course.rate(tokens) == pytest.approx(6e-5, rel=1e-4)
    assert course.rate(1e12) > 3e-4
    data = importlib.import_module("experiments.skywork_13b").experiment.data
    assert data.train[-1].name == "stem" and data.train[-1].weight == 0
    shares = [stage.weights[-1] / sum(stage.weights) for stage in data.stages]
    assert shares[0] == pytest.approx(0.1) and shares[-1] == pytest.approx(0.4)
    edges = [*(stage.first_step for stage in data.stages), course.recipe.steps]
    assert course.tokens(edges[0]) == pytest.approx(3e12, rel=1e-4)
    assert course.tokens(edges[-1]) - course.tokens(edges[0]) == pytest.approx(130e9, rel=1e-3)
    assert np.average(shares, weights=np.diff(edges)) == pytest.approx(0.2, rel=1e-3)
    # What is not `stem` keeps its proportions: 49.8 % English of the first stage, and so on.
    for stage in data.stages:
        assert sum(stage.weights[:5]) / sum(stage.weights[:-1]) == pytest.approx(0.498)


def test_falcon():
    course = Course(falcon_recipe())
    assert course.tokens(course.recipe.steps) == pytest.approx(1e12, rel=1e-4)
    assert course.batch(99e9) < course.batch(100.1e9) == 1152 * 2048
    assert course.rate(4e9) == pytest.approx(1.85e-4, rel=1e-3)
    assert course.rate(2e9) == pytest.approx(1.85e-4 / 2, rel=1e-3)
    assert course.rate(1e12) == pytest.approx(1.85e-5, rel=1e-4)
    with pytest.raises(UserError, match="the sizes are 40B"):
        falcon_recipe("7B")


def test_palm():
    course = Course(palm_recipe("540B"))
    assert course.tokens(course.recipe.steps) == pytest.approx(780e9, rel=0.01)
    batches = [course.plan.batch_size(step) for step in (49_999, 50_000, 114_999, 115_000)]
    assert batches == [512, 1024, 1024, 2048]
    rate = course._rate
    for k in (1, 5000, 10_000):
        assert float(rate(k - 1)) == pytest.approx(1e-2)
    for k in (10_001, 50_001, 255_000):  # by steps, whatever the batch
        assert float(rate(k - 1)) == pytest.approx(1 / math.sqrt(k), rel=1e-5)
    assert course.recipe.model.dropout == 0
    for size in ("8B", "62B"):
        smaller = Course(palm_recipe(size))
        assert smaller.tokens(smaller.recipe.steps) == pytest.approx(780e9, rel=1e-4)


@pytest.mark.parametrize("name", FLAGSHIPS)
def test_a_flagship_is_its_recipe_and_fits_its_machine(name):
    """The mesh divides it, and the numbers of the docstring are those of the code."""
    module = importlib.import_module(f"experiments.{name}")
    experiment, words = module.experiment, " ".join(module.__doc__.split())
    recipe = FLAGSHIPS[name]
    assert (experiment.steps, experiment.schedule) == (recipe.steps, recipe.schedule)
    assert from_json(to_json(recipe)) == recipe
    mesh = experiment.mesh
    devices = mesh.data * mesh.fsdp * mesh.tensor
    with jax.sharding.use_abstract_mesh(mesh.abstract(devices)):
        state = experiment.learner().abstract()
        experiment.check_batches(0)
    # Gradients lie as the parameters do.
    held = sum(map(bytes_of, jax.tree.leaves((state.params, state.params, state.optimizer))))
    rows = experiment.microbatch // (mesh.data * mesh.fsdp)
    model, length = experiment.model, experiment.data.length
    # Where windows take turns, as GPT-3's, two layers are scanned as one.
    scanned = model.num_layers // len(set(model.windows))
    inputs = rows * length * model.hidden * scanned * 2
    tokens = experiment.data.plan(0).row0(experiment.steps) * length
    flops = tokens * training_flops_per_token(model, length)
    assert f"{count_parameters(model).total:,} parameters" in words
    assert f"{held / 1e9:.1f} GB on each of the {devices:,} devices" in words
    assert f"{rows} row{'s' if rows > 1 else ''} at a time {inputs / 1e9:.1f} GB" in words
    assert f"{experiment.steps:,} steps, {tokens / 1e9:,.0f} B tokens, {flops:.2e} FLOPs" in words
    share = float(re.search(r"(\d+) days at 45 % of their peak", words)[1])
    peak = 275e12 if "TPU v4" in words else 312e12
    assert share == round(flops / (devices * peak * 0.45) / 86_400)
    assert held + inputs < (32 if "TPU v4" in words else 80) * 1e9 / 2


@pytest.mark.parametrize(("name", "shards"), [("gpt3_175b", 96), ("bloom_176b", 64)])
def test_more_devices_can_share_the_batch_when_it_has_grown(name, shards):
    module = importlib.import_module(f"experiments.{name}")
    words = " ".join(module.__doc__.split())
    grown = int(re.search(r"after step ([\d,]+),", words)[1].replace(",", ""))
    assert f"mesh.fsdp={shards} accumulation=16" in words
    mesh = Mesh(fsdp=shards, tensor=8)
    experiment = replace(module.experiment, mesh=mesh, accumulation=16)
    with jax.sharding.use_abstract_mesh(mesh.abstract(8 * shards)):
        experiment.learner()
        experiment.check_batches(grown)
        with pytest.raises(UserError, match="does not divide into parts"):
            experiment.check_batches(grown - 1)


def sizes_of(preset):
    """The sizes that a preset lists when it is asked for another one."""
    with pytest.raises(UserError) as error:
        preset("none of them")
    return str(error.value).split("the sizes are ")[1].split(", ")


def bytes_of(leaf):
    """Of an array on one device; counts lie whole on each."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def test_every_recipe_has_a_flagship():
    assert {name.split("_")[0] + "_recipe" for name in FLAGSHIPS} == set(RECIPES)
    folder = Path(__file__).parents[3] / "experiments"
    assert {path.stem for path in folder.glob("*.py")} >= set(FLAGSHIPS)


# Presets that go with a model of the same size: the models, and the sizes that have no such recipe
# because it is not published (lmjax/jobs/recipes.py says so).
PAIRS = {
    gpt3_recipe: ((models.gpt3,), set()),
    opt_recipe: ((models.opt,), set()),
    bloom_recipe: ((models.bloom,), set()),
    llama_recipe: ((models.llama,), set()),
    llama2_recipe: ((models.llama2,), set()),
    baichuan2_recipe: ((models.baichuan2,), set()),
    qwen_recipe: ((models.qwen,), set()),
    skywork_recipe: ((models.skywork,), set()),
    falcon_recipe: ((models.falcon,), {"7B"}),
    palm_recipe: ((models.palm,), set()),
    glm_recipe: ((models.glm, models.glm_130b), set(sizes_of(models.glm)) - {"10B"}),
    bert_recipe: ((models.bert,), set()),
    t5_recipe: ((models.t5,), set()),
    glm_objective: ((models.glm,), set()),
}


def test_recipes_and_objectives_know_the_sizes_of_their_models():
    """By the same names, so that one name gives a model and what it is trained to do."""
    assert {r.__name__ for r in PAIRS} - {"glm_objective"} == set(RECIPES)
    for preset, (families, unpublished) in PAIRS.items():
        sizes = {size for family in families for size in sizes_of(family)}
        assert set(sizes_of(preset)) == sizes - unpublished, preset
        for size in sizes_of(preset):
            preset(size)


def test_chinese_llama():
    """Cui et al. 2023: the shares of trained parameters are those of the paper's table."""
    stages = [
        importlib.import_module(f"experiments.{name}").experiment
        for name in ("chinese_llama_7b_embeddings", "chinese_llama_7b")
    ]
    assert [(s.steps, s.schedule.peak) for s in stages] == [(3000, 2e-4), (6000, 1e-4)]
    assert all((s.data.batch_size, s.data.length) == (1024, 512) for s in stages)
    assert all(s.model.vocab_size == 49_953 for s in stages)

    paths = jax.tree_util.tree_leaves_with_path

    def trained(stage):
        """Trained and all parameters, without the rows that fill up the vocabulary."""
        with jax.sharding.use_abstract_mesh(stage.mesh.abstract(stage.mesh.fsdp)):
            leaves = paths(stage.learner().abstract().params)
        padding = 2 * (stage.model.padded_vocab - 49_953) * 4096
        sizes = {".".join(key.key for key in path): leaf.size for path, leaf in leaves}
        chosen = [size for name, size in sizes.items() if stage.trained().trains(name)]
        return sum(chosen) - padding, sum(sizes.values()) - padding

    tables, whole = trained(stages[0])
    assert tables == 2 * 49_953 * 4096
    assert round(tables / 2 / whole, 4) == 0.0297  # of one table, which alone was trained there
    assert round(np.divide(*trained(stages[1])), 4) == 0.0606
