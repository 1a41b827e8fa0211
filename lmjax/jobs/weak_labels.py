"""Labels texts with a classifier, and writes those that it is sure of: weak labels from a teacher.

python -m lmjax.jobs.weak_labels runs/teacher texts.jsonl labelled.jsonl confidence=0.9
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data import JsonLines, Tokenizer
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.files import errors_told, local_path, replacing
from lmjax.interop.folder import model_folder, read_params, tokenizer_folder
from lmjax.launch import import_modules, is_first, run
from lmjax.models import TextHeadConfig, TransformerConfig, abstract
from lmjax.models.head_classes import usual_labels
from lmjax.objectives import Classification, Example, TextLabels
from lmjax.objectives.labels import outputs_for
from lmjax.parallel import Mesh, training_layout
from lmjax.remote import check_path
from lmjax.training.placement import to_devices

SHORTEST = 16  # tokens; rows have this length, or a power of two times it, for few compilations


class Labelled(NamedTuple):
    """A text with the class that a model finds most likely, and its probability."""

    text: str
    label: str
    confidence: float


@config
class WeakLabels:
    """Labels for texts that have none, from a classifier."""

    teacher: str | None = None  # run folder of a classifier, or a public one's model folder
    texts: str | None = None  # JSON lines with the texts, compressed or not; a path or a pattern
    output: str | None = None  # JSON lines that LabelledTexts reads; the file must not exist
    field: str = "text"  # of the lines: the text
    head: str | None = None  # of the classifier, by name; none: its only one of texts
    confidence: float = 0.9  # least probability of a label that is written
    length: int | None = None  # most tokens of a text; none: the model's max_length, at most 512
    batch_size: int = 64  # texts at once
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_path(self.teacher or "", "teacher")
        if not 0 <= self.confidence <= 1:
            raise UserError(f"confidence={self.confidence}: a probability lies between 0 and 1")
        for name in ("length", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")

    def run(self) -> None:
        """Labels the texts, and prints how many have each label.

        Raises:
          UserError: nothing is named, the teacher is no classifier of texts, a text cannot be read,
            or the output exists or cannot be written.
        """
        if None in (self.teacher, self.texts, self.output):
            raise UserError(
                "Which classifier, texts and output? For instance: python -m lmjax.jobs.weak_labels"
                " runs/teacher texts.jsonl labelled.jsonl"
            )
        import_modules(self.imports)
        path = check_output(self.output)
        counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        with jax.set_mesh(self.mesh.build()):
            teacher = Teacher(self)
            texts = (d.text for d in JsonLines(path=self.texts, field=self.field).documents())
            with errors_told(f"cannot write {self.output}"), replacing(path) as unfinished:
                with open(unfinished, "w", encoding="utf-8") as file:
                    for one in teacher.label(texts):
                        counts[one.label][0] += 1
                        if one.confidence >= self.confidence:
                            counts[one.label][1] += 1
                            line = one._asdict() | {"confidence": round(one.confidence, 6)}
                            file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if not counts:
                    raise UserError(f"there is no text in the field {self.field!r} of {self.texts}")
        if is_first():
            log = RunLog(make_console())
            log.table(table_of(counts, teacher.names, self.confidence))
            log.fact("written", str(self.output))


class Teacher:
    """A classifier of texts with its tokenizer, on the mesh that is set."""

    def __init__(self, settings: WeakLabels) -> None:
        """Reads it. UserError where it is no classifier of texts."""
        folder = settings.teacher
        self.model, self.layout = model_folder(folder), training_layout()
        head = head_of(self.model, settings.head, folder)
        self.names = head.labels or usual_labels(head.outputs)
        self.tokenizer: Tokenizer = read_tokenizer(tokenizer_folder(folder))
        self.objective = TextLabels(objective=Classification(head=head.name))
        self.batch_size = settings.batch_size
        self.length = settings.length or min(self.model.max_length or 512, 512)
        self.params = read_params(folder, self.model, self.layout)
        self._graph = abstract(self.model, self.layout)[0]

    def label(self, texts: Iterator[str]) -> Iterator[Labelled]:
        """The most likely class of each text, in order; blank ones are left out."""
        compiled = jax.jit(self._probabilities)
        wanted = (text for text in texts if text.strip())
        while batch := list(itertools.islice(wanted, self.batch_size)):
            probabilities = jax.device_get(compiled(self.params, self.example(batch)))
            for text, row in zip(batch, probabilities[: len(batch), 0], strict=True):
                best = int(row.argmax())
                yield Labelled(text, self.names[best], float(row[best]))

    def example(self, texts: list[str]) -> Example:
        """Texts as they are trained on, in rows of one of few lengths, on the devices."""
        rows = [self._row(ids) for ids in self.tokenizer.encode_batch(texts)]
        size = SHORTEST
        while size < max(map(len, rows)):
            size *= 2
        size = min(size, self.length)
        tokens = np.zeros((self.batch_size, size), np.int32)
        segments = np.zeros_like(tokens)
        for number, ids in enumerate(rows):
            tokens[number, : len(ids)], segments[number, : len(ids)] = ids, 1
        example = self.objective.prepare(tokens, segments, np.zeros(len(tokens), np.uint64))
        return to_devices(example, self.layout, self.model.vocab_size)

    def _row(self, ids: list[int]) -> list[int]:
        """A text's tokens with what opens and closes it; of too many the first, and the last one.

        As `lmjax.data.groups.Groups` cuts them in training.
        """
        row = [*self.tokenizer.opening, *ids, *self.tokenizer.closing]
        return row if len(row) <= self.length else [*row[: self.length - 1], row[-1]]

    def _probabilities(self, params: dict, example: Example) -> Float[Array, "rows 1 classes"]:
        """Probabilities of the classes of each text, the same on all devices."""
        model = nnx.merge(self._graph, params)
        hidden, _ = model(example.inputs)
        logits, _ = outputs_for(self.objective.objective, model, hidden, example, None)
        return self.layout.reshard(jax.nn.softmax(logits, axis=-1), None, None, None)


def head_of(model: TransformerConfig, name: str | None, folder: str) -> TextHeadConfig:
    """The head that tells classes of texts; UserError where there is none, or several."""
    found = [
        head
        for head in model.heads
        if isinstance(head, TextHeadConfig)
        and head.outputs > 1
        and head.problem in (None, "single_label_classification")
        and name in (None, head.name)
    ]
    if len(found) != 1:
        there = ", ".join(head.name for head in model.heads) or "none"
        which = "no head" if not found else "several heads"
        raise UserError(
            f"{folder} has {which} that tell one class of a text"
            f"{'' if name is None else f' and are named {name}'}; its heads are {there}"
        )
    return found[0]


def check_output(output: str) -> Path:
    """The file to write. UserError where it is there, or cannot be on this machine."""
    path = local_path(output, "output")
    if path.exists():
        raise UserError(f"output={output} is there already; choose another file, or delete it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"output={output}: there is no folder {path.absolute().parent}")
    return path


def table_of(counts: Mapping[str, list[int]], names: Sequence[str], least: float) -> Table:
    """Shares of the texts by label: of all, and of those that are written."""
    total = sum(found for found, _ in counts.values())
    rows = tuple(
        (f"{name}, {counts[name][0]:,}", counts[name][0] / total, counts[name][1] / total)
        for name in names
        if name in counts
    )
    written = sum(kept for _, kept in counts.values())
    notes = [f"{written:,} of {total:,} texts are written."]
    if missing := [name for name in names if not counts.get(name, (0, 0))[1]]:
        notes.append(f"No text is written of {len(missing)} labels: {', '.join(missing[:5])}")
    return Table(
        "Weak labels",
        ("label, texts", "of all texts", f"with {least:g} or more"),
        rows,
        "Share of the texts by the most likely label, and of those with the confidence asked for.",
        notes=tuple(notes),
    )


if __name__ == "__main__":
    run(WeakLabels(), positional=("teacher", "texts", "output"))
