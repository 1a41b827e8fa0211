"""C4's steps on archives of the web (Raffel et al. 2020, arXiv:1910.10683).

python -m experiments.data.c4 sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
A list of bad words is a file of yours: steps.0='c4_cleaning(bad_words=(...))', or `BadWordLists`.
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    c4_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/c4",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText(), LanguageFilter(keep=("en",), least_score=0.99)),
        ),
    ),
    steps=(c4_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
