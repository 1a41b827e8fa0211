"""Pictures of examples: one row as the objective really feeds it to the model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Int

from lmjax.config import UserError
from lmjax.console import load_pyplot
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.drawing import (
    GREY,
    INK,
    LETTER,
    RULE,
    SIZE,
    draw_box,
    draw_rules,
    draw_text,
    letters_of,
)
from lmjax.evaluation.example_stack import CONTEXT, PADDING, UNSEEN, WRITTEN, TokenStack, cross_mask
from lmjax.models import Batch
from lmjax.objectives import Example, TokenTargets
from lmjax.objectives.masked_lm import MaskedTargets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEANINGS = {
    CONTEXT: "context: sees all of the context",
    WRITTEN: "one by one: sees what comes before",
    PADDING: "padding",
}
# Two shades for the segments in turn. Blue, orange and green are told apart by all eyes.
SHADES = {
    UNSEEN: ("#ffffff", "#ffffff"),
    CONTEXT: ("#9fcdf0", "#62a8dc"),
    WRITTEN: ("#fbc77f", "#ee9c32"),
    PADDING: ("#e2e2e2", "#e2e2e2"),
}
COLOURS = [shade for shades in SHADES.values() for shade in shades]
TARGET, FAINT = "#86d3b8", "#9a9a9a"
WRITABLE = 80  # tokens; in longer rows the cells are too small for text
CELL = 0.2  # inches, of a row with text
LONG = 10.0  # inches, of a row without
LINE_HEIGHT = 0.24  # inches, of running text
NARROWEST = 8.5  # inches
GAP = 0.36  # inches between the parts of the picture, which have a line of text above them


def draw_example(
    example: Example, tokenizer: Tokenizer, causal: bool = True, row: int = 0
) -> Figure:
    """Draws one row of an example: its text, numbers, attention mask and targets.

    At the top stands the text. Below is the mask: a token on the left sees those tokens whose cells
    are filled, and above these stand the rows of numbers that the example has for them. Right of
    the mask stand the targets, green where they are trained, and their weights; targets that are no
    `TokenTargets` are not drawn. Where the example has an encoder, its text and mask come first,
    and left of the decoder's mask is what it sees of the encoder. In rows of more than 80 tokens
    the cells are without text.

    In a notebook the picture shows by itself; elsewhere, `draw_example(...).savefig("row.png")`.

    Args:
      example: one batch, as `TextObjective.prepare` gives it, with or without targets; on the host
        or on devices.
      tokenizer: which the tokens are ids of.
      causal: the model's attention.causal; with an encoder the decoder's. For a model with two
        streams the mask is that of the contents.
      row: which row of the example.

    Raises:
      UserError: there is no such row, the inputs are not one batch, the model and the example do
        not fit, or matplotlib is missing.
    """
    batch, targets = example.inputs, example.targets
    if not isinstance(batch, Batch):
        raise UserError(
            "the inputs of the example are not one batch: draw_example(Example(batch, None), ...) "
            "draws one of several"
        )
    rows = len(batch.tokens)
    if not 0 <= row < rows:
        raise UserError(f"row={row}: the batch has the rows 0 to {rows - 1}")
    if batch.ranks is not None and not causal:
        raise UserError("causal=False, but the batch has ranks, which only a causal model reads")
    targets = targets if isinstance(targets, TokenTargets) else None
    batch, targets = jax.tree.map(lambda array: np.asarray(array)[row : row + 1], (batch, targets))
    stacks = [TokenStack.of(batch, targets, tokenizer, causal)]
    if batch.encoder is not None:
        stacks.insert(0, TokenStack.of(batch.encoder, None, tokenizer, causal=False))
    labels = targets.labels if isinstance(targets, MaskedTargets) else None
    label = "" if labels is None else f", label {int(labels[0])}"
    return Picture(stacks, cross_mask(batch)).draw(f"row {row}{label}")


class Picture:
    """The figure and where things stand on it, in inches from its upper left corner.

    From the top: a title, what the colours mean, the texts, the masks. The masks stand on a grid,
    whose rows are the queries of each stack and whose columns its keys.
    """

    def __init__(self, stacks: list[TokenStack], cross: Bool[np.ndarray, "query key"] | None):
        """Of two stacks the encoder is the first, and `cross` is which of it the other sees."""
        self.stacks, self.cross = stacks, cross
        longest = max(len(stack.texts) for stack in stacks)
        self.writable = longest <= WRITABLE
        self.cell = CELL if self.writable else LONG / longest
        self.sizes = [self.cell * len(stack.texts) for stack in stacks]

        names = [LETTER * (2 + max(map(len, stack.numbers))) for stack in stacks]
        rows = [self._label_width(stack.texts) for stack in stacks]
        self.lefts = [GAP + max(*rows, names[0])]
        if cross is not None:
            self.lefts.append(self.lefts[0] + self.sizes[0] + max(names[1], GAP))
        targets = stacks[-1].targets
        self.target_width = 0.0 if targets is None else self._label_width(["target", *targets])
        right = self.lefts[-1] + self.sizes[-1]
        if targets is not None:
            right += LETTER + self.target_width + LETTER * len("weight")
        self.width = max(right + GAP, NARROWEST)

        self.columns = int((self.width - 2 * GAP) / LETTER)
        self.positions = [_wrap(stack.texts, self.columns) for stack in stacks]
        self.lines = [1 + int(at[-1, 0]) for at in self.positions]
        top, self.text_tops = 2.5 * GAP, []
        for lines in self.lines:
            self.text_tops.append(top)
            top += lines * LINE_HEIGHT + 0.8 * GAP
        self.tops = []
        for stack, size in zip(stacks, self.sizes):
            # The decoder's columns are named beside the encoder's mask, if there is room.
            head = self._head(stack)
            top = max(top + GAP, self.tops[0] + head) if self.tops else top + head
            self.tops.append(top)
            top += size
        self.height = top + GAP

    def _label_width(self, texts: list[str]) -> float:
        return LETTER * (1 + max(map(letters_of, texts))) if self.writable else LETTER * 8

    def _head(self, stack: TokenStack) -> float:
        """Of what stands above a mask: a line that says what it is, the tokens, the numbers."""
        tokens = self._label_width(stack.texts) if self.writable else 0.0
        return tokens + CELL * len(stack.numbers) + GAP

    def draw(self, title: str) -> Figure:
        """Draws everything."""
        pyplot = load_pyplot()
        self.figure = pyplot.figure(figsize=(self.width, self.height), facecolor="white")
        self.write(GAP, GAP / 2, title, weight="bold")
        self._legend()
        encoder = self.cross is not None
        for number, stack in enumerate(self.stacks):
            whose = ("encoder", "decoder")[number] + " " if encoder else ""
            self._running_text(number, f"{whose}text")
            at, size = (self.lefts[number], self.tops[number]), (self.sizes[number],) * 2
            self._mask(f"{whose}mask", stack.mask, stack.shades, at, size)
            self._keys(stack, at, f"{whose}mask: a row sees the filled columns")
            self._queries(stack, self.tops[number])
        if encoder:
            at, size = (self.lefts[0], self.tops[1]), tuple(self.sizes)
            name = "cross-attention mask"
            self._mask(name, self.cross, self.stacks[0].shades, at, size)
            self.write(at[0], at[1] - GAP / 3, f"{name}: decoder sees encoder", color=GREY)
        self._targets(self.stacks[-1])
        return self.figure

    def axes(
        self,
        name: str,
        at: tuple[float, float],
        size: tuple[float, float],
        shape: tuple[int, int],
    ) -> Axes:
        """Empty axes of this label, whose units are cells: `shape` says how many rows, columns."""
        (left, top), (width, height) = at, size
        bottom = self.height - top - height
        corner, extent = (left / self.width, bottom / self.height), (width / self.width,)
        axes = self.figure.add_axes((*corner, *extent, height / self.height), label=name)
        axes.set(xlim=(-0.5, shape[1] - 0.5), ylim=(shape[0] - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        return axes

    def write(self, left: float, top: float, text: str, **options) -> None:
        """A line of text, whose middle is `top`."""
        at = left / self.width, 1 - top / self.height
        self.figure.text(*at, text, **{"fontsize": SIZE, "va": "center"} | options)

    def _legend(self) -> None:
        """Draws the meanings of the colours that occur."""
        seen = np.unique(np.concatenate([stack.shades for stack in self.stacks]) // 2)
        meanings = [(SHADES[part][0], MEANINGS[part]) for part in seen]
        weights = self.stacks[-1].weights
        if weights is not None and weights.any():
            meanings.append((TARGET, "target with weight"))
        size = self.width - 2 * GAP, LINE_HEIGHT
        letters = int(size[0] / LETTER)
        axes, left = self.axes("legend", (GAP, 0.75 * GAP), size, (1, letters)), 0
        for colour, meaning in meanings:
            draw_box(axes, (left, 0, 2, 0.8), colour)
            draw_text(axes, (left + 2.2, 0), meaning, ha="left")
            left += 5 + len(meaning)

    def _running_text(self, number: int, name: str) -> None:
        """The tokens in lines, each in a box of its colour."""
        stack, top, lines = self.stacks[number], self.text_tops[number], self.lines[number]
        self.write(GAP, top - GAP / 3, name, color=GREY)
        size = self.columns * LETTER, lines * LINE_HEIGHT
        axes = self.axes(name, (GAP, top), size, (lines, self.columns))
        for i, (line, column) in enumerate(self.positions[number].tolist()):
            width = max(1, letters_of(stack.texts[i]))
            draw_box(axes, (column, line, width + 0.8, 0.86), COLOURS[stack.shades[i]])
            _token(axes, (column + (width - 0.2) / 2, line - 0.07), stack, i)

    def _mask(
        self,
        name: str,
        mask: Bool[np.ndarray, "query key"],
        shades: Int[np.ndarray, "key"],
        at: tuple[float, float],
        size: tuple[float, float],
    ) -> None:
        """A matrix whose cells have the colour of the key where it is seen."""
        from matplotlib.colors import ListedColormap

        axes = self.axes(name, at, size, mask.shape)
        values = np.where(mask, shades, 0)
        colours = ListedColormap(COLOURS)
        limits = {"vmin": -0.5, "vmax": len(COLOURS) - 0.5}
        axes.imshow(values, colours, aspect="auto", interpolation="nearest", **limits)
        axes.spines[:].set(visible=True, color=RULE)
        if self.writable:
            draw_rules(axes, *mask.shape)

    def _keys(self, stack: TokenStack, at: tuple[float, float], title: str) -> None:
        """Above a mask: numbers and texts of its columns."""
        (left, top), length = at, len(stack.texts)
        size = self.cell * length, CELL
        for number, (name, values) in enumerate(reversed(stack.numbers.items())):
            above = top - CELL * (number + 1)
            self.write(left - LETTER / 2, above + CELL / 2, name, ha="right", color=GREY)
            axes = self.axes(name, (left, above), size, (1, length))
            if self.writable:
                draw_rules(axes, 1, length)
                digits = max(len(str(value)) for value in values.tolist())
                fontsize = min(SIZE - 1, SIZE * CELL / LETTER / (digits + 0.5))
                for column, value in enumerate(values.tolist()):
                    draw_text(axes, (column, 0), str(value), fontsize=fontsize)
            else:
                most = 1.5 * max(1, values.max())  # so that nothing is black
                options = {"aspect": "auto", "interpolation": "nearest", "vmax": most}
                axes.imshow(values[None], "Greys", vmin=0, **options)
        top -= CELL * len(stack.numbers)
        if self.writable:
            height = self._label_width(stack.texts)
            axes = self.axes("keys", (left, top - height), (size[0], height), (1, length))
            for i in range(length):
                draw_box(axes, (i + 0.04, 0, 0.92, 1), COLOURS[stack.shades[i]])
                _token(axes, (i, 0.5 - LETTER / 2 / height), stack, i, rotation=90, va="bottom")
            top -= height
        self.write(left, top - GAP / 3, title, color=GREY)

    def _queries(self, stack: TokenStack, top: float) -> None:
        """Left of the masks: the texts of their rows."""
        left, length = self.lefts[0], len(stack.texts)
        width = self._label_width(stack.texts)
        at, size = (left - width, top), (width, self.cell * length)
        axes = self.axes("queries", at, size, (length, 1))
        if self.writable:
            for i in range(length):
                draw_box(axes, (0, i + 0.04, 1, 0.92), COLOURS[stack.shades[i]])
                _token(axes, (0.5 - LETTER / 2 / width, i), stack, i, ha="right")
        else:
            positions = range(0, length, 2 ** max(0, math.ceil(math.log2(length / 12))))
            axes.set_yticks(positions[1:], positions[1:])
            axes.yaxis.tick_right()
            axes.tick_params(labelsize=SIZE, length=0, pad=-LETTER * 72 * 4, labelcolor=GREY)

    def _targets(self, stack: TokenStack) -> None:
        """Right of the decoder's mask: what each row is to predict, and its weight."""
        if stack.targets is None:
            return
        left, top = self.lefts[-1] + self.sizes[-1] + LETTER, self.tops[-1]
        weights = stack.weights
        edge = 0.04 * self.writable
        titles = {"target": self.target_width, "weight": LETTER * len("weight")}
        for name, width in titles.items():
            axes = self.axes(name, (left, top), (width, self.sizes[-1]), (len(weights), 1))
            self.write(left + LETTER / 2, top - GAP / 3, name, color=GREY)
            left += width
            for i, weight in enumerate(weights.tolist()):
                colour = INK if weight else FAINT
                if weight:
                    draw_box(axes, (0, i + edge, 1, 1 - 2 * edge), TARGET)
                if self.writable:
                    text = stack.targets[i] if name == "target" else f"{weight:.3g}"
                    draw_text(axes, (LETTER / 2 / width - 0.5, i), text, ha="left", color=colour)


def _wrap(texts: list[str], columns: int) -> Int[np.ndarray, "seq 2"]:
    """Line and column in which each text begins, with a space between two."""
    line = column = 0
    positions = []
    for text in texts:
        width = 1 + max(1, letters_of(text))
        if column and column + width > columns:
            line, column = line + 1, 0
        positions.append((line, column))
        column += width
    return np.array(positions)


def _token(axes: Axes, at: tuple, stack: TokenStack, i: int, **options) -> None:
    """A token's text, bold where it is a special one."""
    weight = "bold" if stack.is_special[i] else "normal"
    colour = FAINT if stack.shades[i] // 2 == PADDING else INK
    draw_text(axes, at, stack.texts[i], weight=weight, color=colour, **options)
