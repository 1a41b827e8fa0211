"""Encodes each different word once, with words found and looked up by numpy, many at a time.

Byte-pair encoding joins neighbours that together are a piece of the vocabulary. Where no piece has
another character before a space, nothing is ever joined across one, and a text has the tokens of
its words, one after another. Words of up to 32 bytes are looked up in a table by all their bytes.
"""

import itertools
import threading
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt8, UInt64

SPACE = "\u2581"  # how SentencePiece writes a space; as a character of the text it must be hidden
LANES = 4  # words of 8 bytes that a looked up word has room in
SLOTS = 1 << 18  # of the table; where two words want the same slot, the later one has it
MOST_TOKENS = 1 << 22  # of words that are known, before all are forgotten
COUNTED = 1 << 20  # a word has fewer tokens; its entry is the first one's, times this, and how many
TOGETHER = 1 << 15  # words that are looked up together: what is needed stays in the cache
HIDDEN = SPACE.encode()
# Kinds of bytes. One of the kind OTHER is not parted from letters, digits and marks.
LETTER, DIGIT, MARK, OTHER, BLANK, NEWLINE = range(6)
MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # of so many bytes
MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)


def _kinds(small: bool, others: int) -> UInt8[np.ndarray, "256"]:
    found = np.full(256, LETTER, np.uint8)
    if small:
        found[list(b"0123456789")] = DIGIT
        found[list(b"\t!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")] = MARK
    found[128:] = others  # bytes of characters beyond ASCII
    found[ord(" ")], found[ord("\n")] = BLANK, NEWLINE
    return found


# Kinds by which texts fall into smaller words, and into larger ones.
CUTS = (_kinds(True, LETTER), _kinds(True, OTHER), _kinds(False, LETTER))


def safe_kinds(model: bytes) -> UInt8[np.ndarray, "256"] | None:
    """The kinds of bytes by whose borders a SentencePiece model's texts may be cut; None: of none.

    Args:
        model: the model file.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    except DecodeError:  # the library reads some damaged files
        return None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes = (
        normalizer.precompiled_charsmap,
        normalizer.add_dummy_prefix,
        normalizer.remove_extra_whitespaces,
        not normalizer.escape_whitespaces,
        trainer.treat_whitespace_as_suffix,
        # Neighbours that are unknown would become one token.
        not trainer.byte_fallback,
        trainer.model_type != trainer.BPE,
    )
    if any(changes):
        return None
    kind = proto.SentencePiece
    apart = (kind.BYTE, kind.CONTROL, kind.UNKNOWN)
    pieces = [
        one.piece.replace(SPACE, " ").encode() for one in proto.pieces if one.type not in apart
    ]
    # Whether two bytes are parted depends on them alone: what is whole alone is whole anywhere.
    data = np.frombuffer(b"".join(pieces), np.uint8)
    begins = np.cumsum([0, *map(len, pieces)])[:-1]
    for kinds in CUTS:
        if np.array_equal(np.flatnonzero(_begins(kinds[data], begins)), begins):
            return kinds
    return None


def _is_parted(before: int, after: int) -> bool:
    """Returns whether a word begins between bytes of these kinds: its blanks belong to it."""
    if NEWLINE in (before, after):
        return True
    return before != BLANK and (
        after == BLANK or (before != after and OTHER not in (before, after))
    )


PARTED = np.array([[_is_parted(before, after) for after in range(8)] for before in range(8)])


def _begins(
    kinds: UInt8[np.ndarray, "bytes"], texts: Int[np.ndarray, "texts"]
) -> Bool[np.ndarray, "bytes"]:
    """Returns whether a word begins at each byte.

    Args:
        kinds: of the bytes.
        texts: first byte of each text.
    """
    found = np.empty(len(kinds), bool)
    np.take(PARTED.ravel(), kinds[:-1] << 3 | kinds[1:], out=found[1:])
    found[texts] = True
    return found


class ByteWords:
    """Cache of the tokens of words, for texts in UTF-8."""

    def __init__(
        self,
        kinds: UInt8[np.ndarray, "256"],
        encode: Callable[[Sequence[str]], list[list[int]]],
        longest_run: int,
    ):
        """
        Args:
            kinds: of bytes, by whose borders texts may be cut.
            encode: gives the tokens of words.
            longest_run: bytes without a blank that `encode` takes as they are.
        """
        self._kinds, self._encode, self._longest_run = kinds, encode, longest_run
        self._lock = threading.Lock()  # of all that follows
        self._clear()

    def _clear(self) -> None:
        self._lanes = np.zeros((SLOTS, LANES), np.uint64)
        self._sizes = np.zeros(SLOTS, np.int32)  # bytes of the word in each slot; 0: it is empty
        self._entries = np.zeros(SLOTS, np.int64)  # of its tokens in `_tokens`
        self._known: dict[bytes, int] = {}  # entries of all words
        self._tokens = np.zeros(1 << 16, np.uint32)
        self._used = 0  # of `_tokens`

    def encode_arrays(self, texts: Sequence[str]) -> list[Integer[np.ndarray, "tokens"]] | None:
        """The tokens of each text; None for texts that have to be encoded in another way."""
        encoded = [text.encode("utf-8") for text in texts]
        sizes = np.array([len(text) for text in encoded], np.int64)
        data = b"".join([*encoded, bytes(8 * LANES)])
        total = len(data) - 8 * LANES
        if not total or HIDDEN in data:
            return None
        begins = np.cumsum(sizes) - sizes
        words, run = self._words(data, total, begins[sizes > 0])
        if run > self._longest_run:
            return None
        tokens, counts = [], []
        with self._lock:
            for first in range(0, len(words) - 1, TOGETHER):
                found = self._looked_up(data, words[first : first + TOGETHER + 1])
                tokens.append(found[0])
                counts.append(found[1])
        joined = np.concatenate(tokens)
        # Of the first word of each text, and one past the last.
        edges = np.searchsorted(words, np.append(begins, total))
        edges = np.concatenate([[0], *counts]).cumsum()[edges]
        return [joined[first:end] for first, end in itertools.pairwise(edges.tolist())]

    def _words(
        self, data: bytes, total: int, begins: Int[np.ndarray, "texts"]
    ) -> tuple[Int[np.ndarray, "edges"], int]:
        """First byte of each word, and of what follows them; bytes of the longest run of words."""
        kinds = self._kinds[np.frombuffer(data, np.uint8, total)]
        words = np.append(np.flatnonzero(_begins(kinds, begins)), total)
        blanks = np.flatnonzero(kinds >= BLANK)
        runs = np.diff(np.concatenate([[-1], blanks, [total]]))
        return words, int(runs.max())

    def _looked_up(
        self, data: bytes, words: Int[np.ndarray, "edges"]
    ) -> tuple[Integer[np.ndarray, "tokens"], Int[np.ndarray, "words"]]:
        """The tokens of words, and how many each of them has."""
        if self._used > MOST_TOKENS:
            self._clear()
        sizes = np.diff(words)
        short = np.flatnonzero(sizes <= 8 * LANES)
        lanes, slots = _keys(data, words[short], sizes[short])
        hit = self._sizes[slots] == sizes[short]
        for lane in range(LANES):
            hit &= self._lanes[slots, lane] == lanes[:, lane]
        entries = np.empty(len(sizes), np.int64)
        entries[short] = self._entries[slots]
        missing = np.ones(len(sizes), bool)
        missing[short[hit]] = False
        missing = np.flatnonzero(missing)
        found = [data[a:b] for a, b in zip(words[missing].tolist(), words[missing + 1].tolist())]
        self._learn(found)
        entries[missing] = np.fromiter(map(self._known.__getitem__, found), np.int64, len(found))
        own = np.flatnonzero(~hit)  # of the short words
        chosen = slots[own]
        self._lanes[chosen], self._sizes[chosen] = lanes[own], sizes[short[own]]
        self._entries[chosen] = entries[short[own]]
        counts = entries & (COUNTED - 1)
        ends = np.cumsum(counts)
        at = np.repeat(entries // COUNTED - (ends - counts), counts)
        at += np.arange(len(at))
        return self._tokens[at], counts

    def _learn(self, words: list[bytes]) -> None:
        """Encodes those of some words that are not known."""
        new = [word for word in dict.fromkeys(words) if word not in self._known]
        if not new:
            return
        tokens = self._encode([word.decode("utf-8") for word in new])
        counts = np.fromiter(map(len, tokens), np.int64, len(tokens))
        ends = self._used + np.cumsum(counts)
        flat = list(itertools.chain.from_iterable(tokens))
        if ends[-1] > len(self._tokens):
            self._tokens = np.resize(self._tokens, max(int(ends[-1]), 2 * len(self._tokens)))
        self._tokens[self._used : ends[-1]] = flat
        self._used = int(ends[-1])
        self._known.update(zip(new, ((ends - counts) * COUNTED + counts).tolist()))


def _keys(
    data: bytes, words: Int[np.ndarray, "words"], sizes: Int[np.ndarray, "words"]
) -> tuple[UInt64[np.ndarray, "words lanes"], Int[np.ndarray, "words"]]:
    """All bytes of each word, in numbers of 8 bytes, and its slot in the table."""
    # A number from every byte on; they overlap.
    numbers = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
    lanes = np.zeros((len(words), LANES), np.uint64)
    mixed = sizes.astype(np.uint64)
    for lane in range(LANES):
        some = slice(None) if lane == 0 else np.flatnonzero(sizes > 8 * lane)
        own = numbers[words[some] + 8 * lane]
        own &= MASKS[np.minimum(sizes[some] - 8 * lane, 8)]
        lanes[some, lane] = own
        own ^= own >> np.uint64(29)
        mixed[some] ^= own * np.uint64(MIX[lane])
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(MIX[0])
    return lanes, (mixed >> np.uint64(64 - SLOTS.bit_length() + 1)).astype(np.int64)
