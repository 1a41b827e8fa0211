"""What is written for a tokenizer: any text, settings, ends, and what has no file and is said."""

import json
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from lmjax.config import UserError
from lmjax.data.public_tokenizers import (
    HuggingFaceTokenizer,
    IceTokenizer,
    TiktokenTokenizer,
    TokenizerFolder,
    read_tokenizer,
)
from lmjax.data.tokenizers import ByteTokenizer
from lmjax.data.tokenizers.special_tokens import ExtendedTokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer
from lmjax.data.tokenizers.tiktoken_programs import TEKKEN
from lmjax.interop.tokenizer_files import end_ids, own_class_notes, public_files
from tests.lmjax.interop.tokenizer_kinds import (
    CHARACTERS,
    SENTENCEPIECE,
    extended,
    table,
    tokenizer_of,
    trained,
)

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
pytest.importorskip("tokenizers", reason="needs pip install 'lmjax[tokenizers]'")
NAMES = (
    *("ours", "bytes", "characters", "like Qwen", "tekken", "like Gemma", "like mT5"),
    *("like LLaMA with symbols", "byte pairs, space behind"),
)
COPIED = ("glm-10b", "bert-base-uncased")  # from public folders


def written(tokenizer, folder, **how):
    """The folder with what is written for a tokenizer, and what is said of it."""
    folder.mkdir()
    files, notes = public_files(tokenizer, 40, **how)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder, notes


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """By name: a tokenizer, and what is read from the folder that it was written to."""
    root = tmp_path_factory.mktemp("folders")
    made = {name: tokenizer_of(name) for name in NAMES}
    made |= {f"{name}, extended": extended(tokenizer) for name, tokenizer in made.items()}
    made |= {name: tokenizer_of(name) for name in COPIED}
    return {
        name: (tokenizer, read_tokenizer(written(tokenizer, root / name)[0]))
        for name, tokenizer in made.items()
    }


def fitting(name, text):
    """What of a text the tokenizer does not refuse."""
    if name.startswith("characters"):
        return "".join(character for character in text if character in CHARACTERS)
    return text


def test_written_and_read_again_tokens_mean_the_same(pairs):
    for name, (tokenizer, again) in pairs.items():
        assert dict(again.special) == dict(tokenizer.special), name
        assert again.vocab_size == tokenizer.vocab_size, name
        size = tokenizer.vocab_size
        for token in {*range(min(size, 400)), *range(max(0, size - 400), size)}:
            assert again.token_bytes(token) == tokenizer.token_bytes(token), (name, token)
    for name in COPIED:
        assert pairs[name][1].fingerprint == pairs[name][0].fingerprint, name


@settings(max_examples=30)
@given(st.text() | st.text(st.sampled_from(" \n\tab中[NEW]<|quxendoft2>\u2581\u0301Ａ①")))
@example("a\u2581b[NEW]a qux[MASK] [gMASK]<sop></s><|endoftext|>2<n><|tab|><0x41>  \n\t ")
@example("<sep>")
@example(" <sep> abc\n\n①中文")
@example("\x01")
@example("\u2581")
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
        with pytest.raises(UserError, match="the character 'ꙮ' is not one of the"):
            tokenizer.encode("a list ꙮ")


SETTINGS = {
    "bytes": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True},
    "like LLaMA": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "like Qwen": {"eos_token": "<|endoftext|>", "add_bos_token": False},
    "like T5": {"eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": False},
    "like XLNet": {"cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"},
    "bert-base-uncased": {"bos_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_say_what_the_tokenizer_does(name, tmp_path):
    tokenizer = tokenizer_of(name)
    files, _ = public_files(tokenizer, 40)
    said, file = (json.loads(files[f"tokenizer{end}.json"]) for end in ("_config", ""))
    assert {key: said.get(key) for key in SETTINGS[name]} == SETTINGS[name]
    # No other class obeys the whole of a tokenizer.json.
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["model_max_length"] == 40 and said["clean_up_tokenization_spaces"] is False
    segments = ["token_type_ids"] if "bert" in name else []
    assert said["model_input_names"] == ["input_ids", *segments, "attention_mask"]
    if "bert" not in name:
        assert said["add_bos_token"] == (tokenizer.begin is not None)
        assert said["add_eos_token"] is False
    assert ("bos_token" in said) == (tokenizer.begin is not None)
    assert (file["post_processor"] is not None) == (tokenizer.begin is not None)
    assert "model_max_length" not in json.loads(
        public_files(tokenizer, None)[0]["tokenizer_config.json"]
    )


def test_texts_of_an_encoder_are_closed(tmp_path):
    """T5's, in what transformers and lmjax read."""
    transformers = pytest.importorskip("transformers", reason="the extra parity, on Python 3.11")
    tokenizer = tokenizer_of("like T5")
    folder, _ = written(tokenizer, tmp_path / "t5", closed=True)
    ids = transformers.AutoTokenizer.from_pretrained(folder)("a text")["input_ids"]
    assert ids == [*tokenizer.encode("a text"), tokenizer.end]
    again = read_tokenizer(folder)
    assert (again.begin, again.closing, again.end) == (None, (tokenizer.end,), tokenizer.end)
    # Where one token stands between documents there is none behind a text.
    folder, _ = written(ByteTokenizer(), tmp_path / "bytes", closed=True)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == [256, 97]


def test_a_class_that_transformers_takes_whatever_is_said_is_told_of(tmp_path):
    """Qwen2's, for models of this type: with its own tokenizer the ids are equal."""
    transformers = pytest.importorskip("transformers", reason="the extra parity, on Python 3.11")
    text = "The 123 things: 漢字, don't\n\n  x"
    for name, is_told in (("like Qwen", False), ("ours", True)):
        tokenizer = tokenizer_of(name)
        folder, _ = written(tokenizer, tmp_path / name)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        assert own_class_notes(folder) == []
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
        notes = own_class_notes(folder)
        assert bool(notes) == is_told
        expected = [*tokenizer.opening, *tokenizer.encode(text)]
        found = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert (found != expected) == is_told
        whole = transformers.PreTrainedTokenizerFast.from_pretrained(folder)  # what is advised
        assert whole(text)["input_ids"] == expected
    assert "PreTrainedTokenizerFast.from_pretrained(FOLDER)" in notes[0]
    assert own_class_notes(tmp_path) == []


@pytest.mark.parametrize(
    "name, images, roles",
    [
        pytest.param(
            *("glm-130b", 20_000, (150_004, 150_005, 150_000, 150_001, 20_003)),
            marks=pytest.mark.slow,
        ),
        ("chatglm-6b", 0, (130_004, 130_005, 130_000, 130_001, 3)),
    ],
)
def test_icetk_is_written_as_chatglm_6b_has_it(tmp_path, name, images, roles):
    """The model file and the ids of roles that its published folder has."""
    tokenizer = tokenizer_of(name)
    files, (note,) = public_files(tokenizer, 2048)
    assert set(files) == {"ice_text.model", "tokenizer.json", "tokenizer_config.json"}
    assert "puts nothing behind a prompt" in note
    said = json.loads(files["tokenizer_config.json"])
    assert said["num_image_tokens"] == images
    assert (said["bos_token"], said["eos_token"]) == ("<sop>", "<eop>")
    kinds = ("bos", "eos", "mask", "gmask", "pad")
    expected = {f"{kind}_token_id": token for kind, token in zip(kinds, roles, strict=True)}
    assert end_ids(tokenizer) == end_ids(extended(tokenizer)) == expected
    folder, _ = written(tokenizer, tmp_path / "written")
    assert isinstance(read_tokenizer(folder), IceTokenizer)
    assert TokenizerFolder(path=str(folder)).origin() == tokenizer.fingerprint


def edited(change, **settings):
    """A SentencePiece tokenizer whose model was changed after it was trained."""
    model = sentencepiece_model_pb2.ModelProto.FromString(trained(**settings))
    change(model)
    return SentencePieceTokenizer(model.SerializeToString(), by_line=False)


def same_scores(model):
    """As Chinese-LLaMA's new pieces have."""
    for piece in model.pieces:
        if piece.type == piece.NORMAL and len(piece.piece) > 1:
            piece.score = 0.0


def switched_off(model):
    model.pieces[-1].type = model.pieces[-1].UNUSED


def a_sign(model):
    model.pieces.add(piece="§", score=0.0).type = model.pieces[0].CONTROL


def without_a_character(model):
    model.pieces.add(piece="龘龘", score=-5000.0)


BPE = SENTENCEPIECE["byte pairs"]
INEXPRESSIBLE = {
    "have the same score": (same_scores, BPE),
    "is switched off": (switched_off, BPE),
    "'§' is a character": (a_sign, SENTENCEPIECE["like T5"]),
    "'龘龘' has the character '龘', which is no piece": (without_a_character, BPE),
    "its pieces are whole words": (lambda model: None, {"model_type": "word"}),
}


@pytest.mark.parametrize("reason", INEXPRESSIBLE)
def test_a_model_that_the_library_cannot_follow_is_written_for_lmjax_alone(tmp_path, reason):
    """Under a name that transformers does not take for another tokenizer's."""
    change, settings = INEXPRESSIBLE[reason]
    tokenizer = edited(change, **settings)
    folder, (note,) = written(tokenizer, tmp_path / "written")
    assert [path.name for path in folder.iterdir()] == ["sentencepiece.model"]
    assert reason in note and "only lmjax reads it here" in note
    assert read_tokenizer(folder).fingerprint == tokenizer.fingerprint


def test_equal_scores_of_pieces_that_never_meet_are_written():
    def change(model):
        model.pieces.add(piece="qj", score=-3.0)
        model.pieces.add(piece="jz", score=-3.5)
        model.pieces.add(piece="wv", score=-3.0)

    assert "tokenizer.json" in public_files(edited(change, **BPE), 40)[0]


def like_qwen():
    return TiktokenTokenizer(table())


@pytest.mark.parametrize(
    "files, message",
    [
        ({"added_tokens.json": {"[NEW]": 1110}}, "'[NEW]' has the id 1110, but the next id is"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"1108": {"content": "x"}}}},
            None,
        ),
        (
            {
                "tokenizer_config.json": {
                    "added_tokens_decoder": {"1108": {"content": "x", "special": False}}
                }
            },
            "the added token 'x' is text, not special",
        ),
    ],
)
def test_what_a_folder_adds_to_qwens_tokens(tmp_path, files, message):
    assert like_qwen().vocab_size == 1108
    (tmp_path / "qwen.tiktoken").write_bytes(table())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    if message is None:
        assert read_tokenizer(tmp_path).special["x"] == 1108
        return
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path)
    assert message in str(error.value)


def test_a_special_token_that_a_text_may_hold_is_left_out_and_it_is_said():
    """tekken's special tokens come before its table, so they lie in the library's vocabulary."""
    tekken = json.loads(tokenizer_of("tekken").files()["tekken.json"])
    names = ["<unk>", "<s>", "</s>", *(f"<x{n}>" for n in range(27))]
    tekken["special_tokens"] = [{"rank": n, "token_str": name} for n, name in enumerate(names)]

    def files():
        return public_files(TiktokenTokenizer(json.dumps(tekken).encode(), TEKKEN), 40)

    assert "tokenizer.json" in files()[0]
    tekken["special_tokens"][5]["token_str"] = "the"
    found, (note,) = files()
    assert not found and "'the'" in note


@pytest.mark.parametrize("name", ["bytes", "characters", "like LLaMA", "glm-10b", "glm-130b"])
def test_a_new_token_with_the_name_of_a_piece_is_left_out_and_it_is_said(name):
    """In a file one of the two would take the other's place."""
    piece = "Ġthe" if name == "glm-10b" else "e"
    tokenizer = ExtendedTokenizer(tokenizer_of(name), ("[NEW]", "qux", piece))
    files, (note,) = public_files(tokenizer, 40)
    assert not files
    assert f"the tokenizer was left out: '{piece}' is a piece of text too" in note


def test_new_tokens_behind_a_vocabulary_with_gaps_are_left_out_and_it_is_said():
    glm = tokenizer_of("glm-10b")
    data = json.loads(glm.files()["huggingface.json"])
    data["model"]["vocab"]["far"] = 60_000
    tokenizer = HuggingFaceTokenizer(json.dumps(data), None, glm.end)
    files, (note,) = public_files(extended(tokenizer), 40)
    assert not files
    assert "the tokenizer was left out: its ids have gaps" in note and "'[NEW]'" in note
