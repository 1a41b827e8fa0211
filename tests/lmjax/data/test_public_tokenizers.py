"""Tokenizers of public folders: the same ids as their own libraries, every text back, no forgery.

The libraries are used directly beside ours, on tiny tokenizers that are trained here.
"""

import base64
import io
import json
import unicodedata

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lmjax.config import UserError
from lmjax.data.public_tokenizers import TokenizerFolder, read_tokenizer
from lmjax.data.tokenizers import Ends, load_tokenizer
from lmjax.data.tokenizers.tiktoken_programs import QWEN_PATTERN
from lmjax.data.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind it at all.",
    "def f(x):\n    return x + 12345  # 漢字かな交じり文\n\n",
    "Émigrés watched the 2023 théâtre; 中国人民，你好！",
] * 5
HARD = [
    "",
    " ",
    "  two  spaces\n\n\t\r\n",
    "\x00\x07\u2028\ufeff",
    "😀👩‍👩‍👧‍👦 한국어",
    "<|endoftext|><|im_end|></s>[SEP]<reserved_106><0x0A>",
]


def byte_level():
    """GPT-2's kind, with role tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_fallback():
    """LLaMA's kind, as Hugging Face writes it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXTS[0].replace(" ", "▁")], trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are ordinary tokens
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def word_piece():
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def sentencepiece_model(**settings):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
        **settings,
    )
    return model.getvalue()


def write_ranks(path, tokenizer):
    """The merges of a byte-level tokenizer as Qwen's file of ranks."""
    from lmjax.data.public_tokenizers import BYTES

    pieces = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1])
    ranks = [bytes(map(BYTES.get, piece)) for piece, _ in pieces if not piece.startswith("<|")]
    ranks.sort(key=len)  # bytes first
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(ranks)]
    path.write_text("".join(lines))
    return {piece: rank for rank, piece in enumerate(ranks)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("public")
    made = {name: root / name for name in ("gpt2", "json", "llama", "bert", "sp", "qwen")}
    for folder in made.values():
        folder.mkdir()
    gpt2 = byte_level()
    gpt2.save(str(made["json"] / "tokenizer.json"))
    gpt2.model.save(str(made["gpt2"]))
    (made["json"] / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": None, "eos_token": {"content": "<|im_end|>"}})
    )
    llama = byte_fallback()
    llama.save(str(made["llama"] / "tokenizer.json"))
    word_piece().model.save(str(made["bert"]))
    model = sentencepiece_model(user_defined_symbols=["<reserved_106>", "<reserved_107>"])
    (made["sp"] / "tokenizer.model").write_bytes(model)
    write_ranks(made["qwen"] / "qwen.tiktoken", gpt2)
    return made


@pytest.fixture(scope="module")
def read(folders):
    return {name: read_tokenizer(folder) for name, folder in folders.items()}


@given(text=st.text())
@example("".join(HARD))
def test_byte_level_and_byte_fallback_give_every_text_back(read, text):
    for name in ("gpt2", "json"):
        assert read[name].decode(read[name].encode(text)) == text
    for name in ("llama", "sp"):
        plain = text.replace("\u2581", "")  # stands for a space in these
        assert read[name].decode(read[name].encode(plain)) == plain
    normal = unicodedata.normalize("NFC", text)
    assert read["qwen"].decode(read["qwen"].encode(text)) == normal


@given(text=st.text(st.sampled_from("<|im_endsart>/[SEPCLK]rev106unk0x fo")) | st.text())
@example("".join(HARD))
@example("<|im_start|>user\nhi<|im_end|> <s> </s> <unk> [CLS] [MASK] <|extra_0|> <reserved_107>")
def test_no_text_makes_a_special_token(read, text):
    for name, tokenizer in read.items():
        unknown = {tokenizer.special.get(name) for name in ("[UNK]", "<unk>")}
        assert not set(tokenizer.encode(text)) & (set(tokenizer.special.values()) - unknown), name


def test_special_tokens_when_asked(read):
    assert read["json"].special == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    ids = read["json"].encode_special("<|im_start|>user\nhi<|im_end|>")
    assert ids == [1, *read["json"].encode("user\nhi"), 2]
    assert read["json"].decode(ids) == "user\nhi"
    for tokenizer in read.values():
        for token in tokenizer.special.values():
            assert tokenizer.token_bytes(token) == b""
    assert set(read["bert"].special) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert set(read["sp"].special) == {"<unk>", "<s>", "</s>", "<reserved_106>", "<reserved_107>"}


def test_ends_of_documents(read):
    names = {}
    for name, tokenizer in read.items():
        by_id = {token: name for name, token in tokenizer.special.items()} | {None: None}
        names[name] = by_id[tokenizer.begin], by_id[tokenizer.end]
    assert names == {
        "gpt2": (None, "<|endoftext|>"),
        "json": (None, "<|im_end|>"),
        "llama": (None, "</s>"),
        "bert": ("[CLS]", "[SEP]"),
        "sp": ("<s>", "</s>"),
        "qwen": (None, "<|endoftext|>"),
    }


PLAIN = [text for text in (*TEXTS[:3], *HARD[:5], "it's 12  34", "naïve œuvre") if text]


@pytest.mark.parametrize("name", ["json", "llama"])
def test_tokenizer_json_as_the_library_reads_it(folders, read, name):
    theirs = tokenizers.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    ours = read[name]
    assert ours.vocab_size == theirs.get_vocab_size()
    for text in PLAIN:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == wanted
        assert ours.decode(wanted) == theirs.decode(wanted)
        for cut in range(len(wanted)):
            data = b"".join(map(ours.token_bytes, wanted[cut:]))
            if "\ufffd" not in (text := data.decode("utf-8", "replace")):
                first = " " if name == "llama" else ""
                assert text.removeprefix(first) == theirs.decode(wanted[cut:])


def test_gpt2_files_as_the_library_reads_them(folders, read):
    from tokenizers.implementations import ByteLevelBPETokenizer

    paths = folders["gpt2"] / "vocab.json", folders["gpt2"] / "merges.txt"
    theirs = ByteLevelBPETokenizer(*map(str, paths))
    for text in PLAIN:
        assert read["gpt2"].encode(text) == theirs.encode(text).ids
    assert read["gpt2"].encode_batch(PLAIN) == [read["gpt2"].encode(text) for text in PLAIN]


def test_bert_files_as_the_library_reads_them(folders, read):
    from tokenizers.implementations import BertWordPieceTokenizer

    theirs = BertWordPieceTokenizer(str(folders["bert"] / "vocab.txt"))
    for text in PLAIN:
        wanted = theirs.encode(text, add_special_tokens=False).ids
        assert read["bert"].encode(text) == wanted
    words = "the quick fox"
    assert read["bert"].decode(read["bert"].encode(words)) == words


def test_sentencepiece_files_as_the_library_reads_them(folders, read):
    path = folders["sp"] / "tokenizer.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in PLAIN:
        assert read["sp"].encode(text) == theirs.encode(text)
    # There the name in a text makes the role token.
    assert read["sp"].special["<reserved_106>"] in theirs.encode("<reserved_106>")


def test_qwen_files_as_tiktoken_reads_them(tmp_path, read):
    ranks = write_ranks(tmp_path / "qwen.tiktoken", byte_level())
    special = {"<|endoftext|>": len(ranks)}
    theirs = tiktoken.Encoding(
        "t", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )
    for text in PLAIN:
        assert read["qwen"].encode(text) == theirs.encode_ordinary(text)
    assert read["qwen"].vocab_size == len(ranks) + 208
    assert read["qwen"].special["<|im_end|>"] == len(ranks) + 2
    assert read["qwen"].special["<|extra_204|>"] == len(ranks) + 207
    digits = read["qwen"].encode("2023")
    assert [read["qwen"].token_bytes(token) for token in digits] == [b"2", b"0", b"2", b"3"]


def test_chatglm_special_tokens_lie_behind_the_vocabulary(tmp_path):
    model = sentencepiece_model()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.special["[MASK]"] == 360
    assert tokenizer.special["[gMASK]"] == 361
    assert tokenizer.special["<|observation|>"] == 368
    assert tokenizer.vocab_size == 369
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in [*PLAIN, "<|user|>[gMASK]sop"]:
        assert tokenizer.encode(text) == theirs.encode(text)


def test_added_tokens(tmp_path):
    plain = byte_level()
    plain.save(str(tmp_path / "tokenizer.json"))
    size = plain.get_vocab_size()
    for token in (size, size + 7):
        added = {str(token): {"content": "<|x|>"}}
        config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": added}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if token == size:
            tokenizer = read_tokenizer(tmp_path)
            assert (tokenizer.special["<|x|>"], tokenizer.vocab_size) == (size, size + 1)
    with pytest.raises(UserError, match=rf"'<\|x\|>' has the id {size + 7}, but the next id is"):
        read_tokenizer(tmp_path)


def test_added_tokens_that_are_text(tmp_path):
    plain = byte_level()
    plain.model.save(str(tmp_path))
    size = plain.get_vocab_size()
    added = {
        size: {"content": "<tool_call>", "special": False},
        size + 1: {"content": "<|x|>", "special": True},
    }
    config = {"eos_token": "<|endoftext|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    text = "a<tool_call>中<|x|>"
    assert tokenizer.encode(text)[1] == size
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_special(text)[-1] == size + 1
    assert "<tool_call>" not in tokenizer.special


def test_endless_spaces(read):
    text = "a" + " " * 1_000_000 + "b"
    assert read["qwen"].decode(read["qwen"].encode(text)) == text


def test_a_unigram_model_does_not_look_up_special_tokens(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0)]
    pieces += [(character, -3.0) for character in "▁<>/sab"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    assert 1 in tokenizer.encode("ab</s>", add_special_tokens=False).ids
    assert not {1, 2} & set(read_tokenizer(tmp_path).encode("ab</s>"))


@pytest.mark.parametrize("name", ["gpt2", "json", "llama", "bert", "sp", "qwen"])
def test_saved_and_read_again(folders, read, name, tmp_path):
    read[name].save(tmp_path)
    for again in (load_tokenizer(tmp_path), read_tokenizer(tmp_path)):
        assert again.fingerprint == read[name].fingerprint
        assert again.special == read[name].special
        assert (again.begin, again.end) == (read[name].begin, read[name].end)
        assert again.encode_batch(PLAIN) == read[name].encode_batch(PLAIN)
    config = TokenizerFolder(path=str(folders[name]))
    assert config.origin() == read[name].fingerprint


DAMAGED = {
    "nothing": ({}, "there is no tokenizer in"),
    "json": ({"tokenizer.json": "{"}, "is damaged"),
    "no model": ({"tokenizer.json": '{"version": "1.0"}'}, "is damaged"),
    "no merges": ({"vocab.json": json.dumps({})}, "not GPT-2's kind"),
    "vocab": ({"vocab.json": "[1"}, "is damaged"),
    "bert": ({"vocab.txt": "a\nb\n"}, "not BERT's kind"),
    "model": ({"tokenizer.model": "x"}, "is not a SentencePiece model"),
    "table": (
        {"tokenizer.model": "YQ== 0\n"},
        "with 1 tokens is not known.*take the tokenizer.json",
    ),
    "tekken": ({"tekken.json": "{}"}, "is damaged"),
    "two": ({"a.model": "", "b.model": ""}, "several tokenizers: a.model, b.model"),
    "ranks": ({"qwen.tiktoken": "not a rank\n"}, "is damaged"),
    "gap": ({"qwen.tiktoken": "YQ== 0\nYg== 2\n"}, "without a gap"),
    "bytes": ({"qwen.tiktoken": "YQ== 0\nYg== 1\n"}, "no token for the byte 0"),
    "cut": ({"other.tiktoken": "YQ== 0\n"}, "the program of one with 1 tokens is not known"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_is_said(tmp_path, case):
    files, message = DAMAGED[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path)


def test_a_missing_library_is_named(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers.*lmjax\[tokenizers\]"):
        read_tokenizer(folders["gpt2"])


def test_no_end_and_an_unknown_decoder(tmp_path):
    tokenizer = byte_level()
    data = json.loads(tokenizer.to_str())
    data["decoder"] = {
        "type": "CTC",
        "pad_token": "p",
        "word_delimiter_token": "|",
        "cleanup": True,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="decoder CTC is not supported; known are BPEDecoder, Byte"):
        read_tokenizer(tmp_path)
    text = tokenizer.to_str().replace("<|endoftext|>", "<|over|>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="which token ends a document"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</end>"}')
    with pytest.raises(UserError, match="'</end>' is no token"):
        read_tokenizer(tmp_path)


def ranks_of(count):
    """A table of as many tokens: bytes, some pairs that texts have, and pairs that none has."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"th", b" th", b" the", b"12", b"123", b"\n\n", b" a", b"'s", b"!\n"]
    number = 0
    while len(pieces) < count:
        pieces.append(b"\xff\xfe" + number.to_bytes(3, "big"))
        number += 1
    return b"".join(b"%s %d\n" % (base64.b64encode(p), n) for n, p in enumerate(pieces)), pieces


CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONG = ["x" * 25_001 + " y", " " * 60_000 + "z", "the " * 120_000, "字" * 50_001]


@pytest.mark.parametrize(
    "name, count, all_of_it",
    [("3", 128_000, 128_256), pytest.param("4", 200_000, 202_048, marks=pytest.mark.slow)],
)
def test_metas_tables_of_ranks(tmp_path, name, count, all_of_it):
    data, pieces = ranks_of(count)
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokenizer = read_tokenizer(tmp_path)
    special = tokenizer.special
    assert tokenizer.vocab_size == all_of_it and len(special) == all_of_it - count
    assert special["<|begin_of_text|>"] == count and special["<|end_of_text|>"] == count + 1
    assert (tokenizer.opening, tokenizer.end) == ((count,), count + 1)
    published = {
        "3": {"<|start_header_id|>": 128_006, "<|eot_id|>": 128_009, "<|python_tag|>": 128_010}
        | {"<|reserved_special_token_245|>": 128_255},
        "4": {"<|header_start|>": 200_005, "<|eot|>": 200_008, "<|python_start|>": 200_016}
        | {"<|reasoning_thinking_end|>": 201_143},
    }
    for role, token in published[name].items():
        assert special[role] == token
    for text in [*PLAIN, *HARD, "the 12345's !\n\nA", *LONG]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    if name == "3":
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        theirs = tiktoken.Encoding("t", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
        for text in [*PLAIN, *HARD, "the 12345's !\n\nA 12 123"]:
            assert tokenizer.encode(text) == theirs.encode_ordinary(text)
        # Its program cuts runs at 25,000 characters.
        cut = [LONG[0][:25_000], LONG[0][25_000:]]
        assert tokenizer.encode(LONG[0]) == [t for p in cut for t in theirs.encode_ordinary(p)]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.opening) == (tokenizer.fingerprint, tokenizer.opening)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": false, "eos_token": "<|end_of_text|>"}'
    )
    assert read_tokenizer(tmp_path).opening == ()


@pytest.mark.parametrize("names", [None, ["<unk>", "<s>", "</s>", "[INST]"]])
def test_tekken_says_all_of_itself(tmp_path, names):
    _, pieces = ranks_of(400)
    content = {
        "config": {
            "pattern": LLAMA3,
            "num_vocab_tokens": 400,
            "default_vocab_size": 330,
            "default_num_special_tokens": 30,
            "version": "v3",
        },
        "vocab": [
            {"rank": n, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
            for n, p in enumerate(pieces)
        ],
    }
    if names is not None:
        content["special_tokens"] = [
            {"rank": n, "token_str": name, "is_control": True} for n, name in enumerate(names)
        ]
    (tmp_path / "tekken_240911.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(tmp_path)
    ranks = {piece: rank for rank, piece in enumerate(pieces[:300])}
    theirs = tiktoken.Encoding("t", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.vocab_size == 330
    assert tokenizer.special["[INST]"] == 3
    assert tokenizer.special["<SPECIAL_29>"] == 29
    assert (tokenizer.opening, tokenizer.closing) == ((1,), (2,))
    for text in [*PLAIN, *HARD, "the 12345's !\n\nA 12 123 [INST]"]:
        wanted = [30 + token for token in theirs.encode_ordinary(text)]
        assert tokenizer.encode(text) == wanted and tokenizer.decode(wanted) == text
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("the 12") == tokenizer.encode("the 12")


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model"])
def test_a_folder_may_use_reserved_tokens_under_names_of_its_own(tmp_path, name):
    if name == "tekken.json":
        config = {"pattern": LLAMA3, "default_vocab_size": 330, "default_num_special_tokens": 30}
        vocabulary = [
            {"rank": n, "token_bytes": base64.b64encode(p).decode()}
            for n, p in enumerate(ranks_of(400)[1])
        ]
        data, reserved = json.dumps({"config": config, "vocab": vocabulary}).encode(), 25
    else:
        data, reserved = ranks_of(128_000)[0] + b"\n\n", 128_002
    (tmp_path / name).write_bytes(data)
    plain = read_tokenizer(tmp_path)
    roles = ["<|im_start|>", "<|im_end|>"]
    added = {str(reserved + n): {"content": r, "special": True} for n, r in enumerate(roles)}
    config = {"added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = read_tokenizer(tmp_path)
    tokenizer.save(tmp_path / "saved")
    for read in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert read.vocab_size == plain.vocab_size
        assert [read.special[role] for role in roles] == [reserved, reserved + 1]
        assert (read.opening, read.end) == (plain.opening, reserved + 1)
        text = "<|im_start|>the 12<|im_end|>"
        assert read.encode_special(text) == [reserved, *plain.encode("the 12"), reserved + 1]
        assert read.encode(text) == plain.encode(text)


def test_a_table_is_known_by_its_size_not_by_its_name(tmp_path):
    for name, count in (("qwen3_5.tiktoken", 300), ("qwen.tiktoken", 150_000), ("a.tiktoken", 300)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(ranks_of(count)[0])
        with pytest.raises(UserError, match=rf"with {count} tokens is not known.*tokenizer.json"):
            read_tokenizer(folder)
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "vocab.tiktoken").write_bytes(ranks_of(151_643)[0])  # Qwen's number
    assert read_tokenizer(folder).special["<|im_end|>"] == 151_645
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen3_5Tokenizer"}')
    with pytest.raises(UserError, match="is not known"):
        read_tokenizer(folder)


def test_qwens_tokenizer_of_an_earlier_run_keeps_its_separator(tmp_path):
    """Its folder says neither the program nor what stands around a text."""
    data, _ = ranks_of(300)
    tokenizer = TiktokenTokenizer(data)
    tokenizer.set_ends(Ends((tokenizer.end,), (), tokenizer.end))
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()).keys() == {
        *("kind", "vocab_size", "begin", "end", "fingerprint")
    }
    again = load_tokenizer(tmp_path)
    assert again.begin == again.end and (again.opening, again.closing) == ((again.end,), ())


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_mistrals_versions_of_a_sentencepiece_model(tmp_path, version):
    (tmp_path / f"tokenizer.model.{version}").write_bytes(sentencepiece_model())
    tokenizer = read_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    assert tokenizer.encode_batch(PLAIN) == theirs.encode(PLAIN)
    assert tokenizer.opening == (theirs.bos_id(),)
