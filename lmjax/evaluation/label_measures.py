"""Measures of a model on held-out texts with labels, beside those of a constant answer."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lmjax.config import config
from lmjax.console import Table
from lmjax.evaluation.class_measures import accuracy, confusion_table, macro_f1
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator, Record
from lmjax.evaluation.held_out import HELD_OUT, HeldOut
from lmjax.evaluation.text_baselines import last_scores
from lmjax.launch import is_first
from lmjax.models.head_classes import usual_labels
from lmjax.models.transformer import Transformer
from lmjax.objectives import Example
from lmjax.objectives.labels import Classification, outputs_for
from lmjax.objectives.text_labels import LABEL

SETS = "held-out texts"
LARGEST = 12  # most classes whose whole matrix is shown, and most mistakes that are
DRAWN = 200  # most classes of a matrix that is drawn
COLUMNS = (SETS, "commonest class", "macro F1", "standard error", "accuracy")
CAPTION = (
    "Share of held-out texts whose class is right (accuracy, with its standard error); the mean F1 "
    "of the classes; and the accuracy of the class that is commonest in training. More is better."
)
MISTAKES = ("label, predicted class, texts", "share of the label's texts")
MISTAKES_CAPTION = "The mistakes that are most frequent on held-out texts."
NUMBER_COLUMNS = (SETS, "the mean", "model")
NUMBER_CAPTION = (
    "Mean squared error on held-out texts, and that of predicting the mean of the training texts "
    "for all of them; less is better."
)


@config
class ClassMeasures(Evaluator):
    """Accuracy, macro F1 and confusions of classes on held-out texts.

    The macro F1 is "macro_f1" in metrics.jsonl, so that a best checkpoint can be chosen by it.
    """

    tokens: int | None = None  # of each set, as in HeldOutLoss

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` with the objective TextLabels."""
        sets, objective = HeldOut.of(context, self.tokens), context.feed.objective.objective
        head = objective.head_of(context.learner.model)
        names, graph = head.labels or usual_labels(head.outputs), context.learner.graph
        trained = [store.labels[:, LABEL] for store in context.feed.prepared.train.values()]
        common = np.bincount(np.concatenate(trained).astype(int), minlength=len(names)).argmax()

        @jax.jit
        def count(params: dict, example: Example) -> Array:
            return count_classes(objective, nnx.merge(graph, params), example)

        def evaluate(step: int, params: dict) -> tuple[Record | Table, ...]:
            records, rows, confusions = [], [], []
            for name, store in sets.stores.items():
                counts = [count(params, example) for example in sets.examples(store)]
                matrix = np.sum(jax.device_get(counts), axis=0, dtype=np.int64)
                right, texts = accuracy(matrix), int(matrix.sum())
                error = math.sqrt(right * (1 - right) / max(texts, 1))
                guess = float(matrix[common].sum() / max(texts, 1))
                score = macro_f1(matrix)
                records.append({"split": HELD_OUT + name, "macro_f1": score})
                rows.append((f"{name}, {texts:,}", guess, score, error, right))
                title = "Confusion" if len(sets.stores) == 1 else f"Confusion, {name}"
                confusions += confusions_of(matrix, names, title)
            table = Table("Classification", COLUMNS, tuple(rows), CAPTION)
            return (*records, table, *confusions)

        return evaluate


def count_classes(
    objective: Classification, model: Transformer, example: Example
) -> Int[Array, "classes classes"]:
    """Confusion matrix of the texts of an example, the same on all devices."""
    hidden, _ = model(example.inputs)
    logits, targets = outputs_for(objective, model, hidden, example, None)
    classes = jnp.arange(logits.shape[-1])
    labels = (targets.labels[..., None] == classes) & (targets.weights[..., None] > 0)
    predicted = jnp.argmax(logits, axis=-1)[..., None] == classes
    return jnp.sum(labels[..., :, None] & predicted[..., None, :], axis=(0, 1), dtype=jnp.int32)


def confusions_of(
    matrix: Int[np.ndarray, "classes classes"], names: tuple[str, ...], title: str
) -> tuple[Table, ...]:
    """The matrix as a table, a picture in the report; before many classes, the commonest mistakes.

    More classes than a picture has room for have the mistakes alone.
    """
    whole = confusion_table(matrix, names, title)
    if len(names) <= LARGEST:
        return (whole,)
    wrong = matrix - np.diag(np.diag(matrix))
    rows = []
    for index in np.argsort(-wrong, axis=None, kind="stable")[:LARGEST]:
        label, other = divmod(int(index), len(names))
        if wrong[label, other]:
            share = float(wrong[label, other] / matrix[label].sum())
            rows.append((f"{names[label]}: {names[other]}, {wrong[label, other]:,}", share))
    mistakes = Table(f"{title}: mistakes", MISTAKES, tuple(rows), MISTAKES_CAPTION)
    return (mistakes, whole) if len(names) <= DRAWN else (mistakes,)


@config
class NumberMeasures(Evaluator):
    """Squared error of numbers on held-out texts, beside that of a constant number."""

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed` of texts with numbers."""
        prepared = context.feed.prepared
        trained = np.concatenate([store.labels[:, LABEL] for store in prepared.train.values()])
        spread = {
            name: _squared_error(store.labels[:, LABEL], float(trained.mean()))
            for name, store in prepared.held_out.items()
        }

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            if not is_first():
                return ()
            losses = last_scores(context.records(), step, "loss")
            rows = tuple((name, spread[name], loss) for name, loss in losses.items())
            return (Table("Squared error", NUMBER_COLUMNS, rows, NUMBER_CAPTION, False),)

        return evaluate


def _squared_error(numbers: Float[np.ndarray, "texts"], guess: float) -> float:
    return float(np.mean(np.square(numbers.astype(np.float64) - guess)))
