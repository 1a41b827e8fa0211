"""Answers to rank: those that the lines have, and those that a model writes, each once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.annotation.items import FEWEST, AnnotationItem
from lmjax.config import UserError, replace
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.json_log import JsonLog
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator

NAME = "answers.jsonl"
Sample = Callable[[AnnotationItem], list[str]]


@dataclasses.dataclass(frozen=True)
class AnswerSampler:
    """Draws a model's answers to items; the mesh that the model is on must be set.

    Attributes:
      generator: the model.
      template: the chat format that it was trained with.
      sampling: how tokens are drawn; the seed is one for each item.
      samples: answers to an item.
      max_tokens: most tokens of an answer.
    """

    generator: TextGenerator
    template: ChatFormat
    sampling: Sampling
    samples: int
    max_tokens: int

    def check(self, item: AnnotationItem) -> None:
        """Raises UserError for an item that the model cannot answer, if it has no answers."""
        if item.answers:
            return
        length = len(self.template.encode(self.generator.tokenizer, item.messages))
        room = self.generator.generator.config.max_length
        if room is not None and length >= room:
            raise UserError(
                f"the prompt has {length:,} tokens and leaves no room for an answer in the"
                f" {room:,} of the model's context"
            )

    def sample(self, item: AnnotationItem) -> list[str]:
        """Draws answers to an item, a function of the item, the model and the settings alone."""
        seed = (self.sampling.seed + int(item.identity, 16)) % 2**31
        sampling = replace(self.sampling, seed=seed)
        drawn = self.generator.replies(
            self.template, item.messages, sampling, self.max_tokens, self.samples
        )
        return [self.template.read_reply(text).content for text in drawn]


class ItemAnswers:
    """The answers to each item, the same for all annotators.

    Sampled ones are kept in answers.jsonl, each with how it was drawn, so that a second start shows
    what the first one did. Repeated and empty ones are left out; an item with fewer than two
    different ones is not shown.
    """

    def __init__(
        self,
        items: Sequence[AnnotationItem],
        folder: Path,
        sample: Sample | None = None,
        sampled_by: Mapping[str, Any] | None = None,
    ) -> None:
        """Reads what has been sampled before.

        Args:
          items: all of them.
          folder: has answers.jsonl.
          sample: draws answers to an item; None where all lines have some.
          sampled_by: model and settings of it.

        Raises:
          UserError: there are answers of another model or other settings.
        """
        self._items, self._sample = items, sample
        self._sampled_by = dict(sampled_by or {})
        self._found = {item.identity: item.answers for item in items if item.answers}
        self._log = JsonLog(folder / NAME)
        wanted = {item.identity for item in items if not item.answers}
        for record in self._log.records:
            if record.get("item") not in wanted:
                continue
            if sample is not None and record["sampled_by"] != self._sampled_by:
                raise UserError(_of_another(self._log.path, record["sampled_by"], self._sampled_by))
            self._found[record["item"]] = tuple(record["answers"])

    def of(self, item: AnnotationItem) -> tuple[str, ...] | None:
        """The answers to an item; None while there are none yet."""
        return self._found.get(item.identity)

    def comparable(self, item: AnnotationItem) -> bool:
        """Returns whether there may be something to compare: False where all answers are alike."""
        found = self.of(item)
        return found is None or len(found) >= FEWEST

    def missing(self) -> list[AnnotationItem]:
        """The items that the model has not answered yet."""
        return [item for item in self._items if item.identity not in self._found]

    def write_missing(self, stop: threading.Event) -> None:
        """Draws all answers that are missing, in the order of the items, until `stop` is set.

        Raises:
          UserError: of the model, or the answers cannot be kept.
        """
        for item in self.missing():
            if stop.is_set():
                return
            drawn = [answer for answer in self._sample(item) if answer.strip()]
            answers = list(dict.fromkeys(drawn))
            self._log.append(
                {"item": item.identity, "answers": answers, "sampled_by": self._sampled_by}
            )
            self._found[item.identity] = tuple(answers)


def _of_another(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changed = ", ".join(f"{name}={old.get(name)} (now {new.get(name)})" for name in names)
    return f"{path} has answers that were drawn with {changed}: choose another output"
