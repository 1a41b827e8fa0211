"""RefinedWeb's steps (Penedo et al. 2023, arXiv:2306.01116).

python -m experiments.data.refinedweb sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
Lists of domains are yours: sources.0.steps.0.blocked_list=domains.txt.
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    AddressRules,
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    refinedweb_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/refinedweb",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(AddressRules(), MainText(), RepairText(), LanguageFilter(keep=("en",))),
        ),
    ),
    steps=(refinedweb_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
