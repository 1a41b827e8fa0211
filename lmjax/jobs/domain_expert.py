"""An expert of a domain: a pretrained run reads a folder of texts, then learns to reply."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lmjax.config import UserError, config, replace
from lmjax.console import RunLog, make_console
from lmjax.data import Conversations, Data, Domain, Source, TextFiles, TokenizerFolder
from lmjax.data.chat.embedded_instructions import EmbeddedInstructions
from lmjax.interop.folder import tokenizer_folder
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.job import Job
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import ChatEvaluation, Checkpoints, at_least
from lmjax.jobs.transfer import TransferReport
from lmjax.parallel import Mesh
from lmjax.remote import check_path, is_url
from lmjax.runs.folder import RunFolder
from lmjax.training.schedules import Cosine, Schedule

FEW = 100  # files, of which a part that is held out would be too few


@config
class DomainExpert(Job):
    """Continued pretraining on a folder of texts, then instructions, and a report of both.

    The first run goes on as the one that it begins with: its objective and optimizer, its learning
    rate re-warmed and decayed again, and a share of its text replayed (Ibrahim et al. 2024,
    arXiv:2403.08763). The report has the scores on old text, new text and instructions before and
    after each run, and what was transferred and forgotten.
    """

    path: str | None = None  # folder of UTF-8 texts, or pattern of files: "manuals/**/*.txt"
    output: str = "runs/domain"  # folder of the report, with the runs in text/ and chat/
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
        """See `Job.run`.

        Raises:
          UserError: also where there is no text, or `begin_with` is no run of `Pretrain`.
        """
        self.chain().run()

    def chain(self) -> Chain:
        """The jobs, each of which begins with the one before, and the report on them."""
        text, chat = self._runs()
        transfer = TransferReport(
            output="{output}/transfer",
            runs=(self.begin_with, text.output, chat.output),
            tokens=self.tokens,
            mesh=self.mesh,
        )
        return Chain(output=self.output, jobs=(text, chat, transfer))

    def _runs(self) -> tuple[Pretrain, Finetune]:
        """The two runs of training."""
        if self.path is None:
            raise UserError(
                "Which texts? For instance: python -m experiments.domain path=my/folder"
            )
        before = RunFolder(self.begin_with).experiment()
        if not isinstance(before, Pretrain):
            raise UserError(
                f"begin_with={self.begin_with}: it is a run of {type(before).__name__}; give one "
                "of Pretrain, whose text and learning rate are known"
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
            output="{output}/text",
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
            output="{output}/chat",
            begin_with="{output}/text",
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
