"""A person's review of a cleaning: what is shown, that nothing is lost, and the agreement."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data.cleaning import FineWebQuality, GopherQuality
from lmjax.data.cleaning.formats import JsonLinesOutput
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.cleaning.shard_pass import Collection
from lmjax.data.kappa import cohens_kappa, kappa_interval, share_interval
from lmjax.data.review import Review, ReviewJournal, agreement, ask, read_summary, review_items
from lmjax.data.sources import JsonLines

GOOD = "The river that runs through the old town is wide and of slow water in spring. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cleaned")
    rng = random.Random(0)
    texts = [f"{number}. {GOOD * 8}" for number in range(60)]
    texts += [f"too short {number}" for number in range(50)]
    texts += ["\n".join(f"menu {rng.random():.3f} of the" for _ in range(30)) for _ in range(40)]
    lines = (json.dumps({"text": text}) for text in texts)
    (folder / "texts.jsonl").write_text("\n".join(lines))
    output = folder / "out"
    output.mkdir()
    collection = Collection(name="texts", source=JsonLines(path=str(folder / "texts.jsonl")))
    steps = (GopherQuality(), FineWebQuality())
    CleaningPipeline((collection,), steps, JsonLinesOutput(), output).run()
    return output


def test_a_few_documents_of_each_kind(folder):
    items = review_items(read_summary(folder), each=4, seed=0)
    strata = {item.stratum: item for item in items}
    assert strata["kept"].documents == 60 and strata["kept"].filters == "keep"
    short = strata["dropped, GopherQuality: too few words"]
    assert (short.documents, short.filters) == (50, "drop")
    counts = {name: sum(item.stratum == name for item in items) for name in strata}
    assert all(1 <= count <= 4 for count in counts.values())
    assert len({item.shown.identity for item in items}) == len(items)
    assert items == review_items(read_summary(folder), each=4, seed=0)
    other = review_items(read_summary(folder), each=4, seed=1)
    assert items != other and sorted(items) == sorted(other)
    # Their order says nothing: the kept ones are not together.
    verdicts = [item.filters for item in items]
    assert verdicts != sorted(verdicts) and verdicts != sorted(verdicts, reverse=True)


def answered(folder, tmp_path, typed):
    """The journal after some input, as a terminal would give it."""
    items = review_items(read_summary(folder), each=4, seed=0)
    journal = ReviewJournal(tmp_path / "a.jsonl")
    rest, told = iter(typed), []

    def question(item, number, count):
        try:
            answer = next(rest)
        except StopIteration:
            raise EOFError from None
        return answer(item) if callable(answer) else answer

    ask(items, journal, question, told.append)
    return items, journal, told


def test_answers_are_on_disk_at_once_and_the_review_goes_on(folder, tmp_path):
    items, journal, told = answered(folder, tmp_path, ["k", "D", "x", "u", "skip"])
    kept = journal.answers()
    assert list(kept.values()) == ["keep", "skip"]
    assert [items[n].shown.identity for n in (0, 1)] == list(kept)
    assert "'x' is none of them." in told and "the filters: " in told[0]
    # A kill leaves whole lines, and half a line does not count.
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"id": "half')
    items, journal, _ = answered(folder, tmp_path, [lambda item: item.filters[0]] * 99)
    answers = journal.answers()
    assert len(answers) == len(items)
    found = agreement(items, answers)
    assert found["judged"] == len(items) - 1  # but for the one that was skipped
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(lines) == len(items) + 2 and all(map(json.loads, lines))
    _, _, told = answered(folder, tmp_path / "other", ["u", "q"])
    assert told == ["There is nothing to undo."]


def test_agreement_is_weighed_by_reasons(folder, tmp_path):
    def keeps_all_but(reason):
        return lambda item: "k" if item.stratum.endswith(reason) or item.filters == "keep" else "d"

    answers = [keeps_all_but("too few words")] * 99
    items, journal, _ = answered(folder, tmp_path, answers)
    found = agreement(items, journal.answers())
    dropped = {i.stratum: i.documents for i in items if i.filters == "drop"}
    assert sum(dropped.values()) == 90
    assert found["wrongly_dropped"] == pytest.approx(50 / 90) and found["wrongly_kept"] == 0
    low, high = found["kappa_95_percent"]
    assert low <= found["kappa"] <= high and found["same"] < 1


def test_the_command_reads_the_terminal(folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("k\nd\nk\nq\n"))
    Review(folder=str(folder), reviewer="ada").run()
    shown = capsys.readouterr().out
    assert "Agreement with the filters" in shown and "1 of " in shown
    assert len((folder / "review" / "ada.jsonl").read_text().splitlines()) == 3
    assert json.loads((folder / "review" / "agreement.json").read_text())["judged"] == 3
    with pytest.raises(UserError, match="Which cleaning"):
        Review().run()
    with pytest.raises(UserError, match="no finished cleaning"):
        Review(folder=str(folder / "review")).run()
    with pytest.raises(UserError, match="a name of"):
        Review(reviewer="../x").validate()


def test_kappa_s_interval():
    """Of a table by Fleiss, Cohen and Everitt's formula, and beside draws with replacement."""
    table = {("a", "a"): 40, ("a", "b"): 9, ("b", "a"): 6, ("b", "b"): 45}
    pairs = [pair for pair, count in table.items() for _ in range(count)]
    one, other = zip(*pairs, strict=True)
    # p = 0.85, e = 0.49 x 0.46 + 0.51 x 0.54 = 0.5008: kappa = 0.3492 / 0.4992.
    assert cohens_kappa(one, other) == pytest.approx(0.3492 / 0.4992)
    low, high = kappa_interval(one, other)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        some = [pairs[n] for n in rng.integers(0, len(pairs), len(pairs))]
        drawn.append(cohens_kappa(*zip(*some, strict=True)))
    # The interval of the draws; the formula is for many cases: to 0.03.
    np.testing.assert_allclose((low, high), np.quantile(drawn, (0.025, 0.975)), atol=0.03)
    assert kappa_interval("aabb", "aabb") == (1.0, 1.0)
    assert all(map(math.isnan, kappa_interval("aa", "aa")))


def test_wilson_s_interval():
    """8 of 10: 0.490 to 0.943 (Brown, Cai and DasGupta 2001 have the formula)."""
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == pytest.approx(1)
    assert share_interval(0, 0) == (0, 1)
