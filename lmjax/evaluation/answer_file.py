"""Answers of one model on disk: a line each, so that an evaluation that was killed goes on.

The file is named after all that decides about the answers: parameters, tokenizer, precision. Two
models never share one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from lmjax.config import UserError
from lmjax.evaluation.requests import (
    ModelAnswer,
    ModelRequest,
    answer_record,
    read_answer,
    request_key,
)
from lmjax.files import errors_told

FORMAT = 2  # counts changes of how answers are computed or written


class AnswerFile:
    """Answers by request; each is written as soon as it is there."""

    def __init__(self, path: Path) -> None:
        """Reads what is there; a line that a kill has cut off is taken away.

        Raises:
          UserError: the file cannot be read or written, or a line before the last is damaged.
        """
        self.path, self._answers = path, {}
        with errors_told(f"cannot write in {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            self._file.seek(0)
            data = self._file.read()
            whole = data.rfind(b"\n") + 1
            self._file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                key = record.pop("request")
                self._answers[key] = read_answer(record)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number} is damaged ({error}): delete it") from None

    def __contains__(self, request: ModelRequest) -> bool:
        return request_key(request) in self._answers

    def __getitem__(self, request: ModelRequest) -> ModelAnswer:
        return self._answers[request_key(request)]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, request: ModelRequest, answer: ModelAnswer) -> None:
        """Keeps an answer. UserError: it cannot be written."""
        key = request_key(request)
        if key in self._answers:
            return
        self._answers[key] = answer
        line = json.dumps({"request": key, **answer_record(answer)}, ensure_ascii=False)
        with errors_told(f"cannot write {self.path}"):
            self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def answers_key(parts: Iterable[str]) -> str:
    """Name of a model's file, from fingerprints of all that decides about its answers."""
    text = json.dumps([FORMAT, *parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
