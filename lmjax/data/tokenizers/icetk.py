"""The vocabulary of icetk, for text: GLM-130B's and ChatGLM-6B's."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from lmjax.config import UserError
from lmjax.data.tokenizers.base import Tokenizer
from lmjax.data.tokenizers.folder_settings import folder_settings
from lmjax.data.tokenizers.subwords import MODEL_FILE, SentencePieceTokenizer

ICE_FILE = "ice_text.model"
IMAGES = 20_000  # ids before those of text that stand for parts of images
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
NEWLINE, TAB, END, PAD = "<n>", "<|tab|>", "</s>", "<pad>"
LONGEST_BLANK = 80  # spaces
BLANKS = {f"<|blank_{length}|>": " " * length for length in range(2, LONGEST_BLANK + 1)}
WHITESPACE = {NEWLINE: "\n", TAB: "\t", **BLANKS}  # what pieces stand for
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
RUN = re.compile(f"\n|\t| {{2,{LONGEST_BLANK}}}")
PIECES = {text: piece for piece, text in WHITESPACE.items()}
WRITTEN = {piece.encode(): text.encode() for piece, text in WHITESPACE.items()}


class IceTokenizer(Tokenizer):
    """icetk's SentencePiece model, which has pieces for newlines, tabs and runs of spaces.

    What the model does not normalise comes back exactly, but for the names of those pieces: <n> in
    a text is a newline, as in the authors' program.
    """

    kind = "icetk"

    def __init__(self, model: bytes, images: int):
        """`model` is a file with all pieces that icetk has; its ids begin at `images`."""
        self._model, self._images = model, images
        self._inner = SentencePieceTokenizer(model, by_line=False)
        self.vocab_size = images + self._inner.vocab_size
        self.special = {name: images + token for name, token in self._inner.special.items()}
        self.begin, self.end = None, self.special[END]
        self.unknown = images + self._inner.unknown
        first = self._inner.encode("a")[0]
        self._prefix = self._inner.token_bytes(first)[:1] == b" "

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        self._inner.threads = self.threads
        spelt = [RUN.sub(lambda run: PIECES[run[0]], text) for text in texts]
        return [
            [self._images + token for token in tokens] for tokens in self._inner.encode_batch(spelt)
        ]

    def token_bytes(self, token: int) -> bytes:
        piece = self._inner.token_bytes(token - self._images)
        return WRITTEN.get(piece, piece)

    def decode(self, tokens: Sequence[int]) -> str:
        text = super().decode(tokens)
        return text[1:] if self._prefix and text.startswith(" ") else text

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "images": self._images}

    def files(self) -> dict[str, bytes]:
        return {MODEL_FILE: self._model}

    @classmethod
    def from_saved(cls, settings: dict[str, Any], folder: pathlib.Path) -> "IceTokenizer":
        return cls((folder / MODEL_FILE).read_bytes(), settings["images"])


def read_icetk(path: pathlib.Path) -> Tokenizer:
    """An ice_text.model: GLM-130B's, or ChatGLM-6B's of any release.

    The last release of ChatGLM-6B has no ids for images (num_image_tokens is 0 in its
    tokenizer_config.json), and all tokens in its model file.
    """
    images = folder_settings(path.parent).get("num_image_tokens", IMAGES)
    if not isinstance(images, int) or images < 0:
        raise UserError(f"{path.parent}: num_image_tokens is {images!r}; it must be 0 or more")
    data = path.read_bytes()
    try:
        SentencePieceTokenizer(data, by_line=False)
    except RuntimeError as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from None
    return IceTokenizer(_complete(path, data), images)


def _complete(path: pathlib.Path, data: bytes) -> bytes:
    """A model file with icetk's command tokens, which no text can make, whitespace and bytes.

    The program of GLM-130B and of the first ChatGLM-6B puts them behind the file's own 130,000
    pieces, in this order.

    Raises:
      UserError: another vocabulary than icetk's.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(data)
    types = sentencepiece_model_pb2.ModelProto.SentencePiece
    if COMMANDS[0] not in {piece.piece for piece in model.pieces}:
        model.trainer_spec.byte_fallback = True
        for names, kind in (
            (COMMANDS, types.CONTROL),
            ((TAB, *BLANKS), types.USER_DEFINED),
            (BYTE_PIECES, types.BYTE),
        ):
            for name in names:
                model.pieces.add(piece=name, score=0.0).type = kind
    names = {piece.piece for piece in model.pieces}
    if missing := [name for name in (END, *COMMANDS, *WHITESPACE, PAD) if name not in names]:
        raise UserError(f"{path} is not icetk's vocabulary: {missing[0]} is not in it")
    for piece in model.pieces:
        if piece.piece in COMMANDS:
            piece.type = types.CONTROL
    return model.SerializeToString()
