"""Inference by roofline: weights and cache in memory, time to the first token and between tokens.

A prompt is read in one pass that is limited by products; each token of a reply reads all weights
and the cache once, and is limited by the memory's bandwidth until many rows share the weights
(Pope et al. 2022, arXiv:2211.05102).
"""

from __future__ import annotations

import dataclasses
import functools
import math

from lmjax.config import UserError, config
from lmjax.models import TransformerConfig
from lmjax.models.encoder_decoder import EncoderDecoderConfig
from lmjax.scaling.clusters import Cluster
from lmjax.scaling.costs import Prices
from lmjax.scaling.division import Division
from lmjax.scaling.hardware import GB
from lmjax.scaling.plan import near_divisors
from lmjax.scaling.plan_tables import Facts, PlanTable, gigabytes, seconds
from lmjax.scaling.workload import Workload

READING = 0.8  # part of the memory's bandwidth that reading weights and cache reaches
SUM = 10e-6  # least seconds of a sum over tensor, however little is summed
MILLION = 1e6
ROUGH = 0.05  # of the memory: activations of a pass, and what the program needs


@config
class ServedRequests:
    """ServedRequests that a model is to answer."""

    rows: int = 1  # answered at once on each replica
    prompt: int = 1024  # tokens that are read
    reply: int = 256  # tokens that are written
    bits: int = 16  # of a weight; the cache has 16

    def validate(self) -> None:
        """Raises UserError for requests that there are not."""
        for name in ("rows", "prompt", "reply"):
            if getattr(self, name) < 1:
                raise UserError(f"requests.{name}={getattr(self, name)}: must be 1 or more")
        if self.bits not in (4, 8, 16, 32):
            raise UserError(f"requests.bits={self.bits}: must be 4, 8, 16 or 32")


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """A model that answers requests, on replicas of `tensor` chips each.

    Attributes:
      workload: the model.
      requests: what it answers.
      cluster: the chips.
      tensor: chips of a replica.
    """

    workload: Workload
    requests: ServedRequests
    cluster: Cluster
    tensor: int = 1

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.cluster.chips // self.tensor

    @functools.cached_property
    def weights(self) -> float:
        """Bytes of weights on a chip."""
        return self.workload.on_chip(Division(tensor=self.tensor)) * self.requests.bits / 8

    @functools.cached_property
    def weights_read(self) -> float:
        """Bytes of the weights on a chip that the next tokens of all rows need.

        Of n experts, of which a token uses k at random, the part 1 - (1 - k / n) ** rows.
        """
        experts = self.workload.experts
        if experts is None:
            return self.weights
        division = Division(tensor=self.tensor)
        share = experts.router.uses(experts.experts) / experts.experts
        idle = max(0.0, 1 - share) ** self.requests.rows
        of_experts = self.workload.on_chip(division, part="experts") * self.requests.bits / 8
        return self.weights - idle * of_experts

    def cache(self, length: int | float) -> float:
        """Bytes of the keys and values of one row on a chip, in 16 bits."""
        model = self.workload.model
        shards = 1 if model.attention.kv_heads % self.tensor else self.tensor
        numbers = 2 * model.attention.kv_heads * model.attention.head_dim / shards
        windows = (math.inf if window is None else window for window in model.windows)
        return 2 * numbers * sum(min(length, window) for window in windows)

    @property
    def longest(self) -> int:
        """Tokens of a row when its reply ends."""
        return self.requests.prompt + self.requests.reply

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on a chip, by what they hold."""
        caches = self.requests.rows * self.cache(self.longest)
        return {"weights": self.weights, "cache": caches, "the rest": ROUGH * self._available}

    @property
    def fits(self) -> bool:
        """Returns whether weights and caches fit."""
        return sum(self.memory.values()) <= self._available

    @property
    def most_rows(self) -> int:
        """Rows whose caches fit beside the weights."""
        left = self._available * (1 - ROUGH) - self.weights
        return max(0, int(left / self.cache(self.longest)))

    @property
    def first_token(self) -> float:
        """Seconds until all prompts are read."""
        tokens = self.requests.rows * self.requests.prompt
        kind, parts = self.cluster.accelerator, self.workload.forward_parts
        flops = tokens * (parts["products"] + parts["attention"])
        flops += self.requests.rows * parts["head"]  # of the last token alone
        products = flops / (self.tensor * kind.chip.flops * kind.efficiency)
        reading = self.weights / (kind.bandwidth * READING)
        return max(products, reading) + self._sums(tokens)

    @property
    def next_token(self) -> float:
        """Seconds between tokens, at the mean length of a row."""
        return max(self._reading, self._products) + self._sums(self.requests.rows)

    @property
    def bottleneck(self) -> str:
        """Words for what most of the time between tokens is spent on."""
        times = {
            "memory bandwidth": self._reading,
            "matrix units": self._products,
            "sums over tensor": self._sums(self.requests.rows),
        }
        return max(times, key=times.get)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of replies a second, of all replicas, with the time that prompts take."""
        rows, reply = self.requests.rows, self.requests.reply
        return self.replicas * rows * reply / (self.first_token + reply * self.next_token)

    def dollars(self, prices: Prices) -> float:
        """Dollars of a million tokens of replies, while requests come without a pause."""
        price = prices.dollars
        price = self.cluster.accelerator.dollars if price is None else price
        hours = MILLION / self.tokens_per_second / 3600
        return hours * self.cluster.chips * price

    @property
    def _available(self) -> float:
        return self.cluster.accelerator.memory

    @property
    def _reading(self) -> float:
        mean = self.requests.prompt + self.requests.reply / 2
        read = self.weights_read + self.requests.rows * self.cache(mean)
        return read / (self.cluster.accelerator.bandwidth * READING)

    @property
    def _products(self) -> float:
        kind, parts = self.cluster.accelerator, self.workload.forward_parts
        flops = self.requests.rows * sum(parts.values())
        return flops / (self.tensor * kind.chip.flops * kind.efficiency)

    def _sums(self, tokens: int) -> float:
        """Seconds of the sums over tensor of a pass: two a layer, one after the embeddings."""
        if self.tensor == 1:
            return 0.0
        sizes = Division(tensor=self.tensor, data=self.replicas).sizes
        rate = self.cluster.rates(sizes)["tensor"]
        size = 2 * tokens * self.workload.model.hidden * 2 * (self.tensor - 1) / self.tensor
        return (2 * self.workload.model.num_layers + 1) * max(SUM, size / rate)


def plan_serving(
    model: TransformerConfig, requests: ServedRequests, cluster: Cluster, tensor: int | None = None
) -> ServingPlan:
    """The plan on replicas of so many chips.

    Args:
      model: the model.
      requests: what it answers.
      cluster: the chips.
      tensor: chips of a replica; None: the fewest that hold it.

    Raises:
      UserError: the model writes no text, or the chips do not divide so.
    """
    if not model.attention.causal or isinstance(model, EncoderDecoderConfig):
        raise UserError("serve: planned are models that continue a text, token by token")
    if model.max_length is not None and requests.prompt + requests.reply > model.max_length:
        raise UserError(
            f"requests.prompt={requests.prompt} and requests.reply={requests.reply} are longer than"
            f" model.max_length={model.max_length}"
        )
    heads = model.attention.num_heads
    workload = Workload(model, requests.prompt, requests.rows, 0.0)
    plans = {
        size: ServingPlan(workload, requests, cluster, size)
        for size in range(1, min(heads, cluster.chips) + 1)
        if heads % size == 0 and cluster.chips % size == 0
    }
    if tensor is None:
        return next((plan for plan in plans.values() if plan.fits), max(plans.items())[1])
    if tensor not in plans:
        near = " and ".join(map(str, near_divisors(math.gcd(heads, cluster.chips), tensor)))
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {heads} heads and the {cluster.chips:,}"
            f" chips; near ones that do are {near}"
        )
    return plans[tensor]


def serving_facts(plan: ServingPlan, prices: Prices) -> Facts:
    """Labels and words of what matters most."""
    requests, kind = plan.requests, plan.cluster.accelerator
    return [
        ("parameters", f"{plan.workload.count:,}, of {requests.bits} bits"),
        (
            "topology",
            f"{plan.cluster.name}: replicas x chips of each = {plan.replicas:,} x {plan.tensor}",
        ),
        (
            "requests",
            f"{requests.rows} at once on a replica, {requests.prompt:,} tokens read and"
            f" {requests.reply:,} written; caches of {plan.most_rows:,} fit",
        ),
        ("first token", f"after {seconds(plan.first_token)}"),
        (
            "next token",
            f"{seconds(plan.next_token)}, limited by {plan.bottleneck}, if {READING:.0%} of"
            f" {kind.bandwidth / GB:,.0f} GB/s and {kind.efficiency:.0%} of the peak are reached",
        ),
        ("speed", f"{plan.tokens_per_second:,.1f} tokens/s"),
        ("costs", f"{plan.dollars(prices):,.2f} dollars for a million tokens written"),
    ]


def serving_table(plan: ServingPlan) -> PlanTable:
    """Memory of a chip by what it holds."""
    available, parts = plan.cluster.accelerator.memory, plan.memory
    whole = sum(parts.values())
    rows = [(name, gigabytes(size), f"{size / available:.1%}") for name, size in parts.items()]
    rows.append(("all", gigabytes(whole), f"{whole / available:.1%}"))
    if plan.fits:
        note = f"It fits: {gigabytes(available - whole)} GB of a chip are left."
    else:
        note = (
            f"It does not fit: {gigabytes(whole - available)} GB of a chip are missing. A larger"
            " mesh.tensor, fewer requests.rows or requests.bits=8 take less."
        )
    bars = tuple(size / available for size in (*parts.values(), whole))
    columns = ("", "GB", f"of {available / GB:.1f} GB")
    return PlanTable("Memory of a chip", columns, tuple(rows), note, bars)
