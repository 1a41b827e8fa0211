"""Text to batches: sources, tokenizers, the token store, mixtures, and the loader."""

import importlib
from typing import Any

from lmjax.data.archives import WebArchives
from lmjax.data.chat.conversations import (
    ClassFormat,
    ConditionedConversations,
    Conversations,
)
from lmjax.data.chat.folder import FolderTemplate
from lmjax.data.chat.templates import ChatTemplate
from lmjax.data.chat.tfds_conversations import TFDSConversations
from lmjax.data.cleaned import CleanedDocuments
from lmjax.data.code_files import CodeFiles
from lmjax.data.damaged_texts import DamagedTexts
from lmjax.data.documents import Document, Source
from lmjax.data.embedded import EmbeddedCorpus
from lmjax.data.infilling import FillInTheMiddle, ParallelText
from lmjax.data.labelled_texts import LabelledTable, LabelledTexts
from lmjax.data.labelled_tokens import LabelledColumns, LabelledTokens
from lmjax.data.latex import LatexFiles
from lmjax.data.loader import Loader
from lmjax.data.mixture import Mixture
from lmjax.data.pages import HtmlFiles
from lmjax.data.parquet import ParquetFiles
from lmjax.data.plan import Plan, make_plan
from lmjax.data.preparation import PreparedData, prepare
from lmjax.data.public_tokenizers import TokenizerFolder, read_tokenizer
from lmjax.data.published import (
    FirstField,
    PileFiles,
    WuDaoFiles,
    c4_files,
    skypile_files,
    wikipedia_files,
    yayi2_files,
)
from lmjax.data.request_rows import RequestRows
from lmjax.data.rows import EvaluationRows, Ring, RowReader
from lmjax.data.settings import Data, Domain, Stage
from lmjax.data.sources import JsonLines, JsonPrompts, TextFiles
from lmjax.data.store import TokenStore, open_store
from lmjax.data.sums import SumTexts
from lmjax.data.tfds import TFDS
from lmjax.data.token_shares import TokenShares
from lmjax.data.tokenize import build_stores
from lmjax.data.tokenizers import (
    Bytes,
    Characters,
    SentencePiece,
    Tokenizer,
    TokenizerConfig,
    TrainedBPE,
    TrainedByteBPE,
    TrainedSentencePiece,
    WithTokens,
    add_words,
    load_tokenizer,
    merge_tokenizers,
    old_pieces,
)
from lmjax.data.whole_documents import WholeDocuments

__all__ = [
    "TFDS",
    "Bytes",
    "Characters",
    "ChatTemplate",
    "ClassFormat",
    "CleanedDocuments",
    "CodeFiles",
    "ConditionedConversations",
    "Conversations",
    "DamagedTexts",
    "Data",
    "Document",
    "Domain",
    "EmbeddedCorpus",
    "EvaluationRows",
    "FillInTheMiddle",
    "FirstField",
    "FolderTemplate",
    "HtmlFiles",
    "JsonLines",
    "JsonPrompts",
    "LabelledColumns",
    "LabelledTable",
    "LabelledTexts",
    "LabelledTokens",
    "LatexFiles",
    "Loader",
    "Mixture",
    "ParallelText",
    "ParquetFiles",
    "PileFiles",
    "Plan",
    "PreparedData",
    "RequestRows",
    "Ring",
    "RowReader",
    "SentencePiece",
    "Source",
    "Stage",
    "SumTexts",
    "TFDSConversations",
    "TextFiles",
    "TokenShares",
    "TokenStore",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerFolder",
    "TrainedBPE",
    "TrainedByteBPE",
    "TrainedSentencePiece",
    "WebArchives",
    "WholeDocuments",
    "WithTokens",
    "WuDaoFiles",
    "add_words",
    "build_stores",
    "c4_files",
    "chat_template",
    "load_tokenizer",
    "make_plan",
    "merge_tokenizers",
    "old_pieces",
    "open_store",
    "prepare",
    "read_tokenizer",
    "skypile_files",
    "wikipedia_files",
    "yayi2_files",
]


def __getattr__(name: str) -> Any:
    """`chat_template`, when it is first asked for: it knows all models, and they bring jax."""
    if name != "chat_template":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("lmjax.data.chat.catalogue").chat_template
