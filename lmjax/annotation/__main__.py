"""A page in the browser on which a person ranks answers, or writes them.

python -m lmjax.annotation runs/policy prompts.jsonl annotator=ada
python -m lmjax.annotation runs/policy prompts.jsonl samples=6 temperature=0.8 max_tokens=300
python -m lmjax.annotation prompts=answered.jsonl     # its lines have answers
python -m lmjax.annotation prompts=prompts.jsonl task=write
"""

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import jax

from lmjax.annotation.agreement import agreement_table
from lmjax.annotation.answers import AnswerSampler, ItemAnswers
from lmjax.annotation.desk import Desk
from lmjax.annotation.items import FEWEST, AnnotationItem, read_items
from lmjax.annotation.journal import FILES, NAME, annotator_name, read_journals
from lmjax.config import UserError, config, fields
from lmjax.console import RunLog, make_console
from lmjax.files import errors_told, local_path, lock
from lmjax.generation.chat import chat_format, check_chat
from lmjax.generation.run import load
from lmjax.generation.sampling import Sampling
from lmjax.launch import import_modules, run
from lmjax.parallel import Mesh
from lmjax.remote import check_path

LOCK = ".lock"


@config
class Annotate(Sampling):
    """Judgements of people, for training: answers ranked (`Comparisons`) or written."""

    model: str | None = None  # the run or model folder whose answers are ranked
    # JSON lines, a pattern of paths or a URL: prompt, a text or messages, or messages; and perhaps
    # answers, a list of texts, which are then ranked in place of the model's
    prompts: str | None = None
    output: str = "annotations"  # folder of the judgements; the same command goes on in it
    task: Literal["rank", "write"] = "rank"  # what people do
    annotator: str | None = None  # name; none: the page asks, or has it from ?annotator=NAME
    samples: int = 4  # answers that the model writes to a prompt
    max_tokens: int = 200  # most tokens of an answer
    seed: int = 0  # of the answers, and of the order in which an annotator sees them
    # chat format: true, the folder's own or its family's; or the name of one, as in
    # lmjax.generation
    chat: str = "true"
    port: int = 8765  # on this machine; 0: one that is free
    # what is computed in; none: what the run was trained in, but float32 on a CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that no page could satisfy."""
        super().validate()
        check_path(self.model or "", "model")
        local_path(self.output, "output")
        if self.annotator is not None:
            annotator_name(self.annotator)
        if self.samples < FEWEST:
            raise UserError(f"samples={self.samples}: {FEWEST} or more answers can be compared")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be 1 or more")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port={self.port}: must be from 0 to {2**16 - 1}")

    def run(self) -> None:
        """Serves the page until Ctrl-C.

        Raises:
            UserError: prompts, model or settings cannot serve, or another process annotates there.
        """
        try:
            from lmjax.annotation.server import listen, make_app, serve
        except ImportError as error:
            raise UserError(
                f"the page needs Starlette and uvicorn ({error}): pip install 'lmjax[serve]'"
            ) from None
        if self.prompts is None:
            raise UserError(
                "Which prompts? For instance: python -m lmjax.annotation runs/policy prompts.jsonl"
            )
        if jax.process_count() > 1:
            raise UserError("a page needs all devices in one process")
        folder = local_path(self.output, "output")
        mesh = self.mesh.build()
        with closing(listen(self.port)) as listener, jax.set_mesh(mesh):
            items, sampler = self._prepare()
            with _locked(folder):
                answers = self._answers(items, folder, sampler)
                desk = Desk(items, answers, folder, self.task, self.seed)
                _tell_start(self, items, answers, listener.getsockname()[1])

                def work(stop: threading.Event) -> None:
                    with jax.set_mesh(mesh):  # each thread has its own
                        answers.write_missing(stop)

                serve(make_app(desk, self.annotator), listener, work)
                _tell_end(folder, sum(not answers.comparable(item) for item in items))

    def _prepare(self) -> tuple[list[AnnotationItem], AnswerSampler | None]:
        """The items, and the model that answers them where one is needed."""
        items = read_items(self.prompts, self._check)
        if self.task == "write" or all(item.answers for item in items):
            return items, None
        import_modules(self.imports)
        check_chat(self.model, self.chat)
        generator = load(self.model, dtype=self.dtype)
        if generator.filling is not None:
            raise UserError(f"{self.model} fills blanks; answers need a model that continues texts")
        template = chat_format(self.model, generator.tokenizer, self.chat)
        sampler = AnswerSampler(generator, template, self, self.samples, self.max_tokens)
        return read_items(self.prompts, sampler.check), sampler

    def _check(self, item: AnnotationItem) -> None:
        if self.task == "rank" and not item.answers and self.model is None:
            raise UserError("there are no 'answers', and no model is named that could write some")

    def _answers(
        self, items: list[AnnotationItem], folder: Path, sampler: AnswerSampler | None
    ) -> ItemAnswers:
        if sampler is None:
            return ItemAnswers([] if self.task == "write" else items, folder)
        names = (*fields(Sampling), "model", "samples", "max_tokens", "chat")
        drawn_with = {name: getattr(self, name) for name in names}
        return ItemAnswers(items, folder, sampler.sample, drawn_with)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder of judgements, which is made, until the process ends."""
    with errors_told(f"cannot write in output={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    with file:
        try:
            with errors_told(f"cannot lock output={folder}"):
                lock(file)
        except UserError as error:
            if isinstance(error.__cause__, BlockingIOError):
                raise UserError(
                    f"output={folder}: another process is serving it; its page takes several"
                    " annotators, each with a name"
                ) from None
            raise
        yield


def _tell_start(
    settings: Annotate, items: list[AnnotationItem], answers: ItemAnswers, port: int
) -> None:
    log = RunLog(make_console())
    log.title("Annotation", "rank answers" if settings.task == "rank" else "write answers")
    log.fact("prompts", f"{len(items):,} from {settings.prompts}")
    if missing := answers.missing():
        words = f"{settings.samples} to each of {len(missing):,} prompts, by {settings.model}"
        log.fact("answers", words)
    log.fact("judgements", f"{settings.output}/NAME/{NAME}, and {FILES[settings.task]} of it")
    name = settings.annotator
    query = "" if name is None else f"?annotator={quote(annotator_name(name))}"
    log.fact("page", f"http://127.0.0.1:{port}/{query}   Ctrl-C ends it; nothing is lost")


def _tell_end(folder: Path, alike: int) -> None:
    """Agreement, where several annotators have ranked the same, and the items that none could."""
    log = RunLog(make_console())
    if alike:
        log.fact("not shown", f"{alike:,} prompts, to which all answers of the model are the same")
    if (table := agreement_table(read_journals(folder))) is not None:
        log.table(table)


if __name__ == "__main__":
    run(Annotate(), positional=("model", "prompts"))
