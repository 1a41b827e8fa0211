"""Block sizes of the TPU kernels: the largest that the vector memory holds."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.chips import KINDS, MIB, TpuChip

LANES = 128
LARGEST_TOKENS, LARGEST_ROWS = 1024, 2048  # larger ones save nothing in the schedules
STRIP = 256  # rows of the head whose logits are made and used up at a time going backward
FORWARD_STRIP = 2 * STRIP  # going forward, where no accumulators are loaded and stored
SPARE = 1 / 8  # of the vector memory, for what the compiler keeps there
SPILLED = 4 * MIB  # bytes of registers that do not suffice, in the kernels of all chips


class LogitTile(NamedTuple):
    """Numbers of tokens and of rows of the head whose logits are made in one grid step."""

    tokens: int
    rows: int


class LogitBlocks(NamedTuple):
    """Tiles of the kernels.

    Attributes:
        forward: of the sums over the vocabulary.
        fused: of the backward pass that makes both gradients at once; None where its accumulators
            do not fit or it would wait for memory.
        d_hidden: of the backward pass for hidden alone.
        d_head: of the backward pass for the head alone.
        cores: that share the work.
        vmem: bytes that a kernel may take.
    """

    forward: LogitTile
    fused: LogitTile | None
    d_hidden: LogitTile
    d_head: LogitTile
    cores: int
    vmem: int


def blocks(kind: str, tokens: int, rows: int, embed: int, itemsize: int) -> LogitBlocks | None:
    """Tiles for a chip and arrays, all multiples of 128; None if not even the smallest fit."""
    chip = KINDS.get(kind)
    if chip is None:
        return None
    vmem = int(chip.vmem * (1 - SPARE))
    room = vmem - SPILLED
    ends = LogitTile(_even(tokens, LARGEST_TOKENS), _even(rows, LARGEST_ROWS))
    # Larger parts of the tokens save little going backward, and compile long.
    backward_ends = LogitTile(_even(tokens, min(LARGEST_TOKENS, 4 * chip.side)), ends.rows)

    def largest(
        tile_bytes, tokens_first: bool, ends: LogitTile = backward_ends
    ) -> LogitTile | None:
        fitting = [tile for tile in _tiles(*ends) if tile_bytes(tile) + _logits(tile) <= room]

        def area(tile: LogitTile) -> tuple[int, int]:
            return tile.tokens * tile.rows, tile.tokens if tokens_first else tile.rows

        return max(fitting, key=area, default=None)

    # LogitBlocks of arrays are held twice: one is computed with while the next one arrives.
    forward = largest(lambda t: 2 * embed * itemsize * (t.tokens + t.rows), True, ends)
    d_hidden = largest(
        lambda t: embed * (t.tokens * (4 * itemsize + 4) + t.rows * 2 * itemsize), True
    )
    d_head = largest(
        lambda t: embed * (t.rows * (4 * itemsize + 4) + t.tokens * 2 * itemsize), False
    )
    if forward is None or d_hidden is None or d_head is None:
        return None
    fused = largest(
        lambda t: embed * (t.rows * (4 * itemsize + 4) + t.tokens * (2 * itemsize + 12)), False
    )
    if fused is not None and not _worthwhile(fused, chip, ends.rows, itemsize):
        fused = None
    return LogitBlocks(forward, fused, d_hidden, d_head, chip.cores, vmem)


def round_up(size: int, multiple: int = LANES) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def _even(size: int, largest: int) -> int:
    """Size of a block when as few as possible of at most `largest` cover all."""
    even = -(-size // -(-size // largest))
    return round_up(even, LANES if even <= LANES else STRIP)


def _tiles(tokens: int, rows: int) -> list[LogitTile]:
    def sizes(end):
        return sorted({end} | {LANES * 2**n for n in range(5) if LANES * 2**n < end})

    return [LogitTile(t, r) for t in sizes(tokens) for r in sizes(rows)]


def _logits(tile: LogitTile) -> int:
    """Bytes of the logits of a strip and of their gradients, and of rows of numbers of tokens."""
    return tile.tokens * (10 * min(tile.rows, FORWARD_STRIP) + 1024) + MIB // 2


def _worthwhile(tile: LogitTile, chip: TpuChip, rows: int, itemsize: int) -> bool:
    """Returns whether three products for a pair outlast the traffic of the gradient of hidden.

    Each block of rows reads and writes it in float32 and reads hidden; making the logits a second
    time costs a third more than the three products.
    """
    if tile.rows == rows:
        return True  # read and written once
    traffic = (8 + itemsize) * chip.ridge / (6 * tile.rows)
    return traffic < 4 / 3
