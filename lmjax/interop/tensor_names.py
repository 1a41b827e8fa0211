"""Names of a model folder's tensors, matched with parameters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from lmjax.config import UserError, replace
from lmjax.interop.tensor_files import TensorFiles
from lmjax.models import TransformerConfig
from lmjax.models.family import ModelFamily
from lmjax.models.gguf_layout import GGUFLayout
from lmjax.models.names import Name

Shapes = dict[str, jax.ShapeDtypeStruct]  # by dotted path
Index = tuple[int, ...]  # of a tensor in the stacks of its parameters: none, layer, and expert


def entries_of(
    family: ModelFamily | GGUFLayout, config: TransformerConfig, paths: dict
) -> Iterator[tuple[Name, Index]]:
    """The lines of the map that this config's parameters are on, one for each layer and expert."""
    if left := paths.keys() - {path for name in family.names for path in name.ours}:
        raise ValueError(f"the map of {family.name} has no line for {', '.join(left)}")
    for name in family.names:
        if not set(name.ours) <= paths.keys() or not (name.when is None or name.when(config)):
            continue
        stacked = ("{layer" in name.theirs) + ("{expert}" in name.theirs)
        for index in itertools.product(*map(range, paths[name.ours[0]].shape[:stacked])):
            yield name, index


def theirs(name: Name, index: Index, config: TransformerConfig) -> str:
    """A tensor's name in the file."""
    layer, expert = (*index, 0, 0)[:2]
    return name.theirs.format(
        layer=layer, layer_from_1=layer + 1, expert=expert, end=config.num_layers + 1
    )


def titles_of(family: ModelFamily, title: str) -> list[str]:
    """A tensor's name, and the others under which public files have it."""
    older = [title.replace(new, old) for new, old in family.older if new in title]
    titles = [title, *older]
    return titles + [title.removeprefix(family.prefix) for title in titles]


def find_tensors(
    family: ModelFamily, config: TransformerConfig, paths: Shapes, files: TensorFiles
) -> list[tuple[Name, Index, str]]:
    """Finds every parameter in the files and checks everything, before any tensor is read.

    Returns:
      Line of the map, layer and expert, and name in the files.
    """
    left = set(files.names)
    found = []
    for name, index in entries_of(family, config, paths):
        titles = titles_of(family, theirs(name, index, config))
        title = next((title for title in titles if title in left), None)
        if title is None:
            raise UserError(f"{files.folder}: the tensor {titles[0]} is missing")
        left.remove(title)
        parts = [paths[path].shape[len(index) :] for path in name.ours]
        wanted = name.transform.shape(parts, config)
        if files.shape(title).shape != wanted:
            raise UserError(
                f"{files.where(title)} is {list(files.shape(title).shape)};"
                f" by config.json it should be {list(wanted)}"
            )
        found.append((name, index, title))
    if config.tied_head:
        left -= set(titles_of(family, family.tied[0]))  # `with_heads_of` has seen that it is equal
    if left := left - ignored(family, left):
        raise UserError(
            f"{files.where(min(left))} has no place in the {family.model_type} of config.json"
            + (f" (nor have {len(left) - 1} more)" if len(left) > 1 else "")
        )
    return found


def ignored(family: ModelFamily, titles: Iterable[str]) -> set[str]:
    """Those tensors without a parameter that change nothing: buffers, and heads of other tasks.

    Such heads stand beside the model, under names that nothing of it begins with.
    """
    known = [title for line in family.names for title in titles_of(family, line.theirs)]
    first = {re.sub(r"\{\w+\}", r"\\d+", title.partition(".")[0]) for title in known}
    own, buffers = re.compile("|".join(first)), re.compile("|".join(family.buffers) or "(?!)")
    return {
        title
        for title in titles
        if buffers.fullmatch(title) or not own.fullmatch(title.partition(".")[0])
    }


def with_heads_of(
    family: ModelFamily, config: TransformerConfig, files: TensorFiles
) -> TransformerConfig:
    """The config with the heads that the files hold, and tied as they are there."""

    def first(name: str) -> str | None:
        return next((title for title in titles_of(family, name) if title in files.names), None)

    head, table = map(first, family.tied)
    named = [path for line in family.names for path in line.ours]
    if head and table and config.tied_head:
        same = np.array_equal(files.read(head), files.read(table))
        if not same and "head.table" not in named:
            raise UserError(
                f"{files.where(head)} differs from {table}, which the {family.model_type} of"
                " config.json has for both"
            )
        config = replace(config, tied_head=same)
    if not head and family.tied_without_head:
        config = replace(config, tied_head=True)
    parts = ("head_bias", "head_transform.") if config.tied_head else ("head", "head_")
    of_words = [line for line in family.names if line.ours[0].startswith(parts)]
    if of_words and not any(first(line.theirs) for line in of_words):
        config = replace(config, word_head=False)
    of_rows = [line for line in family.names if line.ours[0].startswith("classifier.classes")]
    if not any(first(line.theirs) for line in of_rows):
        config = replace(config, classifier=None)
    return config
