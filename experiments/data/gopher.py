"""MassiveText's steps for the web (Rae et al. 2021, arXiv:2112.11446).

python -m experiments.data.gopher sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    gopher_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/gopher",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText(), LanguageFilter(keep=("en",))),
        ),
    ),
    steps=(gopher_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
