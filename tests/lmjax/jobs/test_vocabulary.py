"""Tokens that a tokenizer has and the model lacks: they may, as long as no text has them."""

import pytest

from lmjax.config import UserError
from lmjax.data import Bytes, Data, Domain, TextFiles, WithTokens, prepare
from lmjax.jobs.text import check_vocabulary

SIZE = 257  # of the bytes and their separator


@pytest.fixture(scope="module", params=[0, 1, 7])
def prepared(request, tmp_path_factory):
    """A text, and a tokenizer with some tokens that it does not have."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("one\ntwo\nthree\nfour\n")
    names = tuple(f"<{n}>" for n in range(request.param))
    data = Data(
        train=(Domain(name="lines", source=TextFiles(path=f"{folder}/a.txt", split="line")),),
        tokenizer=WithTokens(tokenizer=Bytes(), tokens=names) if names else Bytes(),
        held_out=0.0,
        cache=f"{folder}/cache",
    )
    return names, prepare(data, folder / "run")


def test_what_no_text_has_is_a_warning(prepared):
    names, prepared = prepared
    told = []
    check_vocabulary(prepared, SIZE, told.append)
    if not names:
        assert told == []
        return
    (words,) = told
    assert f"has {SIZE + len(names)} tokens, more than the 257 of the model" in words
    assert all(f"{name!r} ({SIZE + n})" in words for n, name in enumerate(names[:5]))
    assert ("and 2 more" in words) == (len(names) > 5)


@pytest.mark.parametrize("vocab_size", [1, 100, 256])
def test_what_a_text_has_is_an_error(prepared, vocab_size):
    names, prepared = prepared
    size = SIZE + len(names)
    with pytest.raises(UserError, match=rf"lines has the token 256: set model\.vocab_size={size}"):
        check_vocabulary(prepared, vocab_size, print)


def test_a_model_may_have_more(prepared):
    told = []
    check_vocabulary(prepared[1], 300, told.append)
    assert told == []
