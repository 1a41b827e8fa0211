"""Measures of classes beside loops over the examples."""

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmjax.config import UserError
from lmjax.evaluation.class_measures import (
    accuracy,
    class_f1,
    confusion_matrix,
    confusion_table,
    draw_confusion,
    macro_f1,
)

matplotlib.use("agg")
CLASSES = 4
PAIRS = st.lists(st.tuples(*[st.integers(0, CLASSES - 1)] * 2), min_size=1, max_size=30)


def f1_of(pairs, number):
    """Precision and recall by counting, as scikit-learn defines them with zero_division=0."""
    right = sum(a == b == number for a, b in pairs)
    predicted = sum(b == number for _, b in pairs)
    labelled = sum(a == number for a, _ in pairs)
    precision = right / predicted if predicted else 0.0
    recall = right / labelled if labelled else 0.0
    return 2 * precision * recall / (precision + recall) if right else 0.0


@settings(max_examples=100)
@given(PAIRS)
def test_measures_are_those_of_counting(pairs):
    labels, predictions = np.array(pairs).T
    matrix = confusion_matrix(labels, predictions, CLASSES)
    for row, column in np.ndindex(CLASSES, CLASSES):
        assert matrix[row, column] == pairs.count((row, column))
    assert accuracy(matrix) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    there = sorted({number for pair in pairs for number in pair})
    scores = class_f1(matrix)
    for number in range(CLASSES):
        if number in there:
            assert scores[number] == pytest.approx(f1_of(pairs, number))
        else:
            assert np.isnan(scores[number])
    assert macro_f1(matrix) == pytest.approx(np.mean([f1_of(pairs, number) for number in there]))


def test_an_example_by_hand():
    """Scores that scikit-learn 1.7 and torchmetrics 1.9 give as well: 0.6, and 0.48888889."""
    labels, predictions = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    matrix = confusion_matrix(labels, predictions, 3)
    np.testing.assert_array_equal(matrix, [[1, 1, 0], [0, 2, 0], [1, 0, 0]])
    np.testing.assert_allclose(class_f1(matrix), [0.5, 0.8, 0.0])
    assert accuracy(matrix) == 0.6
    assert macro_f1(matrix) == pytest.approx(1.3 / 3)


def test_nothing_is_no_number():
    nothing = confusion_matrix(np.zeros(0, int), np.zeros(0, int), 2)
    assert np.isnan(accuracy(nothing)) and np.isnan(macro_f1(nothing))


@pytest.mark.parametrize("wrong", [[0, 2], [-1, 0]])
def test_numbers_that_are_no_classes(wrong):
    right = np.array([0, 1])
    with pytest.raises(UserError, match=r"labels are from .* the classes are 0 to 1"):
        confusion_matrix(np.array(wrong), right, 2)
    with pytest.raises(UserError, match="predictions are from"):
        confusion_matrix(right, np.array(wrong), 2)


def test_the_table():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
    table = confusion_table(matrix, ("no", "perhaps", "yes"))
    assert table.columns == ("class", "as no", "as perhaps", "as yes", "F1")
    assert not table.is_text
    assert table.rows == (
        ("no", 0.75, 0.25, 0.0, pytest.approx(2 / 3)),
        ("perhaps", None, None, None, 0.0),
        ("yes", 0.5, 0.0, 0.5, pytest.approx(2 / 3)),
    )
    assert type(table).from_json(table.to_json()) == table


def test_the_picture():
    matrix = np.array([[30, 1, 0], [0, 0, 0], [2, 0, 200]])
    figure = draw_confusion(matrix, ("no", "perhaps", "não"))
    (axes,) = figure.axes
    drawn = [text.get_text() for text in axes.texts]
    assert drawn[:9] == [str(count) for count in matrix.ravel()]
    assert drawn[9:] == ["no", "no", "perhaps", "perhaps", "não", "não"]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array()[0], [30 / 31, 1 / 31, 0])
    figure.canvas.draw()
    everything = figure.bbox
    for text in axes.texts:
        extent = text.get_window_extent()
        assert everything.x0 <= extent.x0 and extent.x1 <= everything.x1, text
        assert everything.y0 <= extent.y0 and extent.y1 <= everything.y1, text
    with pytest.raises(UserError, match="2 names for 3 classes"):
        draw_confusion(matrix, ("a", "b"))
