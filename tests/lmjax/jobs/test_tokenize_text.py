"""The job that tokenizes: stores that a training finds ready, and GPT-3's table of the mixture."""

import json

import pytest

from lmjax.config import UserError
from lmjax.data import CleanedDocuments, Data, Domain, JsonLines
from lmjax.data.cleaning import Collection
from lmjax.data.preparation import prepare
from lmjax.data.tokenizers import Bytes
from lmjax.jobs.cleaning import Cleaning
from lmjax.jobs.tokenize_text import TokenizeText


def test_cleaned_text_is_tokenized_and_the_mixture_is_shown(tmp_path):
    for name, count in (("few", 20), ("many", 80)):
        lines = [json.dumps({"text": f"{name} {number:06} {'x' * 88}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    sources = tuple(
        Collection(name=name, source=JsonLines(path=str(tmp_path / f"{name}.jsonl")))
        for name in ("few", "many")
    )
    Cleaning(output=str(tmp_path / "clean"), sources=sources).run()

    def domain(name, weight):
        source = CleanedDocuments(path=str(tmp_path / "clean"), collection=name)
        return Domain(name=name, source=source, weight=weight)

    data = Data(
        train=(domain("few", 1), domain("many", 1)),
        tokenizer=Bytes(),
        held_out=0.1,
        cache=str(tmp_path / "cache"),
    )
    TokenizeText(output=str(tmp_path / "run"), data=data, tokens=20_000).run()
    prepared = prepare(data, tmp_path / "run" / "tokenizer")
    stores = prepared.train
    (table,) = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    rows = {row[0]: row[1:] for row in table["rows"]}
    for name, (tokens, share, epochs) in rows.items():
        assert tokens == stores[name].manifest.tokens
        assert share == 0.5 and epochs == pytest.approx(10_000 / tokens)
    assert rows["few"][2] > 4 > rows["many"][2]
    assert [note.split()[0] for note in table["notes"]] == ["few"]
    text = {stores["few"].text(n, prepared.tokenizer) for n in range(3)}
    assert all(one.startswith("few ") for one in text)
    with pytest.raises(UserError, match="tokens=-1"):
        TokenizeText(output="runs/a", data=data, tokens=-1.0)
