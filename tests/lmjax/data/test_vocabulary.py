"""New tokens behind a SentencePiece vocabulary: old ids stay, new words become one token."""

import io

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.tokenizers import Bytes, Corpus, MergedVocabulary, SentencePiece, load_tokenizer
from lmjax.data.tokenizers.subwords import MODEL_FILE, SentencePieceTokenizer, TrainedBPE
from lmjax.data.tokenizers.vocabulary import add_words, merge_tokenizers, old_pieces

ENGLISH = ["the cat sat on the mat and the dog ran", "a theory of the thing that is there"] * 20
CHINESE = ["中国人工智能研究中国人民", "人工智能与中国的智能人民", "研究人民的智能"] * 20


def train(texts, size, **settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=size,
        minloglevel=3,
        **{"model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0} | settings,
    )
    return SentencePieceTokenizer(model.getvalue(), by_line=False)


@pytest.fixture(scope="module")
def english():
    """As LLaMA's: byte fallback, a space before the text, text not normalised."""
    return train(ENGLISH, 310, normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(scope="module")
def chinese():
    return train(CHINESE, 60, byte_fallback=False)


WORDS = ["中", "国", "中国", "人工智能", " theory and", "the"]


def test_a_word_becomes_one_token(english):
    new = add_words(english, WORDS)
    names = [new._processor.id_to_piece(token) for token in range(new.vocab_size)]
    for word in WORDS[:4]:
        tokens = new.encode(f"人{word}。")
        assert names.index(word) in tokens
        assert new.decode(tokens) == f"人{word}。"
    assert len(new.encode("人工智能")) == 2  # the space before a text, and the word
    assert names.index("▁theory▁and") in new.encode(" a theory and the")
    assert len(names) == len(set(names))


def test_a_word_is_added_as_texts_are_normalised():
    new = add_words(train(ENGLISH, 310, normalization_rule_name="nfkc"), ["ﬁﬂ"])  # ligatures
    assert new.decode(new.encode("ﬁﬂ")[-1:]) == "fifl"


def test_old_ids_stay(english):
    new = add_words(english, WORDS)
    assert new.vocab_size > english.vocab_size
    assert (new.begin, new.end, new.special) == (english.begin, english.end, english.special)
    for token in range(english.vocab_size):
        assert new.token_bytes(token) == english.token_bytes(token)


@given(text=st.text(st.sampled_from("the catdogsmrn'.\n 鱼é😀")))
@example("the cat  sat on the\n mat")
def test_texts_without_the_new_words_keep_their_ids(english, text):
    new = add_words(english, ["中国", "智", "zebra"])
    assert new.encode(text) == english.encode(text)


def test_merging_adds_what_is_not_there(english, chinese):
    new = merge_tokenizers(english, chinese)
    theirs = {chinese._processor.id_to_piece(token) for token in range(chinese.vocab_size)}
    ours = [new._processor.id_to_piece(token) for token in range(new.vocab_size)]
    assert set(ours[english.vocab_size :]) == theirs - set(ours[: english.vocab_size])
    text = CHINESE[0]
    assert new.encode(text) != english.encode(text)
    cut = chinese._processor.encode(text, out_type=str)
    assert [ours[token] for token in new.encode(text)] == cut
    assert new.decode(new.encode(text)) == text


def test_old_pieces_spell_the_new_tokens(english):
    new = add_words(english, ["鱼", "catdog", " catdog", "人工"])
    spelt = old_pieces(english, new)
    assert len(spelt) == new.vocab_size - english.vocab_size
    for token, pieces in enumerate(spelt, english.vocab_size):
        joined = b"".join(map(english.token_bytes, pieces))
        assert joined == new.token_bytes(token)
        assert pieces
    assert len(spelt[0]) == 3  # bytes of one character, no space before them
    with pytest.raises(UserError, match="keep the ids"):
        old_pieces(new, train(CHINESE, 60, byte_fallback=False))


def test_it_can_be_saved(english, tmp_path):
    new = add_words(english, ["中国"])
    new.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("中国") == new.encode("中国")
    assert (tmp_path / MODEL_FILE).read_bytes() != english.files()[MODEL_FILE]


@given(text=st.text(st.sampled_from("the catsmn.\n\t中国人工智能\u2581<>|é😀")) | st.text())
def test_a_tokenizer_of_ours_still_gives_every_text_back(ours, text):
    assert ours.decode(ours.encode(text)) == text


@pytest.fixture(scope="module")
def ours(chinese):
    class Texts(Corpus):
        def sample(self, size):
            return iter(ENGLISH)

        def everything(self):
            return iter(ENGLISH)

    return merge_tokenizers(add_words(TrainedBPE(vocab_size=300).build(Texts()), WORDS), chinese)


def test_mistakes(english):
    for word in ("", "a\nb"):
        with pytest.raises(UserError, match="cannot make a token"):
            add_words(english, [word])
    unigram = train(ENGLISH, 40, model_type="unigram", byte_fallback=False, hard_vocab_limit=False)
    with pytest.raises(UserError, match="byte-pair"):
        add_words(unigram, ["a"])
    with pytest.raises(UserError, match="byte-pair"):
        merge_tokenizers(english, unigram)


def test_a_vocabulary_learnt_from_the_text(english, tmp_path):
    """Old ids stay, new tokens come from the text, and there are no more than were asked for."""
    (tmp_path / "old.model").write_bytes(english.files()[MODEL_FILE])

    class Texts(Corpus):
        def sample(self, size):
            return iter(CHINESE)

        def everything(self):
            return iter(CHINESE)

    old = SentencePiece(path=str(tmp_path / "old.model"))
    learnt = TrainedBPE(vocab_size=290)
    merged = MergedVocabulary(tokenizer=old, learnt=learnt, vocab_size=326)
    new = merged.build(Texts())
    assert new.vocab_size == 326
    assert new.encode(ENGLISH[0]) == english.encode(ENGLISH[0])
    assert len(new.encode(CHINESE[0])) < len(english.encode(CHINESE[0])) / 3
    assert new.decode(new.encode(CHINESE[0])) == CHINESE[0]
    assert len(old_pieces(english, new)) == 326 - english.vocab_size
    with pytest.raises(UserError, match="vocab_size=300: the old tokenizer has 310 tokens already"):
        replace(merged, vocab_size=300).build(Texts())
    with pytest.raises(UserError, match="tokenizer=Bytes: only a SentencePiece model"):
        replace(merged, tokenizer=Bytes()).build(Texts())
