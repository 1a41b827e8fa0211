"""Every kind of tokenizer, written for transformers and read there: two thousand real texts.

transformers is the extra parity, on Python 3.11; elsewhere its library `tokenizers` reads the file.
"""

import os

import pytest
from sentencepiece import sentencepiece_model_pb2

from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer
from lmjax.interop.tokenizer_files import public_files
from tests.lmjax.data.real_strings import real_strings
from tests.lmjax.interop.tokenizer_kinds import CHARACTERS, KINDS, PUBLIC, tokenizer_of

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
library = pytest.importorskip("tokenizers", reason="needs pip install 'lmjax[tokenizers]'")
try:
    import transformers
except ImportError:  # on Python 3.12
    transformers = None

SLOW = ("glm-130b", "like Llama 4")  # replace each length of spaces, look for 2,048 names
CLOSED = ("glm-10b", "bert-base-uncased")  # their files put a token behind a text
# With pieces that only fill the vocabulary up, and whose characters are no pieces: where names of
# special tokens are to be text, the library takes some for the tokens.
FILLED = ("chatglm3-6b", "t5-base", "glm-130b")
TIES = 0.03  # share of texts that a Unigram model may cut otherwise, in an equally likely way


class Theirs:
    """A folder as transformers or its library reads it."""

    def __init__(self, folder):
        if transformers is None:
            file = str(folder / "tokenizer.json")
            self._tokenizer, self._apart = (library.Tokenizer.from_file(file) for _ in "12")
            self._apart.encode_special_tokens = True
        else:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(self, texts):
        """With what is put around a text; names of special tokens become these."""
        if transformers is None:
            return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        return self._tokenizer(texts)["input_ids"]

    def encode_text(self, texts):
        """Names of special tokens are text, and nothing is put around it."""
        if transformers is None:
            encodings = self._apart.encode_batch(texts, add_special_tokens=False)
            return [encoding.ids for encoding in encodings]
        how = {"add_special_tokens": False, "split_special_tokens": True}
        return self._tokenizer(texts, **how)["input_ids"]

    def decode(self, ids):
        if transformers is None:
            return self._tokenizer.decode_batch(ids)
        return self._tokenizer.batch_decode(ids, skip_special_tokens=True)


def write(tokenizer, folder, **how):
    """The files of a tokenizer in a folder; what is said of them."""
    folder.mkdir(exist_ok=True)
    files, notes = public_files(tokenizer, 10**6, **how)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return notes


def texts_for(name):
    """All texts that it does not refuse; of what is slow, or no kind of its own, a part."""
    texts = list(real_strings())
    if name in SLOW:
        return texts[::20]
    if "extended" in name or name in PUBLIC:
        texts = texts[::4]
    if name.startswith("characters") and "SentencePiece" not in name:
        return ["".join(c for c in text if c in CHARACTERS) for text in texts]
    return texts


def assert_same(tokenizer, texts, found, expected):
    """Equal ids, but for ways to cut a text that a Unigram model finds equally likely.

    SentencePiece adds scores up in float32, the library in float64. So of the orders in which a run
    of one sign can be cut into the same pieces, they take another one in some texts, and where two
    ways differ by less than the rounding of the sum, the other way.
    """
    other = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    if scores := unigram_scores(tokenizer):
        assert len(other) <= TIES * len(texts), [texts[i] for i in other]
        for i in other:
            sums = [sum(map(scores.__getitem__, ids)) for ids in (found[i], expected[i])]
            assert sums[0] == pytest.approx(sums[1], rel=1e-6), texts[i]
            assert tokenizer.decode(found[i]) == tokenizer.decode(expected[i])
        return
    assert not other, [(texts[i], found[i], expected[i]) for i in other[:3]]


def unigram_scores(tokenizer):
    """The scores of a SentencePiece Unigram model's pieces, those of special tokens too; else None.

    Unknown characters and bytes have one each, and there are as many in every way to cut a text.
    """
    inner = getattr(tokenizer, "inner", tokenizer)
    inner = getattr(inner, "inner", inner)
    if not isinstance(inner, SentencePieceTokenizer):
        return None
    model = sentencepiece_model_pb2.ModelProto.FromString(inner.files()["sentencepiece.model"])
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        return None
    scores = [piece.score if piece.type == piece.NORMAL else 0.0 for piece in model.pieces]
    return scores + [0.0] * (tokenizer.vocab_size - len(scores))


# Of each normaliser, rule and format one; all of them are among the slow tests.
FAST = (
    *("ours", "bytes", "characters", "like Qwen", "like Llama 3", "tekken", "like Gemma"),
    *("like mT5", "like XLNet", "byte pairs", "byte pairs, space behind", "like LLaMA"),
    *("unigram, space behind", "like T5, extended", "like Qwen, extended", "ours, extended"),
    *("characters of SentencePiece", "glm-10b", "bert-base-uncased"),
)


@pytest.mark.parametrize(
    "name, every",
    [
        *((name, 20) for name in FAST),
        *(pytest.param(name, 6, marks=pytest.mark.slow) for name in (*KINDS, *PUBLIC)),
    ],
)
def test_transformers_gives_the_same_ids(tmp_path, name, every):
    """With special tokens in the text and with their names as text, and back to text."""
    tokenizer, texts = tokenizer_of(name), texts_for(name)[::every]
    notes = write(tokenizer, tmp_path / "written")
    assert not [note for note in notes if "only lmjax" in note]
    theirs = Theirs(tmp_path / "written")
    own = tokenizer.closing if name in CLOSED else ()  # by the folder's program
    expected = [[*tokenizer.opening, *tokenizer.encode_special(text), *own] for text in texts]
    assert_same(tokenizer, texts, theirs.encode(texts), expected)
    ids = tokenizer.encode_batch(texts)
    assert theirs.decode(ids) == [tokenizer.decode(tokens) for tokens in ids]
    if name not in FILLED:
        assert_same(tokenizer, texts, theirs.encode_text(texts), ids)
    # What is written is read here as the same tokenizer.
    again = read_tokenizer(tmp_path / "written")
    assert_same(tokenizer, texts, again.encode_batch(texts), ids)
    assert [again.decode(tokens) for tokens in ids] == [tokenizer.decode(t) for t in ids]
    assert (again.opening, again.closing, again.begin, again.end) == (
        *(tokenizer.opening, tokenizer.closing),
        *(tokenizer.begin, tokenizer.end),
    )
    assert dict(again.special) == dict(tokenizer.special)
    assert again.vocab_size == tokenizer.vocab_size
