"""The tokens that a folder names beside its vocabulary or in it: special ones, and text."""

import json

import pytest
import tokenizers

from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer
from tests.lmjax.data.library_tokenizers import library_tokenizer
from tests.lmjax.data.test_tokenizer_classes import pairs_folder, same, theirs
from tests.lmjax.data.vocabulary_folders import UNCASED, put, trained

ADDED = {
    "spaces": [" " * length for length in range(8, 1, -1)],
    "words": ["covid19", "covid-19", "C++"],
    "marks": ["<tool>", "[DOC]", "</think>"],
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("kind", ["CodeGenTokenizer", "GPT2Tokenizer", "BertTokenizer"])
def test_added_tokens_json_holds_text_and_special_tokens(tmp_path, kind, added, named):
    """What the settings name is special, and what looks so; the rest is found in texts."""
    settings = {"tokenizer_class": kind, "do_lower_case": True}
    if named:
        settings["additional_special_tokens"] = ADDED[added]
    if kind == "BertTokenizer":
        folder = put(tmp_path / "a", vocab_txt="\n".join(UNCASED), tokenizer_config_json=settings)
        size = len(UNCASED)
    else:
        folder = pairs_folder(tmp_path / "a", settings)
        size = len(json.loads((folder / "vocab.json").read_text("utf-8")))
    ids = {name: size + number for number, name in enumerate(ADDED[added])}
    (folder / "added_tokens.json").write_text(json.dumps(ids), "utf-8")
    ours, tokenizer = read_tokenizer(folder), theirs(folder, kind)
    special = named or added == "marks"
    assert all((name in ours.special) == special for name in ids)
    texts = [
        "def f():\n        x  =\t\t1",
        "the covid19 dog",
        "the Covid-19 dog C++",
        "a<tool>[DOC]",
    ]
    same(ours, tokenizer, texts)
    if named:
        for text in texts:
            assert ours.encode_special(text) == tokenizer(text, add_special_tokens=False).input_ids
    for text in texts if kind != "BertTokenizer" else ():
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("file", ["tokenizer_config_json", "special_tokens_map_json"])
@pytest.mark.parametrize("kind", ["RobertaTokenizer", "BartTokenizer", "DebertaTokenizer"])
def test_a_mask_takes_the_space_before_it_as_its_folder_says(tmp_path, kind, file):
    flags = {"lstrip": True, "rstrip": False, "normalized": True, "single_word": False}
    files = {"tokenizer_config_json": {"tokenizer_class": kind}, "special_tokens_map_json": {}}
    if file == "tokenizer_config_json":
        flags["__type"] = "AddedToken"
    files[file] = files[file] | {"mask_token": {"content": "<mask>", **flags}}
    settings = files.pop("tokenizer_config_json")
    folder = pairs_folder(tmp_path / "a", settings, **files)
    ours, tokenizer = read_tokenizer(folder), theirs(folder, kind)
    for text in ("the <mask> dog", "the<mask> <mask>", "<mask>", "  <mask> x"):
        assert ours.encode_special(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    "kind, file, end",
    [
        ("GPT2Tokenizer", "gpt2", "<|endoftext|>"),
        ("PreTrainedTokenizerFast", "llama3", "<|endoftext|>"),
        ("PreTrainedTokenizerFast", "gemma3", "</s>"),
        ("BertTokenizer", "bert", "[SEP]"),
    ],
)
def test_a_character_that_is_used_for_padding_stays_text(tmp_path, kind, file, end, in_file):
    made = tokenizers.Tokenizer.from_str(library_tokenizer(file))
    sign = next(sign for sign in "!.,-" if made.token_to_id(sign) is not None)
    settings = {"tokenizer_class": kind, "eos_token": end, "pad_token": sign}
    if in_file:
        made.add_special_tokens([sign])
        entry = {"content": sign, "special": True, "normalized": False}
        settings["added_tokens_decoder"] = {str(made.token_to_id(sign)): entry}
    made.save(str(put(tmp_path / "a", tokenizer_config_json=settings) / "tokenizer.json"))
    ours = read_tokenizer(tmp_path / "a")
    assert sign not in ours.special
    text = "the list! it is!! x !".replace("!", sign)
    ids = ours.encode(text)
    assert ids == theirs(tmp_path / "a", kind)(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids).count(sign) == 4


def test_older_folders_name_roles_in_special_tokens_map(tmp_path):
    """It counts before tokenizer_config.json, unless that lists the added tokens too."""
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    names = {"eos_token": {"content": "</s>", "lstrip": False}}
    older = pairs_folder(tmp_path / "a", settings, special_tokens_map_json=names)
    assert read_tokenizer(older).end == theirs(older, "GPT2Tokenizer").eos_token_id
    listed = {str(read_tokenizer(older).special["<|endoftext|>"]): {"content": "<|endoftext|>"}}
    newer = pairs_folder(
        tmp_path / "b",
        settings | {"added_tokens_decoder": listed},
        special_tokens_map_json=names,
    )
    assert read_tokenizer(newer).end == theirs(newer, "GPT2Tokenizer").eos_token_id
    assert read_tokenizer(newer).end != read_tokenizer(older).end


PAIRS = {
    **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 420},
    **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
}


@pytest.mark.parametrize("said", [None, True, False])
def test_llamas_first_space_of_a_sentencepiece_model(tmp_path, said):
    settings = {"tokenizer_class": "LlamaTokenizer"}
    settings |= {} if said is None else {"add_prefix_space": said}
    folder = put(tmp_path / "a", tokenizer_model=trained(**PAIRS), tokenizer_config_json=settings)
    ours = read_tokenizer(folder)
    texts = ["the dog", "The quick  brown\n\tfox", "今天 x"] + ([" the"] if said is False else [])
    same(ours, theirs(folder, "LlamaTokenizer"), texts)
    for text in ("the dog", " the dog", "", "  x"):
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("listed", [False, True])
def test_special_tokens_among_the_pieces_of_a_sentencepiece_model(tmp_path, listed):
    """Gemma's roles are pieces that its file finds in texts."""
    names = ["<start_of_turn>", "<end_of_turn>"]
    model = trained(**PAIRS, user_defined_symbols=",".join(names), add_dummy_prefix=False)
    find = SentencePieceTokenizer(model, by_line=False)._processor.piece_to_id
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": names[1]}
    if listed:
        listing = {str(find(name)): {"content": name, "special": True} for name in names}
        settings["added_tokens_decoder"] = listing
    else:
        settings["additional_special_tokens"] = names
    folder = put(tmp_path / "a", tokenizer_model=model, tokenizer_config_json=settings)
    ours, tokenizer = read_tokenizer(folder), theirs(folder, "GemmaTokenizer")
    text = "<start_of_turn>user\nthe dog<end_of_turn>"
    assert ours.encode_special(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ours.special.items() >= {(name, find(name)) for name in names}
    assert {*map(find, names)}.isdisjoint(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text and ours.end == find(names[1])


def test_a_folder_names_pieces_that_a_model_keeps_free(tmp_path):
    """InternLM2's do; transformers 5 has its names too, but at the end where its class is said."""
    free = [*(f"[UNUSED_TOKEN_{number}]" for number in range(3)), "<s>"]
    model = trained(**PAIRS, user_defined_symbols=",".join(free[:3]))
    find = SentencePieceTokenizer(model, by_line=False)._processor.piece_to_id
    names = ["<|plugin|>", "[turn]", "<|im_end|>", "<begin>"]
    listing = {str(find(old)): {"content": new, "special": True} for old, new in zip(free, names)}
    listing[str(find("<0x0A>"))] = {"content": "\n", "special": False}
    settings = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": listing}
    folder = put(tmp_path / "a", tokenizer_model=model, tokenizer_config_json=settings)
    ours, plain = read_tokenizer(folder), SentencePieceTokenizer(model, by_line=False)
    assert [ours.special[name] for name in names] == list(map(find, free))
    assert ours.encode_special("the dog<|im_end|>") == [*ours.encode("the dog"), find(free[2])]
    assert ours.opening == (find("<s>"),)
    for text in ("the dog\n", *names, *free):
        assert {*map(find, free)}.isdisjoint(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("the dog") == plain.encode("the dog")
