"""Evaluation of trained models on tasks, resumed by item, with a report.

python -m experiments.evaluate model=runs/x 'tasks=(Arc(path="ARC-Challenge-Test.jsonl"),)'
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from lmjax.config import UserError, config, to_json
from lmjax.console import CountBar, RunLog, Stopwatch, Table, make_console
from lmjax.data.hashes import FileHashes
from lmjax.data.public_tokenizers import read_tokenizer
from lmjax.evaluation.answer_file import AnswerFile, answers_key
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.chat_questions import in_chat, reply_ends
from lmjax.evaluation.contamination import contamination_table
from lmjax.evaluation.leaderboard import leaderboard_table
from lmjax.evaluation.reference_scores import check_published, reference_table
from lmjax.evaluation.requests import ModelAnswer, ModelRequest
from lmjax.evaluation.task_classes import class_tables
from lmjax.evaluation.task_comparison import comparison_tables
from lmjax.evaluation.task_evaluator import check_room, check_tasks, fits_into
from lmjax.evaluation.task_result import TaskResult
from lmjax.evaluation.task_tables import (
    calibration_pictures,
    calibration_table,
    error_table,
    interval_table,
    prompt_table,
    score_table,
    subject_table,
)
from lmjax.evaluation.tasks.task import EvaluationTask, Question
from lmjax.generation.chat import chat_format
from lmjax.generation.fill import Infiller
from lmjax.generation.run import filling_of, load, precision, reads_prefix
from lmjax.interop.adapter_folder import text_folder
from lmjax.interop.beginning import files_of_parameters
from lmjax.interop.folder import (
    begin_token,
    model_folder,
    tokenizer_folder,
)
from lmjax.interop.kept_files import read_end_ids
from lmjax.jobs.job import Job
from lmjax.jobs.report import write_report
from lmjax.jobs.results import Results
from lmjax.jobs.score_curves import curve_tables, training_compute
from lmjax.jobs.settings import at_least
from lmjax.jobs.training_text import training_data, training_texts
from lmjax.launch import from_first, import_modules, is_first, on_first
from lmjax.parallel import Mesh
from lmjax.remote import check_path
from lmjax.runs.folder import REPLIES, REPORT, RESULTS, RunFolder
from lmjax.runs.lock import lock_run_folder


@config
class Evaluate(Job):
    """Score models on tasks, side by side.

    Answers are kept in output/replies, a file for each model: what was answered is not asked again,
    also by other tasks or after a kill. results.json has all numbers, report.html shows them.
    """

    output: str = "runs/evaluate"  # folder of answers and results; the same command goes on there
    model: str | None = None  # run folder or public model folder; see also models
    models: tuple[str, ...] = ()  # further ones, which are compared with it
    tasks: tuple[EvaluationTask, ...] = ()  # what they are asked
    # chat format in which a user asks, such as "llama2"; "true": the model's own; none: plain text
    chat: str | None = None
    batch_size: int = 32  # most rows that are run at once
    published: tuple[str, ...] = ()  # models whose published scores are shown, as in ("LLaMA 7B",)
    over_compute: bool = False  # also show the scores over the FLOPs of the models' training
    contamination: bool = False  # search the training text of the models, all runs, for the items
    # precision of the computation; none: a run's own, but float32 on a CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose tasks there are

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.output, "output", write=True)
        for path in self.folders:
            check_path(path, "models")
        at_least(1, self, "batch_size")
        check_published(self.published)

    @property
    def folders(self) -> tuple[str, ...]:
        """All models, each once."""
        first = () if self.model is None else (self.model,)
        return tuple(dict.fromkeys((*first, *self.models)))

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`: answers are kept by model and request, whatever else is asked."""
        return True

    def run(self) -> None:
        """Asks what is not answered yet, and reports.

        Raises:
          UserError: a setting is missing, a file or model cannot be read, a context cannot hold a
            question, or a model gives no numbers.
        """
        import_modules(self.imports)
        if not self.folders:
            raise UserError("model: give a run folder or a public model folder, as in model=runs/x")
        check_tasks(self.tasks)
        if self.contamination:
            for folder in self.folders:
                training_data(folder)
        if self.over_compute:
            for folder in self.folders:
                training_compute(folder)
        with jax.set_mesh(self.mesh.build()), lock_run_folder(self) as folder:
            EvaluateRun(self, folder).run()


class EvaluateRun:
    """The work of an `Evaluate` in its folder."""

    def __init__(self, job: Evaluate, folder: RunFolder) -> None:
        """A mesh must be set; the folder is locked."""
        self.job, self.folder, self.log = job, folder, RunLog(make_console())

    def run(self) -> None:
        """See `Evaluate.run`."""
        job, watch = self.job, Stopwatch()
        self.log.title(self.folder.location.rpartition("/")[2], self.folder.location)
        questions = [task.questions() for task in job.tasks]
        for task, asked in zip(job.tasks, questions, strict=True):
            shots = max(question.shots for question in asked)
            most = "up to " if task.fit else ""
            words = f"{len(asked):,} items, {most}{shots} examples in the prompt"
            self.log.fact(task.name, words)
        names = names_of(job.folders)
        found = {}
        for folder, name in zip(job.folders, names, strict=True):
            found[name] = self.results_of(folder, name, questions)
        on_first(functools.partial(self.report, found, watch))

    def results_of(
        self, folder: str, name: str, questions: Sequence[Sequence[Question]]
    ) -> list[TaskResult]:
        """Results of a model in all tasks; only those of the first process are whole."""
        job, watch = self.job, Stopwatch()
        questions = self.as_asked(folder, questions)
        path = self.folder.replies / f"{model_key(folder, job.dtype)}.jsonl"
        requests = list(
            dict.fromkeys(r for asked in questions for one in asked for r in one.requests)
        )
        kept: AnswerFile | None = None

        def read() -> None:
            nonlocal kept
            kept = AnswerFile(path)

        on_first(read)
        try:
            there = [kept is not None and request in kept for request in requests]
            there = from_first(np.array(there)).tolist()
            left = [request for request, done in zip(requests, there, strict=True) if not done]
            if left:
                self.ask(folder, name, left, kept, len(requests), questions)
            words = f"{len(requests):,} answers, {len(requests) - len(left):,} of them from before"
            self.log.fact(name, words, watch.seconds())
            if not is_first():
                return []
            return [
                TaskResult.of(task, asked, [[kept[r] for r in one.requests] for one in asked])
                for task, asked in zip(job.tasks, questions, strict=True)
            ]
        finally:
            if kept is not None:
                kept.close()

    def as_asked(
        self, folder: str, questions: Sequence[Sequence[Question]]
    ) -> Sequence[Sequence[Question]]:
        """Questions of all tasks as a model is asked them.

        They may have fewer examples, and stand in its chat format.
        """
        job, wanted = self.job, list(questions)
        if job.chat is None and not any(task.fit for task in job.tasks):
            return wanted
        tokenizer = read_tokenizer(_folder_of_tokenizer(folder))
        asked = _as_it_is
        if job.chat is not None:
            chat = chat_format(folder, tokenizer, job.chat)
            asked = functools.partial(in_chat, chat=chat, ends=reply_ends(chat, tokenizer))
        longest, begin = model_folder(folder).max_length, begin_token(folder, tokenizer)
        fits = fits_into(tokenizer, longest, begin, filling_of(folder))
        for number, task in enumerate(job.tasks):
            # The format takes room too.
            if task.fit:
                wanted[number] = task.questions(lambda one, task=task: fits(asked(task, one)))
        return [
            [asked(task, question) for question in some]
            for task, some in zip(job.tasks, wanted, strict=True)
        ]

    def ask(
        self,
        folder: str,
        name: str,
        left: Sequence[ModelRequest],
        kept: AnswerFile | None,
        total: int,
        questions: Sequence[Sequence[Question]],
    ) -> None:
        """Reads a model and asks it what it has not answered.

        Args:
          folder: of the model.
          name: of it, for the log.
          left: requests without an answer.
          kept: where answers are written, in the first process.
          total: number of all requests.
          questions: of all tasks.
        """
        with self.log.phase(f"reading {name}"):
            text = load(folder, dtype=self.job.dtype)
        blanks = text.filling is not None and not text.writes_replies
        if self.job.chat is not None and blanks:
            raise UserError(f"chat={self.job.chat}: {folder} fills blanks, and holds no talk")
        for task, asked in zip(self.job.tasks, questions, strict=True):
            longest = text.generator.config.max_length
            check_room(task, asked, text.tokenizer, longest, text.filling)
        answering = Answering(text, self.job.batch_size, begin_token(folder, text.tokenizer))
        done = total - len(left)
        with CountBar(name, self.log.console) as bar:

            def note(number: int, answer: ModelAnswer) -> None:
                nonlocal done
                if kept is not None:
                    kept.add(left[number], answer)
                done += 1
                bar(done, total)

            answering.answers(left, note)

    def report(self, found: dict[str, list[TaskResult]], watch: Stopwatch) -> None:
        """Prints and keeps the tables."""
        self.folder.write_config(self.job)
        first = next(iter(found.values()))
        scores = [leaderboard_table(found), *(score_table(found, more) for more in (True, False))]
        references, comparisons = (
            reference_table(found, self.job.published),
            comparison_tables(found),
        )
        subjects = [subject_table(number, found) for number in range(len(first))]
        by_model = [
            make(name, results)
            for make in (interval_table, calibration_pictures, error_table)
            for name, results in found.items()
        ]
        tables = (
            *(*scores, *self.curves(found), references, *comparisons, *subjects),
            *(*self.contaminations(found), *class_tables(found), calibration_table(found)),
            *(*by_model, prompt_table(first)),
        )
        tables: tuple[Table, ...] = tuple(table for table in tables if table is not None)
        for table in (*scores, references, *comparisons):
            if table is not None:
                self.log.table(table)
        results = Results(tables=tables, seconds=watch.seconds(), tiles=tiles_of(found))
        self.folder.write_json(RESULTS, results.to_json())
        write_report(self.folder)
        self.log.files(
            self.folder.location,
            (
                (REPORT, "leaderboard, comparisons, errors and prompts, for a browser"),
                (RESULTS, "the same numbers"),
                (f"{REPLIES}/*.jsonl", "every answer, a file for each model"),
            ),
        )

    def curves(self, found: dict[str, list[TaskResult]]) -> list[Table]:
        """Scores over the compute of training, where asked for."""
        if not self.job.over_compute:
            return []
        folders = zip(found, self.job.folders, strict=True)
        return curve_tables({name: training_compute(folder) for name, folder in folders}, found)

    def contaminations(self, found: dict[str, list[TaskResult]]) -> list[Table | None]:
        """For each model, scores on items that its training text has and lacks, where asked for."""
        if not self.job.contamination:
            return []
        tables = []
        for folder, (name, results) in zip(self.job.folders, found.items(), strict=True):
            with self.log.phase(f"searching the training text of {name}"):
                tables.append(contamination_table(name, results, training_texts(folder)))
        return tables


def model_key(folder: str, dtype: str | None) -> str:
    """A name for all that decides about a model's answers.

    Its files, tokenizer and config, the precision that it is computed in, the tokens that end its
    texts, and how it reads a context.
    """
    files = [*files_of_parameters(folder), *_tokenizer_files(folder)]
    hashes, config = FileHashes()(list(map(str, files))), model_folder(folder)
    ends = read_end_ids(text_folder(folder))
    reads = (*_words_of(filling_of(folder)), str(reads_prefix(folder)))
    return answers_key([*hashes, precision(config, dtype), to_json(config), str(ends), *reads])


def _words_of(filling: Infiller | None) -> list[str]:
    """Words for a filling of blanks, but for the chat format of its requests."""
    fields = dataclasses.fields(filling) if dataclasses.is_dataclass(filling) else ()
    words = [f"{f.name}={getattr(filling, f.name)}" for f in fields if f.name != "template"]
    return [type(filling).__name__, *words]


def _as_it_is(task: EvaluationTask, question: Question) -> Question:
    return question


def _folder_of_tokenizer(folder: str) -> Path:
    """Folder of the tokenizer. UserError: there is none, so that no text can be read."""
    _tokenizer_files(folder)
    return tokenizer_folder(folder)


def _tokenizer_files(folder: str) -> list[Path]:
    """Files of the tokenizer. UserError: there are none, so that no text can be read."""
    where = tokenizer_folder(folder)
    names = ("*token*", "*.model", "*.tiktoken", "vocab*", "merges.txt", "huggingface.json")
    found = {path for name in names for path in where.glob(name) if path.is_file()}
    if not found:
        raise UserError(f"there is no tokenizer in {folder}: texts need one")
    return sorted(found)


def names_of(folders: Sequence[str]) -> list[str]:
    """Short names of models, all different."""
    short = [Path(folder.rstrip("/")).name or folder for folder in folders]
    return [s if short.count(s) == 1 else f for s, f in zip(short, folders, strict=True)]


def tiles_of(found: dict[str, list[TaskResult]]) -> tuple[tuple[str, str], ...]:
    """The first score of each task, of each model, for the report's head."""
    return tuple(
        (f"{name}: {result.task.name}", f"{result.estimate(result.task.measures[0]).value:.3f}")
        for name, results in list(found.items())[:3]
        for result in results[:4]
    )
