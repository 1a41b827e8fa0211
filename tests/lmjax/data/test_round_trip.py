"""What is said to be lost between a text and its tokens, against plain counts and distances."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from lmjax.data import round_trip
from lmjax.data.public_tokenizers import TokenizerFolder, read_tokenizer
from lmjax.data.round_trip import LITTLE, RoundTrip, lost_bytes
from lmjax.data.sources import JsonLines, JsonPrompts
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import Bytes, ByteTokenizer, Characters, Corpus
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer, TrainedBPE
from tests.lmjax.data.vocabulary_folders import GLM_GPT2, T5, gpt2_folder, put, trained

WORDS = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [*SPECIAL, "the", "quick", "brown", "fox", "jumps", "a", ".", "-"]


def distance(a, b):
    """The Levenshtein distance, by its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_lost_bytes_are_no_more_than_the_distance(a, b):
    assert (a != b) <= lost_bytes(a, b) <= distance(a, b)


@given(st.text(st.sampled_from("aÄß \n"), max_size=12))
def test_what_tokenizers_lose_is_counted_whole(text):
    """Deletions alone, insertions alone, and what no byte is lost by elsewhere."""
    data = text.encode()
    for changed in (text.lower(), text.replace("\n", " "), text.replace(" ", "")):
        assert lost_bytes(data, changed.encode()) == distance(data, changed.encode())


class Texts(Corpus):
    def __init__(self, texts):
        self.texts = texts

    def sample(self, size):
        yield from self.texts

    def everything(self):
        yield from self.texts


def stored(folder, texts, tokenizer, **settings):
    """The store of the texts, each a document."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    source = JsonLines(path=str(folder / "texts.jsonl"))
    return build_stores(source, tokenizer, folder / "store", **settings)["all"]


def bert(folder, pieces=PIECES, **settings):
    """A WordPiece tokenizer; by default uncased, as BERT's first one."""
    return read_tokenizer(
        put(folder, vocab_txt="\n".join(pieces) + "\n", tokenizer_config_json=settings)
    )


@pytest.mark.parametrize(
    "texts",
    [
        ["The quick  brown\n\tfox.", "Straße, 中文 and 🙂", " leading", "trailing \n"],
        ["a", "\u2581", "\r\n"],
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "characters", "trained", "byte pairs"])
def test_what_comes_back_has_bits_per_byte(tmp_path, kind, texts):
    if kind == "byte pairs":
        names = "[CLS]", "[SEP]", "[UNK]"
        folder = gpt2_folder(tmp_path / "glm", 400, GLM_GPT2, ["<|endoftext|>"], names)
        tokenizer = TokenizerFolder(path=str(folder)).build(Texts(texts))
    else:
        configs = {"bytes": Bytes(), "characters": Characters()}
        config = configs.get(kind, TrainedBPE(vocab_size=292))
        learnt = texts if kind != "trained" else [" ".join(WORDS)] * 20
        tokenizer = config.build(Texts(learnt))
    store = stored(tmp_path / "s", texts, tokenizer)
    trip = store.manifest.round_trip
    assert (trip.unknown, trip.lost, trip.example) == (0, 0, ())
    assert trip.compared == store.text_bytes == sum(len(text.encode()) for text in texts)
    assert store.not_comparable() == trip.note() == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_unknown_tokens_are_counted(tmp_path, workers):
    tokenizer = bert(tmp_path / "bert")
    texts = ["the quick cat", "dogs", "fox jumps."] * 40
    store = stored(tmp_path / "s", texts, tokenizer, workers=workers)
    ids = [token for text in texts for token in tokenizer.encode(text)]
    trip = store.manifest.round_trip
    assert trip.unknown_name == "[UNK]" and tokenizer.unknown == 1
    assert (trip.tokens, trip.unknown) == (len(ids), ids.count(1)) == (280, 80)
    assert store.manifest.largest == max(ids) == store.tokens.max()
    assert "28.6 percent of the tokens are unknown ([UNK])" in store.not_comparable()


def test_a_text_of_unknown_tokens_alone(tmp_path):
    store = stored(tmp_path / "s", ["Dog", "CAT cow"], bert(tmp_path / "bert"))
    trip = store.manifest.round_trip
    assert trip.unknown_share == trip.lost_share == 1
    assert "100 percent of the tokens" in store.not_comparable()


@pytest.mark.parametrize(
    ("text", "settings", "lost"),
    [
        ("the Quick Brown fox", {}, 2),
        ("the qu\u00edck fox", {}, 2),  # the accented letter has two bytes
        ("the quick\nfox", {}, 1),
        ("the  quick   fox", {}, 3),
        ("the quick-fox", {"do_lower_case": False}, 2),  # two spaces that were not there
    ],
)
def test_what_uncased_wordpiece_loses(tmp_path, text, settings, lost):
    store = stored(tmp_path / "s", [text], bert(tmp_path / "bert", **settings))
    trip = store.manifest.round_trip
    assert (trip.unknown, trip.lost) == (0, lost) and trip.compared == len(text.encode())
    assert trip.example and "do not come back from the tokens" in store.not_comparable()


def test_what_sentencepiece_loses(tmp_path):
    """T5's kind: white space is brought to single spaces, and other scripts are unknown."""
    tokenizer = SentencePieceTokenizer(trained(**T5), by_line=False)
    assert tokenizer.unknown == 2
    kept = stored(tmp_path / "kept", [" ".join(WORDS)] * 3, tokenizer)
    assert kept.not_comparable() == ""
    lines = stored(tmp_path / "lines", ["\n".join(WORDS)] * 3, tokenizer)
    assert lines.manifest.round_trip.lost == 3 * (len(WORDS) - 1)
    assert lines.manifest.round_trip.unknown == 0 and "do not come back" in lines.not_comparable()
    greek = stored(tmp_path / "greek", ["The fox \u03b1\u03b2\u03b3"], tokenizer)
    assert "<unk>" in greek.not_comparable()


@pytest.mark.parametrize(
    ("model", "unknown"),
    [
        (models.Unigram([("a", -1.0), ("?", -9.0)], unk_id=1), 1),
        (models.WordPiece({"?": 0, "a": 1}, unk_token="?"), 0),
        (models.WordLevel({"a": 0, "?": 1}, unk_token="?"), 1),
        (models.BPE({"a": 0, "?": 1}, [], unk_token="?"), 1),
        (models.BPE({"a": 0, "?": 1}, []), None),
    ],
)
def test_every_kind_of_library_file_names_it(model, unknown):
    tokenizer = Library(model)
    tokenizer.decoder = decoders.Metaspace()
    read = HuggingFaceTokenizer(tokenizer.to_str(), None, 0)
    assert read.unknown == unknown
    if unknown is not None:
        assert read.encode("\u4e2d") == [unknown]


@pytest.mark.parametrize("begins", [False, True])
def test_the_token_that_ends_a_document_may_be_the_unknown_one(tmp_path, begins):
    """GPT-2's kind as the library's tutorial makes it: every byte has a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: token for token, piece in enumerate([*alphabet, "<end>"])}
    library = Library(models.BPE(vocabulary, [], unk_token="<end>"))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<end>"])
    tokenizer = HuggingFaceTokenizer(library.to_str(), 256 if begins else None, 256)
    store = stored(tmp_path / "s", ["a text", "中"] * 5, tokenizer)
    trip = store.manifest.round_trip
    assert (trip.tokens, trip.unknown, trip.lost) == (5 * (6 + 3), 0, 0)
    assert store.not_comparable() == ""
    words = Library(models.WordLevel({"<end>": 0, "the": 1}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["<end>"])
    tokenizer = HuggingFaceTokenizer(words.to_str(), 0 if begins else None, 0)
    trip = stored(tmp_path / "w", ["the dog", "the the"], tokenizer).manifest.round_trip
    assert (trip.tokens, trip.unknown) == (4, 1)


def test_extended_tokenizers_know_what_is_unknown(tmp_path):
    inner = bert(tmp_path / "bert")
    assert ExtendedTokenizer(inner, ("<new>",)).unknown == inner.unknown
    assert ExtendedTokenizer(ByteTokenizer(), ("<new>",)).unknown is None


def test_the_pieces_of_an_answer_are_compared_apart(tmp_path):
    """A tokenizer that puts a space before every piece loses nothing by it."""
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    model = trained(**T5, vocab_size=400, byte_fallback=True, **exact)
    inner = SentencePieceTokenizer(model, by_line=False)
    tokenizer = ExtendedTokenizer(inner, ("[MASK]", "<eop>"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "The [MASK] jumps", "answer": "quick fox"}))
    source = JsonPrompts(path=str(path), closing="<eop>")
    store = build_stores(source, tokenizer, tmp_path / "store")["all"]
    trip = store.manifest.round_trip
    assert (trip.unknown, trip.lost) == (0, 0) and trip.compared == store.text_bytes
    assert trip.tokens == store.manifest.tokens - 3  # both marks and the end


def test_only_the_beginning_of_a_shard_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(round_trip, "COMPARED", 10)
    store = stored(tmp_path / "s", ["the Quick", "The fox", "The Fox"], bert(tmp_path / "bert"))
    trip = store.manifest.round_trip  # one shard: the first two documents
    assert (trip.compared, trip.lost) == (16, 2)


@pytest.mark.parametrize("lost", [0, 1, int(LITTLE * 10_000), int(LITTLE * 10_000) + 1])
def test_a_little_is_noted_and_more_is_withheld(lost):
    by_bytes = RoundTrip(100, 0, "", compared=10_000, lost=lost, example=("A", "a")[: 2 * lost])
    by_tokens = RoundTrip(10_000, lost, "<unk>", compared=10_000, lost=0, example=())
    for trip in (by_bytes, by_tokens):
        assert bool(trip.note()) == (lost > 0)
        assert bool(trip.not_comparable()) == (lost > LITTLE * 10_000)
