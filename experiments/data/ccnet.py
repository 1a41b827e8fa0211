"""CCNet's steps, for English and Chinese (Wenzek et al. 2020, arXiv:1911.00359).

python -m experiments.data.ccnet sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
Texts of WET archives are read, as CCNet does. The models of perplexity are trained before:

python -m lmjax.jobs.train_perplexity output=runs/perplexity/en texts.0=JsonLines \
    texts.0.path='wikipedia/en/*.jsonl'
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    RepairText,
    ccnet_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/ccnet",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="texts", on_error="skip"),
            steps=(RepairText(),),
        ),
    ),
    steps=(ccnet_cleaning(models="runs/perplexity/{}", languages=("en", "zh")),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
