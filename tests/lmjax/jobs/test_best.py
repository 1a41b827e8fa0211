"""The best checkpoint of a run, and its end without a better one."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import UserError, config, replace
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.evaluation.evaluator import Evaluator
from lmjax.interop.folder import read_params
from lmjax.jobs.best import BestCheckpoint, Selection
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh, training_layout
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.test_several_processes import pair, start

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=16,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)
SCORES = 1.0, 5.0, 4.0, 5.0, 3.0, 6.0


@config
class Scripted(Evaluator):
    """Gives numbers that are known beforehand."""

    every: int | None = 2
    scores: tuple[float, ...] = SCORES
    interrupted: str | None = None  # folder of a file that is made when Ctrl-C was sent

    def prepare(self, context):
        """See `Evaluator.prepare`."""

        def evaluate(step, params):
            if self.interrupted and step == 6 and not Path(self.interrupted).exists():
                Path(self.interrupted).touch()
                os.kill(os.getpid(), signal.SIGINT)
            return ({"split": "held_out/script", "score": self.scores[step // 2 - 1]},)

        return evaluate


def record(value, split="held_out/a"):
    return {"split": split, "loss": value, "tokens": 3}


def brute_force(values, higher, patience):
    """The index of the best of those that are looked at, and how many are."""
    for count in range(1, len(values) + 1):
        seen = [(-value if higher else value) for value in values[:count]]
        known = [value for value in seen if not np.isnan(value)]
        if not known:
            continue
        best = seen.index(min(known))
        if count - 1 - best >= patience:
            return best, count
    return best, count


@pytest.mark.parametrize("higher", [False, True])
def test_the_choice_is_that_of_a_loop_also_when_resumed_anywhere(higher):
    draw = np.random.default_rng(3)
    for _ in range(60):
        values = draw.integers(0, 5, 14).astype(float)  # few numbers: there are ties
        values[draw.random(14) < 0.15] = np.nan
        values[draw.integers(14)] = 2.0
        patience = int(draw.integers(1, 5))
        settings = BestCheckpoint(better="higher" if higher else "lower", patience=patience)
        selection = Selection(settings, {}, ())
        for step, value in enumerate(values):
            if draw.random() < 0.4:
                extra = json.loads(json.dumps(selection.extra))
                selection = Selection(settings, extra, range(14))
            is_best = selection.update(step, [record(value)])
            assert is_best == (selection.best is not None and selection.best.step == step)
            if selection.is_over:
                break
        best, count = brute_force(values, higher, patience)
        assert (selection.best.step, step + 1) == (best, count)
        assert selection.best.value == values[best]


def test_the_measure_is_the_mean_of_the_sets_or_of_one():
    records = [record(1.0), record(3.0, "held_out/b"), {"split": "train", "loss": 9.0}]
    assert BestCheckpoint().value_of(records) == 2.0
    assert BestCheckpoint(data="b").value_of(records) == 3.0
    assert BestCheckpoint().value_of(records[2:]) is None
    with pytest.raises(UserError, match="measure=bits_per_byte; there are a: loss; b: loss"):
        BestCheckpoint(measure="bits_per_byte").value_of(records)
    with pytest.raises(UserError, match="measure=loss data=c"):
        BestCheckpoint(data="c").value_of(records)


def test_a_choice_by_another_measure_or_of_a_lost_checkpoint_begins_anew():
    selection = Selection(BestCheckpoint(), {}, ())
    assert selection.update(4, [record(1.0)])
    assert Selection(BestCheckpoint(), selection.extra, (4,)).best == selection.best
    assert Selection(BestCheckpoint(), selection.extra, (5,)).best is None
    assert Selection(BestCheckpoint(data="a"), selection.extra, (4,)).best is None
    assert Selection(None, selection.extra, (4,)).extra == {}


def test_settings_that_choose_nothing_are_refused():
    with pytest.raises(UserError, match="with best"):
        BestCheckpoint(measure="accuracy")
    with pytest.raises(UserError, match="patience=0"):
        BestCheckpoint(patience=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    (folder / "corpus.txt").write_text("".join(f"{n} and {n * n}\n\n" for n in range(300)))
    return folder


def job_of(folder, name, **settings):
    source = TextFiles(path=str(folder / "corpus.txt"), split="paragraph")
    choice = BestCheckpoint(measure="score", data="script", better="higher", patience=3)
    defaults = {
        "output": str(folder / name),
        "steps": 20,
        "model": MODEL,
        "data": Data(
            train=(Domain(name="lines", source=source),),
            tokenizer=Bytes(),
            held_out=0.1,
            length=16,
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": Evaluation(every=100, prompts=()),
        "evaluators": (Scripted(),),
        "checkpoint": Checkpoints(every=3, keep=1, best=choice),
    }
    return Pretrain(**(defaults | settings))


@pytest.fixture(scope="module")
def early(folder):
    """A run whose scores are best after step 4, and again as good but not better after step 8."""
    job = job_of(folder, "early")
    job.run()
    return job


def lines(job):
    names = "step", "split", "loss", "score"
    return [[line.get(name) for name in names] for line in read_metrics(job.output)]


def params_in(folder):
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        return jax.device_get(read_params(folder, MODEL, training_layout()))


def test_the_run_ends_early_and_keeps_the_best(early, folder, capsys):
    assert Checkpointer(Path(early.output) / "checkpoints").steps() == [4, 10]
    trained = [line for line in lines(early) if line[1] == "train"]
    assert [line[0] for line in trained] == list(range(1, 11))
    [table] = [
        table
        for table in RunFolder(early.output).results()["tables"]
        if table["title"] == "Best checkpoint"
    ]
    assert table["rows"] == [["step 4", 5.0]]
    assert "Best checkpoint" in (Path(early.output) / "report.html").read_text("utf-8")
    before = lines(early)
    capsys.readouterr()
    early.run()
    assert "training ended early, 3 evaluations after the best one" in capsys.readouterr().out
    assert lines(early) == before


def test_the_best_parameters_are_those_of_a_run_of_so_many_steps(early, folder):
    """Bit for bit: the same programs on the same batches."""
    four = job_of(folder, "four", steps=4, checkpoint=Checkpoints(), evaluators=())
    four.run()
    best, alone = params_in(early.output), params_in(four.output)
    jax.tree.map(np.testing.assert_array_equal, best, alone)


def test_an_interrupted_run_keeps_its_count(early, folder):
    """It stops after step 7, one worse evaluation after the best one, and ends as the other."""
    marker = Scripted(interrupted=str(folder / "marker"))
    job = job_of(folder, "stopped", evaluators=(marker,))
    with pytest.raises(SystemExit):
        job.run()
    assert Checkpointer(Path(job.output) / "checkpoints").steps() == [4, 7]
    job.run()
    assert lines(job) == lines(early)
    jax.tree.map(np.testing.assert_array_equal, params_in(job.output), params_in(early.output))


def test_more_patience_goes_on_from_the_end(early, folder):
    further = job_of(folder, "early", steps=12)
    choice = replace(further.checkpoint.best, patience=4)
    further = replace(further, checkpoint=replace(further.checkpoint, best=choice))
    further.run()
    assert Checkpointer(Path(further.output) / "checkpoints").steps() == [12]
    assert lines(further)[-1][:2] == [12, "held_out/script"]


def test_a_measure_that_no_evaluator_gives_is_refused(folder):
    """In the first evaluation, with the measures that there are."""
    job = job_of(folder, "none", steps=1, evaluators=())
    with pytest.raises(UserError, match="measure=score data=script; there are lines: loss, bits"):
        job.run()


@pytest.mark.slow
def test_a_measure_that_the_first_process_lacks_ends_all(folder):
    """The others, which have one, neither go on nor wait for it."""

    def start_run(devices, **environment):
        words = {
            "output": folder / "two",
            "data.train.0.source.path": folder / "corpus.txt",
            "data.cache": folder / "cache-two",
        }
        settings = [f"{key}={value}" for key, value in words.items()]
        command = "tests.lmjax.jobs.best_experiment", *settings
        return start(*command, devices=devices, **environment)

    processes = pair(start_run)
    first, second = (process.communicate(timeout=300)[1] for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "no evaluation gives measure=score data=script; there are script: other" in first
    assert "the first process has ended; it says why" in second
    assert not any("Traceback" in text for text in (first, second))
    assert Checkpointer(folder / "two" / "checkpoints").steps() == []
