"""Measures of a model on held-out texts whose words have classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from lmjax.config import config
from lmjax.console import Table
from lmjax.data.spans import classes_of
from lmjax.data.store import TokenStore
from lmjax.evaluation.class_measures import accuracy, confusion_matrix, macro_f1
from lmjax.evaluation.entity_measures import are_entities, count_entities
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.held_out import HELD_OUT, HeldOut
from lmjax.evaluation.label_measures import confusions_of
from lmjax.models.head_classes import usual_labels
from lmjax.models.transformer import Transformer
from lmjax.objectives import Example, TokenLabels
from lmjax.objectives.labels import outputs_for

COLUMNS = ("held-out words", "commonest class", "macro F1", "accuracy")
CAPTION = (
    "Share of held-out words whose class is right (accuracy); the mean F1 of the classes; and the "
    "accuracy of the class that is commonest in training. More is better."
)
ENTITIES = ("entities of held-out texts", "precision", "recall", "F1")
ENTITIES_CAPTION = (
    "Of the entities that the model finds, and of those of people, the share that is right: of one "
    "kind, with both borders (conlleval). More is better."
)


class WordClasses(NamedTuple):
    """Classes of one set at the tokens of some rows; -1 where there is none.

    Attributes:
      wanted: of people.
      found: of the model.
    """

    wanted: Int[np.ndarray, "rows seq"]
    found: Int[np.ndarray, "rows seq"]


@config
class TokenMeasures(Evaluator):
    """Accuracy, macro F1 and confusions of the classes of words, and F1 of whole entities.

    There are entities where the names of classes mark them (O, B-LOC, I-LOC). "macro_f1" and
    "entity_f1" are in metrics.jsonl, so that a best checkpoint can be chosen by them; of several
    sets of classes, with the name of the head behind. Words that a cut leaves out are not counted.
    """

    tokens: int | None = None  # of each set, as in HeldOutLoss

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` with the objective TokenLabels."""
        sets, objective = HeldOut.of(context, self.tokens), context.feed.objective
        heads = [one.head_of(context.learner.model) for one in objective.objectives]
        names = [head.labels or usual_labels(head.outputs) for head in heads]
        graph, trained = context.learner.graph, list(context.feed.prepared.train.values())
        common = [_commonest(trained, number) for number in range(len(heads))]

        @jax.jit
        def classes(params: dict, example: Example) -> list[tuple[Array, Array]]:
            return classes_at_tokens(objective, nnx.merge(graph, params), example)

        def evaluate(step: int, params: dict) -> tuple[Record | Table, ...]:
            records, rows, entities, confusions = [], [], [], []
            for name, store in sets.stores.items():
                found = [classes(params, example) for example in sets.examples(store)]
                record = {"split": HELD_OUT + name}
                for number, head in enumerate(heads):
                    parts = [part[number] for part in found]
                    where = name if len(heads) == 1 else f"{name}, {head.name}"
                    labelled = [WordClasses(*map(np.asarray, part)) for part in parts]
                    matrix = _confusions(labelled, len(names[number]))
                    words, score = int(matrix.sum()), macro_f1(matrix)
                    last = "" if len(heads) == 1 else f"_{head.name}"
                    record |= {f"accuracy{last}": accuracy(matrix), f"macro_f1{last}": score}
                    guess = float(matrix[common[number]].sum() / max(words, 1))
                    rows.append((f"{where}, {words:,}", guess, score, accuracy(matrix)))
                    alone = len(heads) * len(sets.stores) == 1
                    title = "Confusion" if alone else f"Confusion, {where}"
                    confusions += confusions_of(matrix, names[number], title)
                    if are_entities(names[number]):
                        counts = count_entities(*_sequences(labelled, names[number]))
                        record[f"entity_f1{last}"] = counts.f1
                        title = f"{where}, {counts.wanted:,}"
                        entities.append((title, counts.precision, counts.recall, counts.f1))
                records.append(record)
            tables = [Table("Classes of words", COLUMNS, tuple(rows), CAPTION)]
            if entities:
                tables.append(Table("Entities", ENTITIES, tuple(entities), ENTITIES_CAPTION))
            return (*records, *tables, *confusions)

        return evaluate


def classes_at_tokens(
    objective: TokenLabels, model: Transformer, example: Example
) -> list[tuple[Int[Array, "rows seq"], Int[Array, "rows seq"]]]:
    """Classes of people and of the model at the tokens of words, of each set; -1 elsewhere.

    They are the same on all devices.
    """
    hidden, _ = model(example.inputs)
    found = []
    for one, targets in zip(objective.objectives, example.targets, strict=True):
        own = Example(example.inputs, targets)
        logits, targets = outputs_for(one, model, hidden, own, None)
        there = targets.weights > 0
        pair = targets.labels, jnp.argmax(logits, axis=-1).astype(jnp.int32)
        everywhere = jax.sharding.PartitionSpec()
        found.append(tuple(jax.reshard(jnp.where(there, part, -1), everywhere) for part in pair))
    return found


def _commonest(stores: Sequence[TokenStore], number: int) -> int:
    """The class of a set that is commonest in some stores."""
    kinds = np.concatenate([store.spans[2] for store in stores])
    found = classes_of(kinds[kinds < 0], number)
    return int(np.bincount(found[found >= 0], minlength=1).argmax())


def _confusions(parts: Sequence[WordClasses], classes: int) -> Int[np.ndarray, "classes classes"]:
    """Confusion matrix of the words of some rows."""
    there = [part.wanted >= 0 for part in parts]
    wanted = np.concatenate([part.wanted[own] for part, own in zip(parts, there, strict=True)])
    found = np.concatenate([part.found[own] for part, own in zip(parts, there, strict=True)])
    return confusion_matrix(wanted, found, classes)


def _sequences(
    parts: Sequence[WordClasses], names: Sequence[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Names of the classes of the words of each row, of people and of the model."""
    wanted, found = [], []
    for part in parts:
        for labels, predicted in zip(part.wanted, part.found, strict=True):
            own = labels >= 0
            wanted.append([names[one] for one in labels[own]])
            found.append([names[one] for one in predicted[own]])
    return wanted, found
