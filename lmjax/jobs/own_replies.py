"""Distillation on the student's own replies (GKD, Agarwal et al. 2024, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax.alignment.rollouts import (
    RolloutRows,
    inputs_of,
    make_rows,
    pack_rows,
    packed,
    sample_replies,
)
from lmjax.config import UserError, config
from lmjax.console import RunLog
from lmjax.data import Data
from lmjax.data.permutation import random_bits
from lmjax.generation.generator import Generator
from lmjax.generation.sampling import Sampling
from lmjax.jobs.begin_with import refuse_prefix_model, warn_of_format, with_starting_model
from lmjax.jobs.settings import Distillation, at_least
from lmjax.jobs.text import prepare_text, warn_of_requests
from lmjax.jobs.training_job import FrozenModel, TrainingJob
from lmjax.models import TransformerConfig
from lmjax.objectives import CausalLM, Example
from lmjax.objectives.distillation import TEACHER
from lmjax.runs.folder import RunFolder
from lmjax.training.feed import RequestFeed, RolloutRequest
from lmjax.training.learner import Learner, Metrics
from lmjax.training.loop import Advance
from lmjax.training.placement import fitting_length, own_rows, to_devices
from lmjax.training.state import TrainState


@config
class OnPolicyDistillation(TrainingJob):
    """Train a student to predict what a teacher does, on replies that the student samples itself.

    Each step replies to `data.batch_size` requests, `samples` times each, and makes one update by
    the divergence at the tokens of the replies (GKD with lambda = 1). No gradient goes through the
    sampling. So the student learns where its own words lead it, and not only where those of a
    text do.
    """

    model: TransformerConfig | None = None  # what is trained; None: the model of begin_with
    objective: CausalLM = CausalLM()  # by whose targets, the words of replies, both are compared
    distillation: Distillation  # the teacher, with weight=1: one's own words are no example
    data: Data  # requests; data.length is the most tokens of one
    samples: int = 1  # replies to each request
    reply_length: int = 128  # most tokens of a reply
    sampling: Sampling = Sampling()  # how replies are drawn

    def validate(self) -> None:
        """Raises UserError for settings that do not go together."""
        at_least(1, self, "samples", "reply_length")
        if self.begin_with is None:
            raise UserError("begin_with: give the folder of the student, which must write replies")
        if self.distillation.weight != 1:
            raise UserError(
                f"distillation.weight={self.distillation.weight}: the student would also learn its"
                " own words as if they were right; set distillation.weight=1"
            )
        if self.data.rows != "groups" or self.data.ramp:
            raise UserError("requests are read with data.rows=groups, and without a ramp")
        super().validate()

    def check_model(self) -> None:
        """See `TrainingJob.check_model`; a model that is not read yet is checked then."""
        if self.model is None:
            return
        self._check_length("model", self.model)
        super().check_model()

    @property
    def length(self) -> int:
        """Tokens of a row: of a request and its reply, with the token that ends it."""
        return self.data.length + self.reply_length

    @property
    def lengths_vary(self) -> bool:
        """See `TrainingJob.lengths_vary`."""
        return True

    def resolved(self) -> OnPolicyDistillation:
        """See `TrainingJob.resolved`: with the model and the tokenizer of `begin_with`."""
        return with_starting_model(self)

    def all_frozen_models(self) -> dict[str, FrozenModel]:
        """See `TrainingJob.all_frozen_models`; the teacher reads whole replies."""
        found = super().all_frozen_models()
        self._check_length("the teacher", found[TEACHER].config)
        return found

    def example_shapes(self) -> Example:
        """See `TrainingJob.example_shapes`."""
        count = self.data.batch_size * self.samples
        tokens = np.zeros((count, self.length), np.int32)
        return Example(*inputs_of(RolloutRows(tokens, *np.zeros((2, count), np.int32))))

    def facts(self) -> Iterator[tuple[str, str]]:
        """See `TrainingJob.facts`."""
        requests = f"{self.data.batch_size} requests x {self.samples} replies"
        yield "training", f"{self.steps:,} steps of {requests}"

    def prepare(self, folder: RunFolder, log: RunLog, saved: dict[str, Any]) -> RequestFeed:
        """See `TrainingJob.prepare`."""
        refuse_prefix_model(self.begin_with)
        warn_of_format(self, log)
        prepared = prepare_text(self.data, folder.tokenizer, self.model.vocab_size, log, saved)
        feed = RequestFeed(prepared, self.data.plan(self.seed), self.data.length)
        warn_of_requests(log, feed)
        return feed

    def advance(
        self,
        learner: Learner,
        feed: RequestFeed,
        examples: Iterator[list[RolloutRequest]],
        frozen: Mapping[str, dict] | None,
    ) -> Advance:
        """See `TrainingJob.advance`: replies, and an update by what the teacher says of them."""
        most = self.microbatch_tokens

        def update(state: TrainState, step: int) -> tuple[TrainState, Metrics, int]:
            found = sample_replies(
                Generator(self.model, state.params, merge=False),
                feed.tokenizer,
                feed.template,
                next(examples),
                self.sampling,
                self.reply_length,
                random_bits(self.seed, step).item() % 2**31,
                self.samples,
            )
            longest = max(len(one.reply.tokens) for one in found)
            rows = make_rows(found, fitting_length(longest, self.length, learner.layout))
            example = Example(*inputs_of(rows))
            packing = pack_rows(example.inputs, self.length, learner.layout, most)
            example = own_rows(packed(example, packing))
            example = to_devices(example, learner.layout, self.model.vocab_size)
            state, metrics = learner.compiled_step(state, example, frozen)
            ended = np.mean([one.reply.ended for one in found])
            more = {"reply_tokens": rows.reply_lengths.mean(), "ended": ended}
            metrics |= {name: jnp.float32(value) for name, value in more.items()}
            return state, metrics, packing.rows * packing.length

        return update

    def _check_length(self, whose: str, model: TransformerConfig) -> None:
        """Raises UserError for a model that cannot read a request and its reply."""
        if model.max_length is not None and self.length > model.max_length:
            raise UserError(
                f"data.length={self.data.length} and reply_length={self.reply_length} are more"
                f" than {whose}'s max_length={model.max_length}"
            )
