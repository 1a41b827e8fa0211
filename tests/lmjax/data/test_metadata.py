"""Metadata of documents: kept as the source has it, found by number, and nowhere else."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError, config, replace
from lmjax.data import JsonLines, JsonPrompts, TextFiles, build_stores, metadata
from lmjax.data.documents import Document, Part, Source, digest
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer

BYTES = ByteTokenizer()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=4,
)


@settings(max_examples=30)
@given(
    lines=st.lists(st.dictionaries(st.sampled_from(["url", "a", "b"]), JSON), min_size=1),
    block=st.integers(1, 5),
    data=st.data(),
)
def test_every_document_has_its_own(tmp_path_factory, lines, block, data):
    folder = tmp_path_factory.mktemp("metadata")
    for start in range(0, len(lines), 4):  # a shard each
        written = [json.dumps({"text": "words", **line}) for line in lines[start : start + 4]]
        (folder / f"{start:04d}.jsonl").write_text("\n".join(written))
    source = JsonLines(path=f"{folder}/*.jsonl", metadata=("url", "b"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metadata, "BLOCK", block)
        store = build_stores(source, BYTES, folder / "store")["all"]
    expected = [{k: v for k, v in line.items() if k in ("url", "b")} for line in lines]
    assert (store.folder / "metadata.bin").exists() == any(expected)
    order = data.draw(st.permutations(range(len(lines))))
    for each in (store, pickle.loads(pickle.dumps(store))):
        assert [each.metadata(n) for n in order] == [expected[n] for n in order]
    for number in (-1, len(lines)):
        with pytest.raises(UserError, match=rf"document={number}: .* the documents 0 to"):
            store.metadata(number)


@pytest.mark.parametrize("workers", [0, 2])
def test_splits_keep_their_own_and_any_number_of_workers_the_same(tmp_path, workers):
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"text {n}", "url": f"https://example.org/{n}"} for n in range(3000)]
    path.write_text("\n".join(map(json.dumps, lines)))
    source = JsonLines(path=str(path), metadata=("url",))
    stores = build_stores(source, BYTES, tmp_path / "s", held_out=0.4, workers=workers)
    sizes = [(store.folder / "metadata.bin").stat().st_size for store in stores.values()]
    assert sum(sizes) < 0.2 * sum(len(json.dumps(line["url"])) for line in lines)
    for store in stores.values():
        assert store.manifest.documents > 1024  # several blocks
        for n in range(store.manifest.documents):
            number = store.text(n, BYTES).removeprefix("text ")
            assert store.metadata(n) == {"url": f"https://example.org/{number}"}


def test_prompts_have_metadata_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Why?", "answer": "Because.", "score": 0.5}')
    tokenizer = ExtendedTokenizer(BYTES, ("[MASK]", "<|endofpiece|>"))
    source = JsonPrompts(path=str(path), metadata=("score", "url"))
    assert build_stores(source, tokenizer, tmp_path / "s")["all"].metadata(0) == {"score": 0.5}


def test_without_new_settings_nothing_is_kept_and_texts_are_known_as_before(tmp_path):
    """The fingerprints of the settings as they were before there were `metadata` and `longest`."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "text", "url": "x"}\n')
    source = JsonLines(path=str(path), field="t")
    store = build_stores(source, BYTES, tmp_path / "s")["all"]
    assert store.metadata(0) == {} and not list(store.folder.glob("metadata*"))
    metadata, longest = {"metadata": ("url",)}, {"longest": 5}
    for known, before, new in (
        ("7393e279071f", source, (metadata, longest)),
        ("2cee8767f41c", JsonPrompts(path=str(path)), (metadata, longest)),
        ("e564e9147d3a", TextFiles(path=str(path), split="line"), (longest,)),
    ):
        assert before.fingerprint(lambda files: ["held"]) == digest(known, "held")
        for setting in new:
            after = replace(before, **setting)
            assert after.fingerprint(lambda files: ["held"]) != digest(known, "held")


@config
class Wrong(Source):
    def parts(self):
        return (Part("one"),)

    def read(self, part, on_skip):
        yield Document("text", "document 1", metadata={"score": {1, 2}})


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match=r"document 1: the metadata .* has to be JSON: .* set "):
        build_stores(Wrong(), BYTES, tmp_path / "s")
    for wrong in (("url", "url"), ("",)):
        with pytest.raises(UserError, match="give each field's name, once"):
            JsonLines(path="a.jsonl", metadata=wrong)
