"""Special tokens behind a vocabulary: same ids for text, kept with the run, and mistakes."""

import numpy as np
import pytest

from lmjax.config import UserError
from lmjax.data import Bytes, Characters, WithTokens, load_tokenizer
from lmjax.data.tokenizers import Corpus
from lmjax.objectives import TokenTable

NAMES = ("[MASK]", "<|startofpiece|>", "<|endofpiece|>")


class Texts(Corpus):
    def sample(self, size):
        return iter(["some text"])

    def everything(self):
        return iter(["some text"])


@pytest.mark.parametrize("inner", [Bytes(), Characters()])
def test_text_keeps_its_ids_and_no_text_makes_the_new_ones(inner, tmp_path):
    plain = inner.build(Texts())
    config = WithTokens(tokenizer=inner, tokens=NAMES)
    tokenizer = config.build(Texts())
    assert tokenizer.vocab_size == plain.vocab_size + 3
    assert [tokenizer.special[name] for name in NAMES] == [
        *range(plain.vocab_size, plain.vocab_size + 3)
    ]
    assert (tokenizer.begin, tokenizer.end) == (plain.begin, plain.end)
    assert tokenizer.encode("some text") == plain.encode("some text")
    mask = tokenizer.special["[MASK]"]
    ids = tokenizer.encode_special("some[MASK]text")
    assert ids == [*plain.encode("some"), mask, *plain.encode("text")]
    assert tokenizer.decode(ids) == "sometext" and tokenizer.token_bytes(mask) == b""
    if inner == Bytes():
        assert mask not in tokenizer.encode("[MASK]")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_special("some[MASK]text") == ids
    assert loaded.fingerprint == tokenizer.fingerprint != plain.fingerprint


def test_what_is_there_already_is_not_added_again():
    with pytest.raises(UserError, match=r"has <\|endoftext\|> already"):
        WithTokens(tokenizer=Bytes(), tokens=("<|endoftext|>",)).build(Texts())


@pytest.mark.parametrize("tokens", [(), ("[MASK]", "[MASK]"), ("",)])
def test_names_are_needed_once_each(tokens):
    with pytest.raises(UserError, match="each of them once"):
        WithTokens(tokenizer=Bytes(), tokens=tokens)


def test_other_tokens_or_another_tokenizer_are_another_origin():
    configs = [
        WithTokens(tokenizer=Bytes(), tokens=NAMES),
        WithTokens(tokenizer=Bytes(), tokens=NAMES[:2]),
        Bytes(),
    ]
    assert len({config.origin() for config in configs}) == 3
    assert WithTokens(tokenizer=Characters(), tokens=NAMES).origin() is None


def test_a_lexicon_knows_words_and_sentences_of_bytes():
    lexicon = TokenTable.of(WithTokens(tokenizer=Bytes(), tokens=NAMES).build(Texts()))
    assert lexicon.words.tolist() == list(range(256))
    assert {chr(token) for token in lexicon.ends_sentence.nonzero()[0]} == set(".?!;:\n")
    text = np.array([256, *b"Two  words,\n one end", 256, 257])
    begins = lexicon.begins(text)
    words = [
        bytes(word[word < 256].tolist()) for word in np.split(text, np.flatnonzero(begins)[1:])
    ]
    assert words == [b"", b"Two", b"  words,", b"\n one", b" end", b"", b""]
    assert lexicon.token("[MASK]") == 257
    with pytest.raises(UserError, match=r"'\[gMASK\]', which the tokenizer lacks.*WithTokens"):
        lexicon.token("[gMASK]")
