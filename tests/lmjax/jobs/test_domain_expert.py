"""An expert of a folder of texts: its runs, what they replay, and the report at their end."""

import json

import pytest

from lmjax.config import UserError, replace
from lmjax.jobs.domain_expert import DomainExpert
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.runs.folder import RunFolder
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import pretrain_base

MODEL = TransformerConfig(
    vocab_size=257,
    hidden=16,
    num_layers=1,
    max_length=96,
    attention=AttentionConfig(num_heads=4, head_dim=4),
    feed_forward=FeedForwardConfig(size=32),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a pretrained run, texts, and instructions."""
    folder = tmp_path_factory.mktemp("domain")
    pretrain_base(folder, MODEL, split="line", held_out=0.1)
    (folder / "manual" / "part").mkdir(parents=True)
    for name in ("manual/one.txt", "manual/part/two.md"):
        text = "\n\n".join(f"{name} says {n % 7} and {n}" for n in range(150))
        (folder / name).write_text(text)
    (folder / "manual" / "picture.png").write_bytes(b"\xff\xd8\xff\x00" * 40)
    records = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(160)]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def expert(folder, **settings):
    defaults = {
        "path": str(folder / "manual"),
        "output": str(folder / "expert"),
        "begin_with": str(folder / "base"),
        "instructions": str(folder / "talks.jsonl"),
        "steps": 4,
        "instruction_steps": 4,
        "instruction_schedule": Constant(peak=1e-2, warmup=0),
    }
    return DomainExpert(**(defaults | settings))


@pytest.mark.slow
def test_an_expert_of_a_folder(folder):
    job = expert(folder, tokens=2000)
    job.run()
    tables = {
        table["title"]: table for table in RunFolder(f"{job.output}/transfer").results()["tables"]
    }
    bits = tables["Bits per byte"]
    assert bits["columns"] == ["held-out set", "random", "base", "text", "chat"]
    assert [row[0] for row in bits["rows"]] == ["lines", "manual"]
    _, random, base, text, _ = bits["rows"][1]
    assert text < base < random
    [(name, _, _, before, chat)] = tables["Nats per predicted token"]["rows"]
    assert name == "instructions" and chat < before
    assert "Backward transfer" in RunFolder(job.output).report.read_text()
    gains = {row[0]: row[1:] for row in tables["Backward transfer"]["rows"]}
    assert gains["bits per byte"][1] == pytest.approx(random - base)
    steps = [m["step"] for m in read_metrics(f"{job.output}/text") if m["split"] == "train"]
    job.run()  # both runs have ended
    assert steps == [m["step"] for m in read_metrics(f"{job.output}/text") if m["split"] == "train"]


def test_a_share_of_old_text_is_replayed(folder):
    text, chat, transfer = expert(folder).chain().jobs
    weights = {domain.name: domain.weight for domain in text.data.train}
    assert weights == {"manual": 0.75, "lines": 0.25}
    assert text.data.train[0].source.split == "paragraph"  # of two files none can be held out
    assert text.schedule == RunFolder(folder / "base").experiment().schedule
    assert chat.begin_with == text.output
    assert transfer.runs == (str(folder / "base"), text.output, chat.output)
    assert chat.data.held_out == text.data.held_out
    alone = expert(folder, replay=0.0, schedule=Constant(peak=1e-4), split="file")
    alone = alone.chain().jobs[0]
    assert [domain.name for domain in alone.data.train] == ["manual"]
    assert (alone.schedule.peak, alone.data.train[0].source.split) == (1e-4, "file")


def test_what_an_expert_cannot_be_made_of(folder):
    with pytest.raises(UserError, match="Which texts"):
        expert(folder, path=None).run()
    with pytest.raises(UserError, match="is not a run folder"):
        expert(folder, begin_with=str(folder / "manual")).run()
    with pytest.raises(UserError, match=r"name=lines: .* has text of this name"):
        expert(folder, name="lines").run()
    with pytest.raises(UserError, match="no file matches"):
        expert(folder, path=str(folder / "none")).run()
    with pytest.raises(UserError, match=r"replay=1\.0"):
        replace(expert(folder), replay=1.0)
