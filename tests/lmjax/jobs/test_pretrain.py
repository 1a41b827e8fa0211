"""A whole run, small: its files, going on, changing what may change, and mistakes."""

import errno
import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.config import UserError, config, replace
from lmjax.data import Bytes, Data, Domain, TextFiles, TokenizerFolder, TrainedBPE
from lmjax.jobs import training_run
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.results import Results
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.models import ALiBi, AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import CausalLM
from lmjax.parallel import Mesh
from lmjax.runs import manifest
from lmjax.runs.checkpoints import Checkpointer
from lmjax.runs.folder import RunFolder
from lmjax.training.loop import Diverged
from lmjax.training.schedules import Constant, Cosine
from tests.lmjax.jobs.base_run import prepare_alone

STEPS = 8
TIMING = ("tokens_per_second", "mfu", "peak_memory")


def small(folder):
    """A run of seconds on lines of text, on all eight devices."""
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"line {n} of the text, and {n * n}\n" for n in range(400)))
    return Pretrain(
        output=str(folder / "run"),
        steps=STEPS,
        model=TransformerConfig(
            vocab_size=257,
            hidden=16,
            num_layers=1,
            max_length=32,
            attention=AttentionConfig(num_heads=4, head_dim=4),
            feed_forward=FeedForwardConfig(size=32),
            dropout=0.1,
        ),
        data=Data(
            train=(Domain(name="lines", source=TextFiles(path=str(corpus), split="line")),),
            tokenizer=Bytes(),
            held_out=0.2,
            length=32,
            batch_size=8,
            cache=str(folder / "cache"),
        ),
        schedule=Cosine(peak=1e-2, warmup=2),
        mesh=Mesh(fsdp=8),
        ema_decay=0.9,
        evaluation=Evaluation(every=4, prompts=("line 7", ""), sample_length=4),
        checkpoint=Checkpoints(every=3),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was left alone to its end; not to be changed."""
    experiment = small(tmp_path_factory.mktemp("finished"))
    experiment.run()
    return experiment


@pytest.fixture
def copied(finished, tmp_path):
    """The same run in a folder of its own."""
    shutil.copytree(finished.output, tmp_path / "run")
    return replace(finished, output=str(tmp_path / "run"))


@pytest.fixture
def fresh(finished, tmp_path):
    """The same run before its beginning."""
    return replace(finished, output=str(tmp_path / "run"))


def records(folder, timing=False):
    """The lines of metrics.jsonl, without what depends on the clock."""
    found = RunFolder(folder).metrics()
    return [
        {name: value for name, value in record.items() if timing or name not in TIMING}
        for record in found
    ]


def tables(folder, *titles):
    """Tables of a finished run."""
    found = {table.title: table for table in Results.from_json(folder.results()).tables}
    return [found[title] for title in titles]


def parameters(experiment):
    """All arrays of the newest checkpoint, as numpy."""
    with jax.set_mesh(experiment.mesh.build()):
        state, extra = Checkpointer(RunFolder(experiment.output).checkpoints).restore(
            None, experiment.learner().abstract()
        )
    state = jax.tree.map(np.asarray, (state.params, state.optimizer, state.average))
    return jax.tree.leaves(state), extra


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Sends a signal when the metrics of a training step are written."""

    class Writer(training_run.MetricsWriter):
        def write(self, record):
            super().write(record)
            if (record["step"], record["split"]) == (step, "train"):
                os.kill(os.getpid(), number)

    monkeypatch.setattr(training_run, "MetricsWriter", Writer)


def test_a_run_leaves_what_it_promises(finished):
    folder = RunFolder(finished.output)
    assert folder.experiment() == finished
    train = [record for record in records(folder.path, True) if record["split"] == "train"]
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    for field in ("loss", "gradient_norm", "learning_rate", "tokens", "peak_memory"):
        assert all(record[field] > 0 for record in train)
    assert all(record["mfu"] >= 0 for record in train if "tokens_per_second" in record)
    held_out = [record for record in records(folder.path) if record["split"] == "held_out/lines"]
    assert [record["step"] for record in held_out] == [4, 8]
    assert Checkpointer(folder.checkpoints).steps() == [3, 6, 8]
    assert (folder.tokenizer / "tokenizer.json").is_file()
    scores, samples = tables(folder, "Bits per byte", "Samples")
    assert scores.by_row()["lines"]["model"] == held_out[-1]["bits_per_byte"]
    assert [prompt for prompt, _ in samples.rows] == ["line 7", ""]
    assert "line 7" in folder.report.read_text("utf-8")


def test_checkpoints_say_what_made_them(finished):
    _, extra = parameters(finished)
    assert extra["experiment"] == json.loads(RunFolder(finished.output).config.read_text())
    assert extra["plan"]["seed"] == finished.seed
    assert extra["environment"]["devices"] == 8


def test_a_finished_run_says_so_and_changes_nothing(copied, capsys):
    before = records(copied.output, True)
    copied.run()
    assert records(copied.output, True) == before
    told = capsys.readouterr().out
    for words in ("all 8 steps were done before", "8 x cpu as fsdp=8", "report.html", "bigram"):
        assert words in told


def test_a_run_goes_on_to_the_same_bits(finished, fresh, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt_at(patch, 4)
        fresh.run()
    assert stopped.value.code == 128 + signal.SIGINT
    assert "the same command again" in capsys.readouterr().out
    fresh.run()
    assert "after step 5" in capsys.readouterr().out
    assert records(fresh.output) == records(finished.output)
    (left, left_extra), (right, right_extra) = parameters(fresh), parameters(finished)
    assert left_extra["step"] == right_extra["step"] == STEPS
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_run_goes_on_on_another_mesh(finished, copied, capsys):
    folder = RunFolder(copied.output)
    for step in (6, 8):
        shutil.rmtree(folder.checkpoints / str(step))
    (folder.path / "results.json").unlink()
    replace(copied, mesh=Mesh(fsdp=4, tensor=2), zero=2).run()
    told = capsys.readouterr().out
    assert "no longer bit for bit" in told
    assert "mesh.fsdp: 8 before, 4 now" in told
    for one, other in zip(records(copied.output), records(finished.output), strict=True):
        assert (one["step"], one["split"]) == (other["step"], other["split"])
        # Sums in another order, over few steps; all in float32.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_more_steps_where_the_schedule_allows(fresh):
    constant = replace(fresh, schedule=Constant(peak=1e-2, warmup=2), ema_decay=None)
    replace(constant, steps=4).run()
    further = replace(constant, steps=6)
    further.run()
    assert [record["step"] for record in records(fresh.output) if record["split"] == "train"] == [
        *range(1, 7)
    ]
    assert RunFolder(fresh.output).experiment() == further
    assert RunFolder(fresh.output).results()["step"] == 6


def test_more_steps_where_the_schedule_forbids(copied):
    with pytest.raises(UserError, match="8 steps were trained for a run of 8, and Cosine gives"):
        replace(copied, steps=12).run()
    assert RunFolder(copied.output).experiment().steps == 8


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(fresh):
    # Rates that overflow float32 within a few steps, without clipping or a warm-up.
    wild = replace(fresh, schedule=Constant(peak=1e30, warmup=0), gradient_clip=None)
    wild = replace(wild, checkpoint=Checkpoints(every=1))
    with pytest.raises(Diverged, match="last checkpoint is from before"):
        wild.run()
    bad = RunFolder(wild.output).metrics()[-1]
    assert not np.isfinite([bad["loss"], bad["gradient_norm"]]).all()
    assert Checkpointer(RunFolder(wild.output).checkpoints).latest() == bad["step"] - 1


def test_a_tokenizer_too_large_for_the_model_leaves_nothing(fresh):
    small = replace(fresh, model=replace(fresh.model, vocab_size=200))
    with pytest.raises(UserError, match=r"set model\.vocab_size=257"):
        small.run()
    assert not os.path.exists(small.output)


def test_a_missing_corpus_leaves_nothing(fresh):
    nowhere = Domain(name="lines", source=TextFiles(path="/nowhere/*.txt"))
    with pytest.raises(UserError, match="/nowhere/"):
        replace(fresh, data=replace(fresh.data, train=(nowhere,))).run()
    assert not os.path.exists(fresh.output)


def test_a_prompt_longer_than_the_context_is_found_before_training(fresh):
    long = replace(fresh, evaluation=Evaluation(prompts=("long " * 20,)))
    with pytest.raises(UserError, match="prompt"):
        long.run()
    assert not os.path.exists(fresh.output)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": Mesh(fsdp=3)}, "needs 3 devices"),
        ({"mesh": Mesh(tensor=8)}, "heads"),
        ({"mesh": Mesh(fsdp=4, tensor=2), "accumulation": 4}, "accumulation"),
    ],
)
def test_what_does_not_divide_is_said_before_anything_is_made(fresh, changes, words):
    with pytest.raises(UserError, match=words):
        replace(fresh, **changes).run()
    assert not os.path.exists(fresh.output)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"embedding_gradient": ((3, 0.1), (3, 1.0))}, r"must rise from 0 on, got \[3, 3\]"),
        ({"embedding_gradient": ((0, -0.1),)}, "a factor is 0 or more"),
        ({"accumulation": 3}, "no multiple of accumulation=3"),
    ],
)
def test_settings_that_cannot_be_meant(fresh, changes, words):
    with pytest.raises(UserError, match=words):
        replace(fresh, **changes)


def test_a_row_longer_than_the_model(fresh):
    with pytest.raises(UserError, match=r"data\.length=33 is longer than model\.max_length=32"):
        replace(fresh, data=replace(fresh.data, length=33))
    attention = replace(fresh.model.attention, positions=ALiBi())
    relative = replace(fresh.model, attention=attention, positions=None, max_length=None)
    assert replace(fresh, model=relative, data=replace(fresh.data, length=33)).data.length == 33


def test_a_model_without_a_head_of_words(fresh):
    with pytest.raises(UserError, match=r"no head that predicts words.*model\.word_head=true"):
        replace(fresh, model=replace(fresh.model, word_head=False))


def test_another_tokenizer_in_the_folder_is_refused(copied):
    folder = RunFolder(copied.output)
    (folder.path / "results.json").unlink()
    (folder.tokenizer / "tokenizer.json").write_text('{"kind": "characters", "characters": "ab"}')
    with pytest.raises(UserError, match="tokenizer"):
        copied.run()


@config
class IdsOutside(CausalLM):
    """An objective of one's own that makes ids which the model does not have."""

    where: str = "tokens"

    def prepare(self, tokens, segments, seeds, lexicon, length):
        """The last token of the first row is none."""
        example = CausalLM().prepare(tokens, segments, seeds)
        if segments.any():  # not where shapes are found out
            of = example.inputs if self.where == "tokens" else example.targets
            of.tokens[0, -1] = -1
        return example


@pytest.mark.parametrize("where", ["tokens", "targets"])
def test_batches_of_ids_that_the_model_lacks_are_not_trained_on(fresh, where):
    with pytest.raises(UserError, match=rf"{where}\[0, 31\] of the batch is -1; the model has the"):
        replace(fresh, objective=IdsOutside(where=where)).run()
    assert not os.path.exists(fresh.output)


def test_text_that_the_tokens_do_not_hold_has_no_bits_per_byte(fresh, tmp_path, capsys):
    """Said when the run begins, in the metrics, the results, the report, and at the end."""
    (tmp_path / "bert").mkdir()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "line", "of", "the", "text", "a"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = TokenizerFolder(path=str(tmp_path / "bert"))
    wordpiece = replace(fresh, steps=2, data=replace(fresh.data, tokenizer=tokenizer))
    wordpiece.run()
    told, *_ = capsys.readouterr().out.partition("held-out lines")
    assert "lines: 50 percent of the tokens are unknown ([UNK])" in told  # numbers, "," and "and"
    assert "data.tokenizer=TrainedBPE()" in told
    reason = "not comparable: 50 percent of the tokens are unknown"
    assert f"lines: bits per byte are withheld, as they are {reason}" in told
    folder = RunFolder(wordpiece.output)
    (record,) = [r for r in folder.metrics() if r["split"] == "held_out/lines"]
    assert "bits_per_byte" not in record and record["withheld"].startswith(reason)
    (scores,) = tables(folder, "Bits per byte")
    assert scores.by_row()["lines"].keys() == {"gzip -9", "byte bigram"}
    assert "lines, training text: 50 percent" in folder.report.read_text("utf-8")
    wordpiece.run()  # it is finished, and says the same
    assert "lines, held-out text: 50 percent" in capsys.readouterr().out


def unfinished(run):
    """The same run as if it had been stopped after step 3."""
    folder = RunFolder(run.output)
    for step in (6, 8):
        shutil.rmtree(folder.checkpoints / str(step))
    (folder.path / "results.json").unlink()
    return run


def moved(experiment, folder, change=lambda text: text):
    """The experiment on a copy of its text at another place."""
    domain = experiment.data.train[0]
    path = folder / "moved.txt"
    path.write_text(change(Path(domain.source.path).read_text()))
    train = (replace(domain, source=replace(domain.source, path=str(path))),)
    return replace(experiment, data=replace(experiment.data, train=train))


def assert_same(run, other):
    """Every line and every bit."""
    assert records(run.output) == records(other.output)
    for one, two in zip(parameters(run)[0], parameters(other)[0], strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_run_does_not_go_on_with_another_text(copied, tmp_path, capsys, monkeypatch):
    other = moved(unfinished(copied), tmp_path, lambda text: text.replace("line 7", "line 8"))
    with pytest.raises(UserError, match="another one than the run was trained on so far: lines"):
        other.run()
    assert Checkpointer(RunFolder(copied.output).checkpoints).steps() == [3]
    warned = replace(other, data=replace(other.data, on_change="warn"))
    prepare_alone(warned, monkeypatch)
    assert capsys.readouterr().out.count("the text is another one") == 1


def test_a_run_from_before_texts_were_compared_is_told_so(copied, capsys, monkeypatch):
    path = RunFolder(unfinished(copied).output).checkpoints / "3" / manifest.NAME
    body = json.loads(path.read_text())["body"]
    del body["extra"]["text"]
    text = json.dumps(body)
    path.write_text(f'{{"crc32": "{zlib.crc32(text.encode()):08x}", "body": {text}}}\n')
    prepare_alone(copied, monkeypatch)
    assert capsys.readouterr().out.count("does not say what text it was trained on") == 1


def test_a_save_that_fails_ends_the_run_and_the_last_one_goes_on(
    finished, fresh, tmp_path, monkeypatch
):
    """In the background, long before the next save would come to it; with its text elsewhere."""
    write = manifest.write

    def failing(folder, arrays, extra):
        if extra["step"] == 6:
            raise OSError(errno.EIO, "Input/output error", str(folder))
        write(folder, arrays, extra)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", failing)
        with pytest.raises(UserError, match=r"step 6 could not be written(.|\n)*complete: 3"):
            fresh.run()
    assert Checkpointer(RunFolder(fresh.output).checkpoints).steps() == [3]
    again = moved(fresh, tmp_path)
    again.run()
    assert_same(again, finished)
    assert RunFolder(again.output).experiment() == again
    text = parameters(again)[1]["text"]
    assert text.keys() == {"lines"} and text["lines"].keys() == {"source"}


def test_checkpoints_on_a_disk_that_is_not_mounted_are_not_begun_anew(copied):
    """An empty place would mean a run from step 0, and its metrics cut off."""
    folder = RunFolder(unfinished(copied).output)
    before = records(folder.path)
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.symlink_to("/mnt/not-mounted/checkpoints")
    with pytest.raises(UserError, match=r"is a link to /mnt/not-mounted/checkpoints, which is not"):
        copied.run()
    assert records(folder.path) == before


@pytest.mark.parametrize("name", ["output", "begin_with"])
def test_urls_that_nothing_serves_are_refused_before_anything_is_made(fresh, name):
    with pytest.raises(UserError, match=rf"{name}=nowhere://bucket/run: nowhere:// cannot be"):
        replace(fresh, **{name: "nowhere://bucket/run"})


def test_subword_tokens_count_the_same_bytes(fresh):
    bpe = replace(fresh, steps=2)
    bpe = replace(bpe, data=replace(bpe.data, tokenizer=TrainedBPE(vocab_size=300)))
    bpe = replace(bpe, model=replace(bpe.model, vocab_size=300))
    bpe.run()
    (scores,) = tables(RunFolder(bpe.output), "Bits per byte")
    rows = scores.by_row()["lines"]
    # An untrained model spends about log2(300) bits on each token, which stands for 1 to 8 bytes.
    assert np.log2(300) / 8 < rows["model"] < np.log2(300)
