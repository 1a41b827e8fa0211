"""The arrays of a program, read from its text: StableHLO before the compiler, HLO after it."""

from __future__ import annotations

import math
import re
from typing import Any

ARRAY = re.compile(r"\b[a-z]+\d*\w*\[([\d,]+)\]|tensor<((?:\d+x)+)[a-z]")


def shapes(text: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays that are named in a program, those inside of kernels left out."""
    return {
        tuple(int(size) for size in re.split("[,x]", (hlo or stable).rstrip("x")))
        for hlo, stable in ARRAY.findall(text)
    }


def largest(lowered: Any) -> int:
    """Elements of the largest array of a lowered program and of what is compiled from it."""
    texts = lowered.as_text(), lowered.compile().as_text()
    return max(math.prod(shape) for text in texts for shape in shapes(text))
