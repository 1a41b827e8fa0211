"""GPT-3's filter of Common Crawl (Brown et al. 2020, arXiv:2005.14165, appendix A).

python -m experiments.data.gpt3 sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.

The classifier is trained before, of good sources and raw pages:

python -m lmjax.jobs.train_quality good.0=TextFiles good.0.path='books/*.txt' \
    raw.0=CleanedDocuments raw.0.path=runs/raw
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    LanguageFilter,
    MainText,
    RepairText,
    gpt3_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/gpt3",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText(), LanguageFilter(keep=("en",))),
        ),
    ),
    steps=(gpt3_cleaning(quality="runs/quality/quality.npz"),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
