"""Compares answers with a reward model, and writes the pairs that it is sure of: weak labels.

python -m lmjax.jobs.weak_comparisons runs/reward answers.jsonl pairs.jsonl confidence=0.9
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax.alignment.model_reward import ModelReward, find_score
from lmjax.alignment.reward_functions import Reply
from lmjax.config import UserError, config
from lmjax.console import RunLog, Table, make_console
from lmjax.data.chat.conversations import make_document
from lmjax.data.chat.folder import FolderTemplate
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.chat.records import message_record
from lmjax.data.chat.requests import Requests
from lmjax.data.chat.templates import PLAIN
from lmjax.data.documents import BadRecord
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.data.tokenizers import Tokenizer
from lmjax.files import errors_told, replacing
from lmjax.generation.run import template_of_run
from lmjax.interop.folder import model_folder, tokenizer_folder
from lmjax.interop.huggingface import is_model_folder
from lmjax.jobs.weak_labels import check_output
from lmjax.launch import import_modules, is_first, run
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy

ANSWERS = "answers"  # field of the lines


class Judged(NamedTuple):
    """Two answers to a request, and how sure a reward model is that the first is the better one."""

    messages: list[Message]
    chosen: str
    rejected: str
    confidence: float

    def record(self) -> dict[str, Any]:
        """A line that `Comparisons` reads."""
        line = {"prompt": list(map(message_record, self.messages))}
        rounded = round(self.confidence, 6)
        return line | {"chosen": self.chosen, "rejected": self.rejected, "confidence": rounded}


@config
class WeakComparisons:
    """Comparisons of answers that nobody has compared, from a reward model."""

    judge: str | None = None  # run folder of a reward model, or a public one's model folder
    answers: str | None = None  # JSON lines with prompt and answers; a path or a pattern
    output: str | None = None  # JSON lines that Comparisons reads; the file must not exist
    head: str = "reward"  # name of the judge's head with one output
    confidence: float = 0.9  # least probability that the chosen answer is the better one
    batch_size: int = 64  # answers that are scored at once
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        check_path(self.judge or "", "judge")
        if not 0.5 <= self.confidence <= 1:
            raise UserError(
                f"confidence={self.confidence}: the probability that the answer with the higher "
                "score is the better one lies between 0.5 and 1"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size}: it must be at least 1")

    def run(self) -> None:
        """Compares all answers to each prompt with each other, and prints how many are written.

        Raises:
          UserError: nothing is named, the judge is no reward model, an answer cannot be read, or
            the output exists or cannot be written.
        """
        if None in (self.judge, self.answers, self.output):
            raise UserError(
                "Which reward model, answers and output? For instance: python -m"
                " lmjax.jobs.weak_comparisons runs/reward answers.jsonl pairs.jsonl"
            )
        import_modules(self.imports)
        path = check_output(self.output)
        with jax.set_mesh(self.mesh.build()):
            found = self.judged()
        kept = [one for one in found if one.confidence >= self.confidence]
        with errors_told(f"cannot write {self.output}"), replacing(path) as unfinished:
            lines = (json.dumps(one.record(), ensure_ascii=False) + "\n" for one in kept)
            Path(unfinished).write_text("".join(lines), "utf-8")
        if is_first():
            log = RunLog(make_console())
            log.table(table_of(found, self.confidence))
            log.fact("written", f"{self.output}, {len(kept):,} of {len(found):,} pairs")

    def judged(self) -> list[Judged]:
        """All pairs of different answers to one prompt; a mesh is set.

        The answer with the higher score is chosen; its confidence is the sigmoid of the lead.
        """
        model = model_folder(self.judge)
        find_score(model, self.head, f"judge={self.judge}")
        tokenizer = read_tokenizer(tokenizer_folder(self.judge))
        template = _template(self.judge)
        sets = list(self.answer_sets(template))
        replies = [
            _reply(messages, answer, template, tokenizer, model.max_length)
            for messages, answers in sets
            for answer in answers
        ]
        judge = ModelReward(folder=self.judge, head=self.head, batch_size=self.batch_size)
        scores, found = iter(judge.score(replies)), []
        for messages, answers in sets:
            scored = [(next(scores), answer) for answer in answers]
            for pair in itertools.combinations(scored, 2):
                (low, worse), (high, better) = sorted(pair, key=lambda one: one[0])
                if low < high:
                    sure = 1 / (1 + math.exp(low - high))
                    found.append(Judged(messages, better, worse, sure))
        if not found:
            raise UserError(f"{self.answers}: no prompt has two answers with different scores")
        return found

    def answer_sets(self, template: ChatFormat) -> Iterator[tuple[list[Message], list[str]]]:
        """The messages of each line, and its answers, each once.

        Raises:
          UserError: a line has no list of texts.
        """
        source = Requests(path=self.answers, template=template, metadata=(ANSWERS,))
        for number, dialogue in enumerate(source.dialogues(), 1):
            answers = dialogue.metadata.get(ANSWERS)
            is_list = isinstance(answers, list | tuple) and answers
            if not is_list or not all(isinstance(one, str) and one for one in answers):
                raise UserError(
                    f"{self.answers}: request {number} should have {ANSWERS!r}, a list of texts"
                )
            yield dialogue.messages, list(dict.fromkeys(answers))


def _template(folder: str) -> ChatFormat:
    """The chat format that a reward model was trained with; PLAIN where none is known."""
    path = local_copy(folder, "judge")
    if is_model_folder(path):
        return FolderTemplate(path=str(path))
    return template_of_run(path) or PLAIN


def _reply(
    messages: list[Message],
    answer: str,
    template: ChatFormat,
    tokenizer: Tokenizer,
    longest: int | None,
) -> Reply:
    """An answer with its tokens as in training; of too many the last."""
    try:
        document = make_document([*messages, Message("assistant", answer)], template, "")
    except BadRecord as error:
        raise UserError(f"the answer {answer[:60]!r}: {error}") from None
    tokens, _ = document.encode(tokenizer)
    tokens = tokens if longest is None else tokens[-longest:]
    return Reply(document.group, answer, True, {}, tokens)


def table_of(found: list[Judged], least: float) -> Table:
    """Shares of the pairs by confidence, in steps of a tenth."""
    rows = []
    for tenth in range(5, 10):
        part = [one for one in found if min(9, int(10 * one.confidence)) == tenth]
        kept = sum(one.confidence >= least for one in part) / len(found)
        title = f"{tenth / 10:.1f} to {tenth / 10 + 0.1:.1f}, {len(part):,}"
        rows.append((title, kept, len(part) / len(found)))
    return Table(
        "Weak comparisons",
        ("confidence, pairs", "written", "of all pairs"),
        tuple(rows),
        "Share of the pairs by the probability that the answer with the higher score is the better"
        " one, and of those that are written.",
    )


if __name__ == "__main__":
    run(WeakComparisons(), positional=("judge", "answers", "output"))
