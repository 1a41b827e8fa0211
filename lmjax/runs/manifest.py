"""The manifest of a checkpoint: what is in it, so that damage shows before anything is read.

`manifest.json` lies in the checkpoint's folder and is the last file written there. It holds the
name, shape and dtype of every array, the size and CRC-32 of every other file, and its own.
"""

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from lmjax.files import reason, write_atomically

NAME = "manifest.json"
PIECE = 1 << 22  # bytes that are read at a time
SHOWN = 10  # differences that are listed one by one
Arrays = Mapping[str, jax.Array | jax.ShapeDtypeStruct]
Files = dict[str, list[int | str]]  # [bytes, CRC-32] of each file by its name in the folder


class Damaged(Exception):
    """A checkpoint is not what was written; the message says how."""


def describe(folder: Path) -> Files:
    """Sizes and hashes of everything that lies in `folder`. OSError: something cannot be read."""
    with ThreadPoolExecutor() as pool:  # reading and hashing let other threads run
        names = sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
        )
        return dict(zip(names, pool.map(lambda name: _size_and_hash(folder / name), names)))


def write(
    folder: Path, arrays: Arrays, extra: Mapping[str, Any], elsewhere: Files | None = None
) -> None:
    """Describes everything that lies in `folder` and writes the manifest there.

    Args:
      folder: the checkpoint, complete but for its manifest.
      arrays: what was saved, by name.
      extra: anything else that JSON can hold.
      elsewhere: files of the checkpoint that other machines have written.

    Raises:
      OSError, UserError: something cannot be read or written.
    """
    body = {
        "arrays": {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()},
        "extra": extra,
        "files": (elsewhere or {}) | describe(folder),
    }
    # The hash is of the text below, less itself, as `read` takes it apart.
    text = json.dumps(body, allow_nan=False)
    write_atomically(folder / NAME, f'{{"crc32": "{_hash(text.encode())}", "body": {text}}}\n')


def read(folder: Path) -> dict[str, Any]:
    """The manifest's body: `arrays`, `extra`, `files`; checks that no file is missing or cut.

    Raises:
      Damaged: something is missing or has another size.
    """
    try:
        whole = json.loads((folder / NAME).read_text("utf-8"))
        body = whole["body"]
        intact = whole["crc32"] == _hash(json.dumps(body).encode())
    except FileNotFoundError:
        raise Damaged(f"{NAME} is missing") from None
    except OSError as error:
        raise Damaged(f"{NAME} cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise Damaged(f"{NAME} is cut short or changed")
    for name, (size, _) in body["files"].items():
        found = _size(folder / name)
        if found is None:
            raise Damaged(f"{name} is missing")
        if found != size:
            raise Damaged(f"{name} has {found} bytes instead of {size}")
    return body


def verify(folder: Path) -> dict[str, Any]:
    """Like `read`, and reads every file to compare its hash.

    Raises:
      Damaged: something is missing or changed.
    """
    body = read(folder)
    with ThreadPoolExecutor() as pool:
        found = [(name, pool.submit(_size_and_hash, folder / name)) for name in body["files"]]
        for name, hashed in found:
            try:
                intact = hashed.result() == body["files"][name]
            except OSError as error:
                raise Damaged(f"{name} cannot be read: {reason(error)}") from None
            if not intact:
                raise Damaged(f"{name} has changed since it was written")
    return body


def differences(saved: Mapping[str, Any], wanted: Arrays) -> list[str]:
    """One line for each array that is in only one of the two or differs; at most about ten.

    Args:
      saved: `arrays` of a manifest.
      wanted: what the model has.
    """
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        in_checkpoint = _described(*saved[name]) if name in saved else "nothing"
        in_model = (
            _described(wanted[name].shape, wanted[name].dtype) if name in wanted else "nothing"
        )
        if in_checkpoint != in_model:
            lines.append(f"{name}: {in_checkpoint} in the checkpoint, {in_model} in the model")
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more"]
    return lines


def _described(shape, dtype) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _size(path: Path) -> int | None:
    """A file's bytes; None where there is no file that can be looked at."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def _size_and_hash(path: Path) -> list[int | str]:
    """A file's [bytes, CRC-32]; chance damage is what it must find, not an adversary."""
    size = code = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            size, code = size + len(piece), zlib.crc32(piece, code)
    return [size, f"{code:08x}"]


def _hash(content: bytes) -> str:
    return f"{zlib.crc32(content):08x}"
