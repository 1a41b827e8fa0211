"""Sums as text: a skill whose difficulty is known, and whose test set nobody has read."""

from __future__ import annotations

import random
from collections.abc import Iterator

from lmjax.config import UserError, config
from lmjax.data.documents import Document, OnSkip, Part, Source

END = "\n"  # of a sum


def sum_question(first: int, second: int) -> str:
    """The beginning of a sum, as in 12+30=."""
    return f"{first}+{second}="


def sum_answer(first: int, second: int, units_first: bool) -> str:
    """The digits of a sum, 42, or from the units on, 24."""
    return str(first + second)[:: -1 if units_first else 1]


def sum_document(first: int, second: int, units_first: bool = False) -> Document:
    """A sum as a document; its group is the pair of numbers, in this order."""
    question = sum_question(first, second)
    return Document(question + sum_answer(first, second, units_first) + END, question, question)


def draw_numbers(generator: random.Random, digits: int) -> tuple[int, int]:
    """Two numbers of so many digits, each with the same probability; of one digit, 0 to 9."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    return generator.randrange(least, 10**digits), generator.randrange(least, 10**digits)


@config
class SumTexts(Source):
    """Sums of two numbers of as many digits, such as 12+30=42, a document each.

    Each number of digits up to the largest is as frequent, and sums may occur twice (of one digit
    they do). Small models learn sums that are written from the units on with far fewer examples
    (Lee et al. 2023, arXiv:2307.03381).
    """

    digits: int = 3  # most digits of a number
    number: int = 100_000  # sums that are drawn
    units_first: bool = False  # the answer's digits from the units on: 12+30=24
    seed: int = 0  # of the drawing

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        for name in ("digits", "number"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")

    def parts(self) -> tuple[Part, ...]:
        """See `Source.parts`."""
        return (Part("sums", size=self.number * (3 * self.digits + 4)),)

    def read(self, part: Part, on_skip: OnSkip) -> Iterator[Document]:
        """See `Source.read`."""
        generator = random.Random(self.seed)
        for number in range(self.number):
            numbers = draw_numbers(generator, 1 + number % self.digits)
            yield sum_document(*numbers, self.units_first)
