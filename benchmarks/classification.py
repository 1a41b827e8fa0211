"""A small BERT pretrained here, fine-tuned to classify texts, beside logistic regression on words.

python -m benchmarks.classification folder=DATA python=PYTHON [json=FILE]

`folder` holds rt-polarity (rt-polarity.neg, rt-polarity.pos: sentences of film reviews), banking77
(train.csv, test.csv: questions to a bank) and, for pretraining, gutenberg (*.txt.gz) and wikitext2
(*.txt). A tenth of rt-polarity is its test set. One encoder learns to find hidden words of that
text and of the training texts of both sets, without their labels; it is then fine-tuned on each
set. `python` is an interpreter with scikit-learn, for the words. A run that was stopped goes on in
its `output` folder.
"""

import csv
import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int

from benchmarks.classification_words import WORD
from benchmarks.harness import Worker, save, table
from lmjax.config import UserError, config
from lmjax.data import Data, Domain, JsonLines, LabelledTexts, TrainedBPE, WithTokens
from lmjax.evaluation.class_measures import accuracy, confusion_matrix, macro_f1
from lmjax.jobs.classify import Classify
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, Evaluation
from lmjax.jobs.weak_labels import Teacher, WeakLabels
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.objectives import MaskedLM
from lmjax.parallel import Mesh
from lmjax.runs.folder import RunFolder
from lmjax.scaling.flops import count_parameters
from lmjax.training.optimizers import AdamW, Muon
from lmjax.training.schedules import Cosine

SETS = ("rt-polarity", "banking77")
GENERAL = ("gutenberg/*.txt.gz", "wikitext2/*.txt")
OLDER = "-old-"  # in the names of older editions of the same books
SHORTEST = 200  # characters of a paragraph that is pretrained on
ROWS = 32  # of a step
SPLIT = 0  # seed of the test set of rt-polarity, and of validation texts
SEED = 0  # of the bootstrap
END = 10**9  # steps between evaluations of a run that is evaluated at its end alone
Pairs = list[tuple[str, str]]  # texts with the names of their classes
Classes = Int[np.ndarray, "texts"]


@config
class ClassificationBenchmark:
    """Pretrains an encoder, fine-tunes it, and compares it on the test texts."""

    folder: str = ""  # of the texts
    python: str = ""  # interpreter with scikit-learn; empty: the words are left out
    output: str = "runs/classification"  # folder of all runs
    sets: tuple[Literal["rt-polarity", "banking77"], ...] = SETS  # what is classified
    # compare on the test texts, or, to choose settings, on a tenth of the training texts
    on: Literal["test", "validation"] = "test"
    width: int = 128  # of the model
    layers: int = 2  # of the model
    vocabulary: int = 8192  # tokens
    dropout: float = 0.1  # of the model
    length: int = 48  # tokens of a text, the first ones of a longer one
    pretraining: int = 2000  # steps in which it learns to find hidden words, of 32 rows
    peak: float = 1e-2  # highest rate of pretraining
    epochs: float = 6.0  # of fine-tuning
    rate: float = 1e-3  # highest rate of fine-tuning
    ema_decay: float | None = 0.99  # decay of the average of the parameters that is the classifier
    resamples: int = 2_000  # of the bootstrap
    seed: int = 0  # of the training
    json: str = ""  # file for the results

    def check_folder(self) -> None:
        """Raises UserError for a folder without the files."""
        for pattern in ("rt-polarity/rt-polarity.*", "banking77/*.csv", *GENERAL):
            if not any(Path(self.folder).glob(pattern)):
                raise UserError(f"folder={self.folder!r} has no {pattern}")


def normal(text: str) -> str:
    """Words and marks in small letters with a space between, as rt-polarity has them."""
    return " ".join(re.findall(WORD, text.lower()))


def polarity_of(folder: Path) -> tuple[Pairs, Pairs]:
    """Training and test texts of rt-polarity: nine tenths and one, drawn once for all."""
    pairs = [
        (normal(line), name)
        for name in ("neg", "pos")
        for line in (folder / f"rt-polarity.{name}").read_text("cp1252").split("\n")
        if line.strip()
    ]
    return divided(pairs)


def banking_of(folder: Path) -> tuple[Pairs, Pairs]:
    """Training and test texts of banking77, its own."""
    found = []
    for name in ("train", "test"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            found.append([(normal(row["text"]), row["category"]) for row in rows])
    return found[0], found[1]


def divided(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Nine tenths and a tenth of them, in a random order that is always the same."""
    pairs = random.Random(SPLIT).sample(pairs, len(pairs))
    tenth = len(pairs) // 10
    return pairs[tenth:], pairs[:tenth]


READERS = dict(zip(SETS, (polarity_of, banking_of), strict=True))


def parts_of(folder: Path, name: str) -> dict[str, Pairs]:
    """Texts of a set: those that train, a tenth for the choice of settings, and the test's."""
    train, test = READERS[name](folder / name)
    train, validation = divided(train)
    return {"train": train, "validation": validation, "test": test}


def paragraphs(folder: Path) -> Iterator[str]:
    """Paragraphs of the books and of Wikipedia."""
    for pattern in GENERAL:
        for path in sorted(folder.glob(pattern)):
            if OLDER in path.name:
                continue
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
            between = r"\n\s*\n" if path.suffix == ".gz" else "\n"
            for paragraph in re.split(between, text):
                if len(paragraph) >= SHORTEST:
                    yield normal(paragraph.replace("<unk>", " "))


def write_texts(settings: ClassificationBenchmark, sets: dict[str, dict[str, Pairs]]) -> Path:
    """Writes all text as JSON lines into a folder, and returns it."""
    folder = Path(settings.output) / "texts"
    folder.mkdir(parents=True, exist_ok=True)
    records = {"general": [{"text": text} for text in paragraphs(Path(settings.folder))]}
    for name, parts in sets.items():
        for part, pairs in parts.items():
            records[f"{name}-{part}"] = [{"text": text, "label": label} for text, label in pairs]
    for name, found in records.items():
        lines = "".join(json.dumps(record) + "\n" for record in found)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    return folder


def pretraining(settings: ClassificationBenchmark, texts: Path) -> Pretrain:
    """The encoder: half of its text is general, half is that of the training texts."""
    width = settings.width
    model = TransformerConfig(
        vocab_size=settings.vocabulary + 1,
        hidden=width,
        num_layers=settings.layers,
        max_length=settings.length,
        attention=AttentionConfig(num_heads=width // 32, head_dim=32, causal=False),
        feed_forward=FeedForwardConfig(size=4 * width),
        dropout=settings.dropout,
        unroll=settings.layers,
    )
    weights = {"general": 2.0} | dict.fromkeys((f"{name}-train" for name in SETS), 1.0)
    domains = (
        Domain(name=name, source=JsonLines(path=str(texts / f"{name}.jsonl")), weight=weight)
        for name, weight in weights.items()
    )
    tokenizer = WithTokens(tokenizer=TrainedBPE(vocab_size=settings.vocabulary), tokens=("[MASK]",))
    return Pretrain(
        output=f"{settings.output}/encoder",
        steps=settings.pretraining,
        seed=settings.seed,
        model=model,
        objective=MaskedLM(),
        data=Data(
            train=tuple(domains),
            tokenizer=tokenizer,
            held_out=0.02,
            length=settings.length,
            batch_size=ROWS,
        ),
        optimizer=Muon(),
        schedule=Cosine(peak=settings.peak, warmup=settings.pretraining // 20, final=0.05),
        evaluation=Evaluation(every=500, tokens=20_000),
        checkpoint=Checkpoints(every=500, keep=1),
    )


def files_of(settings: ClassificationBenchmark, name: str) -> tuple[tuple[str, ...], str]:
    """Files of a set that train, and the one that is compared on."""
    train = ("train",) if settings.on == "validation" else ("train", "validation")
    start = f"{settings.output}/texts/{name}"
    return tuple(f"{start}-{part}.jsonl" for part in train), f"{start}-{settings.on}.jsonl"


def tuning(settings: ClassificationBenchmark, name: str, count: int) -> Classify:
    """The classifier of a set of `count` training texts.

    The texts that it is compared on are measured at its end, and choose nothing.
    """
    steps = max(1, round(settings.epochs * count / ROWS))
    train, test = (LabelledTexts(path=path) for path in files_of(settings, name))
    return Classify(
        output=f"{settings.output}/{name}-{settings.on}",
        steps=steps,
        seed=settings.seed,
        begin_with=f"{settings.output}/encoder",
        data=Data(
            train=(Domain(name=name, source=train, evaluation=test),),
            length=settings.length,
            batch_size=ROWS,
            rows="groups",
        ),
        optimizer=AdamW(weight_decay=0.1),
        schedule=Cosine(peak=settings.rate, warmup=steps // 10),
        ema_decay=settings.ema_decay,
        evaluation=ChatEvaluation(every=END),
        checkpoint=Checkpoints(every=500, keep=1),
    )


def by_model(settings: ClassificationBenchmark, folder: str, texts: Sequence[str]) -> list[str]:
    """The classes that a fine-tuned model finds most likely."""
    with jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])):
        teacher = Teacher(WeakLabels(teacher=folder, length=settings.length))
        return [found.label for found in teacher.label(iter(texts))]


def by_words(settings: ClassificationBenchmark, name: str) -> dict:
    """Predictions of logistic regression, and the settings that cross-validation chose."""
    with Worker("benchmarks.classification_words", settings.python) as one:
        train, test = files_of(settings, name)
        return one.ask("classify", train=train, test=test)


def measures_of(labels: Classes, predicted: Classes, classes: int) -> np.ndarray:
    """Accuracy and macro F1."""
    matrix = confusion_matrix(labels, predicted, classes)
    return np.array([accuracy(matrix), macro_f1(matrix)])


def compare(labels: Classes, sides: dict[str, Classes], classes: int, resamples: int) -> dict:
    """Measures of each side, and by how much the model is ahead with its 95% interval.

    Args:
      labels: class of each test text.
      sides: predicted classes, those of the model among them.
      classes: number of classes.
      resamples: of the bootstrap over texts, the same ones for all sides.
    """
    generator = np.random.default_rng(SEED)
    chosen = [generator.integers(len(labels), size=len(labels)) for _ in range(resamples)]
    drawn = {
        side: np.array([measures_of(labels[some], found[some], classes) for some in chosen])
        for side, found in sides.items()
    }
    results = {}
    for side, found in sides.items():
        own = measures_of(labels, found, classes)
        ahead = measures_of(labels, sides["model"], classes) - own
        low, high = np.quantile(drawn["model"] - drawn[side], (0.025, 0.975), axis=0)
        results[side] = {
            measure: {"value": float(own[n]), "interval": quantiles(drawn[side][:, n])}
            | ({} if side == "model" else {"ahead": [float(x[n]) for x in (ahead, low, high)]})
            for n, measure in enumerate(("accuracy", "macro_f1"))
        }
    return results


def quantiles(values: np.ndarray) -> list[float]:
    """Bounds that hold 95 of 100 values."""
    return [float(value) for value in np.quantile(values, (0.025, 0.975))]


def seconds_of(folder: str) -> float | None:
    """Seconds that a run took; None where it was stopped in between."""
    return RunFolder(folder).results()["seconds"]


def main(settings: ClassificationBenchmark) -> None:
    """Trains, prints and saves the comparison."""
    settings.check_folder()
    sets = {name: parts_of(Path(settings.folder), name) for name in SETS}
    job = pretraining(settings, write_texts(settings, sets))
    job.run()
    seconds = {"pretraining": seconds_of(job.output)}
    results, rows = {}, []
    for name in settings.sets:
        parts = sets[name]
        trained = parts["train"] + (parts["validation"] if settings.on == "test" else [])
        tuned = tuning(settings, name, len(trained))
        tuned.run()
        seconds[name] = seconds_of(tuned.output)
        texts, labels = zip(*parts[settings.on], strict=True)
        names = {label: n for n, label in enumerate(sorted({label for _, label in trained}))}
        found, chosen = {"model": by_model(settings, tuned.output, texts)}, {}
        if settings.python:
            chosen = by_words(settings, name)
            found["words"] = chosen.pop("predicted")
        sides = {side: np.array([names[one] for one in of]) for side, of in found.items()}
        truth = np.array([names[one] for one in labels])
        measured = compare(truth, sides, len(names), settings.resamples)
        for side, measures in measured.items():
            for measure, of in measures.items():
                ahead = of.get("ahead", ["", "", ""])
                rows.append([f"{name}, {side}, {measure}", of["value"], *of["interval"], *ahead])
        results[name] = {"texts": len(truth), "classes": len(names), **measured, "chosen": chosen}
    columns = ["", "value", "from", "to", "model ahead by", "from", "to"]
    parameters = count_parameters(RunFolder(job.output).experiment().model).total
    print("\n" + table(columns, rows))
    print(f"\n{parameters:,} parameters; seconds of training: {seconds}")
    facts = {"parameters": parameters, "seconds": seconds, "on": settings.on}
    save(settings.json, "classification", results=results, **facts)


if __name__ == "__main__":
    with exit_on_user_error():
        main(from_command_line(ClassificationBenchmark()))
