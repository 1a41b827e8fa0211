"""Settings of the data of an experiment: text, mixture, tokenizer, rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.balance import TagBalance
from lmjax.data.documents import Source
from lmjax.data.loss_weights import LossWeights
from lmjax.data.plan import Plan, make_plan
from lmjax.data.token_shares import TokenShares
from lmjax.data.tokenizers import TokenizerConfig
from lmjax.data.tokenizers.subwords import TrainedBPE
from lmjax.remote import check_path

Fingerprints = Mapping[str, Mapping[str, str]]  # by domain, of its "source" and "evaluation"


@config
class Domain:
    """Text of one kind: trained on with its weight, and evaluated by its name."""

    name: str  # under which its held-out loss is reported
    source: Source  # the text
    weight: float = 1.0  # relative share of the training rows; 0 in every stage: evaluated only
    evaluation: Source | None = None  # held-out text, in place of a part of `source`
    balance: TagBalance | None = None  # reads documents of rare tags more often in training
    loss_weights: LossWeights | None = None  # of conversations in the training loss

    def validate(self) -> None:
        for name in ("balance", "loss_weights"):
            chosen, kept = getattr(self, name), getattr(self.source, "metadata", ())
            if chosen is not None and chosen.field not in kept:
                raise UserError(
                    f"{self.name}: {name}.field={chosen.field} is not kept of the lines; set"
                    f" source.metadata={(*kept, chosen.field)}"
                )
        if self.weight < 0:
            raise UserError(f"the weight of {self.name} is {self.weight}; it cannot be negative")
        if self.weight == 0 and self.evaluation is not None:
            raise UserError(f"{self.name} has weight 0: give what is evaluated as its source")


@config
class Stage:
    """From `first_step` on, the domains have these weights."""

    first_step: int  # 0-based step
    weights: tuple[float, ...]  # of the domains of data.train, in their order


@config
class Data:
    """Text to train on, its tokenizer, and the rows of a step."""

    train: tuple[Domain, ...]  # the mixture
    stages: tuple[Stage, ...] = ()  # changes of its weights
    # how shares follow from weights and tokens; none: the shares are the weights
    shares: TokenShares | None = None
    tokenizer: TokenizerConfig = TrainedBPE()  # made once, then kept with the run
    held_out: float = 0.05  # fraction of each source's documents that is evaluated, not trained on
    length: int = 1024  # tokens that the model reads in a row
    batch_size: int = 16  # rows in a step, over all devices
    ramp: tuple[tuple[int, int], ...] = ()  # changes of batch_size: (step, rows from there on)
    # what is a row: a stretch of all the text, with documents cut at its edges, whole documents, or
    # documents that belong together, each in a slot: compared answers, or one text with its labels
    rows: Literal["ring", "whole_documents", "groups"] = "ring"
    # what to do with a document that is longer than a row of whole ones, or than an answer may be:
    # cut it, or leave it out
    long_documents: Literal["cut", "drop"] = "cut"
    workers: int = 0  # processes that prepare batches; 0 is a thread
    tokenize_workers: int = 0  # processes that tokenize; 0 uses this one
    # folder for tokens; empty is $LMJAX_CACHE, or ~/.cache/lmjax; machines share those at a URL
    cache: str = ""
    # what to do when a run goes on and its text is another one: stop, or say so and train on it
    on_change: Literal["raise", "warn"] = "raise"

    def validate(self) -> None:
        """Raises UserError for data that cannot be trained on."""
        check_path(self.cache, "cache", write=True)
        names = [domain.name for domain in self.train]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.train needs domains of different names, got {names}")
        self._check_stages()
        self._check_rows()
        if not any(domain.weight for domain in self.train):
            raise UserError("every domain of data.train has weight 0; there is nothing to train on")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; it must be at least 0 and below 1")
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("workers", "tokenize_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative")

    def _check_rows(self) -> None:
        for domain in self.train:
            if domain.loss_weights is not None and self.rows != "whole_documents":
                raise UserError(f"{domain.name}: loss_weights need data.rows=whole_documents")
            if domain.balance is not None and self.rows == "ring":
                raise UserError(
                    f"{domain.name}: balance needs data.rows=whole_documents, or groups; a row of"
                    " data.rows=ring is no set of documents"
                )

    def _check_stages(self) -> None:
        steps = [stage.first_step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step < 1 for step in steps):
            raise UserError(f"the first steps of data.stages must rise from 1, got {steps}")
        for stage in self.stages:
            if len(stage.weights) != len(self.train):
                raise UserError(
                    f"a stage of data.stages has {len(stage.weights)} weights, but there are "
                    f"{len(self.train)} domains"
                )
            if min(stage.weights) < 0 or not any(stage.weights):
                raise UserError(
                    f"the weights of a stage are {stage.weights}; none can be negative, and not "
                    "all 0"
                )

    def is_trained(self, domain: Domain) -> bool:
        """Returns whether the domain has a weight in any stage."""
        number = self.train.index(domain)
        return bool(domain.weight) or any(stage.weights[number] for stage in self.stages)

    def held_out_of(self, domain: Domain) -> float:
        """Share of a domain's source that is held out of training."""
        return self.held_out if self.is_trained(domain) and domain.evaluation is None else 0.0

    @property
    def sizes(self) -> tuple[int, ...]:
        """The rows of a step, first and after each change."""
        return (self.batch_size, *(rows for _, rows in self.ramp))

    def plan(self, seed: int) -> Plan:
        """The data plan of a run that begins with these settings."""
        return make_plan(seed, self.batch_size, self.ramp)
