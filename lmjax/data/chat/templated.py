"""The base of the sources whose texts are written in a chat format."""

from __future__ import annotations

import abc
from typing import Any

from lmjax.config import UserError, config, replace
from lmjax.data.chat.folder import FolderTemplate
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templates import PLAIN, ChatTemplate
from lmjax.data.documents import HashFiles, digest
from lmjax.data.sources import JsonRecords


@config
class TemplatedRecords(JsonRecords, abc.ABC):
    """JSON lines that are written in a chat format."""

    # The format that conversations are written in, for example chat_template("chatml").
    template: ChatTemplate | FolderTemplate = PLAIN

    def fingerprint(self, hash_files: HashFiles | None = None) -> str:
        """See `Source.fingerprint`; a folder's template counts as it is, wherever the folder is."""
        if not isinstance(self.template, FolderTemplate):
            return super().fingerprint(hash_files)
        source = replace(self, template=PLAIN)
        return digest(JsonRecords.fingerprint(source, hash_files), *self.template.identity())


def template_of(data: Any) -> ChatFormat | None:
    """The format of the conversations in `data`, a `Data`; None where there are none.

    Raises:
      UserError: there are several.
    """
    sources = [source for domain in data.train for source in (domain.source, domain.evaluation)]
    found = {
        repr(template): template
        for template in (getattr(source, "template", None) for source in sources)
        if isinstance(template, ChatFormat)
    }
    if len(found) > 1:
        raise UserError(
            "the conversations of data.train have several templates; a model has one: set the same"
            " for all of them"
        )
    return next(iter(found.values()), None)
