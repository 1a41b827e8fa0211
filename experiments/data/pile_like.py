"""A corpus like the Pile: pages, papers, code, books and encyclopaedia, each with its own steps.

python -m experiments.data.pile_like
All cores, hours to days by the size of the sources; needs the extra: pip install -e '.[data]'. Each
part is a folder of yours; of two equal documents that of the earlier part is kept. The Pile (Gao et
al. 2020, arXiv:2101.00027) reads its parts one to three times, table 1: for training give each a
`Domain` with its weight, and `TokenShares(most_epochs=3, ...)`.
"""

from lmjax.data import CodeFiles, LatexFiles, TextFiles, WebArchives, wikipedia_files
from lmjax.data.cleaning import (
    CodeQuality,
    Collection,
    GopherRepetition,
    JsonLinesOutput,
    LatexText,
    MainText,
    NearDuplicates,
    PersonalData,
    QualityFilter,
    RepairText,
    SharedLinks,
    pile_cleaning,
)
from lmjax.jobs.cleaning import Cleaning
from lmjax.launch import run

PARETO = QualityFilter(model="runs/quality/quality.npz", shape=3.0)
EMAIL = PersonalData(kinds=("email", "ip"))

experiment = Cleaning(
    output="runs/pile_like",
    sources=(
        Collection(name="wikipedia", source=wikipedia_files("wikipedia/*")),
        Collection(name="books", source=TextFiles(path="books/*.txt", on_error="replace")),
        Collection(
            name="papers",
            source=LatexFiles(path="arxiv", on_error="skip"),
            steps=(LatexText(least=1000),),
        ),
        Collection(
            name="code",
            source=CodeFiles(path="code", on_error="skip"),
            steps=(CodeQuality(), EMAIL),
        ),
        Collection(
            name="shared_links",
            source=WebArchives(path="links", records="pages", on_error="skip"),
            steps=(SharedLinks(messages="messages/*.jsonl.zst"), MainText(), RepairText()),
        ),
        Collection(
            name="web",
            source=WebArchives(path="crawl", records="pages", on_error="skip"),
            steps=(MainText(), RepairText(), GopherRepetition(), PARETO, EMAIL),
        ),
    ),
    steps=(NearDuplicates(minhash=pile_cleaning().steps[-1].minhash, similarity=0.5),),
    written=JsonLinesOutput(compression="zst"),
    on_error="skip",
)

if __name__ == "__main__":
    run(experiment)
