"""Shares by tokens and epochs; text for filling in the middle; parallel text."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data import Data, Domain, FillInTheMiddle, JsonLines, ParallelText, TokenShares
from lmjax.data.preparation import prepare
from lmjax.data.rows import RowFormat
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import Bytes, WithTokens
from lmjax.data.tokenizers.base import ByteTokenizer
from lmjax.data.tokenizers.listed_texts import ListedTexts
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.jobs.tokenize_text import weight_remarks

NAMES = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")


def test_temperatures_of_languages():
    """XLM-R's exponent of 0.3, by hand: 1000^0.3 = 7.943, 10^0.3 = 1.995."""
    shares = TokenShares(exponent=0.3).weights({"en": 1.0, "sw": 1.0}, {"en": 1000, "sw": 10})
    assert shares == pytest.approx({"en": 0.7992, "sw": 0.2008}, abs=1e-4)
    even = TokenShares(exponent=0.0).weights({"en": 3.0, "sw": 1.0}, {"en": 1000, "sw": 10})
    assert even == {"en": 0.75, "sw": 0.25}
    plain = TokenShares(exponent=1.0).weights({"en": 1.0, "sw": 1.0}, {"en": 900, "sw": 100})
    assert plain == pytest.approx({"en": 0.9, "sw": 0.1})


def test_what_is_beyond_the_epochs_goes_to_the_others():
    step = TokenShares(exponent=0.0, most_epochs=4.0, tokens=1000.0)
    tokens = {"books": 20, "web": 1000, "code": 400}
    shares = step.weights(dict.fromkeys(tokens, 1.0), tokens)
    # Books have four epochs, 80 of 1,000 tokens; the rest is shared equally.
    assert shares == pytest.approx({"books": 0.08, "web": 0.46, "code": 0.46})
    with pytest.raises(UserError, match="1,040 tokens, fewer than"):
        replace(step, tokens=2000.0).weights({"a": 1.0, "b": 1.0}, {"a": 60, "b": 200})


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.1, 10)), min_size=1, max_size=6),
    st.floats(1, 4),
    st.floats(0, 1),
)
@example([(434, 1.0), (1362, 1.0), (1, 1.0)], 1.0, 0.0)  # whose rounded shares are less than 1
def test_no_domain_is_read_more_often(domains, epochs, exponent):
    tokens = {str(n): count for n, (count, _) in enumerate(domains)}
    weights = {str(n): weight for n, (_, weight) in enumerate(domains)}
    step = TokenShares(exponent=exponent, most_epochs=epochs, tokens=float(sum(tokens.values())))
    shares = step.weights(weights, tokens)
    assert sum(shares.values()) == pytest.approx(1)
    read = {name: share * step.tokens / tokens[name] for name, share in shares.items()}
    assert max(read.values()) <= epochs * (1 + 1e-9)
    # Those that are not at the limit keep their proportions.
    wanted = {name: weights[name] * tokens[name] ** exponent for name in shares}
    free = [name for name in shares if read[name] < epochs * (1 - 1e-6)]
    scales = [shares[name] / wanted[name] for name in free]
    assert not scales or max(scales) == pytest.approx(min(scales), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exponent": 1.5}, "lies between 0 and 1"),
        ({"most_epochs": 4.0}, "counted in the tokens of the training"),
        ({"tokens": -1.0}, "0 or more"),
    ],
)
def test_shares_that_cannot_be_meant(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TokenShares(), **changes).validate()


def lines(path, records):
    path.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in records), "utf-8")
    return str(path)


def test_a_mixture_has_these_shares(tmp_path):
    sources = {
        name: JsonLines(path=lines(tmp_path / f"{name}.jsonl", [{"text": "x" * 99}] * count))
        for name, count in (("few", 10), ("many", 160))
    }
    data = Data(
        train=tuple(Domain(name=name, source=source) for name, source in sources.items()),
        tokenizer=Bytes(),
        shares=TokenShares(exponent=0.5),
        held_out=0.0,
        length=32,
        cache=str(tmp_path / "cache"),
    )
    prepared = prepare(data, tmp_path / "tokenizer")
    assert prepared.shares((1.0, 1.0)) == pytest.approx({"few": 0.2, "many": 0.8})
    loader = prepared.loader(data.plan(0), tuple, RowFormat(32))
    assert loader.mixture.stages[0].counts.tolist() == [1, 4]


def test_weights_that_do_not_add_up():
    def data(*weights):
        domains = tuple(
            Domain(name=str(n), source=JsonLines(path="x"), weight=weight)
            for n, weight in enumerate(weights)
        )
        return Data(train=domains)

    assert weight_remarks(data(0.5, 0.45)) == [
        "The weights add up to 0.95, not to 1: they are taken as relative shares"
    ]
    assert "add up to 101, not to 100" in weight_remarks(data(60.0, 41.0))[0]
    for fine in ((0.5, 0.5), (60.0, 40.0), (3.0, 2.0, 1.0), (0.9,)):
        assert weight_remarks(data(*fine)) == []


@pytest.fixture(scope="module")
def tokenizer():
    return ExtendedTokenizer(ByteTokenizer(), NAMES)


def code(tmp_path, count=400):
    records = [{"text": f"def f{n}(x):\n    return x + {n}  # é\n"} for n in range(count)]
    return JsonLines(path=lines(tmp_path / "code.jsonl", records))


def test_the_middle_comes_last_and_nothing_is_lost(tmp_path, tokenizer):
    source = FillInTheMiddle(source=code(tmp_path), share=0.5)
    before, middle, behind = (tokenizer.special[name] for name in NAMES)
    forms = {"plain": 0, "prefix": 0, "suffix": 0}
    for document in source.documents():
        if document.encode is None:
            forms["plain"] += 1
            continue
        ids, spans = document.encode(tokenizer)
        assert spans == [] and ids[0] == tokenizer.begin
        assert [ids.count(token) for token in (before, middle, behind)] == [1, 1, 1]
        at, last = ids.index(behind), ids.index(middle)
        if at == 2:  # suffix first: the prefix is with the middle
            forms["suffix"] += 1
            text = tokenizer.decode(ids[last + 1 :]) + tokenizer.decode(ids[at + 1 : last])
        else:
            forms["prefix"] += 1
            parts = ids[2:at], ids[last + 1 :], ids[at + 1 : last]
            text = "".join(map(tokenizer.decode, parts))
        assert text == document.text
    # Shares of 400 documents: four standard deviations.
    assert abs(forms["plain"] - 200) < 40 and abs(forms["suffix"] - forms["prefix"]) < 60


def test_which_texts_are_cut_depends_on_them_alone(tmp_path, tokenizer):
    source = FillInTheMiddle(source=code(tmp_path, 20))
    encoded = [
        [d.encode(tokenizer) if d.encode else None for d in source.documents()] for _ in range(2)
    ]
    assert encoded[0] == encoded[1]
    assert source.fingerprint() != replace(source, share=0.9).fingerprint()
    assert all(d.encode is None for d in replace(source, share=0.0).documents())
    with pytest.raises(UserError, match="no special token"):
        list(build_stores(replace(source, share=1.0), ByteTokenizer(), tmp_path / "none"))
    with pytest.raises(UserError, match="three different names"):
        replace(source, middle="<|fim_prefix|>").validate()
    assert (
        WithTokens(tokenizer=Bytes(), tokens=NAMES).build(ListedTexts([])).special
        == tokenizer.special
    )


def test_stores_hold_the_cut_texts(tmp_path, tokenizer):
    source = FillInTheMiddle(source=code(tmp_path, 30), share=1.0)
    store = build_stores(source, tokenizer, tmp_path / "store")["all"]
    expected = [d.encode(tokenizer)[0] for d in source.documents()]
    assert store.manifest.documents == 30
    assert store.manifest.tokens == sum(map(len, expected))


def test_parallel_text_in_both_directions(tmp_path):
    records = [{"en": "good", "zh": "好", "id": 7}, {"en": " ", "zh": "好"}]
    source = ParallelText(path=lines(tmp_path / "p.jsonl", records), metadata=("id",))
    one, other = source.documents()
    assert (one.text, other.text) == ("good\n好", "好\ngood")
    assert one.group == other.group and one.metadata == other.metadata == {"id": 7}
    assert other.identity == f"{one.identity}, reversed"
    single = replace(source, both=False, form="English: {} Chinese: {}.")
    assert [d.text for d in single.documents()] == ["English: good Chinese: 好."]
    with pytest.raises(UserError, match="and a form with"):
        replace(source, form="{}").validate()
