"""Guesses of the next tokens, which the model checks together (arXiv:2211.17192).

A guess changes when tokens come, not which: the model's own choice after the guessed tokens stands.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens at the end of a text that are looked for in it
REACH = 4096  # of a text's last tokens that are looked at


def repeated(tokens: Sequence[int], count: int) -> list[int]:
    """Guesses that the text goes on as where its last tokens stood before (Saxena 2023).

    Args:
      tokens: of the text.
      count: most tokens that are guessed.

    Returns:
      The guess, of the longest end that stood before, and there of the newest; where its text
      ends with too few tokens, they are repeated. Empty where none stood before.
    """
    text = list(tokens[-REACH:])
    for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
        end = text[-length:]
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin + length - 1] == end[-1] and text[begin : begin + length] == end:
                guess = text[begin + length :]
                while len(guess) < count:  # a text that goes round goes round once more
                    guess += text[begin + length :]
                return guess[:count]
    return []


def accepted(guess: Sequence[int], chosen: Sequence[int]) -> int:
    """Number of guessed tokens that the model chooses too, each after those before it."""
    for index, (ours, theirs) in enumerate(zip(guess, chosen)):
        if ours != theirs:
            return index
    return min(len(guess), len(chosen))
