"""Devices that a collective joins, as optimised HLO writes them, and the axes of the mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
ROWS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
NAMED = re.compile(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S+)? \{(.*?)\}")
PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


def axes_of(rest: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Axes of a mesh that a collective goes over.

    Args:
      rest: of the collective's line.
      sizes: of the mesh's axes, the last of which has neighbouring devices.
    """
    devices = math.prod(sizes.values())
    group = _first_group(rest, devices)
    coordinates = np.unravel_index(np.asarray(group), tuple(sizes.values()))
    return tuple(axis for axis, at in zip(sizes, coordinates) if len(set(at.tolist())) > 1)


def _first_group(rest: str, devices: int) -> list[int]:
    """Devices of the first of the groups, or the two of a permutation's first pair."""
    if match := IOTA.search(rest):
        number, size, shape, order = match.groups()
        ids = np.arange(math.prod(lengths := _numbers(shape))).reshape(lengths)
        ids = ids.transpose(_numbers(order)) if order else ids
        return ids.reshape(int(number), int(size))[0].tolist()
    if match := ROWS.search(rest) or PAIRS.search(rest):
        return _numbers(",".join(match.groups()))
    if match := NAMED.search(rest):
        lengths = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        joined = [list(lengths).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        ids = np.arange(devices).reshape(tuple(lengths.values()))
        last = np.moveaxis(ids, joined, range(-len(joined), 0))
        return last.reshape(-1, math.prod(ids.shape[axis] for axis in joined))[0].tolist()
    return list(range(devices))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
