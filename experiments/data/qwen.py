"""Qwen's steps for pages (Bai et al. 2023, arXiv:2309.16609, section 2.1).

python -m experiments.data.qwen sources.0.source.path=crawl
All cores, hours to days by the size of the crawl; needs the extra: pip install -e '.[data]'.
Its models are trained before by lmjax.jobs.train_perplexity, train_quality and train_toxicity, and
named by steps.0='qwen_cleaning(quality="runs/quality/quality.npz")'.
"""

from lmjax.data import WebArchives
from lmjax.data.cleaning import (
    Collection,
    JsonLinesOutput,
    MainText,
    RepairText,
    qwen_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

experiment = Cleaning(
    output="runs/qwen",
    sources=(
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText()),
        ),
    ),
    steps=(qwen_cleaning(),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
