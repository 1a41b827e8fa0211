"""Entities in sequences of labels, and how many of them a model finds whole (CoNLL-2000, 2003)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# O, or B, I, E or S (begin, inside, end, single) and perhaps the kind of the entity.
LABEL = re.compile(r"(O)|([BIES])(?:[-_](.+))?")


class Entity(NamedTuple):
    """Words that are named together.

    Attributes:
      kind: such as LOC; "" where labels have none.
      first: number of its first word.
      end: one past its last word.
    """

    kind: str
    first: int
    end: int


class EntityCounts(NamedTuple):
    """Numbers of entities of some texts.

    Attributes:
      right: that both people and the model have: of one kind, with both borders.
      found: of the model.
      wanted: of people.
    """

    right: int
    found: int
    wanted: int

    @property
    def precision(self) -> float:
        """Share of the found ones that are right; 0 where none is found."""
        return self.right / max(self.found, 1)

    @property
    def recall(self) -> float:
        """Share of the wanted ones that are found; 0 where there is none."""
        return self.right / max(self.wanted, 1)

    @property
    def f1(self) -> float:
        """Harmonic mean of both, 0 where none is right."""
        return 2 * self.right / max(self.found + self.wanted, 1)


def are_entities(names: Iterable[str]) -> bool:
    """Returns whether names of classes mark entities: O, and others such as B-LOC and I-LOC."""
    found = [LABEL.fullmatch(name) for name in names]
    return all(found) and any(one[1] for one in found) and any(one[2] for one in found)


def entities_of(labels: Sequence[str]) -> set[Entity]:
    """Entities in the labels of a text's words, by the rules of conlleval.

    One begins at B or S, and at I or E behind O, behind an end, or behind another kind; so what a
    model writes has a meaning also where it breaks the scheme.
    """
    found: set[Entity] = set()
    kind, first, before = "", None, "O"
    for number, label in enumerate((*labels, "O")):
        mark = LABEL.fullmatch(label)
        tag, own = mark[1] or mark[2], mark[3] or ""
        begins = tag in "BS" or (tag in "IE" and (before in "OES" or own != kind))
        if first is not None and (begins or tag == "O"):
            found.add(Entity(kind, first, number))
            first = None
        if begins:
            kind, first = own, number
        before = tag
    return found


def count_entities(wanted: Iterable[Sequence[str]], found: Iterable[Sequence[str]]) -> EntityCounts:
    """Entities of people and of a model.

    Args:
      wanted: labels of people, of the words of each text.
      found: those of the model.
    """
    right = model = people = 0
    for labels, predicted in zip(wanted, found, strict=True):
        theirs, ours = entities_of(labels), entities_of(predicted)
        right, model, people = right + len(theirs & ours), model + len(ours), people + len(theirs)
    return EntityCounts(right, model, people)
