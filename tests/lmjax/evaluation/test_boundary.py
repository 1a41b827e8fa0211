"""The boundary of context and continuation: nothing is lost, nothing is put twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from lmjax.evaluation.boundary import beginning_of, text_tokens, token_pairs
from lmjax.evaluation.requests import ContinuationRequest

tokenizers = pytest.importorskip("tokenizers")
TEXT = "Question: is naïve 漢字 here?\nAnswer: it is, at  the end\n\n"


def trained(whole_words=True, opening=()):
    """Byte-pair encoding; without words, tokens hold spaces, newlines and parts of characters."""
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=whole_words)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT, TEXT.upper()] * 3, trainer)
    return HuggingFaceTokenizer(tokenizer, opening[0] if opening else None, 1, opening, ())


WORDS, ACROSS, BEGUN = trained(), trained(whole_words=False), trained(opening=(0,))


def pair(tokenizer, context, continuation, special=False):
    request = ContinuationRequest(context, continuation, special)
    return token_pairs(tokenizer, [request], beginning_of(tokenizer))[0]


def moved(context, continuation):
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


@pytest.mark.parametrize("tokenizer", [WORDS, ACROSS, BEGUN], ids=["words", "across", "begun"])
@pytest.mark.parametrize("cut", range(len(TEXT)))
def test_every_cut_covers_the_continuation(tokenizer, cut):
    """Also where a token spans the boundary: then it is scored."""
    context, continuation = pair(tokenizer, TEXT[:cut], TEXT[cut:])
    _, wanted = moved(TEXT[:cut], TEXT[cut:])
    scored = b"".join(map(tokenizer.token_bytes, continuation))
    assert continuation and scored.endswith(wanted.encode())
    whole = b"".join(map(tokenizer.token_bytes, [*context, *continuation]))
    assert whole == TEXT.encode()
    first = len(tokenizer.token_bytes(continuation[0]))
    assert len(scored) - len(wanted.encode()) < first  # no more than one token of the context


@given(st.text("ab \nQ:", min_size=1, max_size=12), st.text("ab \nA", min_size=1, max_size=8))
def test_as_the_harness_cuts_where_no_token_spans_the_boundary(context, continuation):
    kept, after = moved(context, continuation)
    whole, alone = WORDS.encode(kept + after), WORDS.encode(kept)
    if not kept or whole[: len(alone)] != alone:
        return
    found = pair(WORDS, context, continuation)
    assert (list(found.context), list(found.continuation)) == (alone, whole[len(alone) :])


def test_white_space_at_the_end_of_a_context_is_the_continuations():
    for space in (" ", "\n", "\n\n", "\u3000"):
        assert pair(WORDS, f"Answer:{space}", "it") == pair(WORDS, "Answer:", f"{space}it")


def test_one_token_begins_a_text():
    begun = BEGUN.special["<s>"]
    for context in ("", " ", " \n", "is"):
        found = pair(BEGUN, context, " it")
        assert found.context[0] == begun and found.context.count(begun) == 1
        assert begun not in found.continuation
    # The end of the text before, where nothing begins one; or the token that a folder names.
    assert pair(WORDS, "", "it").context == (WORDS.end,)
    request = [ContinuationRequest("", "it")]
    assert token_pairs(WORDS, request, beginning_of(WORDS, 0))[0].context == (0,)
    assert pair(ByteTokenizer(), "", "it").context == (256,)
    marked = text_tokens(BEGUN, "<s> is", special=True)
    assert marked == [begun, *BEGUN.encode(" is")] == [begun, *marked[1:]]
    assert pair(BEGUN, "<s><|user|>is<|assistant|>", "it", special=True).context.count(begun) == 1


def test_the_newline_that_opens_a_reply_is_context():
    names = WORDS.special
    found = pair(WORDS, "<|user|>is it?\n<|assistant|>\n", "it is", special=True)
    assert found.context[0] == names["<|user|>"]
    assert found.context[-2:] == (names["<|assistant|>"], *WORDS.encode("\n"))
    assert list(found.continuation) == WORDS.encode("it is")


def test_names_of_special_tokens_are_text_in_answers():
    found = pair(WORDS, "<|user|>is it?", "</s>", special=True)
    assert WORDS.special["</s>"] not in found.continuation
    plain = pair(WORDS, "</s> is", " it")
    assert WORDS.special["</s>"] not in plain.context


def test_a_continuation_without_a_token_is_refused():
    with pytest.raises(UserError, match="makes no token of the continuation"):
        pair(WORDS, "is", "")
