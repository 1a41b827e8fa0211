"""Recipes of published corpora, as far as the steps of this package express them.

Each docstring names what is left out. Thresholds are those of the papers; a step that takes a list,
such as bad words or blocked domains, is given it by the caller. `MainText` and `AddressRules` are
for pages, and belong to their collection.
"""

from __future__ import annotations

from lmjax.config import preset
from lmjax.data.cleaning.bad_words import BadWords
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.corpus_step import CorpusStep
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.heuristics import (
    C4Lines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
)
from lmjax.data.cleaning.languages import LanguageFilter
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.perplexity import Perplexity
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.pipeline import CleaningRecipe
from lmjax.data.cleaning.quality import QualityFilter
from lmjax.data.cleaning.semantic import SemanticDuplicates
from lmjax.data.cleaning.step import Step
from lmjax.data.cleaning.substrings import ExactSubstrings
from lmjax.data.cleaning.toxicity import ToxicityFilter


@preset
def c4_cleaning(bad_words: tuple[str, ...] = ()) -> CleaningRecipe:
    """C4 (Raffel et al. 2020, arXiv:1910.10683, section 2.2), for English.

    Lines of at least three words, pages of at least five sentences, and one of each three sentences
    in a row that occur again. Left out: the language by langdetect (0.99 English).

    Args:
        bad_words: a page with one of them is dropped.
    """
    words = (BadWords(words=bad_words),) if bad_words else ()
    lines = C4Lines(least_words=3, least_sentences=5)
    return CleaningRecipe(steps=(lines, *words, ExactDuplicates(unit="sentence", run=3, least=1)))


@preset
def gopher_cleaning() -> CleaningRecipe:
    """MassiveText's web (Rae et al. 2021, arXiv:2112.11446, appendix A.1).

    Quality, repetition, exact copies, and near-duplicates by 13-grams with a similarity of 0.8.
    Left out: SafeSearch, the language, and the bands, which the paper does not state: 20 of 6 rows
    find 0.997 of the pairs with that similarity.
    """
    minhash = MinHash(ngram=13, bands=20, rows=6)
    return CleaningRecipe(
        steps=(
            GopherQuality(),
            GopherRepetition(),
            ExactDuplicates(),
            NearDuplicates(minhash=minhash, similarity=0.75),
        )
    )


@preset
def refinedweb_cleaning() -> CleaningRecipe:
    """RefinedWeb (Penedo et al. 2023, arXiv:2306.01116), after extraction and rules on URLs.

    Repetition and quality of Gopher's, then MinHash with 20 bands of 450 rows on 5-grams, and exact
    substrings of 50 words. Left out: extraction by trafilatura (`MainText` has another library),
    the language by fastText, and corrections of lines; the paper counts tokens in place of words.
    """
    return CleaningRecipe(
        steps=(
            GopherRepetition(),
            GopherQuality(),
            NearDuplicates(minhash=MinHash(ngram=5, bands=20, rows=450)),
            ExactSubstrings(),
        )
    )


@preset
def fineweb_cleaning() -> CleaningRecipe:
    """FineWeb (Penedo et al. 2024, arXiv:2406.17557), after extraction and rules on URLs.

    Gopher's rules, C4's without the one on terminal marks, FineWeb's own, MinHash with 14 bands of
    8 rows on 5-grams, and placeholders for addresses. Left out: extraction by trafilatura, and the
    language by fastText (0.65 English). MinHash is applied over all that is read: FineWeb applies
    it to each snapshot of Common Crawl, which is a cleaning for each here.
    """
    return CleaningRecipe(
        steps=(
            GopherRepetition(),
            GopherQuality(),
            C4Lines(terminal=False, least_words=1, least_sentences=5),
            FineWebQuality(),
            NearDuplicates(minhash=MinHash(ngram=5, bands=14, rows=8)),
            PersonalData(kinds=("email", "ip")),
        )
    )


@preset
def gpt3_cleaning(quality: str = "") -> CleaningRecipe:
    """GPT-3's fuzzy deduplication (Brown et al. 2020, arXiv:2005.14165, appendix A).

    10 hashes, which the paper's library takes as 10 bands of a row: their agreement in a share of
    half is asked for, since a single one links texts that have little in common. Left out: that the
    classifier's features are hashed too. Add `Decontaminate(tests=...)` for the evaluation sets
    (appendix C).

    Args:
        quality: file of a classifier (`TrainQuality`) for the Pareto rule; empty: without it.
    """
    return CleaningRecipe(
        steps=(
            *_quality(quality),
            NearDuplicates(minhash=MinHash(ngram=1, bands=10, rows=1), similarity=0.5),
        )
    )


@preset
def ccnet_cleaning(models: str, languages: tuple[str, ...] = ("en",)) -> CleaningRecipe:
    """CCNet (Wenzek et al. 2020, arXiv:1911.00359, sections 3 and 4).

    Paragraphs that occur again, the language with a score of 0.5, and perplexity by a model of
    5-grams of pieces of each language's Wikipedia; head, middle and tail are noted, and all are
    kept, as the paper keeps them in files of their own. Left out: fastText, and that paragraphs are
    compared within 5 GB of a snapshot.

    Args:
        models: outputs of `TrainPerplexity`, with {} for the code of the language.
        languages: that there is a model for, and that are kept.
    """
    return CleaningRecipe(
        steps=(
            ExactDuplicates(unit="paragraph", least=1),
            LanguageFilter(keep=languages, least_score=0.5),
            Perplexity(models=models, languages=languages),
        )
    )


@preset
def pile_cleaning(quality: str = "") -> CleaningRecipe:
    """The Pile's part of Common Crawl (Gao et al. 2020, arXiv:2101.00027, appendices C.1 and D.2).

    English, the classifier with a Pareto distribution of the shape 3, and near-duplicates by 10
    hashes with a similarity of 0.5. Left out: extraction by jusText (`MainText` has another
    library), and fastText as the classifier.

    Args:
        quality: file of a classifier (`TrainQuality`), of links' pages; empty: without it.
    """
    return CleaningRecipe(
        steps=(
            LanguageFilter(keep=("en",)),
            *_quality(quality, shape=3.0),
            NearDuplicates(minhash=MinHash(ngram=1, bands=10, rows=1), similarity=0.5),
        )
    )


@preset
def baichuan2_cleaning(similarity: float = 0.95) -> CleaningRecipe:
    """Baichuan 2 (Yang et al. 2023, arXiv:2309.10305, section 2.1).

    Duplicates of documents, paragraphs and sentences, exactly and by locality-sensitive hashing,
    then by clusters of dense vectors, whose numbers stay with the documents: with
    `TagBalance(field="cluster")` they decide about sampling. The report gives no thresholds: those
    here are chosen, and so are the vectors, for which `SemanticDuplicates` takes others too. Left
    out: the classifiers of safety.

    Args:
        similarity: least cosine of two documents of which the later one is dropped.
    """
    return CleaningRecipe(
        steps=(
            ExactDuplicates(),
            ExactDuplicates(unit="paragraph"),
            ExactDuplicates(unit="sentence", run=3),
            NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7),
            SemanticDuplicates(similarity=similarity),
        )
    )


@preset
def qwen_cleaning(perplexity: str = "", quality: str = "", toxicity: str = "") -> CleaningRecipe:
    """Qwen (Bai et al. 2023, arXiv:2309.16609, section 2.1).

    English and Chinese for the most part, exact duplicates after normalisation, MinHash, rules, and
    scores by models: of language, of quality, and of offensive text. The report gives no
    thresholds: the rules are Gopher's here, of MinHash 20 bands of 6 rows. Sources of high quality
    are read more often: give their `Domain` a larger weight.

    Args:
        perplexity: outputs of `TrainPerplexity`, with {} for en and zh; empty: without it.
        quality: file of a classifier (`TrainQuality`); empty: without it.
        toxicity: file of classifiers (`TrainToxicity`); empty: without them.
    """
    bands = Perplexity(models=perplexity or "{}", languages=("en", "zh"), most_quantile=2 / 3)
    return CleaningRecipe(
        steps=(
            LanguageFilter(),
            GopherRepetition(),
            GopherQuality(least_stop_words=0),
            *((bands,) if perplexity else ()),
            *_quality(quality),
            *((ToxicityFilter(model=toxicity),) if toxicity else ()),
            ExactDuplicates(),
            NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7),
        )
    )


@preset
def skywork_cleaning(quality: str = "") -> CleaningRecipe:
    """SkyPile (Wei et al. 2023, arXiv:2310.19341, section 2.1).

    English and Chinese alone; its filter of distributions, for text that repeats others in meaning,
    deduplication, and a classifier of pages that an encyclopaedia would refer to. The report gives
    no thresholds: those here are chosen. Left out: the rules for JSON, XML and HTML of code, and
    parallel paragraphs (`ParallelText`). A source is read five times at most:
    `TokenShares(most_epochs=5)`.

    Args:
        quality: file of a classifier (`TrainQuality`) of pages that are referred to; empty: none.
    """
    return CleaningRecipe(
        steps=(
            LanguageFilter(keep=("en", "zh")),
            SemanticDuplicates(similarity=0.95),
            ExactDuplicates(),
            NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7),
            *_quality(quality),
        )
    )


def _quality(model: str, shape: float = 9.0) -> tuple[Step | CorpusStep, ...]:
    """The classifier with the Pareto rule; nothing without a model."""
    return (QualityFilter(model=model, shape=shape),) if model else ()
