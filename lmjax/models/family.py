"""A model family: what is known of one kind of public models, in a value that its file registers.

    GPT2_FAMILY = ModelFamily(name="gpt2", model_type="gpt2", ...)
    register(GPT2_FAMILY)

Conversion, chat and blank filling go through `families()`; none of them names a family. A family
in a module of the user's own takes part as soon as that module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from lmjax.config import UserError
from lmjax.config.declare import module_of
from lmjax.models.gguf_layout import GGUFLayout
from lmjax.models.head_classes import HeadClass
from lmjax.models.infill import InfillFormat
from lmjax.models.names import Name, Settings
from lmjax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True)
class ChatStyle:
    """A chat format that public models of a family were trained with.

    Attributes:
      name: of the format, as in `chat=NAME` on a command line.
      template: fields of `lmjax.data.chat.templates.ChatTemplate`.
      tokens: special tokens that the tokenizers of just these models have, besides those of the
        template.
      when: the configs of these models; None: any.
      of: where models of the family were trained in many formats and nothing tells which, the
        models that have this one: it is then suggested, but not taken. Empty: it is taken.
    """

    name: str
    template: Mapping[str, Any]
    tokens: tuple[str, ...] = ()
    when: Callable[[TransformerConfig], bool] | None = None
    of: str = ""


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """Everything that a public folder of one kind of models means.

    Attributes:
      name: no other family has it.
      model_type: as config.json has it; several families may share one, see `key`.
      architecture: the class that transformers loads the folder with.
      names: the tensors.
      prefix: what public files put before most names, or leave out.
      tied: (head, table): names that may both be there when they are one tensor.
      buffers: regular expressions of names that a file may have beside the parameters.
      supported: the values of a key of config.json (dotted where nested) with which the model is
        computed as we do; an absent or null key is fine. None: every value.
      read: config.json, as `settings` completes it -> config.
      write: config -> config.json, less `model_type` and `architectures`; for a config that is not
        of this family, something that `read` makes another config of.
      older: (part of a name, what older files have in its place).
      key: what a config.json of this family has, and those of others of its model_type have not.
      signs: keys that tell the family where config.json has neither `model_type` nor
        `architectures`, as those of 2019; empty: none do.
      unlike: keys of other models that have the same signs.
      defaults: what transformers has for keys that a config.json lacks. Those of sizes are left
        out: it would be another model.
      aliases: other names of keys, which transformers reads as well, and before the usual ones.
      former: names of keys from before transformers had the family, behind the usual ones.
      tied_without_head: whether a file without a head has it tied, whatever config.json says.
      heads: the classes of transformers' for its models with a head on labels.
      chat: the formats of its chat models whose folders do not spell them out, the newest first.
      infill: how its models fill blanks; None: they continue texts.
      gguf: the architecture of llama.cpp's that computes its models; None: none does.
    """

    name: str
    model_type: str
    architecture: str
    names: tuple[Name, ...]
    prefix: str
    tied: tuple[str, str]
    buffers: tuple[str, ...]
    supported: Mapping[str, tuple[Any, ...] | None]
    read: Callable[[Settings], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    older: tuple[tuple[str, str], ...] = ()
    key: str | None = None
    signs: frozenset[str] = frozenset()
    unlike: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    former: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tied_without_head: bool = False
    heads: tuple[HeadClass, ...] = ()
    chat: tuple[ChatStyle, ...] = ()
    infill: InfillFormat | None = None
    gguf: GGUFLayout | None = None

    def settings(self, given: Settings) -> dict[str, Any]:
        """A config.json with its keys under their usual names, completed with the defaults."""
        aliased, former = (
            {name: given[other] for other, name in names.items() if given.get(other) is not None}
            for names in (self.aliases, self.former)
        )
        kept = {k: v for k, v in given.items() if k not in self.aliases and k not in self.former}
        return {**self.defaults, **former, **kept, **aliased}


_registered: dict[str, ModelFamily] = {}  # by name


def register(*added: ModelFamily) -> None:
    """Adds families to `families()`.

    A module that is imported twice, as a program is where a process imports its file again,
    registers its families twice; the second ones take the places of the first.

    Raises:
      UserError: another family has the name of one.
    """
    for family in added:
        other = _registered.get(family.name, family)
        if _origin(other) != _origin(family):
            raise UserError(
                f"there is a family {family.name!r} already, of model_type={other.model_type} in"
                f" {module_of(other.read)}; the one in {module_of(family.read)} needs another name"
            )
        _registered[family.name] = family


def families() -> tuple[ModelFamily, ...]:
    """Every registered family, in the order of registration.

    Of several families that a config belongs to, the first one counts. A family that is made of
    another one comes after it, because its file imports the other's: what is a LLaMA is written as
    a LLaMA.
    """
    _import_all()
    return tuple(_registered.values())


def _origin(family: ModelFamily) -> tuple[str, ...]:
    """Tells a family that is registered again from another one of its name."""
    read = family.read
    return family.model_type, family.architecture, module_of(read), read.__qualname__


@functools.cache
def _import_all() -> None:
    """Imports the modules beside this one, so that a new family there is found with no list."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
