"""The tensor files of a model folder, read and written one tensor at a time."""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import UserError
from lmjax.files import replacing
from lmjax.interop import torch_files

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"
FILES = ((FILE, INDEX), (TORCH_FILE, TORCH_INDEX))
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Of weights in few bits; see `lmjax.interop.packed_formats`.
INTEGERS = {
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
}
LARGEST_FILE = 5_000_000_000  # bytes, as transformers has it
PIECE = 1 << 26  # bytes that are brought into another order or precision at a time
Report = Callable[[int, int], None]  # is told how many bytes are done, and of how many


def report_nothing(done: int, total: int) -> None:
    """For those who do not want to know."""


class Stored(NamedTuple):
    """A tensor in a file."""

    file: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class TensorFiles:
    """The tensors of a folder by name, whether they lie in one file or in several.

    Of several kinds the first that is there is read, as in transformers: one safetensors file,
    several with an index, one file of PyTorch's, several with an index. Those of PyTorch go
    through its weights-only loader, so that nothing is ever unpickled. Tensors are memory-mapped
    one by one.
    """

    def __init__(self, folder: Path, files: tuple[tuple[str, str], ...] = FILES):
        """Looks at what is in the files of `folder`.

        Args:
          folder: where they are.
          files: names of one file with all tensors, and of the index of several, for each kind.

        Raises:
          UserError: there are none, one is damaged or missing, or lacks what the index says; two
            hold a tensor of one name that is not the same; a PyTorch file, and torch is not
            installed.
        """
        self.folder, self._kinds = folder, files
        self._stored: dict[str, Stored] = {}
        names, listed, index = self._files()
        for name in names:
            path = folder / name
            if not path.is_file():
                raise UserError(f"{folder / index} names the file {name}, which is not there")
            for title, stored in (_safetensors if path.suffix == ".safetensors" else _torch)(path):
                if title in self._stored and not self._same(stored, title):
                    raise UserError(f"{self.where(title)} is also in {name}, and is not the same")
                self._stored[title] = stored
        for title, name in listed.items():
            if title not in self._stored:  # in another file than it says, it is found all the same
                raise UserError(f"{folder / name} has no tensor {title}, but {index} says it has")

    def _files(self) -> tuple[list[str], dict[str, str], str]:
        """Names of the files, which tensor lies where as far as an index says it, and its name."""
        for file, index in self._kinds:
            if (self.folder / file).is_file():  # the index of an earlier save may lie beside it
                return [file], {}, ""
            if (self.folder / index).is_file():
                listed = self._read_index(self.folder / index)
                return sorted(set(listed.values())), listed, index
        names = ", ".join(name for kind in self._kinds for name in kind)
        raise UserError(f"{self.folder} holds no weights: none of {names}")

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            listed = json.loads(path.read_text("utf-8"))["weight_map"]
            names = list(listed.values())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged: it has no weight_map") from None
        kind = Path(path.name.removesuffix(".index.json")).suffix
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != kind:
                raise UserError(f"{path} names {name!r}, which is no {kind} file of the folder")
        return listed

    def _same(self, stored: Stored, title: str) -> bool:
        """Returns whether a tensor is bit for bit the one of its name."""
        known = self._stored[title]
        alike = (known.dtype, known.shape) == (stored.dtype, stored.shape)
        return alike and known.read().tobytes() == stored.read().tobytes()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._stored)

    def where(self, name: str) -> str:
        """The file and the tensor's name, for messages."""
        return f"{self.folder / self._stored[name].file}: {name}"

    def shape(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and type, without reading it. UserError where it holds no floating point."""
        stored = self._floats(name)
        return jax.ShapeDtypeStruct(stored.shape, FLOATS[stored.dtype])

    def read(self, name: str) -> np.ndarray:
        """A tensor as it is in its file, of which it is a view: not to be written to.

        UserError where it holds no floating point.
        """
        return self._floats(name).read()

    def _floats(self, name: str) -> Stored:
        stored = self._stored[name]
        if stored.dtype not in FLOATS:
            raise UserError(
                f"{self.where(name)} holds {stored.dtype}, not one of {', '.join(FLOATS)}"
            )
        return stored


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a safetensors file, whose header the library checks."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    header.pop("__metadata__", None)
    for title, entry in header.items():
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin = 8 + length + entry["data_offsets"][0]
        kind = (FLOATS | INTEGERS).get(dtype)
        read = functools.partial(np.memmap, path, kind, "r", begin, shape)
        yield title, Stored(path.name, dtype, shape, read)


def _torch(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a PyTorch file."""
    for title, tensor in torch_files.load(path).items():
        read = functools.partial(torch_files.as_numpy, tensor)
        yield title, Stored(path.name, torch_files.dtype_name(tensor), tuple(tensor.shape), read)


def size_of(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes of a tensor."""
    return math.prod(shape.shape) * shape.dtype.itemsize


def write_tensors(
    folder: Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Iterable[np.ndarray],
    largest_file: int = LARGEST_FILE,
    report: Report = report_nothing,
) -> None:
    """Writes tensors as safetensors into a folder: model.safetensors, or several and an index.

    Files get their names when all are complete. Others that a model had there before are removed.

    Args:
      folder: exists.
      shapes: names, shapes and types (float32 or bfloat16 and the like) in order.
      tensors: the tensors in the same order and of any precision; each is let go before the next
        is asked for.
      largest_file: in bytes; a tensor that is larger has a file alone.
      report: is called after each tensor.
    """
    groups = _cut_into_files(shapes, largest_file)
    names = [FILE]
    if len(groups) > 1:
        names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    total, done = sum(map(size_of, shapes.values())), 0
    partial = {folder / name: folder / f".{name}.partial" for name in names}
    tensors = iter(tensors)
    try:
        for path, group in zip(partial.values(), groups, strict=True):
            with path.open("wb") as file:
                file.write(_header(group))
                for shape in group.values():
                    _write_tensor(file, next(tensors), shape)
                    done += size_of(shape)
                    report(done, total)
        for path, unfinished in partial.items():
            unfinished.replace(path)
    finally:
        for unfinished in partial.values():
            unfinished.unlink(missing_ok=True)
    for path in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if path not in partial:
            path.unlink(missing_ok=True)
    if len(groups) > 1:
        files_by_name = {title: name for name, group in zip(names, groups) for title in group}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files_by_name})


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, whole or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _cut_into_files(
    shapes: Mapping[str, jax.ShapeDtypeStruct], largest: int
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """The tensors of each file, in order."""
    groups: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    room = largest
    for name, shape in shapes.items():
        if groups[-1] and size_of(shape) > room:
            groups.append({})
            room = largest
        groups[-1][name] = shape
        room -= size_of(shape)
    return groups


def _header(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> bytes:
    """Header of a safetensors file."""
    titles = {dtype: title for title, dtype in (FLOATS | INTEGERS).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + size_of(shape)
        header[name] = {
            "dtype": titles[shape.dtype],
            "shape": list(shape.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _write_tensor(file: Any, tensor: np.ndarray, shape: jax.ShapeDtypeStruct) -> None:
    """Writes a tensor some rows at a time, so that no whole copy of it is made."""
    if tensor.shape != shape.shape:
        raise ValueError(f"a tensor is {tensor.shape}, not {shape.shape} as announced")
    rows = max(1, PIECE * len(tensor) // max(1, size_of(shape)))
    for first in range(0, len(tensor), rows):
        piece = np.ascontiguousarray(tensor[first : first + rows], shape.dtype)
        file.write(piece.view(np.uint8).data)  # as bytes: bfloat16 is no type of Python's
