"""Log-probabilities of the reference: computed once, found again, and those of the model."""

import json
import pickle

import numpy as np
import pytest

from lmjax.alignment import reference_cache
from lmjax.alignment.comparison_rows import REFERENCE_LOG_PROB
from lmjax.config import UserError, replace
from lmjax.data import Data, Domain
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.store import TokenStore
from lmjax.jobs.preference_optimization import PreferenceOptimization
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.runs.metrics import read_metrics
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.base_run import go_on_from, prepare_alone, write_base

LENGTH = 24
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
    """A pretrained run, and comparisons, some of them longer than a slot."""
    folder = tmp_path_factory.mktemp("reference")
    write_base(folder, MODEL)
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdef"), random.integers(1, 20))) for _ in range(60)]
    lines = [{"prompt": f"{n}", "chosen": w, "rejected": w.upper()} for n, w in enumerate(words)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def job_of(folder, name, **settings):
    source = Comparisons(path=str(folder / "pairs.jsonl"))
    data = Data(
        train=(Domain(name="pairs", source=source),),
        held_out=0.3,
        length=LENGTH,
        batch_size=8,
        rows="groups",
        cache=str(folder / "cache"),
    )
    defaults = {
        "output": str(folder / name),
        "steps": 4,
        "begin_with": str(folder / "base"),
        "data": data,
        "schedule": Constant(peak=1e-2, warmup=0),
        "evaluation": ChatEvaluation(every=2),
        "checkpoint": Checkpoints(every=2),
    }
    return PreferenceOptimization(**(defaults | settings))


def losses(job):
    return [(m["split"], m["step"], m["loss"], m["margin"]) for m in read_metrics(job.output)]


@pytest.fixture
def scored(monkeypatch):
    """The stores that were scored, in turn."""
    found, score = [], reference_cache._Scorer.score

    def counted(self, store):
        found.append(store.manifest.split)
        return score(self, store)

    monkeypatch.setattr(reference_cache._Scorer, "score", counted)
    return found


def files(folder):
    return sorted((folder / "cache" / "reference").iterdir())


def test_losses_are_those_with_the_model_in_memory(folder, scored, capsys, monkeypatch):
    """To 1e-6: the same numbers of another program. Interrupted and again, they are found."""
    inside = job_of(folder, "memory", reference="in_memory")
    inside.run()
    assert not scored and inside.frozen_models()
    cached = job_of(folder, "cached")
    assert not cached.frozen_models()
    cached.run()
    assert scored == ["train", "held_out"] and "computed in" in capsys.readouterr().out
    one, other = losses(inside), losses(cached)
    assert [line[:2] for line in one] == [line[:2] for line in other]
    numbers = np.array([[line[2:] for line in run] for run in (one, other)])
    # Sums of 20 log-probabilities of about -6, times beta = 0.1, in float32.
    np.testing.assert_allclose(*numbers, rtol=0, atol=2e-6)
    assert len(files(folder)) == 2

    # A file that was cut short is made again, the other is found; it goes on with the same bits.
    whole = files(folder)[0].read_bytes()
    files(folder)[0].write_bytes(whole[:-8])
    go_on_from(cached, 2)
    assert len(scored) == 3 and files(folder)[0].read_bytes() == whole
    assert losses(cached) == other
    capsys.readouterr()
    prepare_alone(job_of(folder, "again"), monkeypatch)
    assert len(scored) == 3 and "reference   log-probabilities" in capsys.readouterr().out


def test_another_reference_or_length_has_other_files(folder, scored, monkeypatch):
    prepare_alone(job_of(folder, "first"), monkeypatch)
    before = len(files(folder))
    del scored[:]
    # That of a run that went on from there has other parameters.
    job = job_of(folder, "second", begin_with=str(folder / "memory"))
    prepare_alone(job, monkeypatch)
    assert len(scored) == 2 and len(files(folder)) == before + 2
    shorter = replace(job.data, length=LENGTH - 8)
    prepare_alone(replace(job, output=str(folder / "third"), data=shorter), monkeypatch)
    assert len(scored) == 4 and len(files(folder)) == before + 4


def test_workers_have_the_further_label(folder, monkeypatch):
    prepare_alone(job_of(folder, "workers"), monkeypatch)
    path = str(files(folder)[0])
    size = len(np.load(path))
    for manifest in (folder / "cache" / "tokens").rglob("manifest.json"):
        store = TokenStore(manifest.parent)
        if store.manifest.documents == size and store.labels.shape[1] == REFERENCE_LOG_PROB:
            break
    store = TokenStore(store.folder, path)
    assert store.labels.shape == (size, REFERENCE_LOG_PROB + 1)
    np.testing.assert_array_equal(store.labels[:, REFERENCE_LOG_PROB], np.load(path))
    sent = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(sent.labels, store.labels)


def test_a_reference_is_needed(folder):
    with pytest.raises(UserError, match="begin_with: give the folder of the reference"):
        job_of(folder, "mistake", begin_with=None, model=MODEL)
