"""Steps that need all documents, against loops over all pairs and rules done by hand."""

import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, config
from lmjax.data.cleaned import CleanedDocuments
from lmjax.data.cleaning.clusters import NearDuplicates, clusters
from lmjax.data.cleaning.contamination import Decontaminate, run_hashes, word_hashes
from lmjax.data.cleaning.duplicates import ExactDuplicates, first_equal
from lmjax.data.cleaning.formats import JsonLinesOutput
from lmjax.data.cleaning.near_duplicates import MinHash, first_of_cluster, ngrams, tokens
from lmjax.data.cleaning.pipeline import CleaningPipeline
from lmjax.data.cleaning.shard_pass import Collection
from lmjax.data.cleaning.step import Dropped
from lmjax.data.cleaning.substrings import ExactSubstrings
from lmjax.data.documents import Document, Part, Source
from lmjax.data.sources import JsonLines


def cleaned(step, shards, tell=lambda document, finding: None):
    """What a step makes of the texts of some shards: texts, None for those that are dropped."""
    documents = [
        [Document(text, f"{n}.{m}") for m, text in enumerate(s)] for n, s in enumerate(shards)
    ]
    marks = [step.mark(shard) for shard in documents]
    decided = step.decide(marks)
    return [
        [
            None if isinstance(one, Dropped) else one.text
            for one in step.apply(iter(shard), {**verdict, **decided.common}, tell)
        ]
        for shard, verdict in zip(documents, decided.verdicts, strict=True)
    ]


SHARDS = st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=5)


@settings(deadline=None)
@given(shards=SHARDS, together=st.integers(1, 9))
def test_first_equal_is_the_first_equal(shards, together):
    """However few rows are sorted at a time."""
    table = np.random.default_rng(0).integers(0, 2**63, (7, 2)).astype(np.uint64)
    table[3, 0] = table[4, 0]  # half of it alone decides nothing
    parts = [table[np.array(shard, int)] for shard in shards]
    every = [number for shard in shards for number in shard]
    assert first_equal(parts, together).tolist() == [every.index(number) for number in every]


@settings(deadline=None)
@given(shards=SHARDS)
def test_of_equal_documents_the_first_is_kept(shards):
    forms = ("{} words, here", "{}  WORDS here.", "{} words\nhere!")
    texts = [[forms[at % 3].format(number) for at, number in enumerate(s)] for s in shards]
    known, expected = set(), []
    for shard in texts:
        expected.append([])
        for text in shard:
            key = tuple(tokens(text))
            expected[-1].append(None if key in known else text)
            known.add(key)
    assert cleaned(ExactDuplicates(), texts) == expected


def test_what_is_equal_depends_on_the_normalisation():
    texts = [["One, two", "one two", "one  two", "one two"]]
    step = ExactDuplicates(normalize="spaces")
    assert cleaned(step, texts) == [["One, two", "one two", None, None]]
    step = ExactDuplicates(normalize="nothing")
    assert cleaned(step, texts) == [["One, two", "one two", "one  two", None]]
    assert cleaned(ExactDuplicates(), [["!!!", "???", "!!!"]]) == [["!!!", "???", None]]


def test_repeated_paragraphs_are_cut_out_and_the_rest_stays_as_it_is():
    notice = "All rights reserved by the owners of this page."
    first = f"A heading\n\n{notice}\n\n  Some text\nin lines."
    second = f"{notice}\n\nOther text, longer than a heading is.\n\nA heading\n\n{notice}\n"
    step = ExactDuplicates(unit="paragraph", least=20)
    assert cleaned(step, [[first], [second, notice]]) == [
        [first],
        ["Other text, longer than a heading is.\n\nA heading", None],
    ]
    lines = ExactDuplicates(unit="line", least=1)
    assert cleaned(lines, [["a\n\nb\na", "b\nc"]]) == [["a\n\nb", "c"]]


def test_three_sentences_in_a_row_that_occur_again_are_cut_out():
    """C4's rule: two in a row stay."""
    a, b, c, d, e = (f"This is sentence {name}." for name in "abcde")
    step = ExactDuplicates(unit="sentence", run=3, least=1)
    one, other = " ".join((a, b, c)), " ".join((d, a, b, c, e))
    assert cleaned(step, [[one, other]]) == [[one, f"{d} {e}"]]
    other = " ".join((d, a, b, e))
    assert cleaned(step, [[one, other]]) == [[one, other]]
    # Runs that overlap are one hole.
    one, other = " ".join((a, b, c, d)), " ".join((e, a, b, c, d, e))
    assert cleaned(step, [[one, other]]) == [[one, f"{e} {e}"]]


def edited(rng, words, share):
    """The words, with a share of them exchanged."""
    return [f"new{rng.randrange(10**6)}" if rng.random() < share else word for word in words]


def corpus(rng, families=12, members=4, length=120):
    """Texts in families of different similarity, shuffled into shards."""
    texts = []
    for family in range(families):
        words = [f"w{rng.randrange(10**5)}" for _ in range(length)]
        texts += [
            " ".join(edited(rng, words, rng.choice([0.0, 0.005, 0.01, 0.1, 0.3])))
            for _ in range(1 + family % members)
        ]
    rng.shuffle(texts)
    return [texts[at : at + 7] for at in range(0, len(texts), 7)]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_all_texts_at_once(seed):
    shards = corpus(random.Random(seed))
    step = NearDuplicates(minhash=MinHash(bands=10, rows=4))
    marks = [step.mark([Document(text, "") for text in shard]) for shard in shards]
    whole = step.minhash.keys(step.minhash.signatures(list(itertools.chain(*shards))))
    assert clusters(marks).tolist() == first_of_cluster(whole).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_signatures_decide_on_candidates(seed):
    """With many bands: all pairs above the similarity are found, and none far below is linked."""
    shards = corpus(random.Random(seed))
    texts = list(itertools.chain(*shards))
    step = NearDuplicates(minhash=MinHash(bands=40, rows=4), similarity=0.7)
    kept = list(itertools.chain(*cleaned(step, shards)))
    grams = [ngrams(text, 5) for text in texts]
    for later in range(len(texts)):
        shares = [
            len(grams[later] & grams[first]) / len(grams[later] | grams[first])
            for first in range(later)
        ]
        best = max(shares, default=0)
        # 160 orders estimate a similarity to 0.036 (one standard deviation) at most.
        if best >= 0.85:
            assert kept[later] is None
        if best <= 0.5:
            assert kept[later] == texts[later]


def test_the_first_collection_wins_and_empty_shards_do_no_harm():
    text = " ".join(f"w{n}" for n in range(50))
    shards = [["short"], [], [text], [text + " end", "other words altogether"], []]
    expected = [["short"], [], [text], [None, "other words altogether"], []]
    for similarity in (0.0, 0.7):
        step = NearDuplicates(minhash=MinHash(bands=40, rows=4), similarity=similarity)
        assert cleaned(step, shards) == expected


@config
class Texts(Source):
    """Texts that are given."""

    texts: tuple[str, ...]  # each a document

    def parts(self):
        return (Part("texts", size=1),)

    def read(self, part, on_skip):
        for number, text in enumerate(self.texts):
            yield Document(text, f"test {number}")


WORDS = [f"word{n}" for n in range(2000)]
QUESTION = " ".join(f"Ask{n}," for n in range(20))
LEAK = "ask3 ask4 ASK5 ask6 ask7 ask8 ask9 (ask10) ask11 ask12 ask13 ask14 ask15"  # 13 words


def decontaminate(**changes):
    return Decontaminate(tests=(Texts(texts=(QUESTION, "one two three")),), **changes)


def test_gpt3s_rules_by_hand():
    before, after = " ".join(WORDS[:200]), " ".join(WORDS[200:400])
    document = f"{before} {LEAK} {after}"
    told = []
    step = decontaminate()
    (found,) = cleaned(
        step, [[document]], lambda one, finding: told.append((one.identity, finding))
    )
    assert told == [("0.0", "test 0")]
    start, end = len(before) + 1 - 200, len(before) + 1 + len(LEAK) + 200
    assert found == [f"{document[:start].strip()}\n\n{document[end:].strip()}"]
    # 12 words are no leak.
    short = document.replace(" ask15", "")
    assert cleaned(step, [[short]]) == [[short]]
    # A piece of less than 200 characters is left out, and a document of nothing else.
    small = f"{before[:350]} {LEAK} {after}"
    assert cleaned(step, [[small]])[0][0].startswith(after[200 - 1 :].strip()[:20])
    assert cleaned(step, [[f"{before[:350]} {LEAK} {after[:350]}"]]) == [[None]]


def test_common_phrases_and_documents_in_many_pieces():
    step = decontaminate()
    text = f"{' '.join(WORDS[:200])} {LEAK}"
    ten = [[text] * 5, [text] * 5]
    assert all(one != text for shard in cleaned(step, ten) for one in shard)
    eleven = [[text] * 5, [text] * 6]
    assert cleaned(step, eleven) == eleven
    pieces = [" ".join(WORDS[at : at + 150]) for at in range(0, 1800, 150)]
    assert cleaned(step, [[f" {LEAK} ".join(pieces[:10])]])[0][0].count("\n\n") == 9
    assert cleaned(step, [[f" {LEAK} ".join(pieces[:11])]]) == [[None]]


def test_short_evaluation_texts_are_searched_whole():
    step = decontaminate(shortest=3, margin=0, least_piece=1)
    text = "zero One, two three four"
    assert cleaned(step, [[text, "one two four three"]]) == [["zero\n\nfour", "one two four three"]]
    with pytest.raises(UserError, match="no text has shortest=8"):
        cleaned(Decontaminate(tests=(Texts(texts=("one two",)),)), [["text"]])
    with pytest.raises(UserError, match="tests is empty"):
        Decontaminate(tests=())


def test_chinese_is_compared_by_characters():
    sentence = (
        "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed\u73a9\u800d\u5427"
    )
    step = Decontaminate(tests=(Texts(texts=(sentence,)),), margin=0, least_piece=1)
    text = f"\u4ed6\u8bf4\uff1a\u201c{sentence}\u201d\u7136\u540e\u8d70\u4e86\u3002"
    (found,) = cleaned(step, [[text]])[0]
    assert sentence not in found and found.startswith("\u4ed6\u8bf4")


@settings(deadline=None)
@given(words=st.lists(st.sampled_from("abc"), max_size=30), length=st.integers(1, 6))
def test_runs_have_equal_hashes_exactly_where_they_are_equal(words, length):
    hashes = run_hashes(word_hashes(words), length).tolist()
    runs = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
    assert len(hashes) == len(runs)
    for (one, first), (other, second) in itertools.product(zip(runs, hashes), repeat=2):
        assert (one == other) == (first == second)


@settings(deadline=None)
@given(
    shards=st.lists(st.lists(st.text("ab", max_size=20), max_size=4), min_size=1, max_size=3),
    length=st.integers(1, 5),
)
def test_substrings_are_those_of_a_loop_over_all_runs(shards, length):
    """The words that are left, of texts of few different words, so that runs overlap."""
    seen, expected = set(), []
    for text in itertools.chain(*shards):
        runs = [text[at : at + length] for at in range(len(text) - length + 1)]
        cut = set()
        for at, run in enumerate(runs):
            if run in seen:
                cut |= {*range(at, at + length)}
            seen.add(run)
        expected.append("".join(word for at, word in enumerate(text) if at not in cut))
    texts = [[" ".join(text) for text in shard] for shard in shards]
    found = itertools.chain(*cleaned(ExactSubstrings(words=length, least=0), texts))
    assert ["".join(text.split()) for text in found] == expected


def test_the_text_around_a_repeated_run_stays_as_it_is():
    run = "One two, three four."
    step = ExactSubstrings(words=4, least=3)
    texts = [[f"First: {run} End."], [f"(Another beginning)\n\n{run} And more, too.", f"a b {run}"]]
    expected = [[texts[0][0]], ["(Another beginning)\nAnd more, too.", None]]
    assert cleaned(step, texts) == expected


def test_runs_that_an_earlier_cleaning_has_kept_are_cut(tmp_path):
    """A later slice: the same as if both had been one corpus."""
    old, new = "a b c d e f g h", "x y z c d e f g h u v w"
    outputs = []
    for number, text in enumerate((old, new)):
        lines = tmp_path / f"{number}.jsonl"
        lines.write_text(json.dumps({"text": text}))
        output = tmp_path / f"out{number}"
        output.mkdir()
        step = ExactSubstrings(words=4, least=1, earlier=tuple(map(str, outputs)))
        collection = Collection(name="c", source=JsonLines(path=str(lines)))
        CleaningPipeline((collection,), (step,), JsonLinesOutput(), output).run()
        outputs.append(output)
    (found,) = CleanedDocuments(path=str(outputs[1])).documents()
    together = cleaned(ExactSubstrings(words=4, least=1), [[old], [new]])
    assert found.text == together[1][0] == "x y z\nu v w"
