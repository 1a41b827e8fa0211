"""An expert of a domain: a pretrained run reads a folder of texts, then learns to reply."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Conversations, Data, Domain, Source, TextFiles, TokenizerFolder
from lmjax.data.chat.embedded_instructions import EmbeddedInstructions
from lmjax.interop.folder import tokenizer_folder
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, at_least
from lmjax.jobs.training_job import TrainingJob
from lmjax.jobs.transfer import transfer_tables, write_tables
from lmjax.parallel import Mesh
from lmjax.remote import check_path, is_url
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Cosine, Schedule

FEW = 100  # files, of which a part that is held out would be too few


@config
class DomainExpert:
    """Continued pretraining on a folder of texts, then instructions, and a report of both.

    The first run goes on as the one that it begins with: its objective and optimizer, its learning
    rate re-warmed and decayed again, and a share of its text replayed (Ibrahim et al. 2024,
    arXiv:2403.08763). The report has the scores on old text, new text and instructions before and
    after each run, and what was transferred and forgotten.
    """

    path: str | None = None  # folder of UTF-8 texts, or pattern of files: "manuals/**/*.txt"
    output: str = "runs/domain"  # folder of the report, with the two runs in text/ and chat/
    begin_with: str = "runs/quickstart"  # run of Pretrain
    name: str | None = None  # of the text in the report; none: that of the folder
    # what is a document, of which a part is held out; none: a file where there are 100 or more
    split: Literal["file", "paragraph"] | None = None
    replay: float = 0.25  # share of the rows that are the text of begin_with; 0.05 for similar text
    steps: int = 350  # updates on the text
    schedule: Schedule | None = None  # the learning rate there; none: that of begin_with
    # JSON lines of conversations, as Conversations reads them; none: questions about Python's
    # library and their answers
    instructions: str | None = None
    instruction_steps: int = 300  # updates on the instructions
    instruction_schedule: Schedule = Cosine(peak=1e-3, warmup=20, final=0.05)  # learning rate there
    prompts: tuple[str, ...] = ()  # requests that the trained model replies to
    tokens: int | None = None  # about how many tokens of each held-out set to score; none: all
    mesh: Mesh = Mesh()  # how the devices are arranged

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        at_least(1, self, "steps", "instruction_steps", "tokens")
        check_path(self.output, "output", write=True)
        check_path(self.begin_with, "begin_with")
        if not 0 <= self.replay < 1:
            raise UserError(f"replay={self.replay}: a share of the rows is 0 or more, and below 1")

    def run(self) -> None:
        """Trains, or goes on training, and writes the report.

        Raises:
          UserError: there is no text, or `begin_with` is no run of `Pretrain`.
          SystemExit: after Ctrl-C or SIGTERM; the same command goes on.
        """
        runs = self.runs()
        run_in_order(runs)
        folders = (self.begin_with, *(job.output for job in runs))
        with jax.set_mesh(self.mesh.build()):
            write_tables(self, self.output, transfer_tables(folders, self.tokens))

    def runs(self) -> tuple[TrainingJob, ...]:
        """The runs, each of which begins with the one before."""
        if self.path is None:
            raise UserError(
                "Which texts? For instance: python -m experiments.domain path=my/folder"
            )
        before = RunFolder(self.begin_with).experiment()
        if not isinstance(before, Pretrain):
            raise UserError(
                f"begin_with={self.begin_with}: it is a run of {type(before).__name__};"
            )
        if not before.data.held_out:
            raise UserError(
                f"begin_with={self.begin_with}: it has held out nothing of its text (data.held_out="
                "0), so that what is forgotten could not be measured"
            )
        return self._text(before), self._instructions(before)

    def _text(self, before: Pretrain) -> Pretrain:
        """Continued pretraining."""
        every = -(-self.steps // 4)
        old = before.data.train
        name = self.name or Path(self.path.partition("*")[0]).name or "domain"
        if name in [domain.name for domain in old]:
            raise UserError(
                f"name={name}: {self.begin_with} has text of this name; give another one"
            )
        stages = before.data.stages
        weights = stages[-1].weights if stages else tuple(domain.weight for domain in old)
        replayed = [
            replace(domain, weight=self.replay * weight / sum(weights))
            for domain, weight in zip(old, weights, strict=True)
            if self.replay * weight > 0
        ]
        new = Domain(name=name, source=self._source(), weight=1 - self.replay)
        return replace(
            before,
            output=os.path.join(self.output, "text"),
            begin_with=self.begin_with,
            steps=self.steps,
            schedule=self.schedule or before.schedule,
            schedule_counts="steps",
            data=replace(self._data(before), train=(new, *replayed)),
            evaluation=replace(before.evaluation, every=every, prompts=()),
            checkpoint=Checkpoints(every=every),
            mesh=self.mesh,
        )

    def _instructions(self, before: Pretrain) -> Finetune:
        """Training on instructions."""
        every = -(-self.instruction_steps // 4)
        source: Source = EmbeddedInstructions()
        if self.instructions is not None:
            source = Conversations(path=self.instructions)
        return Finetune(
            output=os.path.join(self.output, "chat"),
            begin_with=os.path.join(self.output, "text"),
            steps=self.instruction_steps,
            data=replace(
                self._data(before),
                train=(Domain(name="instructions", source=source),),
                rows="whole_documents",
            ),
            schedule=self.instruction_schedule,
            evaluation=ChatEvaluation(every=every, tokens=self.tokens, prompts=self.prompts),
            checkpoint=Checkpoints(every=every),
            mesh=self.mesh,
        )

    def _data(self, before: Pretrain) -> Data:
        """Settings that the data of all runs have in common: the same documents are held out."""
        tokenizer = TokenizerFolder(path=str(tokenizer_folder(self.begin_with)))
        return replace(before.data, tokenizer=tokenizer, stages=(), ramp=())

    def _source(self) -> TextFiles:
        """The folder's texts; files that are no UTF-8 are left out and counted."""
        path = self.path
        if not is_url(path) and os.path.isdir(os.path.expanduser(path)):
            path = os.path.join(path, "**", "*")
        source = TextFiles(path=path, on_error="skip")
        split = self.split
        if split is None:
            files = len(source.parts())
            split = "file" if files >= FEW else "paragraph"
            RunLog(make_console()).fact("documents", f"each {split} of {files:,} files")
        return replace(source, split=split)


def run_in_order(jobs: Sequence[TrainingJob]) -> None:
    """Runs jobs one after another; those that have ended say so, and the others go on."""
    for job in jobs:
        job.run()
