"""Division of a training step over chips: mesh, microbatches, pipeline, ZeRO, recomputation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from lmjax.config import UserError
from lmjax.models.executor import Remat
from lmjax.parallel.mesh import AXES
from lmjax.parallel.schedules import Name
from lmjax.training.gradients import Zero


@dataclasses.dataclass(frozen=True)
class Division:
    """Division of the work of a step.

    Attributes:
      data, fsdp, expert, stage, context, tensor: sizes of the mesh's axes.
      rows: of the batch, that each shard of it (data x fsdp x expert) computes at once.
      microbatches: of a step, one after another on each shard.
      schedule: of the pipeline.
      chunks: parts of the model on each stage, with the schedule `interleaved`.
      remat: what backward recomputes.
      zero: ZeRO stage.
      sums_once: whether gradients are summed over `data` once a step, not for each microbatch; a
        pipeline always does.
      sequence_parallel: whether `tensor` divides the sequence between layers, norms included.
      parts_again: whether a pipeline keeps only the inputs of its parts, and computes each part
        again in its backward, as `lmjax.parallel.pipeline` does; others keep activations, and so do
        all zero-bubble schedules.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    stage: int = 1
    context: int = 1
    tensor: int = 1
    rows: int = 1
    microbatches: int = 1
    schedule: Name = "1f1b"
    chunks: int = 1
    remat: Remat = "full"
    zero: Zero = 3
    sums_once: bool = False
    sequence_parallel: bool = False
    parts_again: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh's axes by name."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def chips(self) -> int:
        """Chips that the mesh needs."""
        return math.prod(self.sizes.values())

    @property
    def shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.data * self.fsdp * self.expert

    @property
    def batch(self) -> int:
        """Rows of a step."""
        return self.shards * self.rows * self.microbatches

    @property
    def streams(self) -> int:
        """Parts of the residual stream over `tensor`."""
        return self.tensor if self.sequence_parallel else 1

    @property
    def split(self) -> bool:
        """Returns whether a pipeline's gradients of weights have ticks of their own."""
        return self.stage > 1 and self.schedule in ("zb_h1", "zb_v")

    @property
    def forwards(self) -> int:
        """Forward passes, but for what a policy of recomputation does not keep.

        Pipelines that keep the inputs of their parts alone go through each part twice.
        """
        return 2 if self.stage > 1 and self.parts_again and not self.split else 1

    @property
    def parts(self) -> int:
        """Parts of the model on each stage."""
        return {"interleaved": self.chunks, "zb_v": 2}.get(self.schedule, 1)

    @property
    def ticks(self) -> int:
        """Ticks of the pipeline's schedule; in each, a stage sends a message both ways.

        In those of 1f1b and interleaved a stage may go forward and backward.
        """
        p, work = self.stage, self.microbatches * self.parts
        if self.schedule in ("1f1b", "interleaved"):
            return work + p * self.parts + p - 2
        kinds = 2 if self.schedule == "gpipe" else 3
        return kinds * work + (2 * p - 2 if self.schedule == "gpipe" else p - 1)

    @property
    def delay(self) -> float:
        """Time of the blocks in a step, over that without waiting in the pipeline.

        With n microbatches, p stages and v chunks it is 1 + (p - 1) / (n v) for gpipe, 1f1b and
        interleaved. For the zero-bubble schedules it is that of equal times of forward, of the
        gradients of inputs and of those of weights: 1 + (p - 1) / 3n for zb_h1 and 1 + (p - 1) / 6n
        for zb_v. See `lmjax.parallel.schedules.schedule`.
        """
        parts = {"interleaved": self.chunks, "zb_h1": 3, "zb_v": 6}.get(self.schedule, 1)
        return 1 + (self.stage - 1) / (self.microbatches * parts)

    @property
    def bubble(self) -> float:
        """Share of the blocks' time in which a stage waits."""
        return 1 - 1 / self.delay

    @property
    def live(self) -> float:
        """Microbatches whose activations the fullest stage holds at once.

        A chunk's count as 1 / chunks. See `lmjax.parallel.schedules.schedule`.
        """
        p, n = self.stage, self.microbatches
        if p == 1:
            return 1.0
        if self.schedule == "gpipe":
            return float(n)
        if self.schedule == "1f1b":
            return float(min(n, 2 * p - 1))
        if self.schedule == "interleaved":
            return min(n * self.chunks, p * self.chunks + p - 1) / self.chunks
        return float(min(n, p))

    def __str__(self) -> str:
        axes = " ".join(f"{axis}={size}" for axis, size in self.sizes.items() if size > 1)
        return axes or "one chip"


def resolve_sizes(given: Mapping[str, int], chips: int) -> tuple[dict[str, int], bool]:
    """Sizes of the mesh's axes on a number of chips, and whether `data` was multiplied to use all.

    Args:
      given: sizes as settings of a mesh have them: one may be -1, for the rest.
      chips: of the cluster.

    Raises:
      UserError: the mesh needs more chips than there are, or a number that does not divide theirs.
    """
    known = math.prod(size for size in given.values() if size != -1)
    named = " ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size != 1)
    if known > chips:
        raise UserError(
            f"{named}: the mesh needs {known:,} chips, and the topology has {chips:,}; give a"
            " larger topology, or smaller axes (mesh.fsdp=-1 takes what the others leave)"
        )
    if chips % known:
        raise UserError(
            f"{named or 'the mesh'}: {known:,} chips do not divide the topology's {chips:,}; of"
            " each axis give a size that does"
        )
    rest = [axis for axis, size in given.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"{named}: only one axis may be -1 (the rest of the chips)")
    sizes = dict(given)
    if rest:
        return sizes | {rest[0]: chips // known}, False
    return sizes | {"data": sizes["data"] * (chips // known)}, known < chips


def microbatches_of(batch: int, shards: int, rows: int) -> tuple[int, int]:
    """Rows at once on each shard, at most so many, and the number of microbatches.

    Raises:
      UserError: the rows of the batch do not divide among the shards.
    """
    if batch % shards:
        raise UserError(
            f"a batch of {batch:,} rows does not divide among mesh.data x mesh.fsdp x mesh.expert ="
            f" {shards:,} shards; more mesh.tensor, mesh.stage or mesh.context make fewer of them"
        )
    own = batch // shards
    rows = max(size for size in range(1, min(rows, own) + 1) if own % size == 0)
    return rows, own // rows
