"""Memory of a training step on a chip, by formulas.

Parameters, gradients and the optimizer's numbers are float32, unless settings say otherwise: 16
bytes a parameter with AdamW, as in mixed precision with 16-bit weights (2 + 2 + 4 + 4 + 4;
Rajbhandari et al. 2020, section 3.1).
Three moments of a step may need most: backward in the last layer, when all activations are kept;
the loss; and the end of backward, when the token table's gradient is whole. Not counted are the
program itself, padding of buffers to tiles, and what lies unused between buffers.
"""

from __future__ import annotations

import dataclasses

from lmjax.scaling.division import Division
from lmjax.scaling.workload import FLOAT32, Part, Workload

MESSAGES = 6  # arrays of a stage's output, of gradients, and of what comes and goes
LOGITS = 2**26  # bytes of a chunk of logits (pallas_kernels.cross_entropy.chunked)


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the fullest chip at the moment of a step that needs most, by what they hold.

    Attributes:
      parameters: as they are stored, cut over fsdp, tensor and stages.
      gradients: of the trained ones that are there; twice where microbatches add to them.
      optimizer: its state.
      average: moving average of the parameters.
      cast: weights of all layers in the compute dtype, which XLA makes once a step, also of those
        that are stored in it: an update begins with them in float32.
      gathered: weights made whole over fsdp: two layers' with ZeRO-3, all with 1 and 2; in the
        compute dtype.
      activations: what layers keep for backward; of a pipeline, what those of the part in work
        keep, and inputs of parts of all microbatches that are in flight. With a zero-bubble
        schedule, what all layers keep of all of these, for gradients of weights as well.
      working: arrays of the layer that backward is in.
      vocabulary: token table and head as they are used, their gradients, a chunk of logits.
      moment: of the step: "loss", "backward" or "table".
    """

    parameters: float
    gradients: float
    optimizer: float
    average: float
    cast: float
    gathered: float
    activations: float
    working: float
    vocabulary: float
    moment: str

    @property
    def parts(self) -> dict[str, float]:
        """The bytes by name."""
        found = dataclasses.asdict(self)
        del found["moment"]
        return found

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
    own, trained = FLOAT32 * workload.on_chip(division), workload.trained
    kept = _kept(workload, division)
    found, held = _gradients(workload, division)
    in_layers, _ = _gradients(workload, division, "layers")
    table, logits = _tables(workload, division)
    head = workload.itemsize * table
    # A tied table's gradient of the head waits, whole, for that of the tokens.
    tied = workload.model.tied_head and workload.model.word_head and division.fsdp > 1
    waiting = head * trained if tied else 0.0
    cut = division.shards > 1
    # Gathered before the loop over microbatches, it is there in all of them.
    once = division.microbatches > 1 and division.stage == 1
    always = {
        "parameters": workload.stored_bytes * workload.on_chip(division),
        "optimizer": own * trained * workload.optimizer_share,
        "average": own if workload.average else 0.0,
        "cast": _cast(workload, division),
    }
    moments = [
        MemoryPlan(
            **always,
            gradients=held + in_layers,
            gathered=_gathered(workload, division),
            activations=kept,
            working=_working(workload, division),
            vocabulary=(head if once else head / division.fsdp) + waiting,
            moment="backward",
        ),
        MemoryPlan(
            **always,
            gradients=held,
            gathered=_gathered(workload, division, layers=0),
            activations=kept,
            working=0.0,
            vocabulary=2 * head + logits,
            moment="loss",
        ),
        MemoryPlan(
            **always,
            gradients=held + found,
            gathered=_gathered(workload, division, layers=0),
            activations=0.0,
            working=0.0,
            vocabulary=FLOAT32 * table * trained * (2 if cut else 1),
            moment="table",
        ),
    ]
    return max(moments, key=lambda one: one.total)


def _kept(workload: Workload, division: Division) -> float:
    """Bytes of activations that are kept for backward."""
    remat, pieces = division.remat, workload.token_layers(division)
    if division.stage == 1 or not (division.parts_again or division.split):
        return pieces * workload.kept_bytes(remat, division) * division.live
    # Passes of parts keep what products give, and make again what follows from it.
    kept = pieces * workload.kept_bytes("dots" if remat == "none" else remat, division)
    tokens = division.rows * workload.length / division.context
    array = workload.itemsize * tokens * workload.model.hidden / division.streams
    if division.split:
        kept += pieces * workload.put_off_bytes(remat, division)
        return kept * division.live + MESSAGES * array
    return kept / division.parts + (division.parts * division.live + MESSAGES) * array


def _gradients(workload: Workload, division: Division, part: Part = "all") -> tuple[float, float]:
    """Bytes of the gradients of a microbatch, and of the sum of those before."""
    number = FLOAT32 * workload.trained
    own = number * workload.on_chip(division, part=part)
    whole = number * workload.on_chip(division, gathered=True, part=part)
    found = own if division.zero == 3 else whole
    if division.microbatches == 1:
        return found, 0.0
    return found, whole if division.zero == 1 else own


def _cast(workload: Workload, division: Division) -> float:
    """Bytes of the layers' weights in the compute dtype, where these are not whole anyway."""
    if workload.itemsize == FLOAT32 or (division.zero < 3 and division.fsdp > 1):
        return 0.0
    return workload.itemsize * workload.on_chip(division, part="layers")


def _gathered(workload: Workload, division: Division, layers: int = 2) -> float:
    """Bytes of weights that are whole over fsdp: of the layer in use and of the next one."""
    layer = workload.on_chip(division, gathered=True, part="layer")
    found = layers * workload.itemsize * layer
    if division.zero < 3 and division.fsdp > 1:
        found = workload.itemsize * workload.on_chip(division, gathered=True)
    return found


def _working(workload: Workload, division: Division) -> float:
    """Bytes of a layer's arrays: four of hidden units, three float32 ones of the stream.

    Of experts there are three of the stream for each row, and four of hidden units, or six where
    rows have no capacity: their products are kernels, whose operands are whole. Of a period of
    windows that is computed again as one, all that its other layers keep is there too.
    """
    tokens = division.rows * workload.length / division.context
    c, hidden, rows = workload.itemsize, workload.model.hidden, workload.expert_rows(division)
    sizes = [fed.size for fed, _ in workload.dense_layers]
    dense = 4 * max(sizes, default=0) / division.tensor
    sparse = rows * workload.model.feed_forward.size / division.tensor
    sparse *= 4 if rows == 0 or workload.experts.router.drops else 6
    stream = 3 * FLOAT32 * hidden  # whole: what sequences over tensor divide is gathered here
    found = tokens * (c * (dense + sparse) + 3 * c * rows * hidden + stream)
    if division.remat == "full":
        others = workload.period - workload.model.group
        found += tokens * others * workload.kept_bytes("none", division)
    return found


def _tables(workload: Workload, division: Division) -> tuple[float, float]:
    """Numbers of the token table or the head on a chip, and bytes of a chunk of logits."""
    rows = workload.model.padded_vocab / division.tensor
    tokens = division.rows * workload.length / division.context
    return workload.vocabulary / division.tensor, min(float(LOGITS), FLOAT32 * rows * tokens)
