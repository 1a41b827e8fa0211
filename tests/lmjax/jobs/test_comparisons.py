"""Jobs on compared answers: a reward model, and a policy that learns without one."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lmjax.alignment import DPO, ORPO, LabelledAnswers, SimPO
from lmjax.alignment.comparison_accuracy import length_accuracy
from lmjax.alignment.preference_objective import PreferencePairs
from lmjax.alignment.reward_ranking import RewardRanking
from lmjax.config import UserError, replace
from lmjax.data import DamagedTexts, Data, Domain, TextFiles, build_stores
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.interop.folder import load_trained_model
from lmjax.jobs.preference_optimization import PreferenceOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import (
    AttentionConfig,
    FeedForwardConfig,
    LoRA,
    TextHeadConfig,
    TransformerConfig,
    plain_batch,
)
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.learner import Learner
from lmjax.training.optimizers import AdamW
from lmjax.training.placement import to_devices
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from, prepare_alone, trace_step, write_base

LENGTH = 32
MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=LENGTH,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
    dropout=0.1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, and comparisons in which small letters win."""
    folder = tmp_path_factory.mktemp("comparisons")
    write_base(folder, MODEL)
    generator = np.random.default_rng(0)
    records = []
    for n in range(120):
        word = "".join(generator.choice(list("abcdef"), 4))
        records.append({"prompt": f"{n}", "chosen": word, "rejected": word.upper()})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def job_of(kind, folder, name, **settings):
    source = Comparisons(path=str(folder / "pairs.jsonl"))
    data = Data(
        train=(Domain(name="pairs", source=source),),
        held_out=0.3,
        length=LENGTH,
        batch_size=16,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 8,
        "begin_with": str(folder / "base"),
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=4),
        "checkpoint": Checkpoints(every=4),
    }
    return kind(**(defaults | settings))


def numbers(job):
    return [(m["split"], m["step"], m["loss"], m["accuracy"]) for m in read_metrics(job.output)]


KINDS = {"reward": RewardModel, "preferences": PreferenceOptimization}


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_which_answer_is_better_and_goes_on_bit_for_bit(name, folder, capsys):
    whole = job_of(KINDS[name], folder, f"{name}-whole")
    whole.run()
    told = capsys.readouterr().out
    assert "model.heads" not in told
    assert ("the head reward" in told) == (name == "reward")
    found = numbers(whole)
    *_, (split, step, loss, accuracy) = found
    assert (split, step) == ("held_out/pairs", 8)
    assert accuracy > 0.8
    assert loss < math.log(2)
    table, *further = RunFolder(whole.output).results()["tables"]
    titles = ["Calibration", "Length"] if name == "reward" else []
    assert [one["title"] for one in further] == titles
    for one in further:  # the scores of the report are those of the metrics
        assert one["rows"][-1][3] == pytest.approx(accuracy) or one["title"] == "Length"
    [(title, by_length, model, error)] = table["rows"]
    count = int(title.removeprefix("pairs, "))
    first, held_out = (
        next(m for m in read_metrics(whole.output) if m["split"] == split)
        for split in ("train", "held_out/pairs")
    )
    assert held_out["comparisons"] == count
    assert first["comparisons"] == 16
    # Tokens are those that are read, without the padding of 16 pairs of rows.
    assert 16 * 2 * 8 < first["tokens"] < 16 * 2 * LENGTH
    assert (by_length, model) == (0.5, accuracy)  # answers of one length
    assert error == pytest.approx(math.sqrt(model * (1 - model) / count))
    if name == "preferences":
        # DPO's before the first update, with dropout in the model: to float32's rounding of sums.
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    go_on_from(whole, 4)
    assert numbers(whole) == found


def test_a_reward_model_begins_with_another_one_and_its_head(folder, capsys):
    """First trained on text beside damaged text; a step without a change has its numbers."""
    texts = TextFiles(path=str(folder / "corpus.txt"), split="line")
    cheap = Domain(name="cheap", source=DamagedTexts(source=texts, words=8))
    first = job_of(RewardModel, folder, "cheap", steps=2)
    first = replace(first, data=replace(first.data, train=(cheap,)))
    first.run()
    assert "afresh" in capsys.readouterr().out
    begun = {"begin_with": first.output, "schedule": Constant(peak=1e-9, warmup=0), "steps": 1}
    job_of(RewardModel, folder, "people", **begun).run()
    assert "afresh" not in capsys.readouterr().out
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        before, after = (
            load_trained_model(folder / name, training_layout()).params["heads"]["reward"]
            for name in ("cheap", "people")
        )
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("loss", [SimPO(), ORPO()])
def test_losses_without_a_reference_need_none(loss, folder):
    """A step is traced that reads no other model."""
    job = job_of(PreferenceOptimization, folder, type(loss).__name__, steps=1)
    job = replace(job, objective=PreferencePairs(preference=loss))
    assert job.frozen_models() == {}
    _, metrics = trace_step(job)
    assert metrics["loss"].shape == ()


def test_the_reward_model_has_one_number_in_place_of_words(folder):
    """Also where a model is given, as one with adapters is; the head that one has stays."""
    job, adapted = job_of(RewardModel, folder, "head"), replace(MODEL, lora=LoRA())
    model = job.with_model().model
    assert not model.word_head
    assert [(head.name, head.outputs) for head in model.heads] == [("reward", 1)]
    found = replace(job, model=adapted).with_model().model
    assert found == replace(model, lora=LoRA())
    own = replace(found, heads=(replace(model.heads[0], bias=True),))
    assert replace(job, model=own).with_model().model == own


# ---- the objective -------------------------------------------------------------------------------

TOKENS = np.random.default_rng(1).integers(1, 256, (8, 4, LENGTH)).astype(np.int32)
SIZES = np.random.default_rng(2).choice((4, 11, LENGTH), (8, 4))  # few: each is compiled
RANKS = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [0, 1, np.nan, np.nan], [0, 0, 0, 0]] * 2)


def ranked(tokens=TOKENS, order=slice(None)):
    """An example of four answers to each of eight requests."""
    inside = np.arange(LENGTH) < SIZES[..., None]
    segments = np.where(inside & ~np.isnan(RANKS)[..., None], 1 + np.arange(4)[:, None], 0)
    labels = np.stack([np.arange(4) + 0 * RANKS, RANKS, 0 * RANKS + 0.5], axis=2)
    return RewardRanking(answers=4).prepare(
        np.where(inside, tokens, 0).reshape(8, -1)[order].astype(np.int32),
        segments.reshape(8, -1)[order].astype(np.int32),
        np.zeros(8, np.uint64),
        labels=labels[order].astype(np.float32),
    )


def reward_learner(**settings):
    head = TextHeadConfig(name="reward", outputs=1, bias=False)
    model = replace(MODEL, word_head=False, heads=(head,), dropout=0.0)
    objective = RewardRanking(answers=4)
    return Learner(model, objective, AdamW(), lambda step: 1e-2, training_layout(), **settings)


@functools.cache
def gradients(data=1, fsdp=1, tensor=1, microbatch=None):
    """Loss, weight and gradients on a mesh."""
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    devices = jax.devices()[: math.prod(shape.values())]
    with jax.set_mesh(Mesh(**shape).build(devices)):
        learner = reward_learner(microbatch=microbatch)
        state = learner.init(seed=0)
        example = to_devices(ranked(), learner.layout, 257)
        found, sums = jax.jit(learner.gradients)(state, example, state.key)
        return float(sums.loss), float(sums.weight), jax.device_get(found)


def test_all_pairs_of_a_request_are_those_of_a_loop(one_device):
    """Scores of single answers, without padding; ties are no pairs. To float32's rounding."""
    learner = reward_learner()
    state = learner.init(seed=0)

    @jax.jit
    def scored(params, batch):
        model = nnx.merge(learner.graph, params)
        return model.outputs("reward", model(batch)[0], batch)[0, 0, 0]

    def score(tokens):
        return float(scored(state.params, plain_batch(tokens[None].astype(np.int32))))

    total, weight = 0.0, 0
    for row in range(8):
        scores = [score(TOKENS[row, n, : SIZES[row, n]]) for n in range(4)]
        losses = [
            math.log1p(math.exp(-(scores[a] - scores[b] - 0.5)))
            for a in range(4)
            for b in range(4)
            if RANKS[row, a] < RANKS[row, b]
        ]
        total += np.mean(losses) if losses else 0.0
        weight += bool(losses)
    example = to_devices(ranked(), learner.layout, 257)
    sums = learner.compiled_evaluate(state.params, example)
    assert float(sums.weight) == weight == 6
    assert float(sums.loss) == pytest.approx(total, rel=1e-5)


def test_any_mesh_and_accumulation_gives_the_gradients_of_one_device():
    """To 1e-6 of the largest gradient: the same sums in another order."""
    one, other = gradients(), gradients(data=2, fsdp=2, tensor=2, microbatch=4)
    assert one[1] == other[1]
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[2]))
    for a, b in zip(jax.tree.leaves(one[2]), jax.tree.leaves(other[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * scale)


def test_length_alone(tmp_path):
    """Four pairs differ in rank: in two the better is longer, in one shorter, in one as long."""
    records = [
        {"prompt": "a", "answers": ["12345", "123", "123"], "ranks": [0, 1, 1]},
        {"prompt": "b", "chosen": "12", "rejected": "123456789"},
        {"prompt": "c", "chosen": "12", "rejected": "34"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    source = Comparisons(path=str(path))
    [store] = build_stores(source, ByteTokenizer(), tmp_path / "store").values()
    assert length_accuracy(store) == (2 + 0 + 0.5) / 4


def test_mistakes(folder):
    job = job_of(PreferenceOptimization, folder, "mistakes")
    for message, settings in {
        "PreferencePairs reads data.rows=groups": {
            "data": replace(job.data, rows="whole_documents")
        },
    }.items():
        with pytest.raises(UserError, match=message):
            replace(job, **settings)
    with pytest.raises(UserError, match="a pair has 2"):
        PreferencePairs(preference=DPO(), answers=3)
    two = replace(MODEL, heads=(TextHeadConfig(name="reward", outputs=2),))
    with pytest.raises(UserError, match="reads a TextHead with one output of the name 'reward'"):
        replace(job_of(RewardModel, folder, "mistakes"), model=two)


# ---- answers with labels -------------------------------------------------------------------------


def labelled_job(folder, name, answers, **settings):
    """A job of KTO: on single answers with labels, or on pairs."""
    job = job_of(PreferenceOptimization, folder, name, **settings)
    if answers == 1:
        pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        lines = [
            {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
            for number, pair in enumerate(pairs)
            for side in [("chosen", "rejected")[number % 2]]
        ]
        path = folder / "labels.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        domain = Domain(name="labels", source=Comparisons(path=str(path)))
        job = replace(job, data=replace(job.data, train=(domain,)))
    return replace(job, objective=LabelledAnswers(answers=answers))


@pytest.mark.parametrize("answers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_answers_with_labels_are_learnt_and_go_on_bit_for_bit(answers, folder, capsys):
    # Of pairs adapters learn, and the reference shares all but these.
    lora = LoRA(layers=("*",)) if answers == 2 else None
    model = {"model": replace(MODEL, lora=lora)}
    whole = labelled_job(folder, f"kto-{answers}", answers, **model)
    whole.run()
    told = capsys.readouterr().out
    assert ("not trained are held once" in " ".join(told.split())) == (answers == 2)
    assert "are wanted" in told and "are padding" not in told
    found = read_metrics(whole.output)
    first, *_, last = (m for m in found if m["split"].startswith("held_out"))
    assert last["reward"] > (0.1 if lora is None else 0.03) and last["loss"] < first["loss"]
    train = [m for m in found if m["split"] == "train"]
    assert train[0]["answers"] == 16 * answers
    # Policy and reference are one: sigmoid(0), and no divergence; to the rounding of sums.
    assert train[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert train[0]["kl"] == pytest.approx(0, abs=1e-5)
    go_on_from(whole, 4)
    names = ("split", "step", "loss", "reward", "kl")
    after = read_metrics(whole.output)
    before, after = ([[line[name] for name in names] for line in m] for m in (found, after))
    assert after == before


def test_slots_that_no_answer_fills_are_told_of(folder, capsys, monkeypatch):
    job = labelled_job(folder, "kto-padding", 1, steps=1)
    prepare_alone(replace(job, objective=LabelledAnswers(answers=2)), monkeypatch)
    assert "objective.answers=2, and no comparison has more than 1" in capsys.readouterr().out


def test_pairs_need_two_answers(folder):
    job = job_of(PreferenceOptimization, folder, "kto-mistake")
    with pytest.raises(UserError, match=r"set objective.answers=2"):
        replace(job, objective=LabelledAnswers()).run()
    for rows, parts in (1, 1), (16, 16):
        with pytest.raises(UserError, match=rf"accumulation={parts}: .* must have at least 2"):
            replace(
                job,
                objective=LabelledAnswers(answers=2),
                data=replace(job.data, batch_size=rows),
                accumulation=parts,
            )
