"""SkyPile's steps for English and Chinese pages (Wei et al. 2023, arXiv:2310.19341).

python -m experiments.data.skywork sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
The classifier is trained before on pages that an encyclopaedia refers to
(lmjax.jobs.train_quality).
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    MainText,
    RepairText,
    skywork_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/skywork",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText()),
        ),
    ),
    steps=(skywork_cleaning(quality="runs/quality/quality.npz"),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
