"""Models as StableHLO programs, which jax alone runs, on CPUs, GPUs and TPUs (`jax.export`).

    prefill = jax.export.deserialize(bytearray(Path("model/prefill.jax").read_bytes())).call
    logits, cache = prefill(weights, cache, inputs)

Weights, cache and inputs are dictionaries of arrays by name; `manifest.json` has their shapes.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmjax.config import UserError, replace
from lmjax.interop.families import ranked
from lmjax.interop.huggingface import by_path, nest, whole
from lmjax.interop.tensor_files import (
    LARGEST_FILE,
    Report,
    report_nothing,
    write_json,
    write_tensors,
)
from lmjax.launch import is_first
from lmjax.models import (
    Batch,
    Cache,
    EncoderDecoderConfig,
    Transformer,
    TransformerConfig,
    abstract,
    make_cache,
    merge_adapters,
)
from lmjax.models.batch import last_tokens
from lmjax.parallel import Layout, Mesh, generation_layout

PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST, ENDING = "manifest.json", ".jax"
# jax promises that newer ones read a program for half a year, and older ones for three weeks.
READABLE = datetime.timedelta(days=182)
SIZES = {
    "batch": "rows",
    "new": "columns of tokens, of which some on either side may be padding",
    "room": "most tokens of a row of the cache: more than the columns of a prompt",
    "source": "columns of what the encoder reads",
}
ENCODER = "encoder_"  # before the names of inputs that the encoder reads
Shapes = dict[str, jax.ShapeDtypeStruct]
Arrays = dict[str, jax.Array]


def write(
    folder: Path,
    config: TransformerConfig,
    params: dict,
    report: Report = report_nothing,
    largest_file: int = LARGEST_FILE,
    prefix: bool = False,
) -> list[str]:
    """Writes programs, weights and manifest of a model into an empty folder.

    A model that continues texts has the programs `prefill`, which reads prompts, and `step`, which
    adds a token to each row; any other has `read`.

    Args:
      folder: is there.
      config: of the model; adapters are merged.
      params: float32, as `huggingface.read` or `initialize` gives them; a mesh must be set.
      report: is told the bytes of weights that are written, and of how many.
      largest_file: of the weights, in bytes.
      prefix: prompts are read from both sides, as `ranks` says (`Batch`): an input of `prefill`.

    Returns:
      Sentences for the user.

    Raises:
      UserError: `jax.export` lacks a package.
    """
    params, config = merge_adapters(params, config)
    leaves = by_path(params)
    entries = {
        name: (path, index)
        for path, leaf in leaves.items()
        for name, index in _names(path, leaf.shape)
    }
    shapes = {
        name: jax.ShapeDtypeStruct(leaves[path].shape[len(index) :], _dtype(config, path))
        for name, (path, index) in entries.items()
    }
    # Plain operations alone: kernels are for one kind of device, and lengths are not known.
    attention = replace(config.attention, implementation="reference")
    plain = replace(config, attention=attention, unroll=0)
    with jax.set_mesh(mesh_of_one()):
        programs = Exporter(plain, generation_layout(), shapes, prefix).programs()
    tensors = (
        whole(leaves[path], index, shapes[name].dtype.name)
        for name, (path, index) in entries.items()
    )
    if not is_first():
        for _ in tensors:  # the first process needs the parts that lie here
            pass
        return []
    for name, program in programs.items():
        (folder / f"{name}{ENDING}").write_bytes(serialized(program))
    write_tensors(folder, shapes, tensors, largest_file, report)
    until = (datetime.date.today() + READABLE).isoformat()
    write_json(folder / MANIFEST, manifest(programs, until))
    return [f"jax promises to read the programs until {until}; the weights are safetensors"]


def mesh_of_one() -> jax.sharding.Mesh:
    """A mesh of one CPU, whose axes are not explicit.

    With explicit ones each number has a constraint of its sharding, sizes too: `jax.export` writes
    programs of unknown sizes so, and cannot call them.
    """
    mesh = Mesh(fsdp=1).build(jax.devices("cpu")[:1])
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _names(path: str, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Names of a parameter in the file, one for each layer of a stack, and where it is there."""
    before, blocks, rest = path.rpartition("blocks.")
    if not blocks:
        return [(path, ())]
    return [(f"{before}blocks.{layer}.{rest}", (layer,)) for layer in range(shape[0])]


def _dtype(config: TransformerConfig, path: str) -> str:
    """The dtype of a weight: that of computation, where the model only casts it."""
    exact = path.endswith(".router.weight")  # of experts, which computes in float32
    only_cast = path == "head.table" or (path.endswith(".weight") and not exact)
    return config.dtype if only_cast else "float32"


def serialized(program: Any) -> bytes:
    """A program as bytes; UserError where jax lacks a package for it."""
    try:
        return bytes(program.serialize())
    except ImportError:
        raise UserError(
            "jax.export needs the package flatbuffers: pip install 'lmjax[stablehlo]'"
        ) from None


def manifest(programs: dict[str, Any], until: str) -> dict[str, Any]:
    """Facts about programs that who runs them needs.

    Args:
      programs: by name.
      until: the day until which jax promises to read them.
    """
    of_packages = {name: importlib.metadata.version(name) for name in ("lmjax", "jax", "jaxlib")}
    first = next(iter(programs.values()))
    described = {name: _described(program) for name, program in programs.items()}
    known = {size for one in described.values() for size in _sizes(one)}
    return {
        "versions": of_packages,
        "calling_convention": first.calling_convention_version,
        "readable_until": until,
        "platforms": list(first.platforms),
        "weights": "model.safetensors, or the files of model.safetensors.index.json",
        "sizes": {name: text for name, text in SIZES.items() if name in known},
        "programs": {name: {"file": f"{name}{ENDING}"} | one for name, one in described.items()},
    }


def _described(program: Any) -> dict[str, Any]:
    """Names, shapes and dtypes of inputs, in the order of the program, and of outputs."""

    def of(tree: Any, leaves: Any) -> Any:
        facts = [{"shape": list(map(_size, a.shape)), "dtype": a.dtype.name} for a in leaves]
        return jax.tree.unflatten(tree, facts)

    (weights, *cache, inputs), _ = of(program.in_tree, program.in_avals)
    del weights  # which the safetensors describe
    found = {"inputs": ["weights", *("cache" for _ in cache), "inputs"]}
    return found | {
        **({"cache": cache[0]} if cache else {}),
        "texts": inputs,
        "outputs": of(program.out_tree, program.out_avals),
    }


def _size(size: Any) -> int | str:
    """A size as JSON has it: a number, or the name of one that each call has its own of."""
    return size if isinstance(size, int) else str(size)


def _sizes(tree: Any) -> set[str]:
    """The names of sizes in a description."""
    return {size for size in jax.tree.leaves(tree) if size in SIZES}


@dataclasses.dataclass(frozen=True)
class Exporter:
    """Exports the programs of a model. The mesh of one CPU must be set.

    Attributes:
      config: of the model, as it is computed.
      layout: of that mesh.
      weights: shapes by name.
      prefix: see `write`.
    """

    config: TransformerConfig
    layout: Layout
    weights: Shapes
    prefix: bool = False

    def programs(self) -> dict[str, Any]:
        """The programs by name, as `jax.export.Exported`."""
        if self.config.attention.causal and self.config.word_head:
            return {"prefill": self._prefill(), "step": self._step()}
        return {"read": self._read()}

    def _export(self, function: Callable, *shapes: Shapes) -> Any:
        return jax.export.export(jax.jit(function), platforms=PLATFORMS)(self.weights, *shapes)

    def _read(self) -> Any:
        """The program of whole texts: what all heads give, or else hidden states."""
        sizes = jax.export.symbolic_shape("batch, new")

        def read(weights: Arrays, inputs: Arrays) -> Arrays:
            model, batch = self._model(weights), batch_of(inputs)
            hidden, _ = model(batch)
            return self._outputs(model, hidden, batch)

        return self._export(read, self._inputs(*sizes))

    def _prefill(self) -> Any:
        """The program of prompts, whose cache is empty."""
        names = ["new", "source"] if self._looks else ["new"]
        batch, room, new, *source = jax.export.symbolic_shape(
            ", ".join(["batch", "room", *names]), constraints=["room >= new + 1"]
        )

        def prefill(weights: Arrays, cache: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
            rows, room = cache["keys.0"].shape[1:3]
            return self._run(weights, batch_of(inputs), self._empty(rows, room))

        inputs = self._inputs(batch, new)
        for size in source:
            read = self._inputs(batch, size)
            inputs |= {f"{ENCODER}{name}": shape for name, shape in read.items()}
        return self._export(prefill, self._cache(batch, room), inputs)

    def _step(self) -> Any:
        """The program of one more token of each row that goes on."""
        text = ", source" if self._looks else ""
        batch, room, *source = jax.export.symbolic_shape(f"batch, room{text}")
        shapes = self._cache(batch, room, *source)

        def step(weights: Arrays, cache: Arrays, inputs: Arrays) -> tuple[jax.Array, Arrays]:
            rows, room = cache["keys.0"].shape[1:3]
            like = jax.eval_shape(lambda: self._empty(rows, room, *source))
            known = jax.tree.unflatten(
                jax.tree.structure(like), [cache[name] for name in _arrays(like)]
            )
            known = dataclasses.replace(known, empty=False)
            going = inputs["going"].astype(jnp.int32)
            return self._run(weights, known.newest.next().batch(inputs["tokens"], going), known)

        row = (batch,)
        going = jax.ShapeDtypeStruct(row, jnp.bool_)
        return self._export(
            step, shapes, {"tokens": jax.ShapeDtypeStruct(row, jnp.int32), "going": going}
        )

    @property
    def _looks(self) -> bool:
        return isinstance(self.config, EncoderDecoderConfig)

    def _run(self, weights: Arrays, batch: Batch, cache: Cache) -> tuple[jax.Array, Arrays]:
        """Logits after each row's last token, and the cache that holds the batch."""
        model = self._model(weights)
        hidden, cache = model(batch, cache)
        hidden = last_tokens(batch.segments, hidden)[:, None]
        return model.logits(hidden)[:, 0, : self.config.vocab_size], _arrays(cache)

    def _model(self, weights: Arrays) -> Transformer:
        """The model with these weights."""
        found: dict[str, list[jax.Array]] = {}
        stacked = set()
        for name, (path, index) in self._origins().items():
            found.setdefault(path, []).append(weights[name])
            stacked |= {path} if index else set()
        stacks = {
            path: jnp.stack(layers) if path in stacked else layers[0]
            for path, layers in found.items()
        }
        return nnx.merge(abstract(self.config, self.layout)[0], nest(stacks))

    def _origins(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Path and layer of each weight, those of a stack in order."""
        paths = by_path(abstract(self.config, self.layout)[1])
        return {
            name: (path, index)
            for path, leaf in paths.items()
            for name, index in _names(path, leaf.shape)
        }

    def _outputs(self, model: Transformer, hidden: jax.Array, batch: Batch) -> Arrays:
        """Outputs of the heads of a model, by name."""
        found, config = {}, self.config
        if config.word_head:
            found["logits"] = model.logits(hidden)[..., : config.vocab_size]
        if config.classifier is not None:
            found["classes"] = model.classes(hidden)
        for head in config.heads:
            rows = model.outputs(head.name, hidden, batch)
            found[head.name] = rows[:, 0] if head.of_texts else rows
        return found if config.word_head or config.heads else found | {"hidden": hidden}

    def _empty(self, rows: Any, room: Any, *source: Any) -> Cache:
        return make_cache(self.config, self.layout, rows, room, *source, rings=False)

    def _cache(self, rows: Any, room: Any, *source: Any) -> Shapes:
        """The arrays of a cache by name."""
        arrays = _arrays(jax.eval_shape(lambda: self._empty(rows, room, *source)))
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}

    def _inputs(self, batch: Any, columns: Any) -> Shapes:
        """The fields of `Batch` that texts are read from."""
        names = ["tokens", "positions", "segments"]
        if ranked(self.config):
            names += ["ranks", "block_positions"]
        elif self.prefix:
            names.append("ranks")
        if self.config.token_types is not None:
            names.append("token_types")
        return {name: jax.ShapeDtypeStruct((batch, columns), jnp.int32) for name in names}


def batch_of(inputs: Arrays) -> Batch:
    """The batch of inputs by name."""
    own = {name: a for name, a in inputs.items() if not name.startswith(ENCODER)}
    read = {name.removeprefix(ENCODER): a for name, a in inputs.items() if name not in own}
    return Batch(**own, encoder=Batch(**read) if read else None)


def _arrays(cache: Cache) -> Any:
    """The arrays of a cache by name, such as keys.0, in the order of its leaves."""
    return by_path(cache)
