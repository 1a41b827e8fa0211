"""Memory of a training step on a chip, by formulas.

Parameters, gradients and the optimizer's numbers are float32: 16 bytes a parameter with AdamW, as
in mixed precision with 16-bit weights (2 + 2 + 4 + 4 + 4; Rajbhandari et al. 2020, section 3.1).
Counted is what is there at once near the end of backward, when most is. Not counted are the
program itself, inputs, padding of buffers to tiles, and small arrays.
"""

from __future__ import annotations

import dataclasses

from lmjax.scaling.division import Division
from lmjax.scaling.workload import FLOAT32, Workload

LOGITS = 2**26  # bytes of a chunk of logits (pallas_kernels.cross_entropy.chunked)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest chip, by what they hold.

    Attributes:
      parameters: in float32, cut over fsdp, tensor and stages.
      gradients: of the trained ones; twice where microbatches add to them.
      optimizer: its state.
      average: moving average of the parameters.
      gathered: weights made whole over fsdp: two layers' with ZeRO-3, all with 1 and 2, and the
        gradients of these.
      activations: what layers keep for backward, of all microbatches that are in flight.
      working: arrays of the layer that backward is in.
      vocabulary: token table and head as they are used, their gradients, a chunk of logits.
    """

    parameters: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    working: float
    vocabulary: float

    @property
    def parts(self) -> dict[str, float]:
        """The bytes by name."""
        return dataclasses.asdict(self)

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


def plan_memory(workload: Workload, division: Division) -> MemoryPlan:
    """Memory of a training step on the fullest chip.

    Args:
      workload: the model and its batch.
      division: how they are divided over chips.
    """
    own = FLOAT32 * workload.on_chip(division)
    trained = own * workload.trained
    whole = FLOAT32 * workload.on_chip(division, gathered=True) * workload.trained
    several = division.microbatches > 1
    if division.zero == 3 or division.fsdp == 1:
        gradients = trained * (2 if several else 1)
    elif division.zero == 2:
        gradients = whole + (trained if several else 0)
    else:
        gradients = whole * (2 if several else 1)
    tokens = division.rows * workload.length / division.context
    kept = workload.token_layers(division)
    kept *= workload.kept_bytes(division.remat, division.tensor)
    working = tokens * workload.kept_bytes("none", division.tensor)
    return MemoryPlan(
        parameters=own,
        gradients=gradients,
        optimizer=trained * workload.optimizer_share,
        average=own if workload.average else 0.0,
        gathered=_gathered(workload, division),
        activations=kept * division.live,
        working=working + 3 * FLOAT32 * tokens * workload.model.hidden,
        vocabulary=_vocabulary(workload, division),
    )


def _gathered(workload: Workload, division: Division) -> float:
    """Bytes of weights as they are multiplied with, and of a layer's gradients."""
    layer = workload.on_chip(division, gathered=True, part="layer")
    if division.zero < 3 and division.fsdp > 1:
        whole = workload.on_chip(division, gathered=True)
        return FLOAT32 * whole + 2 * workload.itemsize * layer
    return 3 * workload.itemsize * layer


def _vocabulary(workload: Workload, division: Division) -> float:
    """Bytes of the table and the head in use: each whole, cut over tensor alone."""
    table = workload.vocabulary / division.tensor
    copies = workload.itemsize + FLOAT32
    if division.fsdp > 1:
        copies += FLOAT32  # gathered, or the gradient before it is scattered
    rows = workload.model.padded_vocab / division.tensor
    tokens = division.rows * workload.length / division.context
    return table * copies + min(LOGITS, FLOAT32 * rows * tokens) * 2
