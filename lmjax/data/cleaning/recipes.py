"""Recipes of published corpora, as far as the steps of this package express them.

Each docstring names what is left out. Thresholds are those of the papers; a step that takes a list,
such as bad words or blocked domains, is given it by the caller. `MainText` and `AddressRules` are
for pages, and belong to their collection.
"""

from __future__ import annotations

from lmjax.config import preset
from lmjax.data.cleaning.bad_words import BadWords
from lmjax.data.cleaning.clusters import NearDuplicates
from lmjax.data.cleaning.duplicates import ExactDuplicates
from lmjax.data.cleaning.heuristics import (
    C4Lines,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
)
from lmjax.data.cleaning.near_duplicates import MinHash
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.pipeline import CleaningRecipe
from lmjax.data.cleaning.substrings import ExactSubstrings


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
def gpt3_cleaning() -> CleaningRecipe:
    """GPT-3's fuzzy deduplication (Brown et al. 2020, arXiv:2005.14165, appendix A).

    10 hashes, which the paper's library takes as 10 bands of a row: their agreement in a share of
    half is asked for, since a single one links texts that have little in common. Left out: the
    classifier of quality with its Pareto rule, and that its features are hashed too. Add
    `Decontaminate(tests=...)` for the evaluation sets (appendix C).
    """
    return CleaningRecipe(
        steps=(NearDuplicates(minhash=MinHash(ngram=1, bands=10, rows=1), similarity=0.5),)
    )
