"""What a folder's class and settings change: the ids of transformers, or a refusal by name."""

import json
import os
import warnings

import pytest
import tokenizers
from tokenizers import processors

from lmjax.config import UserError
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers.subwords import SentencePieceTokenizer
from lmjax.generation.text import prompt_tokens
from tests.lmjax.data.library_tokenizers import library_tokenizer, unigram_model
from tests.lmjax.data.real_strings import HARD, real_strings
from tests.lmjax.data.vocabulary_folders import UNCASED, byte_pairs, put, trained

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # nothing is downloaded
EXTRA = "the live comparison needs the extra parity: pip install -e '.[parity]', on Python 3.11"
TEXTS = [*HARD, *real_strings()[::20], "The Paris café. 今天", "it's 123 \n\n wow !\n x"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]"]


def theirs(folder, kind):
    transformers = pytest.importorskip("transformers", reason=EXTRA)
    return getattr(transformers, kind).from_pretrained(str(folder))


def same(ours, tokenizer, texts=TEXTS):
    """The ids of texts that name no special token, without what stands around them."""
    plain = [text for text in texts if not any(name in text for name in ours.special)]
    wanted = tokenizer(plain, add_special_tokens=False)["input_ids"]
    for text, ids, right in zip(plain, ours.encode_batch(plain), wanted, strict=True):
        assert ids == right, text


def pairs_folder(folder, settings, **files):
    pairs, merges = byte_pairs()
    names = [*sorted(pairs, key=pairs.get), "<|endoftext|>", "<|padding|>", *ROBERTA]
    vocabulary = {name: number for number, name in enumerate(names)}
    return put(
        folder,
        vocab_json=vocabulary,
        merges_txt=merges,
        tokenizer_config_json=settings,
        **files,
    )


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("GPT2Tokenizer", "CodeGenTokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer"),
        *("RobertaTokenizer", "LongformerTokenizer", "BartTokenizer"),
        *("BlenderbotTokenizer", "DebertaTokenizer"),
    ],
)
def test_vocabulary_and_merges_as_their_class_cuts(tmp_path, kind, prefix):
    settings = {"tokenizer_class": kind}
    if prefix is not None:
        settings["add_prefix_space"] = prefix
    ours = read_tokenizer(pairs_folder(tmp_path / "folder", settings))
    tokenizer = theirs(tmp_path / "folder", kind)
    same(ours, tokenizer)
    text = "word 12"
    # Blenderbot's end is put behind by its program before transformers 5.
    if kind != "BlenderbotTokenizer":
        wanted = tokenizer(text)["input_ids"]
        closing = ours.closing if kind in ("DebertaTokenizer",) or "Ro" in kind else ()
        closing = ours.closing if kind in ("LongformerTokenizer", "BartTokenizer") else closing
        assert [*ours.opening, *ours.encode(text), *closing] == wanted


def test_qwens_newest_cut(tmp_path):
    """transformers 5 makes no tokenizer of these files, but has the pattern and a tokenizer.json's
    way to use it."""
    pytest.importorskip("transformers", reason=EXTRA)
    from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

    folder = pairs_folder(tmp_path / "folder", {"tokenizer_class": "Qwen3_5Tokenizer"})
    paths = str(folder / "vocab.json"), str(folder / "merges.txt")
    made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*paths))
    made.normalizer = tokenizers.normalizers.NFC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = read_tokenizer(folder)
    plain = [text for text in TEXTS if not any(name in text for name in ours.special)]
    assert ours.encode_batch(plain) == [made.encode(text).ids for text in plain]


def test_the_kind_of_model_says_the_class_where_no_settings_do(tmp_path):
    digits = "123"
    for number, (model, kind) in enumerate(
        [("gpt2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer"), ("gpt_neox", "GPTNeoXTokenizer")]
    ):
        folder = pairs_folder(tmp_path / str(number), {}, config_json={"model_type": model})
        same(read_tokenizer(folder), theirs(folder, kind), [*TEXTS, digits])
    by_name = pairs_folder(
        tmp_path / "named", {}, config_json={"tokenizer_class": "Qwen2Tokenizer"}
    )
    assert read_tokenizer(by_name).encode("e\u0301") == read_tokenizer(by_name).encode("é")


ARCHITECTURES = [
    ("GPT2LMHeadModel", "GPT2Tokenizer"),
    ("Qwen2ForCausalLM", "Qwen2Tokenizer"),
    ("Qwen3MoeForCausalLM", "Qwen2Tokenizer"),
    ("GPTNeoXModel", "GPTNeoXTokenizer"),
    ("RobertaForMaskedLM", "RobertaTokenizer"),
]


@pytest.mark.parametrize("architecture, kind", ARCHITECTURES)
def test_the_architecture_says_it_where_there_is_no_model_type(tmp_path, architecture, kind):
    folder = pairs_folder(tmp_path / "a", {}, config_json={"architectures": [architecture]})
    named = read_tokenizer(pairs_folder(tmp_path / "b", {"tokenizer_class": kind}))
    assert read_tokenizer(folder).fingerprint == named.fingerprint
    other = pairs_folder(tmp_path / "c", {}, config_json={"architectures": ["MyForCausalLM"]})
    with pytest.raises(UserError, match="a model of architectures 'MyForCausalLM' cuts a text"):
        read_tokenizer(other)


def test_sentencepiece_models_of_other_programs_are_refused(tmp_path):
    """Their ids are not the file's, or their texts are changed before."""
    for kind in ("xglm", "m2m_100", "nllb-moe", "rembert", "bigbird_pegasus", "xlm-roberta-xl"):
        folder = put(tmp_path / kind, spiece_model=trained(), config_json={"model_type": kind})
        with pytest.raises(UserError, match=r"the class \w+ cuts a text.*its program"):
            read_tokenizer(folder)


REFUSED = [
    ({"tokenizer_class": "CLIPTokenizer"}, {}, "the class CLIPTokenizer"),
    ({"tokenizer_class": "WhisperTokenizer"}, {}, "the class WhisperTokenizer"),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}, "the class PreTrainedTokenizer"),
    ({"tokenizer_class": "MyTokenizer"}, {}, "the class MyTokenizer"),
    ({}, {"model_type": "clip"}, "the class CLIPTokenizer"),
    ({}, {"model_type": "mymodel"}, "a model of model_type 'mymodel'"),
]


@pytest.mark.parametrize("settings, config, message", REFUSED)
def test_a_class_of_another_program_is_refused(tmp_path, settings, config, message):
    """Whatever the vocabulary: its file looks like those of the classes that are known."""
    files = {"config_json": config, "tokenizer_config_json": settings}
    pairs, merges = byte_pairs()
    folders = [
        put(tmp_path / "pairs", vocab_json=pairs, merges_txt=merges, **files),
        put(tmp_path / "words", vocab_txt="\n".join(UNCASED), **files),
    ]
    if settings.get("tokenizer_class") not in (None, "PreTrainedTokenizerFast"):
        folders.append(put(tmp_path / "pieces", tokenizer_model=trained(), **files))
    for folder in folders:
        with pytest.raises(UserError, match=f"{message} cuts a text.*A tokenizer.json says it"):
            read_tokenizer(folder)


def library_folder(folder, kind, settings, **files):
    return put(
        folder, tokenizer_json=library_tokenizer(kind), tokenizer_config_json=settings, **files
    )


@pytest.mark.parametrize("file", ["bert", "bert, cased"])
@pytest.mark.parametrize("kind", ["BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", None])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
    ],
)
def test_case_and_accents_beside_a_library_file(tmp_path, file, kind, settings):
    named = {"tokenizer_class": kind} if kind else {}
    folder = library_folder(tmp_path / "folder", file, settings | named)
    ours = read_tokenizer(folder)
    if kind:
        same(ours, theirs(folder, "AutoTokenizer" if kind == "ElectraTokenizer" else kind))
    else:
        made = tokenizers.Tokenizer.from_str(library_tokenizer(file))
        assert ours.encode("The café 今天") == made.encode("The café 今天").ids[1:-1]


def test_case_follows_the_kind_of_model_too(tmp_path):
    folder = library_folder(
        tmp_path / "folder",
        "bert, cased",
        {"do_lower_case": True},
        config_json={"model_type": "bert"},
    )
    same(read_tokenizer(folder), theirs(folder, "AutoTokenizer"))


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}, {"strip_accents": True}])
def test_word_pieces_alone(tmp_path, settings):
    folder = put(
        tmp_path / "folder",
        vocab_txt="\n".join([*UNCASED, "The", "Paris", "café"]),
        tokenizer_config_json={"tokenizer_class": "BertTokenizer"} | settings,
    )
    if "do_lower_case" in settings:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = read_tokenizer(folder)
    else:
        with pytest.warns(UserWarning, match="capital letters.*read in lower case.*do_lower_case"):
            ours = read_tokenizer(folder)
    same(ours, theirs(folder, "BertTokenizer"))


@pytest.mark.parametrize("kind, said", [("LlamaTokenizer", True), ("LlamaTokenizer", False)])
def test_llamas_first_space(tmp_path, kind, said):
    """Both kinds of its files, told to have it and not to have it."""
    for number, file in enumerate(("llama", "gemma3", "llama, first")):
        settings = {"tokenizer_class": kind, "add_prefix_space": said}
        ours = read_tokenizer(library_folder(tmp_path / str(number), file, settings))
        first = ours.token_bytes(ours.encode("the")[0])
        assert first.startswith(b" ") == said
        # Where a space is put only before what has none, the text's own is lost.
        lost = said and file == "llama, first"
        for text in ("the text", "" if lost else " two", "", "a\n b"):
            assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("prefix", [True, False, None])
def test_a_byte_level_files_first_space(tmp_path, prefix):
    settings = {"eos_token": "<|endoftext|>"} | (
        {} if prefix is None else {"add_prefix_space": prefix}
    )
    for kind, file in (("GPT2Tokenizer", "gpt2"), ("GPT2Tokenizer", "roberta, space")):
        folder = library_folder(tmp_path / f"{file}", file, settings | {"tokenizer_class": kind})
        same(read_tokenizer(folder), theirs(folder, kind))
    generic = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    folder = library_folder(tmp_path / "generic", "roberta, space", generic)
    assert read_tokenizer(folder).encode("the") == read_tokenizer(folder).encode(" the")


BOS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "nothing": None,
    "offsets": processors.ByteLevel(trim_offsets=False),
    "begin": processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)]),
    "both": processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", 1), ("</s>", 2)]),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "two": processors.TemplateProcessing("<s> <pad> $A", "$A $B", [("<s>", 1), ("<pad>", 3)]),
    "behind": processors.TemplateProcessing("$A </s> <pad>", "$A $B", [("</s>", 2), ("<pad>", 3)]),
    "sequence": processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)]),
        ]
    ),
}


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_stands_around_a_text(tmp_path, name, add_bos, add_eos):
    """The file's processor, unless the settings say otherwise."""
    made = tokenizers.Tokenizer.from_str(library_tokenizer("gemma3"))
    if TEMPLATES[name] is not None:
        made.post_processor = TEMPLATES[name]
    said = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    settings = BOS | {key: value for key, value in said.items() if value is not None}
    made.save(str(put(tmp_path / "a", tokenizer_config_json=settings) / "tokenizer.json"))
    ours = read_tokenizer(tmp_path / "a")
    bare, whole = (made.encode("the", add_special_tokens=some).ids for some in (False, True))
    place = next(n for n in range(3) if whole[n : n + len(bare)] == bare)
    opening, closing = whole[:place], whole[place + len(bare) :]
    if add_bos is not None:
        opening = (opening or [1]) if add_bos else []
    if add_eos is not None:
        closing = (closing or [2]) if add_eos else []
    assert list(ours.opening) == opening == prompt_tokens(ours, "the")[: len(opening)]
    assert prompt_tokens(ours, "the") == opening + bare
    assert ours.begin == (opening[0] if opening else None)
    assert list(ours.closing) == (closing or [2]) and ours.end == ours.closing[0]
    assert prompt_tokens(ours, "") == (opening or [2])
    ours.save(tmp_path / "b")
    again = read_tokenizer(tmp_path / "b")
    assert (again.opening, again.closing, again.end) == (ours.opening, ours.closing, ours.end)
    # The file that is kept says the same.
    kept = tokenizers.Tokenizer.from_file(str(tmp_path / "b" / "huggingface.json"))
    assert kept.encode("the").ids == opening + bare + closing


def test_the_end_where_only_the_model_says_it(tmp_path):
    made = tokenizers.Tokenizer.from_str(library_tokenizer("gemma3"))
    for number, (files, end) in enumerate(
        [
            ({"config_json": {"eos_token_id": 3}}, 3),
            ({"config_json": {"eos_token_id": [0, 3]}}, 0),
            ({"config_json": {}}, 2),
            ({"generation_config_json": {"eos_token_id": 1}}, 1),
        ]
    ):
        folder = put(tmp_path / str(number), **files)
        made.save(str(folder / "tokenizer.json"))
        assert read_tokenizer(folder).end == end
        assert end in read_tokenizer(folder).special.values()
    folder = put(tmp_path / "none", config_json={"eos_token_id": 100_000})
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="the id 100000 is to end a document, but is no token"):
        read_tokenizer(folder)


@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "BaichuanTokenizer", None])
def test_a_sentencepiece_model_begins_as_its_folder_says(tmp_path, kind, said):
    settings = {"tokenizer_class": kind} if kind else {}
    settings |= {} if said is None else {"add_bos_token": said}
    folder = put(tmp_path / "a", tokenizer_model=trained(), tokenizer_config_json=settings)
    ours = read_tokenizer(folder)
    begin = ours.special["<s>"]
    assert ours.begin == (None if said is False else begin)  # LLaMA's class puts it by default
    assert ours.closing == (ours.end,) == (ours.special["</s>"],)
    text = "the dog"
    assert prompt_tokens(ours, text) == [*ours.opening, *ours.encode(text)]
    ours.save(tmp_path / "b")
    again = read_tokenizer(tmp_path / "b")
    assert (again.opening, again.closing, again.fingerprint) == (
        ours.opening,
        ours.closing,
        ours.fingerprint,
    )
    plain = SentencePieceTokenizer(trained(), by_line=False)
    assert ours.encode_batch(HARD) == plain.encode_batch(HARD)


def test_chatglm_begins_with_two_tokens(tmp_path):
    settings = {"tokenizer_class": "ChatGLMTokenizer"}
    ours = read_tokenizer(
        put(tmp_path / "a", tokenizer_model=trained(), tokenizer_config_json=settings)
    )
    assert ours.opening == (ours.special["[gMASK]"], ours.special["sop"])
    assert prompt_tokens(ours, "the")[:2] == list(ours.opening)


@pytest.mark.parametrize("kind", ["XLNetTokenizer", "AlbertTokenizer"])
@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True}, {"do_lower_case": False}])
def test_xlnets_and_alberts_accents_and_case(tmp_path, kind, settings):
    names = ["<sep>", "<cls>", "<pad>", "<mask>", "[CLS]", "[SEP]", "[MASK]", "<eop>", "<eod>"]
    model = unigram_model(user_defined_symbols=",".join(names))
    if kind == "AlbertTokenizer":
        model = unigram_model(
            user_defined_symbols=",".join(names[4:7]), pad_id=0, unk_id=1, bos_id=-1, eos_id=-1
        )
    folder = put(
        tmp_path / "a",
        spiece_model=model,
        tokenizer_config_json={"tokenizer_class": kind} | settings,
    )
    ours = read_tokenizer(folder)
    tokenizer = theirs(folder, kind)
    same(ours, tokenizer)
    text = "Émigrés don't ``eat''"
    assert tokenizer(text)["input_ids"] == [*ours.opening, *ours.encode(text), *ours.closing]
    tokenizer.save_pretrained(tmp_path / "written")  # with a tokenizer.json
    path = tmp_path / "written" / "tokenizer_config.json"
    written = json.loads(path.read_text("utf-8"))
    for said in ({"do_lower_case": False}, {"do_lower_case": True, "keep_accents": True}):
        path.write_text(json.dumps(written | said), "utf-8")
        same(read_tokenizer(path.parent), theirs(path.parent, kind))
    kept = {"tokenizer_class": kind, "keep_accents": True, "do_lower_case": False}
    folder = put(tmp_path / "b", spiece_model=model, tokenizer_config_json=kept)
    assert "é" in read_tokenizer(folder).decode(read_tokenizer(folder).encode("café"))
