"""A training step as the planner counts it: parameters, FLOPs and bytes of a token."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.config import UserError
from lmjax.models import (
    ExpertsConfig,
    FeedForwardConfig,
    GatedFeedForwardConfig,
    TransformerConfig,
)
from lmjax.models.executor import Remat
from lmjax.models.residual import Parallel
from lmjax.models.stretches import pattern
from lmjax.objectives.example import batches
from lmjax.parallel import Mesh
from lmjax.scaling.division import Division
from lmjax.scaling.flops import (
    Parameter,
    forward_flops_per_token,
    parameters,
    training_flops_per_token,
)
from lmjax.training.optimizers import AdamW, Optimizer
from lmjax.training.rounding import Stored

FLOAT32 = 4  # bytes of a parameter, of its gradient, and of each of the optimizer's numbers
ADAMW = AdamW()
ONE_CHIP = Division()
Part = Literal["all", "layers", "layer", "rest", "experts"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its batch and its optimizer, without a machine.

    Attributes:
      model: config of the model.
      length: tokens of a row.
      rows: of a step.
      tokens: of the whole training.
      source: tokens that an encoder reads for each row; None: as many.
      optimizer: turns gradients into updates.
      average: whether a moving average of the parameters is kept.
      weights: dtype that parameters are stored in from step to step.
      trained: share of the parameters that are trained.
      flops: model FLOPs of a token in training; None: of all parameters.
    """

    model: TransformerConfig
    length: int
    rows: int
    tokens: float
    source: int | None = None
    optimizer: Optimizer = ADAMW
    average: bool = False
    weights: Stored = "float32"
    trained: float = 1.0
    flops: float | None = None

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters; see `lmjax.scaling.flops.parameters`."""
        return parameters(self.model)

    @functools.cached_property
    def count(self) -> int:
        """Number of parameters."""
        return sum(parameter.size for parameter in self.parameters)

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of a parameter from step to step."""
        return jnp.dtype(self.weights).itemsize

    @functools.cached_property
    def period(self) -> int:
        """Layers that are scanned as one, where windows or kinds of layers take turns."""
        return len(pattern(self.model.windows, self.model.group))

    @property
    def experts(self) -> ExpertsConfig | None:
        """The mixture of experts that the feed-forward layers are; None: they are dense."""
        fed = self.model.feed_forward
        return fed if isinstance(fed, ExpertsConfig) else None

    # ---- FLOPs ----------------------------------------------------------------------------------

    @functools.cached_property
    def model_flops(self) -> float:
        """Model FLOPs of a token in training."""
        if self.flops is not None:
            return self.flops
        return training_flops_per_token(self.model, self.length, self.source)

    @functools.cached_property
    def forward_parts(self) -> dict[str, float]:
        """Model FLOPs of a token in forward: of attention's pairs, of the head, and of the rest."""
        attention, source = self.model.attention, self.source or self.length
        pairs = 4 * attention.num_heads * attention.head_dim
        pairs *= self.model.pairs(self.length, source)
        head = 2.0 * self.vocabulary if self.model.word_head else 0.0
        whole = forward_flops_per_token(self.model, self.length, self.source)
        return {"attention": pairs, "head": head, "products": whole - pairs - head}

    @property
    def vocabulary(self) -> int:
        """Numbers of the head's rows, without those that pad them."""
        return self.model.vocab_size * (self.model.embedding_size or self.model.hidden)

    def hardware_flops(self, division: Division) -> float:
        """FLOPs of a token that chips compute in training, with what backward computes again.

        Backward of attention makes the scores once more (five products where forward has two), and
        that of the head the logits. "dots" computes attention again, and experts, whose products
        are one for all of them; "full" all blocks. Experts with a capacity compute their empty
        slots as well. A pipeline that keeps inputs of its parts alone computes these once more.
        """
        parts, experts, remat = self.forward_parts, self.expert_flops, division.remat
        passes = division.forwards - 1
        again = 0.5 * parts["attention"] + parts["head"]
        again += passes * (parts["attention"] + parts["products"])
        if remat != "none":
            again += parts["attention"]
        if remat == "dots":
            again += experts
        if remat == "full":
            again += parts["products"]
        if self.experts is not None:
            if division.split:  # gradients of weights make those of hidden units once more
                again += experts / (3 if self.experts.gated else 2)
            number, router = self.experts.experts, self.experts.router
            times = 3 + passes + (0 if remat == "none" else 1)
            again += times * experts * (router.room(number) / router.uses(number) - 1)
        return self.model_flops + again

    @functools.cached_property
    def expert_flops(self) -> float:
        """Model FLOPs of a token in forward that experts have."""
        source = self.source or self.length
        return 2.0 * sum(
            parameter.size * self.model.uses(parameter.path, self.length, source)
            for parameter in self.parameters
            if is_of_experts(parameter)
        )

    @property
    def dense_layers(self) -> list[tuple[FeedForwardConfig, float]]:
        """Feed-forward layers of all tokens, shared experts too, with their share of the layers."""
        model, share = self.model, 1 / self.model.group
        own = model.feed_forward if self.experts is None else self.experts.shared
        return [(fed, share) for fed in (own, model.alternate_feed_forward) if fed is not None]

    def expert_rows(self, division: Division) -> float:
        """Rows of a sparse layer's arrays on a chip for each of its tokens.

        Without a capacity they have room for all tokens of the axis `expert`.
        """
        if self.experts is None:
            return 0.0
        router = self.experts.router
        return router.room(self.experts.experts) * (1 if router.drops else division.expert)

    def attention_flops(self, division: Division) -> float:
        """The part of `hardware_flops` that attention's scores and sums of values have."""
        passes = 2.5 + division.forwards + (0 if division.remat == "none" else 1)
        return passes * self.forward_parts["attention"]

    # ---- parameters on a chip -------------------------------------------------------------------

    def on_chip(self, division: Division, gathered: bool = False, part: Part = "all") -> float:
        """Numbers of parameters on the fullest chip.

        Args:
          division: says how they are cut.
          gathered: leave them whole over `fsdp`, as they are used.
          part: of the model: all of it, its layers, one layer, all but layers, or the experts.
        """
        cuts = division.fsdp, division.expert, division.tensor, division.stage
        key = *cuts, gathered, part
        if key not in self._counted:
            self._counted[key] = self._on_chip(division, gathered, part)
        return self._counted[key]

    @functools.cached_property
    def _counted(self) -> dict[tuple[int | bool | str, ...], float]:
        """Results of `on_chip`, of which a search asks for the same ones again and again."""
        return {}

    def _on_chip(self, division: Division, gathered: bool, part: Part) -> float:
        total = 0.0
        for parameter in self.parameters:
            inside = "blocks" in parameter.path
            if part != "all" and inside == (part == "rest"):
                continue
            if part == "experts" and not is_of_experts(parameter):
                continue
            size = self._padded(parameter) / self.shards(parameter, division, gathered)
            if inside:
                layers = parameter.shape[0]
                size *= (1 if part == "layer" else math.ceil(layers / division.stage)) / layers
            total += size
        return total

    def _padded(self, parameter: Parameter) -> int:
        rows = self.model.vocab_size
        if parameter.path[0] in ("embedding", "head", "head_bias"):
            return parameter.size // rows * self.model.padded_vocab
        return parameter.size

    def shards(self, parameter: Parameter, division: Division, gathered: bool = False) -> int:
        """Parts that a parameter is cut into, but for stages, as the training layout does.

        Every matrix is cut along the residual stream over `fsdp`; heads, hidden units and
        vocabulary over `tensor`, but for key heads that do not divide it; experts over `expert`.
        """
        parts = self._shards(parameter, division, gathered)
        return parts * division.expert if is_of_experts(parameter) else parts

    def _shards(self, parameter: Parameter, division: Division, gathered: bool) -> int:
        *path, name = parameter.path
        owner = path[-1] if path else name
        if name == "scale" or any(part.endswith("norm") for part in path):
            return 1
        if owner == "attention_positions":
            return division.tensor
        along = name in ("weight", "table") or owner in ("output", "down")
        fsdp = division.fsdp if along and not gathered else 1
        if owner in ("key", "value") and self.model.attention.kv_heads % division.tensor:
            return fsdp
        if owner in ("query", "key", "value", "up", "gate", "head_bias"):
            return fsdp * division.tensor
        if owner in ("output", "down", "embedding", "head") and name != "bias":
            return fsdp * division.tensor
        return fsdp

    @functools.cached_property
    def optimizer_share(self) -> float:
        """Bytes of the optimizer's state for a byte of a trained parameter, counters left out."""
        tree: dict[str, Any] = {}
        for parameter in self.parameters:
            node = tree
            for name in parameter.path[:-1]:
                node = node.setdefault(name, {})
            node[parameter.path[-1]] = jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
        with jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1)):
            transform = self.optimizer.build(lambda step: 1.0, tree)
            state = jax.eval_shape(transform.init, tree)
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
        return size / (FLOAT32 * self.count)

    # ---- activations of a token -----------------------------------------------------------------

    def kept_bytes(self, remat: Remat, division: Division = ONE_CHIP) -> float:
        """Bytes of activations of a token that a layer keeps for its backward, on one chip.

        "full" keeps the layer's input. "dots" keeps that and what products give: queries, keys,
        values, attention's output (unless nothing reads it but the sum of a parallel block) and the
        hidden units. "none" keeps of each norm three float32 arrays and the result, of attention
        its queries, keys, values, output twice and a number a head, of the feed-forward six arrays
        of hidden units, as its activation's derivative is made of them. Of experts it keeps these
        for each row, and the row before and after them; "dots" keeps nothing of experts. Where
        dense and sparse layers take turns, it is their mean. The layers of a period of windows or
        kinds, which are scanned as one, have one input.
        """
        model, c, tensor = self.model, self.itemsize, division.tensor
        attention, dense = model.attention, self.dense_layers
        queries = attention.num_heads * attention.head_dim / tensor
        shared = 1 if attention.kv_heads % tensor else tensor
        keys = attention.kv_heads * attention.head_dim / shared
        stream = model.hidden / division.streams
        hidden, units = model.hidden, sum(fed.size * share for fed, share in dense) / tensor
        parallel = isinstance(model.arrangement, Parallel)
        if remat == "full":
            return c * stream / self.period
        if remat == "dots":
            read = 0 if parallel else stream
            gates = sum(fed.size * share for fed, share in dense if is_gated(fed)) / tensor
            return c * (stream / self.period + queries + 2 * keys + read + units + gates)
        read = 1 if parallel else len(model.arrangement.norms)  # norms of unlike inputs
        norms = read * (3 * FLOAT32 * stream + c * hidden)
        attended = c * (3 * queries + 2 * keys) + FLOAT32 * attention.num_heads / tensor
        rows = self.expert_rows(division) / model.group
        routed = rows * (2 * hidden + 6 * model.feed_forward.size / tensor)
        return norms + attended + c * (routed + 6 * units)

    def put_off_bytes(self, remat: Remat, division: Division = ONE_CHIP) -> float:
        """Bytes of a token that a layer keeps further until gradients of weights, on one chip.

        Where these are computed apart from backward. They are gradients of what products give, and
        with "full", where backward computes the layer again, also what products read.
        """
        model, tensor = self.model, division.tensor
        attention, dense = model.attention, self.dense_layers
        queries = attention.num_heads * attention.head_dim / tensor
        keys = attention.kv_heads * attention.head_dim
        keys /= 1 if attention.kv_heads % tensor else tensor
        units = sum(fed.size * share for fed, share in dense) / tensor
        gates = sum(fed.size * share for fed, share in dense if is_gated(fed)) / tensor
        found = queries + 2 * keys + 2 * model.hidden + units + gates
        if remat == "full":
            found += queries + model.hidden + units + gates
        return self.itemsize * found

    def token_layers(self, division: Division) -> float:
        """Tokens that a chip computes at once, times the layers of the fullest stage.

        Of an encoder and a decoder each with its own tokens.
        """
        model, source = self.model, self.source or self.length
        encoder = model.depth - model.num_layers
        work = self.length * model.num_layers + source * encoder
        most = math.ceil(model.depth / division.stage) / model.depth
        return division.rows * work * most / division.context


def model_of(job: Any) -> TransformerConfig:
    """The model that a job trains.

    Raises:
      UserError: the experiment trains no model by itself.
    """
    if not hasattr(job, "flops_per_token") or getattr(job, "model", None) is None:
        raise UserError(
            f"{type(job).__name__} makes no training step that could be planned; give an experiment"
            " that trains one model (of a chain, an experiment with the job alone)"
        )
    return job.model


def workload_of(job: Any, tokens: float | None = None) -> Workload:
    """The workload of a training job, such as an experiment's.

    Args:
      job: with the settings of `lmjax.jobs.training_job.TrainingJob`.
      tokens: of the whole training; None: as many as the job has.

    Raises:
      UserError: the experiment trains no model by itself.
    """
    model_of(job)  # or it says that there is none
    batch = batches(job.example_shapes())[0]
    length = batch.tokens.shape[1]
    source = None if batch.encoder is None else batch.encoder.tokens.shape[1]
    rows = job.largest_batch()
    if tokens is None:
        data = getattr(job, "data", None)
        plan = data.plan(job.seed) if hasattr(data, "plan") else None
        steps = job.steps or 0
        tokens = (plan.row0(steps) if plan else steps * rows) * length
    share = job.trained().share
    made = Workload(job.model, length, rows, float(tokens), source, job.optimizer)
    layers = job.model.num_layers
    sizes = [(p.size, share(".".join(p.path), layers)) for p in made.parameters]
    return dataclasses.replace(
        made,
        average=job.ema_decay is not None,
        weights=job.weights,
        trained=sum(size * part for size, part in sizes) / made.count,
        flops=job.flops_per_token(),
    )


def is_gated(layer: FeedForwardConfig) -> bool:
    """Returns whether hidden units are a product of two."""
    return isinstance(layer, GatedFeedForwardConfig)


def is_of_experts(parameter: Parameter) -> bool:
    """Returns whether each expert has a part of a parameter."""
    return "experts" in parameter.path
