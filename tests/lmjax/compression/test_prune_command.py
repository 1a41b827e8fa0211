"""The prune command: run folders in and out, training that goes on from them, and mistakes."""

import re
import sys

import jax
import numpy as np
import pytest

from lmjax.compression.__main__ import main
from lmjax.compression.prune import Prune
from lmjax.config import UserError, replace
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.interop.folder import load_trained_model, model_folder
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Evaluation
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.parallel import Mesh, generation_layout
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from lmjax.training.zeros import share_of_zeros
from tests.lmjax.jobs.base_run import write_base

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=2,
    max_length=32,
    attention=AttentionConfig(num_heads=8, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run."""
    folder = tmp_path_factory.mktemp("prune")
    write_base(folder, MODEL)
    return folder


def prune(folder, name, **settings):
    texts = {"calibration": str(folder / "corpus.txt"), "rows": 8, "length": 32}
    where = {"source": str(folder / "base"), "destination": str(folder / name)}
    Prune(**(texts | where | settings)).run()


def recover(folder, name, **settings):
    """Training that goes on from a folder, with its model."""
    pruned, recovered = str(folder / name), str(folder / f"{name}-recovered")
    lines = TextFiles(path=str(folder / "corpus.txt"), split="line")
    data = Data(
        train=(Domain(name="lines", source=lines),),
        tokenizer=Bytes(),
        length=32,
        batch_size=8,
        cache=str(folder / "cache"),
    )
    job = Pretrain(
        output=recovered,
        steps=12,
        model=model_folder(pruned),
        begin_with=pruned,
        data=data,
        schedule=Constant(peak=1e-2, warmup=0),
        evaluation=Evaluation(prompts=()),
        **settings,
    )
    job.run()
    losses = [line["loss"] for line in read_metrics(recovered) if line["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    return recovered


def zeros_of(folder):
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        trained = load_trained_model(folder, generation_layout())
        return trained, share_of_zeros(trained.params)


def test_a_sparse_model_recovers_with_its_zeros(folder, capsys):
    prune(folder, "sparse", method="sparsegpt", pattern="2:4")
    assert "50.0% of the weights of dense layers are zero" in capsys.readouterr().out
    sparse, share = zeros_of(folder / "sparse")
    assert (share, sparse.config) == (0.5, MODEL)
    assert sparse.tokenizer is not None
    trained, share = zeros_of(recover(folder, "sparse", keep_zeros=True))
    assert share == 0.5
    up = np.asarray(trained.params["blocks"]["feed_forward"]["up"]["weight"])
    assert (np.count_nonzero(up.reshape(2, 4, 4, 32), axis=2) == 2).all()


def test_a_smaller_model_recovers(folder, capsys):
    prune(folder, "small", layers=1, heads=4, width=16)
    out = capsys.readouterr().out
    assert re.search(r"layers \d are left out", out) and "4 of 8 heads of each layer stay" in out
    expected = replace(
        MODEL,
        num_layers=1,
        attention=replace(MODEL.attention, num_heads=4),
        feed_forward=replace(MODEL.feed_forward, size=16),
    )
    assert model_folder(str(folder / "small")) == expected
    trained, _ = zeros_of(recover(folder, "small"))
    assert trained.config == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.5, "method": "wanda"}, r"sparsity=1\.5: must be from 0 to 1"),
        ({"sparsity": 0.5}, "give method=magnitude, wanda or sparsegpt too"),
        ({"rows": 0}, "rows=0: must be 1 or more"),
        ({"damping": 0.0}, r"damping=0\.0: must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Prune(**settings)


def test_what_cannot_be_pruned_leaves_nothing(folder):
    with pytest.raises(UserError, match="layers=5: the model has 2, of which 1 to 2 can stay"):
        prune(folder, "nothing", layers=5)
    with pytest.raises(UserError, match="method=wanda needs texts: give calibration=FILE"):
        prune(folder, "nothing", method="wanda", calibration=None)
    assert not (folder / "nothing").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "Which folders"),
        (["prune", "a", "b"], "What is pruned\\? Give method=magnitude"),
        (["prune", "a", "b", "method=best"], "magnitude.*wanda.*sparsegpt"),
        (["prune", "a", "b", "method=magnitude", "sparsity=2"], "must be from 0 to 1"),
    ],
)
def test_mistakes_on_the_command_line(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["lmjax.compression", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
