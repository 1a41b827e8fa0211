"""metrics.jsonl: valid JSON whatever happens, each step once after a resume, copies elsewhere."""

import json
import math
import os
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.runs.metrics import NAME, MetricsWriter, read_metrics


def refuse(text):
    raise AssertionError(f"{text} is not JSON")


def test_one_line_a_record_there_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write({"step": 1, "split": "train", "loss": 2.5, "tokens": 64})
    # before the file is closed
    assert (tmp_path / "run" / NAME).read_text() == (
        '{"step": 1, "split": "train", "loss": 2.5, "tokens": 64}\n'
    )
    writer.close()
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write({"step": 2, "split": "wiki", "loss": np.float32(0.5), "mfu": None})
        writer.write({"step": 3, "split": "train", "loss": jnp.float32(0.25), "note": "ramp"})
    assert read_metrics(tmp_path / "run") == [
        {"step": 1, "split": "train", "loss": 2.5, "tokens": 64},
        {"step": 2, "split": "wiki", "loss": 0.5, "mfu": None},
        {"step": 3, "split": "train", "loss": 0.25, "note": "ramp"},
    ]
    assert read_metrics(tmp_path) == []


def test_infinity_and_nan_are_valid_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write({"step": 1, "loss": math.nan, "norm": np.float32("inf"), "low": -math.inf})
    line = (tmp_path / NAME).read_text()
    json.loads(line, parse_constant=refuse)
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["norm"] == math.inf and record["low"] == -math.inf


def test_a_resume_cuts_back_to_its_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.write({"step": step, "split": "train", "loss": 1 / step})
        writer.write({"step": 4, "split": "held-out", "loss": 9.0})
    path = tmp_path / NAME
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed here
    assert len(read_metrics(tmp_path)) == 8
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(4)
        assert path.read_text().splitlines() == [*before[:4], before[7]]
        writer.write({"step": 5, "split": "train", "loss": 0.2})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 4, 5]
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(0)
    assert path.read_text() == "" and [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1.0}', "3", ""])
def test_a_spoilt_line_is_told_with_its_number(tmp_path, line):
    (tmp_path / NAME).write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with MetricsWriter(tmp_path / "run", tensorboard=True, wandb={}) as writer:
        writer.write({"step": 1, "loss": 1.0})
        writer.truncate_after(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "module, settings, extra",
    [
        ("tensorboardX", {"tensorboard": True}, r"lmjax\[tensorboard\]"),
        ("wandb", {"wandb": {}}, r"lmjax\[wandb\]"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, settings, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=extra):
        MetricsWriter(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_copies_hold_the_numbers_by_split_and_step(tmp_path, monkeypatch):
    """What is handed over to Weights & Biases, by a stand-in for its module."""
    seen = []
    run = types.SimpleNamespace(
        define_metric=lambda *arguments, **keywords: None,
        log=seen.append,
        finish=lambda: seen.append("finished"),
    )
    started = {}
    monkeypatch.setitem(
        sys.modules,
        "wandb",
        types.SimpleNamespace(init=lambda **keywords: started.update(keywords) or run),
    )
    with MetricsWriter(tmp_path, wandb={"project": "p"}) as writer:
        writer.write({"step": 3, "split": "wiki", "loss": 1.5, "note": "x", "mfu": None})
    assert seen == [{"wiki/loss": 1.5, "step": 3}, "finished"]
    assert started["project"] == "p" and started["dir"] == str(tmp_path)


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 3, "split": "wiki", "loss": 1.5, "note": "x", "mfu": None})
        (file,) = (tmp_path / "tensorboard").iterdir()
        data, events = file.read_bytes(), []  # before it is closed
    while data:  # length, its check, the event, and its check
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    first, second = events
    assert first.file_version == "brain.Event:2" and second.step == 3
    assert [(v.tag, v.simple_value) for v in second.summary.value] == [("wiki/loss", 1.5)]


def test_a_disk_that_fills_up_under_the_copy_for_tensorboard_is_told(tmp_path, monkeypatch):
    """At once, and not when a queue is full and nobody takes from it any more."""
    record_writer = pytest.importorskip("tensorboardX.record_writer", reason="needs tensorboard")
    with monkeypatch.context() as patch:
        full = os.open("/dev/full", os.O_WRONLY)
        patch.setattr(record_writer, "open_file", lambda path: os.fdopen(full, "wb"))
        writer = MetricsWriter(tmp_path, tensorboard=True)
    for step in range(30):
        with pytest.raises(UserError, match=r"cannot write in .*tensorboard: No space left"):
            writer.write({"step": step, "split": "train", "loss": 1.5})
    with pytest.raises(UserError, match=r"cannot write in .*tensorboard: No space left"):
        writer.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(30))
