r"""Best of n: samples replies to requests, and writes the best and all others with their rewards.

python -m lmjax.jobs.best_of_n policy=runs/sft 'requests=Requests(path="asks.jsonl")' \
    'rewards=(ModelReward(folder="runs/reward"),)'
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lmjax.alignment.candidates import (
    KEYS,
    Line,
    divergence_of_best,
    earlier_replies,
    key_of,
    make_line,
    of_before,
    sampled,
)
from lmjax.alignment.ghost_attention import GhostAttention, remind
from lmjax.alignment.reward_functions import ReadyReward, Reward, make_ready, total_rewards
from lmjax.alignment.rollouts import sample_replies
from lmjax.config import UserError, config, to_json
from lmjax.console import CountBar, RunLog, Table, make_console
from lmjax.data.chat.conversations import Conversations
from lmjax.data.chat.messages import Message
from lmjax.data.chat.records import message_record
from lmjax.data.chat.requests import Dialogue, RequestSource
from lmjax.data.permutation import random_bits
from lmjax.files import errors_told, write_atomically
from lmjax.generation.run import load
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator
from lmjax.jobs.begin_with import warn_of_template
from lmjax.jobs.job import Job
from lmjax.jobs.results import Results
from lmjax.jobs.settings import at_least
from lmjax.launch import from_first, import_modules, on_first, run
from lmjax.parallel import Mesh
from lmjax.remote import check_path
from lmjax.runs.folder import REPLIES, RESULTS, RunFolder
from lmjax.runs.lock import lock_run_folder
from lmjax.training.feed import RolloutRequest

COLUMNS = ("replies", "standard error", "reward")


@config
class BestOfN(Job):
    """Sample replies to requests and keep the best (rejection sampling of LLaMA 2).

    Each line of output/replies/*.jsonl has the messages of a request with the best reply, and all
    replies with their rewards: `Conversations` and `Comparisons` read the files as they are. A
    reply that is cut off, is empty or imitates a role is no candidate.
    """

    output: str = "runs/best_of_n"  # folder of what it makes; the same command continues there
    policy: str | None = None  # run folder or public model folder of the model that replies
    requests: RequestSource | None = None  # requests, and the chat format of the model
    rewards: tuple[Reward, ...] = ()  # what the replies are worth: the sum
    # files of conversations, such as those of earlier rounds: their replies to the same requests
    # are candidates too
    earlier: tuple[str, ...] = ()
    # repeat the instruction of a dialogue while sampling (LLaMA 2); none: sample dialogues as they
    # are
    ghost_attention: GhostAttention | None = None
    samples: int = 16  # replies to each request
    request_length: int = 512  # most tokens of a request; longer ones are left out
    reply_length: int = 256  # most tokens of a reply
    sampling: Sampling = Sampling()  # how replies are drawn (LLaMA 2: temperature 1.2 to 1.3)
    batch_size: int = 32  # requests that are replied to at once, and make a file
    seed: int = 0  # of the replies
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        check_path(self.output, "output", write=True)
        check_path(self.policy or "", "policy")
        for path in self.earlier:
            check_path(path, "earlier")
        at_least(1, self, "samples", "request_length", "reply_length", "batch_size")
        at_least(0, self, "seed")
        if self.sampling.seed:
            raise UserError(f"sampling.seed={self.sampling.seed}: give seed={self.sampling.seed}")
        kept = getattr(self.requests, "metadata", ())
        if taken := sorted({*kept} & {*KEYS}):
            raise UserError(
                f"requests.metadata: {taken[0]!r} is a field of the lines to be written"
            )

    def may_change(self, setting: str) -> bool:
        """See `Job.may_change`."""
        return setting in ("output", "imports") or setting.startswith("mesh.")

    def run(self) -> None:
        """Samples, or goes on sampling, and reports.

        Raises:
          UserError: a setting is missing or does not fit the others, something cannot be read or
            written, all replies to the first requests were cut off, or a reward is not finite.
        """
        for name in ("policy", "requests", "rewards"):
            if not getattr(self, name):
                raise UserError(f"{name}: give it; see python -m lmjax.jobs.best_of_n --help")
        import_modules(self.imports)
        with jax.set_mesh(self.mesh.build()), lock_run_folder(self) as folder:
            BestOfNRun(self, folder).run()


class BestOfNRun:
    """The work of a `BestOfN` in its folder: file after file, as far as they are not there."""

    def __init__(self, job: BestOfN, folder: RunFolder) -> None:
        """A mesh must be set; the folder is locked."""
        self.job, self.folder, self.log = job, folder, RunLog(make_console())
        self.template = job.requests.template
        self.length = job.request_length + job.reply_length

    def run(self) -> None:
        """See `BestOfN.run`."""
        job = self.job
        self.log.title(self.folder.location.rpartition("/")[2], self.folder.location)
        dialogues = self.dialogues()
        parts = range(0, len(dialogues), job.batch_size)
        paths = {first: self.folder.replies / f"{first:08}.jsonl" for first in parts}
        # The others may see the files of the first process later, or not at all.
        is_there = np.array([path.is_file() for path in paths.values()])
        done = dict(zip(parts, from_first(is_there).tolist()))
        if not all(done.values()):
            self.prepare(dialogues)
        with CountBar("requests", self.log.console) as bar:
            for first, path in paths.items():
                part = dialogues[first : first + job.batch_size]
                if done[first]:
                    on_first(functools.partial(self.check, path, part))
                else:
                    on_first(functools.partial(self.write, path, self.replied(part, first)))
                bar(first + len(part), len(dialogues))
        on_first(lambda: self.report(list(paths.values()), len(dialogues)))

    def dialogues(self) -> list[Dialogue]:
        """All requests, as they are trained on.

        Raises:
          UserError: there are none.
        """
        found = list(self.job.requests.dialogues())
        if not found:
            raise UserError(f"there is no request in {to_json(self.job.requests)}")
        if (ghost := self.job.ghost_attention) is None:
            return found
        return [
            one._replace(messages=ghost.instruct(one.messages, self.job.seed, number))
            for number, one in enumerate(found)
        ]

    def prepare(self, dialogues: Sequence[Dialogue]) -> None:
        """Reads the policy, the rewards and the replies of earlier rounds.

        Args:
          dialogues: all requests.

        Raises:
          UserError: they do not fit each other.
        """
        job = self.job
        remedy = "give requests.template that of the model"
        warn_of_template(job.policy, self.template, self.log, remedy)
        self.text: TextGenerator = load(job.policy)
        longest = self.text.generator.config.max_length
        if longest is not None and self.length > longest:
            raise UserError(
                f"request_length={job.request_length} and reply_length={job.reply_length} are more "
                f"than the {longest} tokens that the model in {job.policy} reads"
            )
        if all(self.tokens(one) is None for one in map(self.context, dialogues)):
            raise UserError(
                f"all {len(dialogues)} requests are longer than request_length="
                f"{job.request_length} tokens"
            )
        ready = job.rewards, self.text.tokenizer, self.length, job.policy
        self.rewards: tuple[ReadyReward, ...] = make_ready(*ready)
        self.before: dict[str, list[Message]] = {}
        if job.earlier:
            source = Conversations(path=job.earlier, template=self.template)
            self.before = earlier_replies(source)

    def context(self, dialogue: Dialogue) -> list[Message]:
        """The messages of a request, as the policy reads them."""
        messages = dialogue.messages
        return messages if self.job.ghost_attention is None else remind(messages)

    def tokens(self, messages: Sequence[Message]) -> list[int] | None:
        """The tokens of a request; None where it is too long."""
        tokens = self.template.encode(self.text.tokenizer, messages)
        return tokens if len(tokens) <= self.job.request_length else None

    def replied(self, dialogues: Sequence[Dialogue], first: int) -> list[Line]:
        """Lines of some requests.

        Args:
          dialogues: the requests, as they are trained on.
          first: number of the first one.
        """
        job, tokenizer = self.job, self.text.tokenizer
        contexts = [self.context(one) for one in dialogues]
        asked = []
        for number, messages in enumerate(contexts):
            if (tokens := self.tokens(messages)) is not None:
                text, metadata = tokenizer.decode(tokens), dialogues[number].metadata
                asked.append((number, RolloutRequest(tokens, text, metadata)))
        rollouts = sample_replies(
            self.text.generator,
            tokenizer,
            self.template,
            [request for _, request in asked],
            job.sampling,
            job.reply_length,
            random_bits(job.seed, first).item() % 2**31,
            job.samples,
            self.text.reads_prefix,
        )
        replies = [rollout.reply for rollout in rollouts]
        if not first and asked and not any(reply.ended for reply in replies):
            raise UserError(
                f"all {len(replies)} replies to the first requests were cut off after reply_length="
                f"{job.reply_length} tokens: give a longer one, or a policy that ends its replies"
            )
        found = []
        for position, (number, request) in enumerate(asked):
            own = replies[position * job.samples : (position + 1) * job.samples]
            new = list(sampled(self.template, contexts[number], own))
            known = self.before.get(key_of(dialogues[number].messages), [])
            dialogue = self.template, tokenizer, contexts[number], known
            old = list(of_before(*dialogue, request.metadata, self.length))
            found.append((number, [*new, *old], job.samples - len(new), len(old)))
        every = [one.reply for _, candidates, *_ in found for one in candidates]
        scores = iter(total_rewards(self.rewards, every)[0].tolist() if every else [])
        return [
            make_line(*dialogues[number], candidates, [next(scores) for _ in candidates], *counts)
            for number, candidates, *counts in found
            if candidates
        ]

    def write(self, path: Path, lines: Sequence[Line]) -> None:
        """Writes a file, whole or not at all."""
        with errors_told(f"cannot write in {path.parent}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )

    def check(self, path: Path, dialogues: Sequence[Dialogue]) -> None:
        """Raises UserError for a file with replies to other requests than there are now."""
        prompts = [[message_record(m) for m in one.messages] for one in dialogues]
        if any(line["prompt"] not in prompts for line in read_lines(path)):
            raise UserError(
                f"{path} has replies to other requests than `requests` has now: "
                "choose another output"
            )

    def report(self, paths: Sequence[Path], requests: int) -> None:
        """Prints and keeps the mean rewards of all sampled replies, and of the best ones.

        Raises:
          UserError: there is no line.
        """
        lines = [line for path in paths for line in read_lines(path)]
        if not lines:
            raise UserError(
                f"none of the {requests} requests has a reply: all were cut off after reply_length="
                f"{self.job.reply_length} tokens, are empty, or imitate a role"
            )
        if missing := requests - len(lines):
            self.log.warn(
                f"{missing} of {requests} requests are left out: they are longer than "
                f"request_length={self.job.request_length} tokens, or no reply came to an end"
            )
        if left_out := sum(line["left_out"] for line in lines):
            self.log.warn(
                f"{left_out} sampled replies are left out, which were cut off after reply_length="
                f"{self.job.reply_length} tokens, are empty, or imitate a role"
            )
        bound = divergence_of_best(self.job.samples)
        self.log.fact("divergence", f"of the best from the policy: at most {bound:.3f} nats")
        table = summary(lines, self.job.samples)
        self.log.table(table)
        self.folder.write_json(RESULTS, Results(step=requests, tables=(table,)).to_json())
        self.log.files(
            self.folder.location,
            (
                (f"{REPLIES}/*.jsonl", "lines for Conversations, Comparisons and Requests"),
                (RESULTS, "the numbers above"),
            ),
        )


def read_lines(path: Path) -> list[Line]:
    """The lines of a file. UserError: it cannot be read."""
    with errors_told(f"cannot read {path}"):
        text = path.read_text("utf-8")
    try:
        lines = [json.loads(line) for line in text.split("\n") if line]
        sound = all(set(KEYS) <= line.keys() for line in lines)
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged: delete it, and it is made again")
    return lines


def summary(lines: Sequence[Line], samples: int) -> Table:
    """Mean rewards of all sampled replies, and of the best ones, over requests."""
    new = [line["scores"][: len(line["scores"]) - line["earlier"]] for line in lines]
    found = {
        "all": [np.mean(scores) for scores in new if scores],
        "the best": [max(line["scores"]) for line in lines],
    }
    rows = tuple(
        (name, float(np.std(each)) / math.sqrt(len(each)), float(np.mean(each)))
        for name, each in found.items()
        if each
    )
    kept = sum(np.argmax(line["scores"]) >= len(own) for line, own in zip(lines, new, strict=True))
    notes = (f"{kept} of the best are of earlier rounds.",) if kept else ()
    caption = (
        f"Of {samples} replies to each of {len(lines)} requests; the best are at most "
        f"{divergence_of_best(samples):.3f} nats from the policy: log n - (n - 1) / n."
    )
    return Table("Best of n", COLUMNS, rows, caption, notes=notes)


if __name__ == "__main__":
    run(BestOfN())
