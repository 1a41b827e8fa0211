"""Tokenizers in model folders: the library's tokens, and the same tokenizer when read again."""

import base64
import io
import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.data.public_tokenizers import (
    HuggingFaceTokenizer,
    IceTokenizer,
    TiktokenTokenizer,
    TokenizerFolder,
    read_tokenizer,
)
from lmjax.data.special_tokens import ExtendedTokenizer
from lmjax.data.subwords import SentencePieceTokenizer, TrainedBPE
from lmjax.data.tokenizers import ByteTokenizer, CharacterTokenizer, Corpus
from lmjax.interop.tokenizer_files import end_ids, public_files
from tests.lmjax.data.vocabulary_folders import FOLDERS

TEXT = "The things of the list:\n\n    def f(x):\treturn  x+10  # ünï 漢字 🙂\n end  "
CHARACTERS = "".join(sorted(set(TEXT + "a\u2581")))
NEW = ("[NEW]", "qux", "<|endoftext|>2", "[NEWER]")


class Words(Corpus):
    """Enough text for a small vocabulary."""

    def sample(self, size):
        yield from ["the list of the things that the function returns, 10 of them\n" * 20, TEXT]

    def everything(self):
        yield TEXT


def like_llama():
    """A SentencePiece model of the kind of LLaMA's: a space comes before a text."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in Words().sample(0) for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return SentencePieceTokenizer(model.getvalue(), by_line=False)


def like_qwen():
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    return TiktokenTokenizer(b"\n".join([*lines, base64.b64encode(b"th") + b" 256"]))


def extended(tokenizer, names=NEW):
    """The tokenizer with new tokens, some of them behind others."""
    return ExtendedTokenizer(ExtendedTokenizer(tokenizer, names[:2]), names[2:])


TOKENIZERS = {
    "like LLaMA's": like_llama,
    "bytes": ByteTokenizer,
    "characters": lambda: CharacterTokenizer(CHARACTERS),
    "trained": lambda: TrainedBPE(vocab_size=330, coverage=1.0).build(Words()),
}
TOKENIZERS |= {
    f"{kind}, extended": lambda m=make: extended(m()) for kind, make in TOKENIZERS.items()
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_public_tokenizers_give_the_same_tokens(tmp_path, kind):
    """The `tokenizers` library, which transformers uses, beside the tokenizer itself."""
    library = pytest.importorskip("tokenizers", reason="needs pip install 'lmjax[tokenizers]'")
    tokenizer = TOKENIZERS[kind]()
    for name, data in public_files(tokenizer, 40)[0].items():
        (tmp_path / name).write_bytes(data)
    public = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [TEXT, "the things that", " ", "\n\n\t ", "  the   list"]
    if "characters" not in kind:
        texts += ["", "0123 é🙂", "<|endoftex"]
    if "trained" in kind:
        texts.append("the\u2581list \u2581 of")
    for text in texts:
        tokens = tokenizer.encode(text)
        found = public.encode(text).ids
        assert found == [tokenizer.begin, *tokens], text
        assert public.decode(found) == text
    for name, token in tokenizer.special.items():
        assert public.encode(f"f{name}", add_special_tokens=False).ids[-1] == token, name
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert public.token_to_id(said["eos_token"]) == tokenizer.end


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By name: a tokenizer, and what is read from the folder that it was written to."""
    root = tmp_path_factory.mktemp("folders")
    made = {name: read_tokenizer(make(root / name)) for name, make in FOLDERS.items()}
    made |= {"qwen": like_qwen(), **{name: TOKENIZERS[name]() for name in list(TOKENIZERS)[:4]}}
    made |= {f"{name}, extended": extended(tokenizer) for name, tokenizer in made.items()}
    found = {}
    for name, tokenizer in made.items():
        folder = root / f"{name}, written"
        folder.mkdir()
        for file, data in public_files(tokenizer, 40)[0].items():
            (folder / file).write_bytes(data)
        if name.startswith("t5"):  # the model's, whose type names tokens that no file need have
            (folder / "config.json").write_text('{"model_type": "t5"}')
        found[name] = tokenizer, read_tokenizer(folder)
    return found


def fitting(name, text):
    """What of a text the tokenizer does not refuse."""
    if "characters" in name:
        return "".join(character for character in text if character in CHARACTERS)
    return text


def test_written_and_read_again_tokens_mean_the_same(pairs):
    for name, (tokenizer, again) in pairs.items():
        assert dict(again.special) == dict(tokenizer.special), name
        assert again.vocab_size == tokenizer.vocab_size, name
        assert (again.begin, again.end) == (tokenizer.begin, tokenizer.end), name
        size = tokenizer.vocab_size
        for token in {*range(min(size, 400)), *range(max(0, size - 400), size)}:
            assert again.token_bytes(token) == tokenizer.token_bytes(token), (name, token)
    for name in FOLDERS:  # where nothing is added, it is one and the same
        assert pairs[name][1].fingerprint == pairs[name][0].fingerprint, name


@given(st.text() | st.text(st.sampled_from(" \n\tab中[NEW]<|quxendoft2>")))
@example("a\u2581b[NEW]a qux[MASK] [gMASK]<sop></s><|endoftext|>2<n><|tab|><0x41>  \n\t ")
def test_written_and_read_again_texts_have_the_same_tokens(pairs, text):
    for name, (tokenizer, again) in pairs.items():
        kept = fitting(name, text)
        tokens = tokenizer.encode(kept)
        assert again.encode(kept) == tokens, name
        assert again.decode(tokens) == tokenizer.decode(tokens), name
        assert again.encode_special(kept) == tokenizer.encode_special(kept), name


@pytest.mark.parametrize("name", ["characters", "characters, extended"])
def test_characters_that_a_tokenizer_lacks_are_refused_after_reading_too(pairs, name):
    """The library drops them without a word."""
    for tokenizer in pairs[name]:
        with pytest.raises(UserError, match="the character '☃' is not one of the"):
            tokenizer.encode("a list ☃")


@pytest.mark.parametrize(
    "name, images, roles",
    [
        ("glm-130b", 20_000, (150_004, 150_005, 150_000, 150_001, 20_003)),
        ("chatglm-6b", 0, (130_004, 130_005, 130_000, 130_001, 3)),
    ],
)
def test_icetk_is_written_as_chatglm_6b_has_it(pairs, tmp_path, name, images, roles):
    """The files and the ids of roles that its published folder has."""
    tokenizer = pairs[name][0]
    files, (note,) = public_files(tokenizer, 2048)
    assert set(files) == {"ice_text.model", "tokenizer_config.json"}
    assert "only lmjax reads it" in note
    said = json.loads(files["tokenizer_config.json"])
    assert said["num_image_tokens"] == images
    assert said["tokenizer_class"] == "ChatGLMTokenizer"
    assert (said["bos_token"], said["eos_token"]) == ("<sop>", "<eop>")
    kinds = ("bos", "eos", "mask", "gmask", "pad")
    expected = {f"{kind}_token_id": token for kind, token in zip(kinds, roles, strict=True)}
    assert end_ids(tokenizer) == end_ids(extended(tokenizer)) == expected
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    assert isinstance(read_tokenizer(tmp_path), IceTokenizer)
    assert TokenizerFolder(path=str(tmp_path)).origin() == tokenizer.fingerprint


def test_what_transformers_cannot_read_is_said():
    files, notes = public_files(like_qwen(), 40)
    assert set(files) == {"qwen.tiktoken"} and "only lmjax reads it" in notes[0]


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens.json": {"[NEW]": 467}}, "'[NEW]' has the id 467, but the next id is 465"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"465": {"content": "x"}}}},
            None,
        ),
        (
            {
                "tokenizer_config.json": {
                    "added_tokens_decoder": {"465": {"content": "x", "special": False}}
                }
            },
            "the added token 'x' is text, not special",
        ),
    ],
)
def test_what_a_folder_adds_to_qwens_tokens(tmp_path, files, message):
    (tmp_path / "qwen.tiktoken").write_bytes(like_qwen().files()["qwen.tiktoken"])
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if message is None:
        assert read_tokenizer(tmp_path).special["x"] == 465
        return
    with pytest.raises(UserError, match=re.escape(message)):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bytes", "characters", "like LLaMA's", "glm-10b", "glm-130b"])
def test_a_new_token_with_the_name_of_a_piece_is_left_out_and_it_is_said(pairs, name):
    """In a file one of the two would take the other's place."""
    piece = "Ġthe" if name == "glm-10b" else "e"
    files, (note,) = public_files(extended(pairs[name][0], ("[NEW]", "qux", piece)), 40)
    assert not files
    assert f"the tokenizer was left out: '{piece}' is a piece of text too" in note


def test_new_tokens_behind_a_vocabulary_with_gaps_are_left_out_and_it_is_said(pairs):
    data = json.loads(pairs["glm-10b"][0].files()["huggingface.json"])
    data["model"]["vocab"]["far"] = 60_000
    tokenizer = HuggingFaceTokenizer(json.dumps(data), None, pairs["glm-10b"][0].end)
    files, (note,) = public_files(extended(tokenizer), 40)
    assert not files
    assert "the tokenizer was left out: its ids have gaps" in note and "'[NEW]'" in note
