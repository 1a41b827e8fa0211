"""Small tokenizers of every kind that tokenizer.json files describe, made with their own library.

Their parts are those of the published files of the models they are named after; what they are
trained on is a little of `real_strings`.
"""

import functools
import io

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.lmjax.data.real_strings import real_strings

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{ENDS}"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{ENDS}"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
FEW = real_strings()[:160:2] + real_strings()[700::40]  # of all sorts


def _cut(*patterns, prefix=False):
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
    return pre_tokenizers.Sequence([*splits, level])


def byte_level(cutter, normalizer=None, words=(), **settings):
    """Byte pairs; `words` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = cutter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(alphabet),
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(FEW, trainer)
    for name, value in settings.items():
        setattr(tokenizer.model, name, value)
    tokenizer.add_tokens(list(words))
    return tokenizer


def spaced_pairs(normalizer=None, cutter=None, strip=True, words=()):
    """LLaMA's and Gemma's kind: byte pairs of texts whose spaces are U+2581, bytes for the rest."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)|(?<=\n)"), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=700, limit_alphabet=180, show_progress=False)
    trained.train_from_iterator(FEW, trainer)
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁"]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if cutter is not None:
        tokenizer.pre_tokenizer = cutter
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] * strip)])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(list(words))
    return tokenizer


@functools.cache
def unigram_model(**settings):
    """A SentencePiece model of 500 pieces, for its pieces and its table of characters."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in FEW for line in text.split("\n") if line]),
        model_writer=model,
        model_type="unigram",
        vocab_size=500,
        character_coverage=0.98,
        hard_vocab_limit=False,
        num_threads=2,
        minloglevel=3,
        **settings,
    )
    return model.getvalue()


def unigram(byte_fallback=False, cutter=None, normalizer=None, scheme="always"):
    """T5's kind."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(unigram_model())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == piece.NORMAL]
    spelt = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] * byte_fallback
    pieces = [*((name, 0.0) for name in SPECIAL), *spelt, *pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    compiled = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.normalizer = normalizer or normalizers.Sequence(
        [compiled, normalizers.Strip(False, True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    tokenizer.pre_tokenizer = cutter or pre_tokenizers.Metaspace("▁", scheme)
    metaspace = decoders.Metaspace("▁", scheme)
    bytes_first = decoders.Sequence([decoders.ByteFallback(), metaspace])
    tokenizer.decoder = bytes_first if byte_fallback else metaspace
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece(cutter, decoder, **normalizer):
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer, tokenizer.decoder = cutter, decoder
    trainer = trainers.WordPieceTrainer(
        vocab_size=700,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(FEW, trainer)
    return tokenizer


def word_level():
    """Words of a list, without a decoder."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(FEW, trainer)
    return tokenizer


def gpt1():
    """Byte pairs of characters, words end in </w>."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        limit_alphabet=100,
        show_progress=False,
    )
    tokenizer.train_from_iterator(FEW, trainer)
    return tokenizer


def _xlnet():
    proto = sentencepiece_model_pb2.ModelProto.FromString(unigram_model())
    steps = [normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents()]
    steps += [normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)]
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    return unigram(cutter=pre_tokenizers.Sequence(words), normalizer=normalizers.Sequence(steps))


PREFIXED = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
BERT = pre_tokenizers.BertPreTokenizer()
GEMMA_WORDS = [AddedToken(name, normalized=False) for name in ("▁▁", "▁▁▁▁", "\n\n", "<table>")]
FLAGGED = [
    AddedToken("<tool>", lstrip=True, rstrip=True),
    AddedToken("def", single_word=True),
    AddedToken("<think>", normalized=False),
]
MAKE = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta, space": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "gpt_neox": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), ["   ", "  "]
    ),
    "claude": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()
    ),
    "qwen2": lambda: byte_level(_cut(QWEN2), normalizers.NFC(), ["<tool_call>", "</think>"]),
    "llama3": lambda: byte_level(_cut(LLAMA3), ignore_merges=True),
    "gpt4o": lambda: byte_level(_cut(GPT4O)),
    "deepseek": lambda: byte_level(_cut(*DEEPSEEK), words=["<｜User｜>"]),
    "starcoder": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "bloom": lambda: byte_level(_cut(" ?[^(\\s|[.,!?…。，、।۔،])]+")),
    "flags": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), words=FLAGGED),
    "llama": lambda: spaced_pairs(normalizers.Sequence(PREFIXED)),
    "llama, words": lambda: spaced_pairs(
        normalizers.Sequence(PREFIXED), words=[AddedToken("<tool>", normalized=False)]
    ),
    "gemma": lambda: spaced_pairs(PREFIXED[1], strip=False, words=GEMMA_WORDS),
    "gemma3": lambda: spaced_pairs(
        PREFIXED[1], pre_tokenizers.Split(" ", "merged_with_previous"), strip=False
    ),
    "llama, first": lambda: spaced_pairs(
        cutter=pre_tokenizers.Metaspace("▁", "first", split=False)
    ),
    "t5": unigram,
    "t5, first": lambda: unigram(scheme="first"),
    "unigram with bytes": lambda: unigram(byte_fallback=True),
    "xlnet": _xlnet,
    "bert": lambda: word_piece(BERT, decoders.WordPiece()),
    "bert, cased": lambda: word_piece(BERT, decoders.WordPiece(cleanup=False), lowercase=False),
    "bert, words": lambda: word_piece(pre_tokenizers.Whitespace(), decoders.WordPiece()),
    "word level": word_level,
    "gpt1": gpt1,
}


@functools.cache
def library_tokenizer(kind: str) -> str:
    """The JSON of a kind, with a post-processor that puts tokens around a text as a rule."""
    tokenizer = MAKE[kind]()
    if kind in ("bert", "bert, cased"):
        ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
        )
    return tokenizer.to_str()
