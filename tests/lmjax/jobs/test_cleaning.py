"""The job that cleans: its folder, its report, and that it finds what was planted."""

import gzip
import importlib
import json
import random
import subprocess
import sys

import pytest

from lmjax.config import UserError, config, from_json, parse, replace, to_json, to_text
from lmjax.data import CleanedDocuments, JsonLines
from lmjax.data.cleaning import recipes
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.contamination import Decontaminate
from lmjax.data.cleaning.dirt import DirtyPages, PlantedQuestions
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.heuristics import FineWebQuality, GopherQuality, GopherRepetition
from lmjax.data.cleaning.main_text import MainText
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.repair import RepairText
from lmjax.data.cleaning.shard_pass import Collection
from lmjax.data.documents import Document, Part, Source
from lmjax.jobs.cleaning import Cleaning
from lmjax.jobs.dirt_check import DirtCheck

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "that",
    "with",
    "a",
    "river",
    "harbour",
    "of",
    "boats",
    "and",
    "have",
    "been",
]


@config
class Stories(Source):
    """Paragraphs of made-up words, none like another."""

    def parts(self):
        return tuple(Part(f"story {number}", number, size=5000) for number in range(45))

    def read(self, part, on_skip):
        rng = random.Random(part.start)
        own = [
            f"{rng.choice('bdfgk')}{rng.choice('aeiou')}{rng.choice('lmnrst')}o" for _ in range(40)
        ]
        for number in range(12):
            words = rng.choices([*WORDS, *own], k=60)
            text = " ".join(words).capitalize() + "."
            yield Document(text, f"{part.name}, {number}")


PAGES = DirtyPages(source=Stories(), questions=20)


def cleaning(output, pages=PAGES, **changes):
    """A cleaning with all kinds of steps."""
    settings = {
        "output": str(output),
        "sources": (Collection(name="pages", source=pages, steps=(MainText(), RepairText())),),
        "steps": (
            GopherQuality(),
            GopherRepetition(most_frequent=(0.4, 0.4, 0.4), most_repeated=(0.6,) * 6),
            FineWebQuality(),
            ExactDuplicates(),
            NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7),
            Decontaminate(tests=(PlantedQuestions(questions=20),)),
            PersonalData(),
        ),
        "workers": 1,
    }
    return Cleaning(**settings | changes)


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """The output of a cleaning of pages with planted dirt."""
    for library in ("resiliparse", "ftfy"):
        pytest.importorskip(library)
    output = tmp_path_factory.mktemp("runs") / "cleaned"
    cleaning(output).run()
    return output


def test_what_was_planted_is_found_and_good_pages_stay(cleaned, tmp_path, capsys):
    check = DirtCheck(
        output=str(tmp_path / "check"), cleaned=str(cleaned), collection="pages", pages=PAGES
    )
    check.run()
    results = json.loads((tmp_path / "check" / "results.json").read_text())
    rows = {row[0]: row[1:] for row in results["tables"][0]["rows"]}
    assert len(rows) == 9 and all(row[0] >= 3 for row in rows.values())
    assert all(share >= least for _, least, share in rows.values())


def test_a_cleaning_that_falls_short_is_told(tmp_path):
    pytest.importorskip("resiliparse")
    small = (Collection(name="pages", source=PAGES, steps=(MainText(),)),)
    cleaning(tmp_path / "cleaned", sources=small, steps=(ExactDuplicates(),)).run()
    check = DirtCheck(
        output=str(tmp_path / "check"),
        cleaned=str(tmp_path / "cleaned"),
        collection="pages",
        pages=PAGES,
    )
    with pytest.raises(
        UserError, match=r"falls short: edited.*mojibake.*personal.*questions.*spam"
    ):
        check.run()


def test_the_report_has_every_step_reasons_and_examples(cleaned):
    page = (cleaned / "report.html").read_text()
    for title in ("Documents by step", "Text by step", "Kept by collection", "Reasons", "Lengths"):
        assert f'"{title}"' in page
    for title in ("Throughput", "Dropped", "Duplicates", "documents kept", "share kept"):
        assert f'"{title}"' in page
    tables = {t["title"]: t for t in json.loads((cleaned / "results.json").read_text())["tables"]}
    steps = [row[0] for row in tables["Documents by step"]["rows"]]
    assert steps[:4] == [
        "reading (pages)",
        "MainText (pages)",
        "RepairText (pages)",
        "GopherQuality",
    ]
    found = CleanedDocuments(path=str(cleaned)).documents()
    count = sum(1 for _ in found)
    assert tables["Documents by step"]["rows"][-1][-1] == count
    assert sum(row[1] for row in tables["Lengths"]["rows"]) == count
    assert len(tables["Duplicates"]["rows"][0]) == 3
    assert "(edited)" in json.dumps(tables["Duplicates"])


def test_a_finished_cleaning_does_nothing_and_settings_must_stay(cleaned, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in cleaned.rglob("*") if path.name != ".lock"}
    cleaning(cleaned, workers=2, on_error="skip").run()
    after = {path: path.stat().st_mtime_ns for path in cleaned.rglob("*") if path.name != ".lock"}
    assert after == before
    with pytest.raises(UserError, match="holds another run; settings that differ"):
        cleaning(cleaned, steps=(ExactDuplicates(),)).run()


def test_two_runs_on_one_folder(cleaned, tmp_path):
    import fcntl

    with (cleaned / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            cleaning(cleaned).run()


def test_an_error_leaves_work_to_go_on_with_and_other_errors_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"body": "two"}\n')

    def run(**options):
        source = JsonLines(path=str(path), **options)
        collections = (Collection(name="a", source=source),)
        cleaning(tmp_path / "out", sources=collections, steps=()).run()

    with pytest.raises(UserError, match="line 2: there is no field 'text'"):
        run()
    run(on_error="skip")
    assert [d.text for d in CleanedDocuments(path=str(tmp_path / "out")).documents()] == ["one"]
    path.unlink()
    with pytest.raises(UserError, match="no file matches"):
        cleaning(
            tmp_path / "none",
            sources=(Collection(name="a", source=JsonLines(path=str(path))),),
        ).run()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": ()}, "collections of different names"),
        ({"sources": (Collection(name="a/b", source=Stories()),)}, "'a/b' is a folder's name"),
        ({"workers": -1}, "workers=-1"),
        ({"output": "gs://bucket/out"}, "only paths of this machine"),
    ],
)
def test_settings_that_cannot_be_meant(changes, words):
    with pytest.raises(UserError, match=words):
        cleaning(**{"output": "runs/a"} | changes)


@pytest.mark.parametrize("name", ["c4", "gopher", "refinedweb", "fineweb", "gpt3"])
def test_recipes_run(tmp_path, name):
    """On pages of which copies are planted; and can be kept as settings."""
    recipe = getattr(recipes, f"{name}_cleaning")()
    if name == "refinedweb":  # 9,000 hashes of each n-gram, of which less will do
        first, *others = (s for s in recipe.steps if not isinstance(s, NearDuplicates))
        minhash = MinHash(bands=20, rows=6)
        recipe = replace(recipe, steps=(first, *others, NearDuplicates(minhash=minhash)))
    collections = (Collection(name="stories", source=Stories()),)
    job = cleaning(tmp_path / "out", sources=collections, steps=(recipe,))
    assert from_json(to_json(job)) == job
    job.run()
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_demonstration_is_an_experiment():
    module = importlib.import_module("experiments.data.demo")
    experiment = module.experiment
    assert "python -m experiments.data.demo" in module.__doc__ and "minutes" in module.__doc__
    assert experiment.output == "runs/demo"
    assert from_json(to_json(experiment)) == experiment
    assert parse(experiment, to_text(experiment).splitlines()) == experiment


ENGLISH = (
    "The old bridge over the river was closed in the spring, and the people of the village had to "
    "walk to the next one. Nobody knew how long the work would take. The mayor said that it would "
    "be finished before the harvest. The farmers did not believe him, and they were right. In the "
    "end it was winter when the first cart could cross. There was a feast that night, with music "
    "and lanterns, and the oldest man of the village was the first to walk to the other side."
)
OTHER = (
    "My grandmother kept bees behind her house for forty years. She wore no veil, and was stung "
    "less often than the neighbours who came to look. In June she took the first honey, which was "
    "light and tasted of lime trees. In August it was dark, and that she kept for the family. If "
    "you want to know more of how she did it, write to ada@example.com, and I will send her notes."
)
GERMAN = (
    "Die alte Br\u00fccke \u00fcber den Fluss wurde im Fr\u00fchjahr geschlossen, und die "
    "Leute mussten zur n\u00e4chsten gehen. Niemand wusste, wie lange es dauern w\u00fcrde."
)


def archive(texts):
    """A web archive with a page of each text."""
    found = b""
    for number, text in enumerate(texts):
        page = f"<html><body><main><p>{text}</p></main></body></html>".encode()
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + page
        head = (
            "WARC/1.0\r\nWARC-Type: response\r\n"
            f"WARC-Target-URI: https://a.example/{number}\r\n"
            f"WARC-Date: 2024-05-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:{number:032}>\r\n"
            "Content-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        found += gzip.compress(head.encode() + body + b"\r\n\r\n")
    return found


def test_finewebs_steps_from_the_command_line(tmp_path):
    """Of pages in an archive: the language, a near-duplicate, a placeholder, the origin."""
    for library in ("fastwarc", "resiliparse", "ftfy", "zstandard"):
        pytest.importorskip(library)
    experiment = importlib.import_module("experiments.data.fineweb").experiment
    texts = [ENGLISH, GERMAN * 4, f"{ENGLISH} Really.", OTHER]
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl" / "a.warc.gz").write_bytes(archive(texts))
    words = [f"sources.0.source.path={tmp_path}/crawl", f"output={tmp_path}/out"]
    parse(experiment, words).run()
    found = list(CleanedDocuments(path=str(tmp_path / "out")).documents())
    urls = [document.metadata["url"] for document in found]
    assert urls == ["https://a.example/0", "https://a.example/3"]
    assert all(document.metadata["language"] == "en" for document in found)
    assert "<email>" in found[1].text and "ada@" not in found[1].text
    tables = json.loads((tmp_path / "out" / "results.json").read_text())["tables"]
    assert {t["title"]: t["rows"] for t in tables}["Languages"] == [["en", 2]]
    lines = gzip.decompress((tmp_path / "out" / "left_out.jsonl.gz").read_bytes()).splitlines()
    reasons = {json.loads(line)["id"].rpartition(":")[2]: json.loads(line) for line in lines}
    assert [one["reason"] for one in reasons.values()] == [
        "another language",
        "nearly an earlier document",
    ]


@pytest.mark.slow
def test_the_demonstration_runs(tmp_path):
    command = [sys.executable, "-m", "experiments.data.demo", f"output={tmp_path}/demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo" / "trained" / "report.html").is_file()


def test_cleaning_needs_no_jax():
    """Processes that clean start quickly."""
    code = "import sys, lmjax.jobs.cleaning; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
