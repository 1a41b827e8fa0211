"""Conversations to train on, from TensorFlow Datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmjax.config import UserError, config, fingerprint, replace
from lmjax.data.chat.conversations import make_documents
from lmjax.data.chat.folder import FolderTemplate
from lmjax.data.chat.records import find_layout
from lmjax.data.chat.templates import PLAIN, ChatTemplate
from lmjax.data.documents import BadRecord, Document
from lmjax.data.tfds import TFDSExamples, plain_values


@config
class TFDSConversations(TFDSExamples):
    """Conversations of a TensorFlow Datasets builder, in the layouts that `Conversations` knows.

    The features of an example are the fields of a line.
    """

    # The format that conversations are written in, for example chat_template("chatml").
    template: ChatTemplate | FolderTemplate = PLAIN
    metadata: tuple[str, ...] = ()  # features that are kept of an example beside its text

    def settings(self) -> tuple[str, ...]:
        """See `TFDSExamples.settings`; a folder's template counts as it is."""
        if isinstance(self.template, FolderTemplate):
            rest = self.template.identity()
            return (fingerprint(replace(self, template=PLAIN, data_dir="", download=False)), *rest)
        return (fingerprint(replace(self, data_dir="", download=False)),)

    def documents_of(self, example: Any, identity: str) -> Iterator[Document]:
        """See `TFDSExamples.documents_of`."""
        record = self._record(example, identity)
        kept = {name: record[name] for name in self.metadata if name in record} or None
        try:
            for document in make_documents(record, self.template, identity):
                yield document._replace(metadata=kept)
        except BadRecord as error:
            raise UserError(f"{identity}: {error}") from None

    def layout(self) -> str:
        """Name of the layout of the examples. UserError: it is none that is known."""
        try:
            return find_layout(self._record(self._open()[0], f"{self.name} example 0")).name
        except BadRecord as error:
            raise UserError(f"TFDS {self.name!r}: {error}") from None

    def _record(self, example: Any, identity: str) -> dict[str, Any]:
        """An example as a line would have it. The features of an example are never one list."""
        return {name: plain_values(value, identity) for name, value in example.items()}
