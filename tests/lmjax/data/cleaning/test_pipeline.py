"""The pipeline: the same bytes with any number of workers and after any kill; damage is counted."""

import errno
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmjax.config import UserError, config
from lmjax.data import TFDS, CleanedDocuments, JsonLines, ParquetFiles, TextFiles
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.contamination import Decontaminate
from lmjax.data.cleaning.corpus_step import StoredArrays
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.formats import ArrayRecordOutput, JsonLinesOutput, ParquetOutput
from lmjax.data.cleaning.heuristics import GopherQuality
from lmjax.data.cleaning.ledger import Ledger, stricter
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.pipeline import CleaningPipeline, CleaningRecipe, flat
from lmjax.data.cleaning.shard_pass import Collection
from lmjax.data.cleaning.step import Step

SHARED = Path(__file__).parents[5] / "shared" / "data" / "gutenberg"
BOOKS = sorted(SHARED.glob("*.txt.gz"), key=lambda path: "-old" in path.name)  # newest first
QUESTION = "How many boxes of apples does the shop have at the end of a day of seven sales?"


def write_corpus(folder, files=12, documents=40):
    """Files of documents, with copies, nearly equal ones, leaks and short ones."""
    rng = random.Random(5)
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{n}" for n in range(3000)]
    before = []
    for number in range(files):
        lines = []
        for at in range(documents):
            text = "the shop and " + " ".join(rng.choices(words, k=rng.randrange(40, 160)))
            kind = rng.randrange(8)
            if kind == 0 and before:
                text = rng.choice(before).upper()
            elif kind == 1 and before:
                text = rng.choice(before) + " and more"
            elif kind == 2:
                text = f"{text} {QUESTION} {text}"
            elif kind == 3:
                text += f" write to user{at}@mail.example.org"
            before.append(text)
            lines.append(json.dumps({"text": text, "number": at}))
        (folder / f"{number:02}.jsonl").write_text("\n".join(lines))
    (folder / "test.txt").write_text(QUESTION)


def pipeline(corpus, output, written=None, steps=None, **options):
    """A pipeline with a step of each kind."""
    output.mkdir(parents=True, exist_ok=True)
    usual = (
        GopherQuality(least_stop_words=1, least_words=60, longest_mean=20, shortest_mean=1),
        ExactDuplicates(),
        NearDuplicates(minhash=MinHash(bands=20, rows=5), similarity=0.7),
        Decontaminate(tests=(TextFiles(path=str(corpus / "test.txt")),), most_documents=1000),
        PersonalData(),
    )
    names = {"first": ("0[0-2]",), "second": ("0[3-9]", "1*")}
    source = {
        name: JsonLines(path=tuple(f"{corpus}/{one}.jsonl" for one in some), metadata=("number",))
        for name, some in names.items()
    }
    collections = tuple(Collection(name=name, source=one) for name, one in source.items())
    written = written or JsonLinesOutput()
    return CleaningPipeline(
        collections, usual if steps is None else steps, written, output, **options
    )


def made(output):
    """The bytes of all files of an output but its summary, which has times."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The output of one process, and what it came to."""
    output = tmp_path_factory.mktemp("undisturbed")
    return output, pipeline(corpus, output).run()


def lines(path):
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def test_every_document_comes_out_or_is_listed(undisturbed, corpus):
    output, summary = undisturbed
    kept = [d.identity for d in CleanedDocuments(path=str(output)).documents()]
    dropped = [line["id"] for line in lines(output / "left_out.jsonl.gz")]
    assert len({*kept, *dropped}) == len(kept) + len(dropped) == 12 * 40
    total = summary.total()
    assert total.documents == len(kept) and total.skipped == 0
    steps = list(total.steps)
    assert steps == [
        "reading (first)",
        "reading (second)",
        "GopherQuality",
        "ExactDuplicates",
        "NearDuplicates",
        "Decontaminate",
        "PersonalData",
    ]
    for one, other in itertools.pairwise(steps[2:]):
        assert total.steps[one].kept == total.steps[other].documents
        assert total.steps[one].kept_size == total.steps[other].size
    for counts in total.steps.values():
        assert counts.documents == counts.kept + sum(counts.reasons.values())
    assert {"too few words"} == {*total.steps["GopherQuality"].reasons}
    assert all(total.steps[name].reasons for name in steps[3:5])
    assert summary.findings == len(lines(output / "findings.jsonl.gz")) > 20
    assert summary.pairs and all(pair["kept"] != pair["dropped"] for pair in summary.pairs)
    texts = [d.text for d in CleanedDocuments(path=str(output)).documents()]
    assert not any(QUESTION in text or "@mail" in text for text in texts)
    size = sum(len(text.encode()) for text in texts)
    assert total.size == total.steps["PersonalData"].kept_size == size


def test_the_earlier_collection_keeps_its_documents(undisturbed, corpus):
    """Of copies the one of the collection that is named first is kept, whatever the files are."""
    output, _ = undisturbed
    first = [d.identity for d in CleanedDocuments(path=str(output), collection="first").documents()]
    assert first and all("/00" in one or "/01" in one or "/02" in one for one in first)
    with pytest.raises(UserError, match=r"collection=third: .* has first, second"):
        CleanedDocuments(path=str(output), collection="third").parts()


def test_two_workers_give_the_same_bytes(undisturbed, corpus, tmp_path):
    pipeline(corpus, tmp_path).run(workers=2)
    assert made(tmp_path) == made(undisturbed[0])


SCRIPT = """
import pathlib, sys
from tests.lmjax.data.cleaning.test_pipeline import pipeline

if __name__ == "__main__":
    print("ready", flush=True)
    corpus, output, workers = sys.argv[1:]
    pipeline(pathlib.Path(corpus), pathlib.Path(output)).run(int(workers))
"""


def run_and_kill(script, corpus, output, workers, seconds):
    """Begins, or goes on, and is killed after some seconds; returns whether it had finished."""
    command = [sys.executable, str(script), str(corpus), str(output), str(workers)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stdout.close()
    return process.wait() == 0


@pytest.mark.parametrize(
    ("kills", "workers"), [(1, 0), pytest.param(30, 2, marks=pytest.mark.slow)]
)
def test_kills_at_random_moments_change_no_byte(undisturbed, corpus, tmp_path, kills, workers):
    script, rng = tmp_path / "script.py", random.Random(kills)
    script.write_text(SCRIPT)
    begin = time.perf_counter()
    pipeline(corpus, tmp_path / "timed").run()
    taken = time.perf_counter() - begin
    left, number = kills, 0
    while left:
        output = tmp_path / str(number)
        output.mkdir()
        number += 1
        while left and not run_and_kill(script, corpus, output, workers, rng.uniform(0, taken)):
            left -= 1
        assert run_and_kill(script, corpus, output, workers, None)
        assert made(output) == made(undisturbed[0])


def test_nothing_is_done_twice(corpus, undisturbed, tmp_path, monkeypatch):
    """A kill in the second pass: the first is not read again, nor decided again."""
    monkeypatch.setattr(ExactDuplicates, "apply", None)
    with pytest.raises(TypeError):
        pipeline(corpus, tmp_path).run()
    monkeypatch.undo()
    monkeypatch.setattr(JsonLines, "read", None)
    monkeypatch.setattr(ExactDuplicates, "decide", None)
    pipeline(corpus, tmp_path).run()
    assert made(tmp_path) == made(undisturbed[0])
    # A finished one is not even begun.
    monkeypatch.setattr(CleaningPipeline, "_shards", None)
    assert pipeline(corpus, tmp_path).run().findings == undisturbed[1].findings


def test_other_text_is_refused_while_work_goes_on(tmp_path, monkeypatch):
    write_corpus(tmp_path / "text", documents=10)
    monkeypatch.setattr(ExactDuplicates, "apply", None)
    with pytest.raises(TypeError):
        pipeline(tmp_path / "text", tmp_path / "out").run()
    monkeypatch.undo()
    with open(tmp_path / "text" / "01.jsonl", "a") as file:
        file.write('\n{"text": "more"}')
    with pytest.raises(UserError, match="unfinished work on other text"):
        pipeline(tmp_path / "text", tmp_path / "out").run()


@pytest.mark.parametrize("unit", ["documents", "nearly"])
def test_what_an_earlier_cleaning_has_kept_is_known(corpus, tmp_path, unit):
    """In two slices one after another the same is kept as at once."""

    def steps(*earlier):
        if unit == "documents":
            return (ExactDuplicates(earlier=earlier),)
        return (NearDuplicates(minhash=MinHash(bands=20, rows=5), earlier=earlier),)

    def slice_of(pattern, output, *earlier):
        collection = Collection(name="c", source=JsonLines(path=f"{corpus}/{pattern}.jsonl"))
        (tmp_path / output).mkdir()
        CleaningPipeline(
            (collection,), steps(*map(str, earlier)), JsonLinesOutput(), tmp_path / output
        ).run()
        found = CleanedDocuments(path=str(tmp_path / output)).documents()
        return {document.identity for document in found}

    whole = slice_of("*", "whole")
    first = slice_of("0[0-5]", "first")
    second = slice_of("*[!0-5]", "second", tmp_path / "first")
    third = slice_of("1[01]", "third", tmp_path / "first", tmp_path / "second")
    assert first | second | third == whole and first and second and third
    with pytest.raises(UserError, match="has no marks of"):
        slice_of("*", "none", tmp_path)


@pytest.mark.parametrize(
    "written",
    [JsonLinesOutput(compression=c) for c in ("none", "gz", "zst")]
    + [ParquetOutput(), ArrayRecordOutput()],
    ids=lambda written: written.ending,
)
def test_every_format_has_the_same_documents(corpus, tmp_path, written):
    for package in {".parquet": ("pyarrow",), ".jsonl.zst": ("zstandard",)}.get(written.ending, ()):
        pytest.importorskip(package)
    steps = (PersonalData(),)
    for name, each in {"one": written, "two": written, "usual": None}.items():
        pipeline(corpus, tmp_path / name, each, steps).run()
    assert made(tmp_path / "one") == made(tmp_path / "two")
    found = list(CleanedDocuments(path=str(tmp_path / "one")).documents())
    assert found == list(CleanedDocuments(path=str(tmp_path / "usual")).documents())
    assert found[0].metadata.keys() == {"number"}
    files = str(tmp_path / "one" / "documents" / "**" / f"*{written.ending}")
    texts = [document.text for document in found]
    if written.ending == ".parquet":
        assert [d.text for d in ParquetFiles(path=files).documents()] == texts
    elif written.ending == ".array_record":
        folder = str(tmp_path / "one" / "documents")
        own = [TFDS(name=name, data_dir=folder) for name in ("first", "second")]
        assert [d.text for source in own for d in source.documents()] == texts
    else:
        assert [d.text for d in JsonLines(path=files).documents()] == texts


@config
class Failing(Step):
    """Fails on some documents."""

    def __call__(self, document):
        if "bad" in document.text:
            raise ValueError("it is bad")
        return document


def test_damage_is_counted_and_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"body": "two"}\nnot JSON\n{"text": "bad"}')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n' * 99)[:-9])
    (tmp_path / "c.jsonl").touch()
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "gr\xfc"}\n{"text": "%s"}' % (b"long " * 99))
    output = tmp_path / "out"
    output.mkdir()

    def run(on_error, step_error):
        source = JsonLines(path=f"{tmp_path}/*.jsonl*", on_error=on_error)
        collections = (Collection(name="c", source=source),)
        steps = (Failing(), ExactDuplicates())
        options = {"on_error": step_error, "most_bytes": 400}
        return CleaningPipeline(collections, steps, JsonLinesOutput(), output, **options).run()

    with pytest.raises(UserError, match=r"a\.jsonl, line 2: there is no field 'text'"):
        run("raise", "raise")
    with pytest.raises(UserError, match=r"a\.jsonl:\d+: the step Failing failed: .*it is bad"):
        run("skip", "raise")
    # What was finished had no error, so the settings may be changed.
    summary = run("skip", "skip")
    total = summary.total()
    assert total.skipped == 4 and summary.empty == [str(tmp_path / "c.jsonl")]
    assert total.steps["reading (c)"].reasons == {"longer than most_bytes": 1}
    assert total.steps["Failing"].reasons == {"the step failed: ValueError": 1}
    reasons = " ".join(line["reason"] for line in lines(output / "left_out.jsonl.gz"))
    for words in (
        "no field 'text'",
        "not JSON",
        "cut short",
        "is not UTF-8",
        "most_bytes",
        "failed",
    ):
        assert words in reasons
    texts = {d.text for d in CleanedDocuments(path=str(output)).documents()}
    assert "one" in texts and texts <= {"one", "three"}


def test_a_full_disk_leaves_work_to_go_on_with(corpus, undisturbed, tmp_path, monkeypatch):
    """In the second pass: what was finished stays, and the rest is made when there is room."""
    save, left = StoredArrays.save, [20]

    def save_until_full(folder, arrays):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        save(folder, arrays)

    monkeypatch.setattr(StoredArrays, "save", save_until_full)
    with pytest.raises(OSError, match="No space left"):
        pipeline(corpus, tmp_path).run()
    assert not (tmp_path / "documents").exists() and left == [0]
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("ledger.json")}
    assert len(finished) >= 12
    monkeypatch.undo()
    pipeline(corpus, tmp_path).run()
    assert made(tmp_path) == made(undisturbed[0])


@pytest.mark.skipif(not BOOKS, reason="the books are not there")
def test_older_editions_of_novels_are_found_and_no_novel_is_lost(tmp_path):
    books = TextFiles(path=tuple(map(str, BOOKS)), on_error="replace")
    step = NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.5)
    collections = (Collection(name="books", source=books),)
    CleaningPipeline(collections, (step,), JsonLinesOutput(), tmp_path).run()
    kept = [d.identity for d in CleanedDocuments(path=str(tmp_path)).documents()]
    names = {path.name for path in BOOKS if "-old" not in path.name}
    assert {os.path.basename(one).rpartition(":")[0] for one in kept} == names
    assert len(kept) == len(names) == 6 < len(BOOKS)


def test_a_cleaning_that_is_not_finished_is_not_read(tmp_path):
    with pytest.raises(UserError, match="has no finished cleaning"):
        CleanedDocuments(path=str(tmp_path)).parts()


def test_nothing_may_be_kept(corpus, tmp_path):
    steps = (GopherQuality(least_words=10**5, most_words=10**6), NearDuplicates())
    assert pipeline(corpus, tmp_path, steps=steps).run().total().documents == 0
    assert list(CleanedDocuments(path=str(tmp_path)).documents()) == []


def test_recipes_are_steps():
    inner = (GopherQuality(), ExactDuplicates())
    assert flat((CleaningRecipe(steps=inner), PersonalData())) == (*inner, PersonalData())


def test_stricter_steps_drop_more():
    step = stricter(GopherQuality())
    assert (step.least_words, step.most_words) == (57, 85_000)
    assert step.least_alphabetic == pytest.approx(0.8 * 1.15)
    assert step.stop_words == GopherQuality().stop_words
    assert stricter(PersonalData()) is None


def test_ledgers_add_up_in_any_order(undisturbed):
    _, summary = undisturbed
    whole, back = Ledger(), Ledger()
    for ledger in summary.ledgers.values():
        whole.merge(ledger)
    for ledger in reversed(summary.ledgers.values()):
        back.merge(ledger)
    times = [counts.seconds for counts in whole.steps.values()]
    for each in (whole, back):
        for counts in each.steps.values():
            counts.seconds = 0.0
    assert whole == back and np.all(np.array(times) >= 0)
    assert Ledger.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    border = whole.steps["GopherQuality"].border
    dropped = whole.steps["GopherQuality"].dropped
    assert {*dropped} == {"too few words"} and {*border} <= {"too few words"}
    assert all(float(one.measured) < 60 for one in dropped["too few words"])
    assert all(60 <= float(one.measured) < 69 for one in border.get("too few words", ()))
