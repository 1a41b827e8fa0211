"""A desk: items and their answers, shown to annotators one by one, and what these judge of them."""

from __future__ import annotations

import datetime
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.annotation.answers import ItemAnswers
from lmjax.annotation.items import AnnotationItem
from lmjax.annotation.journal import EVENTS, FILES, Journal, Task, annotator_name
from lmjax.config import UserError
from lmjax.data.chat.messages import Message, text_of
from lmjax.data.chat.records import require_text
from lmjax.data.documents import BadRecord


class StaleRequest(UserError):
    """A judgement of an item that is not, or no longer, the one to be judged."""


class Desk:
    """Gives each annotator the next item, and keeps the judgement of it.

    Its methods may be called from several threads.
    """

    def __init__(
        self,
        items: Sequence[AnnotationItem],
        answers: ItemAnswers,
        folder: Path,
        task: Task = "rank",
        seed: int = 0,
    ) -> None:
        """Makes a desk over what was judged before.

        Args:
          items: in the order in which they are shown.
          answers: to the items; of no concern where answers are written.
          folder: has a folder for each annotator.
          task: whether answers are ranked or written.
          seed: of the order in which answers are shown.
        """
        self.task = task
        self._items, self._answers, self._folder, self._seed = items, answers, folder, seed
        self._journals: dict[str, Journal] = {}
        self._lock = threading.Lock()

    def state(self, annotator: str) -> dict[str, Any]:
        """All that the page shows to an annotator, as JSON values.

        Raises:
          UserError: no name of an annotator, or a damaged file.
        """
        with self._lock:
            return self._state(annotator_name(annotator))

    def submit(self, annotator: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps a judgement, a skip or an undo, and returns the state after it.

        Args:
          annotator: the name.
          given: `event` (ranked, written, skipped, undone), and `turn` and, but for an undo, `item`
            of the state that it answers. `ranks`, one for each answer in the order that was shown:
            0 is the best, equal ones are ties. `completion`, the answer that was written. Perhaps
            `reason`.

        Raises:
          StaleRequest: it answers another state than the present one, as a second window's does;
            nothing is kept.
          UserError: it is incomplete or wrong, or cannot be written.
        """
        name = annotator_name(annotator)
        with self._lock:
            journal, item = self._journal(name), self._next(self._journal(name))
            if given.get("turn") != journal.turn:
                raise StaleRequest(
                    "this was judged already, perhaps in another window; nothing was saved twice"
                )
            record = self._record(name, journal, item, given)
            if given["event"] == EVENTS[self.task]:
                judged = self._ranking if self.task == "rank" else self._completion
                record |= judged(name, item, given)
            journal.append(record)
            return self._state(name)

    def shown_order(self, annotator: str, item: AnnotationItem, count: int) -> list[int]:
        """Numbers of an item's answers in the order that an annotator sees.

        A function of seed, annotator and item alone, and each order is as likely as any other.
        """
        key = json.dumps([self._seed, annotator, item.identity])
        return sorted(range(count), key=lambda n: hashlib.sha256(f"{key}{n}".encode()).digest())

    def _journal(self, annotator: str) -> Journal:
        if annotator not in self._journals:
            journal = Journal(self._folder / annotator)
            journal.complete()
            self._journals[annotator] = journal
        return self._journals[annotator]

    def _next(self, journal: Journal) -> AnnotationItem | None:
        """The first item that is neither judged nor skipped."""
        done = {record["item"] for record in journal.holding[self.task]}
        return next((item for item in self._shown() if item.identity not in done), None)

    def _shown(self) -> list[AnnotationItem]:
        if self.task == "write":
            return list(self._items)
        return [item for item in self._items if self._answers.comparable(item)]

    def _state(self, name: str) -> dict[str, Any]:
        journal = self._journal(name)
        item, shown = self._next(journal), {one.identity for one in self._shown()}
        done = [record for record in journal.holding[self.task] if record["item"] in shown]
        state = {
            "task": self.task,
            "annotator": name,
            "turn": journal.turn,
            "total": len(shown),
            "judged": sum(record["event"] != "skipped" for record in done),
            "skipped": sum(record["event"] == "skipped" for record in done),
            "undo": bool(journal.holding[self.task]),
            "waiting": False,
            "file": str(self._folder / name / FILES[self.task]),
            "item": None,
        }
        if item is None:
            return state
        answers = self._answers.of(item) if self.task == "rank" else ()
        if answers is None:
            return state | {"waiting": True}
        order = self.shown_order(name, item, len(answers))
        draft = _draft(journal.last_of(self.task, item.identity), order)
        shown_item = {
            "id": item.identity,
            "messages": [{"role": one.role, "text": _text(one)} for one in item.messages],
            "answers": [answers[number] for number in order],
            "draft": draft,
        }
        return state | {"item": shown_item}

    def _record(
        self,
        name: str,
        journal: Journal,
        item: AnnotationItem | None,
        given: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The part of a line that every event has."""
        event, kept = given.get("event"), {"task": self.task, "event": given.get("event")}
        if event not in (EVENTS[self.task], "skipped", "undone"):
            raise UserError(f"event={event!r}: known here are {EVENTS[self.task]}, skipped, undone")
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        who = {"annotator": name, "time": now}
        if event == "undone":
            holding = journal.holding[self.task]
            if not holding:
                raise UserError("there is nothing to undo")
            return kept | {"item": holding[-1]["item"], **who}
        if item is None or given.get("item") != item.identity:
            raise StaleRequest("this is not the item to judge now; nothing was saved")
        reason = _checked_text(given.get("reason", ""), "reason")
        return kept | {"item": item.identity, "source": item.source, "reason": reason, **who}

    def _ranking(self, name: str, item: AnnotationItem, given: Mapping[str, Any]) -> dict[str, Any]:
        """The ranks as `Comparisons` reads them, back in the order of the answers."""
        answers = self._answers.of(item)
        if answers is None:
            raise StaleRequest("there are no answers to this item yet; nothing was saved")
        ranks = given.get("ranks")
        whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
        if not whole or len(ranks) != len(answers) or {*ranks} != {*range(len({*ranks}))}:
            raise UserError(
                f"ranks={str(ranks)[:80]}: give each of the {len(answers)} answers a whole number,"
                " 0 for the best and no number left out"
            )
        order = self.shown_order(name, item, len(answers))
        ordered = [rank for _, rank in sorted(zip(order, ranks, strict=True))]
        return {"prompt": item.prompt, "answers": [*answers], "ranks": ordered, "shown": order}

    def _completion(
        self, name: str, item: AnnotationItem, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The answer as `Conversations` reads it."""
        completion = _checked_text(given.get("completion"), "completion")
        if not completion.strip():
            raise UserError("the answer is empty: write one, or skip")
        return {"prompt": item.prompt, "completion": completion}


def _checked_text(value: Any, name: str) -> str:
    try:
        return require_text(value, name)
    except BadRecord as error:
        raise UserError(str(error)) from None


def _draft(record: Mapping[str, Any] | None, order: Sequence[int]) -> dict[str, Any] | None:
    """A judgement that was undone, as the page shows it for correction."""
    if record is None:
        return None
    if "completion" in record:
        return {"completion": record["completion"], "reason": record["reason"]}
    if sorted(record["shown"]) != sorted(order):
        return None
    return {"ranks": [record["ranks"][number] for number in order], "reason": record["reason"]}


def _text(message: Message) -> str:
    """A message as it is shown, the tools that it calls with it."""
    calls = [
        f"{one.name}({json.dumps(one.arguments, ensure_ascii=False)})" for one in message.calls
    ]
    return "\n".join(filter(None, [text_of(message), *calls]))
