"""The report: what is in its page, and that nothing in the data can break out of the page."""

import html.parser
import json
import math
import shutil
import subprocess

import pytest

from lmjax.console import Table
from lmjax.jobs.report import fill, thinned, write_report
from lmjax.jobs.results import Results
from lmjax.runs.folder import RunFolder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ROWS = (("books", 2.5, 1.5), ("code", 2.0, None), ("web", None, 1.0))
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 &amp; \" '"


class Page(html.parser.HTMLParser):
    """Collects the scripts of a page, and every address that it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.scripts, self.fetched, self.tags, self.attributes = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append(dict(attributes))
        if tag == "script":
            self.scripts.append("")
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "my <run>")
    folder.path.mkdir()
    folder.write_json("config.json", {"class": "Pretrain", "steps": 3, "output": HOSTILE})
    folder.write_json("environment.json", {"jax": "0.0", "cores": 2})
    lines = [
        {"step": 1, "split": "train", "loss": 4.0, "tokens": 10.0},
        {"step": 2, "split": "train", "loss": 2.0, "tokens": 10.0, "tokens_per_second": 5.0},
        {"step": 2, "split": "held_out/books", "loss": 3.0, "bits_per_byte": 1.5},
        {"step": 3, "split": "train", "loss": math.nan, "tokens": 10.0, "tokens_per_second": 7.0},
    ]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def scores(*rows):
    """A table of bits per byte."""
    return Table("Bits per byte", ("text", "gzip", "model"), rows, notes=("lost",))


def page_data(folder):
    page = Page(write_report(folder).read_text("utf-8"))
    return json.loads(page.scripts[0]), page


def test_the_page_holds_the_run(folder):
    data, _ = page_data(folder)
    assert data["name"] == "my <run>"
    [run] = data["runs"]
    assert [record["step"] for record in run["train"]] == [1, 2, 3]
    assert run["held_out"] == {
        "held-out books": [
            {"step": 2, "split": "held_out/books", "loss": 3.0, "bits_per_byte": 1.5}
        ]
    }
    assert data["config"]["steps"] == 3


def test_the_page_fetches_nothing_and_runs_only_its_own_script(folder):
    samples = Table("Samples", ("prompt", "text"), ((HOSTILE, HOSTILE),), notes=(HOSTILE,))
    folder.write_json("results.json", Results(3, tables=(samples,)).to_json())
    data, page = page_data(folder)
    assert page.fetched == []
    assert len(page.scripts) == 2
    assert "alert" not in page.scripts[1]
    assert data["runs"][0]["tables"][0]["rows"] == [[HOSTILE, HOSTILE]]


def test_results_reach_the_page(folder):
    table = scores(("books", 2.5, 1.25))
    folder.write_json("results.json", Results(3, tables=(table,)).to_json())
    data, _ = page_data(folder)
    assert data["runs"][0]["tables"] == [
        {**json.loads(json.dumps(table.to_json())), "is_text": False}
    ]
    assert ["bits per byte", "1.250"] in data["tiles"]


def test_a_mean_says_which_domains_it_is_of(folder):
    rows = {name: (name, *values) for name, *values in ROWS}
    for names, words in (
        (["books", "web"], "bits per byte, mean of rows"),
        (["books", "code", "web"], "bits per byte, of 2 of 3 rows"),
    ):
        table = scores(*(rows[name] for name in names))
        folder.write_json("results.json", Results(3, tables=(table,)).to_json())
        data, _ = page_data(folder)
        assert [words, "1.250"] in data["tiles"] and data["runs"][0]["tables"][0]["notes"] == [
            "lost"
        ]


def test_results_of_another_build_are_no_error(folder):
    """Those from before there were tables have none."""
    folder.write_json("results.json", {"step": 3, "bits_per_byte": {"books": {"model": 1.0}}})
    assert page_data(folder)[0]["runs"][0]["tables"] == []


def test_numbers_that_are_none_become_null():
    with pytest.raises(ValueError):  # json must not write NaN, which no browser reads
        fill("__TITLE__ __DATA__", {"name": "x", "loss": math.nan})
    assert thinned([{"step": 1, "loss": math.nan}], 10) == [{"step": 1}]


def test_thinned_keeps_the_mean_and_the_last_step():
    records = [{"step": step, "loss": float(step)} for step in range(1, 11)]
    assert thinned(records, 10) == records
    assert thinned(records, 4) == [
        {"step": 3, "loss": 2.0},
        {"step": 6, "loss": 5.0},
        {"step": 9, "loss": 8.0},
        {"step": 10, "loss": 10.0},
    ]


def test_what_a_job_measures_has_curves_unless_it_is_a_copy(folder):
    lines = [
        {"step": n, "split": "train", "loss": n, "cross_entropy": n, "reward": n * n, "mfu": 0.5}
        for n in (1, 2, 3)
    ]
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, _ = page_data(folder)
    assert data["runs"][0]["measures"] == ["reward"]
    assert [record["reward"] for record in data["runs"][0]["train"]] == [1, 4, 9]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
def test_a_calibration_is_drawn(folder):
    """A dot for each bin of each set, from 0.5 at the lower left to 1 at the upper right."""
    columns = ("pairs", "share of pairs", "predicted", "agreement", "error")
    rows = (
        ("a, b, 0.5 to 0.6", 0.36, 0.5, 0.5, 0.0),
        ("a, b, 0.9 to 1.0", 0.64, 1.0, 0.75, 0.25),
        ("a, b, all", 1.0, 0.8, 0.7, 0.16),
        ("c, 0.7 to 0.8", 1.0, 0.75, 1.0, 0.25),
        ("c, all", 1.0, 0.75, 1.0, 0.25),
    )
    table = Table("Calibration", columns, rows, picture="calibration")
    folder.write_json("results.json", Results().with_tables((table,), 3).to_json())
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = write_report(folder).absolute().as_uri()
    made = subprocess.run(
        [CHROMIUM, *options, address], capture_output=True, text=True, timeout=120
    )
    page = Page(made.stdout)
    dots = [one for one in page.attributes if "fill-opacity" in one.get("style", "")]
    places = [[float(one[name]) for name in ("cx", "cy", "r")] for one in dots]
    assert places == [[60, 332, 8], [380, 172, 10], [220, 12, 12]]
    assert [title for title in ("a, b", "c") if f"</i>{title}</span>" in made.stdout] == [
        "a, b",
        "c",
    ]
