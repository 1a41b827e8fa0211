"""Baichuan 2's deduplication (Yang et al. 2023, arXiv:2309.10305, section 2.1).

python -m experiments.data.baichuan2 sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
Documents keep the number of their cluster: `TagBalance(field="cluster")` samples by it.
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    baichuan2_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/baichuan2",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText(), LanguageFilter()),
        ),
    ),
    steps=(baichuan2_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
