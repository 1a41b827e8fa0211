"""From raw pages to a trained model: pages with planted dirt are cleaned, checked, and trained on.

python -m experiments.data.demo
2 CPU cores, less than four minutes, no download; needs the extra: pip install -e '.[data]'. The
good text is this Python's own documentation, put into HTML pages with navigation, scripts, copies,
edited copies, mojibake, personal data, spam and questions of an evaluation set; books of Project
Gutenberg join it where ../shared/data has them.

  cleaned    extraction, repair, rules of Gopher's and FineWeb's, duplicates, leaks, personal data
  checked    what was planted, compared with what was found; fails below 0.99 found, 0.98 kept
  trained    a tokenizer, a mixture of pages and code, and a small GPT for a minute

runs/demo/cleaned/report.html shows each step with examples of what it dropped.
"""

from pathlib import Path

from lmjax.data import CleanedDocuments, Data, Domain, EmbeddedCorpus, TextFiles, TrainedBPE
from lmjax.data.cleaning import (
    Collection,
    Decontaminate,
    DirtyPages,
    ExactDuplicates,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    MainText,
    MinHash,
    NearDuplicates,
    PersonalData,
    PlantedQuestions,
    RepairText,
)
from lmjax.jobs.chain import Chain
from lmjax.jobs.cleaning import Cleaning
from lmjax.jobs.dirt_check import DirtCheck
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, Normal, TransformerConfig
from lmjax.training.optimizers import Muon
from lmjax.training.schedules import Cosine

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BOOKS = tuple(
    map(str, sorted((SHARED / "gutenberg").glob("*.txt.gz"), key=lambda p: "old" in p.name))
)
PAGES = DirtyPages(source=EmbeddedCorpus(domain="prose"))

pages = Collection(
    name="pages",
    source=PAGES,
    steps=(
        MainText(),
        RepairText(),
        GopherQuality(),
        # Documentation repeats its phrases more than the web does that Gopher's thresholds are for.
        GopherRepetition(most_frequent=(0.4, 0.4, 0.4), most_repeated=(0.6,) * 6),
        FineWebQuality(),
    ),
)
# Paragraphs of books, some of them in several editions, of which the newest is read first.
novels = Collection(name="books", source=TextFiles(path=BOOKS, split="paragraph", on_error="skip"))
books = (novels,) if BOOKS else ()


def cleaned(name: str, weight: float) -> Domain:
    """A collection of the output in the mixture."""
    source = CleanedDocuments(path="{output}/cleaned", collection=name)
    return Domain(name=name, source=source, weight=weight)


experiment = Chain(
    output="runs/demo",
    jobs=(
        Cleaning(
            output="{output}/cleaned",
            sources=(*books, pages),
            steps=(
                ExactDuplicates(),
                # 0.997 of the pairs with a similarity of 0.8 share a band.
                NearDuplicates(minhash=MinHash(bands=20, rows=6), similarity=0.7),
                Decontaminate(tests=(PlantedQuestions(),)),
                PersonalData(),
            ),
            on_error="skip",
        ),
        DirtCheck(
            output="{output}/checked", cleaned="{output}/cleaned", collection="pages", pages=PAGES
        ),
        Pretrain(
            output="{output}/trained",
            steps=120,
            model=TransformerConfig(
                vocab_size=1024,
                hidden=128,
                num_layers=2,
                max_length=128,
                attention=AttentionConfig(num_heads=2, head_dim=64),
                feed_forward=FeedForwardConfig(size=512),
                initializer=Normal(std=0.02, scale_residual=True),
            ),
            data=Data(
                train=(
                    cleaned("pages", 3),
                    *(cleaned(one.name, 2) for one in books),
                    Domain(name="code", source=EmbeddedCorpus(domain="code"), weight=1),
                ),
                tokenizer=TrainedBPE(vocab_size=1024, sample_bytes=1_000_000),
                length=128,
                batch_size=8,
            ),
            optimizer=Muon(),
            schedule=Cosine(peak=1e-2, warmup=20, final=0.05),
            evaluation=Evaluation(every=60, tokens=20_000, prompts=("The function returns ",)),
            checkpoint=Checkpoints(every=60),
        ),
    ),
)

if __name__ == "__main__":
    run(experiment)
