"""Cleaning: small steps, each of which gives a document back, changed or not, or drops it."""

from lmjax.data.cleaning.addresses import AddressRules
from lmjax.data.cleaning.bad_words import BadWordLists, BadWords
from lmjax.data.cleaning.chinese import ChineseQuality
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.code_quality import CodeQuality
from lmjax.data.cleaning.contamination import Decontaminate
from lmjax.data.cleaning.corpus_step import CorpusStep
from lmjax.data.cleaning.dirt import DirtyPages, PlantedQuestions
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.embeddings import Embedder, GivenVectors, HashedWords
from lmjax.data.cleaning.formats import (
    ArrayRecordOutput,
    JsonLinesOutput,
    OutputFormat,
    ParquetOutput,
)
from lmjax.data.cleaning.heuristics import (
    C4Lines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
)
from lmjax.data.cleaning.languages import LanguageFilter
from lmjax.data.cleaning.latex_text import LatexText
from lmjax.data.cleaning.links import SharedLinks
from lmjax.data.cleaning.main_text import MainText
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.perplexity import Perplexity
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.pipeline import CleaningPipeline, CleaningRecipe
from lmjax.data.cleaning.quality import QualityFilter
from lmjax.data.cleaning.recipes import (
    baichuan2_cleaning,
    c4_cleaning,
    ccnet_cleaning,
    fineweb_cleaning,
    gopher_cleaning,
    gpt3_cleaning,
    pile_cleaning,
    qwen_cleaning,
    refinedweb_cleaning,
    skywork_cleaning,
)
from lmjax.data.cleaning.repair import RepairText
from lmjax.data.cleaning.semantic import SemanticDuplicates
from lmjax.data.cleaning.shard_pass import Collection
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.cleaning.substrings import ExactSubstrings
from lmjax.data.cleaning.toxicity import ToxicityFilter

__all__ = [
    "AddressRules",
    "ArrayRecordOutput",
    "BadWordLists",
    "BadWords",
    "C4Lines",
    "ChineseQuality",
    "CleaningPipeline",
    "CleaningRecipe",
    "CodeQuality",
    "Collection",
    "CorpusStep",
    "Decontaminate",
    "DirtyPages",
    "Dropped",
    "Embedder",
    "ExactDuplicates",
    "ExactSubstrings",
    "FineWebQuality",
    "GivenVectors",
    "GopherQuality",
    "GopherRepetition",
    "HashedWords",
    "JsonLinesOutput",
    "LanguageFilter",
    "LatexText",
    "MainText",
    "MinHash",
    "NearDuplicates",
    "OutputFormat",
    "ParquetOutput",
    "Perplexity",
    "PersonalData",
    "PlantedQuestions",
    "QualityFilter",
    "RepairText",
    "SemanticDuplicates",
    "SharedLinks",
    "Step",
    "ToxicityFilter",
    "baichuan2_cleaning",
    "c4_cleaning",
    "ccnet_cleaning",
    "fineweb_cleaning",
    "gopher_cleaning",
    "gpt3_cleaning",
    "pile_cleaning",
    "qwen_cleaning",
    "refinedweb_cleaning",
    "skywork_cleaning",
]
