"""A training step as the planner counts it: parameters, FLOPs and bytes of a token."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lmjax.config import UserError
from lmjax.models import TransformerConfig
from lmjax.models.executor import Remat
from lmjax.models.residual import Parallel
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

FLOAT32 = 4  # bytes of a parameter, of its gradient, and of each of the optimizer's numbers
ADAMW = AdamW()
Part = Literal["all", "layers", "layer", "rest"]


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

    def hardware_flops(self, remat: Remat) -> float:
        """FLOPs of a token that chips compute in training, with what backward computes again.

        Backward of attention makes the scores once more (five products where forward has two), and
        that of the head the logits. "dots" computes attention again, "full" all blocks.
        """
        parts = self.forward_parts
        again = 0.5 * parts["attention"] + parts["head"]
        if remat != "none":
            again += parts["attention"]
        if remat == "full":
            again += parts["products"]
        return self.model_flops + again

    def attention_flops(self, remat: Remat) -> float:
        """The part of `hardware_flops` that attention's scores and sums of values have."""
        passes = 3.5 if remat == "none" else 4.5
        return passes * self.forward_parts["attention"]

    # ---- parameters on a chip -------------------------------------------------------------------

    def on_chip(self, division: Division, gathered: bool = False, part: Part = "all") -> float:
        """Numbers of parameters on the fullest chip.

        Args:
          division: says how they are cut.
          gathered: leave them whole over `fsdp`, as they are used.
          part: of the model: all of it, its layers, one layer, or all but layers.
        """
        key = division.fsdp, division.tensor, division.stage, gathered, part
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
        """Parts that a parameter is cut into over `fsdp` and `tensor`, as the training layout does.

        Every matrix is cut along the residual stream over `fsdp`; heads, hidden units and
        vocabulary over `tensor`, but for key heads that do not divide it.
        """
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

    def kept_bytes(self, remat: Remat, tensor: int = 1) -> float:
        """Bytes of activations of a token that a layer keeps for its backward, on one chip.

        "full" keeps the layer's input. "dots" keeps that and what products give: queries, keys,
        values, attention's output (unless nothing reads it but the sum of a parallel block) and the
        hidden units. "none" keeps of each norm three float32 arrays and the result, of attention
        its queries, keys, values, output twice and a number a head, of the feed-forward six arrays
        of hidden units, as its activation's derivative is made of them.
        """
        model, c = self.model, self.itemsize
        attention, fed = model.attention, model.feed_forward
        queries = attention.num_heads * attention.head_dim / tensor
        shared = 1 if attention.kv_heads % tensor else tensor
        keys = attention.kv_heads * attention.head_dim / shared
        hidden, units = model.hidden, fed.size / tensor
        parallel = isinstance(model.arrangement, Parallel)
        if remat == "full":
            return float(c * hidden)
        if remat == "dots":
            read = 0 if parallel else hidden
            gated = 2 if _is_gated(self) else 1
            return c * (hidden + queries + 2 * keys + read + gated * units)
        read = 1 if parallel else len(model.arrangement.norms)  # norms of unlike inputs
        norms = read * (3 * FLOAT32 + c) * hidden
        attended = c * (3 * queries + 2 * keys) + FLOAT32 * attention.num_heads / tensor
        return norms + attended + 6 * c * units

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
    if model_of(job).feed_forward.reads_rows:
        raise UserError("model.feed_forward: mixtures of experts are not planned")
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
        trained=sum(size * part for size, part in sizes) / made.count,
        flops=job.flops_per_token(),
    )


def _is_gated(workload: Workload) -> bool:
    return any(p.path[-2:] == ("gate", "weight") for p in workload.parameters)
