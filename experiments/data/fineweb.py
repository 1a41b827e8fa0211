"""FineWeb's steps on archives of the web (Penedo et al. 2024, arXiv:2406.17557).

python -m experiments.data.fineweb sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'. For
Common Crawl give its list of archives, and where they are:

python -m experiments.data.fineweb sources.0.source.path='()' \
    sources.0.source.segments=warc.paths.gz sources.0.source.root=s3://commoncrawl/
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    AddressRules,
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    fineweb_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/fineweb",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(AddressRules(), MainText(), RepairText(), LanguageFilter(keep=("en",))),
        ),
    ),
    steps=(fineweb_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
