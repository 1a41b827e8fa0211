"""Measures of classifications: accuracy, F1, confusion matrix, as numbers, table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from lmjax.config import UserError
from lmjax.console import Table, load_pyplot
from lmjax.evaluation.drawing import (
    GREY,
    INK,
    LETTER,
    SIZE,
    draw_rules,
    draw_text,
    letters_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.45  # inches, of the picture of a matrix
MARGIN = 0.3  # inches around it
SHADES = ("#ffffff", "#2f7fbf")  # of a share of 0 and of 1
CAPTION = (
    "Rows are the classes of the labels, columns the predicted ones: the share of each row's"
    " examples. The F1 of a class is the harmonic mean of its precision and its recall."
)


def confusion_matrix(
    labels: Int[np.ndarray, "examples"], predictions: Int[np.ndarray, "examples"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Number of examples by their class (row) and the predicted one (column).

    Raises:
      UserError: a number is no class.
    """
    for name, given in (("labels", labels), ("predictions", predictions)):
        if len(given) and not 0 <= given.min() <= given.max() < classes:
            raise UserError(
                f"{name} are from {given.min()} to {given.max()}; the classes are 0 to"
                f" {classes - 1}"
            )
    pairs = labels.astype(np.int64) * classes + predictions
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: Int[np.ndarray, "classes classes"]) -> float:
    """Share of the examples of a confusion matrix that are right; NaN where there are none."""
    return float(np.trace(matrix) / matrix.sum()) if matrix.any() else float("nan")


def class_f1(matrix: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes"]:
    """F1 of each class, 2 right / (labels + predictions); NaN for one that never occurs."""
    found = matrix.sum(axis=0) + matrix.sum(axis=1)
    return np.where(found > 0, 2 * np.diag(matrix) / np.maximum(found, 1), np.nan)


def macro_f1(matrix: Int[np.ndarray, "classes classes"]) -> float:
    """Mean F1 of the classes that occur among labels or predictions (scikit-learn's macro F1)."""
    scores = class_f1(matrix)
    occurring = ~np.isnan(scores)
    return float(scores[occurring].mean()) if occurring.any() else float("nan")


def confusion_table(
    matrix: Int[np.ndarray, "classes classes"], names: Sequence[str], title: str = "Confusion"
) -> Table:
    """The matrix as shares of each class's examples, and each class's F1.

    Args:
      matrix: as `confusion_matrix` gives it.
      names: of the classes.
      title: of the table; a run has one of each title.
    """
    scores = [None if np.isnan(score) else float(score) for score in class_f1(matrix)]
    rows = [
        (name, *(float(share) if counts.any() else None for share in shares), score)
        for name, counts, shares, score in zip(names, matrix, _shares(matrix), scores, strict=True)
    ]
    columns = "class", *(f"as {name}" for name in names), "F1"
    return Table(title, columns, tuple(rows), CAPTION, picture="matrix")


def draw_confusion(matrix: Int[np.ndarray, "classes classes"], names: Sequence[str]) -> Figure:
    """Draws the matrix: numbers of examples, shaded by their share of the row.

    In a notebook the picture shows by itself; elsewhere, `.savefig("confusion.png")`.

    Raises:
      UserError: matplotlib is missing, or there is not one name for each class.
    """
    if len(names) != len(matrix):
        raise UserError(f"there are {len(names)} names for {len(matrix)} classes")
    pyplot = load_pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    size, longest = len(matrix), max(map(letters_of, names))
    cell = max(CELL, LETTER * (1 + len(str(matrix.max()))))
    label = LETTER * (longest + 1)
    width, height = (2 * MARGIN + label + cell * size + extra for extra in (0.0, MARGIN))
    figure = pyplot.figure(figsize=(width, height), facecolor="white")
    corner = (MARGIN + label) / width, MARGIN / height
    axes = figure.add_axes((*corner, cell * size / width, cell * size / height), label="confusion")
    axes.imshow(
        _shares(matrix), cmap=LinearSegmentedColormap.from_list("share", SHADES), vmin=0, vmax=1
    )
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    draw_rules(axes, size, size)
    for (row, column), count in np.ndenumerate(matrix):
        dark = matrix[row, column] > 0.6 * max(1, matrix[row].sum())
        draw_text(axes, (column, row), str(count), color="#ffffff" if dark else INK)
    for number, name in enumerate(names):
        draw_text(axes, (-0.6, number), name, ha="right")
        draw_text(axes, (number, -0.6), name, rotation=90, va="bottom")
    title = "rows: labels, columns: predictions"
    figure.text(MARGIN / width, 1 - MARGIN / height / 2, title, fontsize=SIZE, color=GREY)
    return figure


def _shares(matrix: Int[np.ndarray, "classes classes"]) -> Float[np.ndarray, "classes classes"]:
    """Each row divided by its sum; zeros where that is 0."""
    return matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
