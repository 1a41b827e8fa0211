"""Families of config.json files, and the configs of the models that they stand for."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any

from lmjax.config import UserError, replace, to_text
from lmjax.interop.packed_files import open_tensors
from lmjax.interop.settings import config_of, read_settings
from lmjax.interop.tensor_names import with_heads_of
from lmjax.models import BlockPositions, BlockRotary, Normal, TransformerConfig
from lmjax.models.family import ModelFamily, families
from lmjax.models.head_classes import HeadClass
from lmjax.models.infill import BlankFormat
from lmjax.models.label_heads import HeadConfig
from lmjax.models.stretches import pattern
from lmjax.remote import local_copy

# Ends of names of classes.
HEADS = re.compile(r"((With)?LMHeadModel|DoubleHeadsModel|(Encoder)?Model|For[A-Z]\w*)$")


def is_model_folder(folder: str | os.PathLike) -> bool:
    """Returns whether a config.json is there that is not of a run, whose name their `class`."""
    try:
        settings = json.loads((local_copy(folder, "folder") / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "class" not in settings


def read_config(folder: str | os.PathLike) -> tuple[ModelFamily, TransformerConfig]:
    """The family and the config of a folder's model; UserError as `huggingface.read`.

    Its heads are those that the weights hold, whatever config.json says of them: a folder without
    a head of words is an encoder, a head that differs from the token table is not tied. A class
    with a head on labels has this one alone, and its own names of tensors (`of_labels`).
    """
    folder = local_copy(folder, "folder")
    path, settings = folder / "config.json", read_settings(folder)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: it should hold an object")
    try:
        family = family_for(settings)
        config = config_of(family, settings)
        if kind := head_class_of(family, settings):
            head = kind.read(family.settings(settings))
            return of_labels(family, kind, head), replace(without_heads(config), heads=(head,))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    try:
        files = open_tensors(folder, settings)
    except UserError:  # what is wrong with the weights is said when they are read
        bare = base_class(family.architecture) in architectures(settings)
        return family, without_heads(config) if bare else config
    return family, with_heads_of(family, config, files)


def family_for(settings: dict[str, Any]) -> ModelFamily:
    """The family of a config.json; UserError where it is none of ours, or cannot be told."""
    kind, _ = kind_of(settings)
    kinds = ", ".join(dict.fromkeys(family.model_type for family in families()))
    if kind is None:
        named = ", ".join(architectures(settings))
        said = f" ({named})" if named else ""
        raise UserError(
            f"there is no model_type, and neither architectures{said} nor the other keys tell what"
            f' model it is: add "model_type", which is one of {kinds}'
        )
    found = [family for family in families() if family.model_type == kind]
    if not found:
        raise UserError(
            f"model_type={json.dumps(kind)} is not one of {kinds}; a family of your own is known"
            " once its module is imported (imports=...)"
        )
    named = architectures(settings)
    of_class = [f for f in found if f.architecture in named or head_class_of(f, settings)]
    found = of_class or found
    usual = next((family for family in found if family.key is None), found[0])
    return next((family for family in found if family.key in settings), usual)


def architectures(settings: dict[str, Any]) -> list[str]:
    """The names of classes that a config.json gives."""
    given = settings.get("architectures")
    return [str(name) for name in (given if isinstance(given, list) else [given]) if name]


def kind_of(settings: dict[str, Any]) -> tuple[Any, str]:
    """The model_type of a config.json, None where it cannot be told; and what tells it."""
    if settings.get("model_type"):
        return settings["model_type"], "model_type"
    if isinstance(settings.get("model"), str):  # PaLM has no public type
        return settings["model"], "model"
    if named := architectures(settings):
        stems = {HEADS.sub("", name).lower() for name in named}
        for family in families():
            if HEADS.sub("", family.architecture).lower() in stems:
                return family.model_type, "architectures"
        return None, ""
    for family in families():
        signs = family.signs
        if signs and signs <= settings.keys() and not family.unlike & settings.keys():
            return family.model_type, "keys"
    return None, ""


def assumption(folder: str | os.PathLike) -> str:
    """Assumptions about a folder whose config.json has no model_type, in words; empty: none."""
    kind, told = kind_of(read_settings(local_copy(folder, "folder")))
    if kind is None or told not in ("architectures", "keys"):
        return ""
    return (
        f"config.json has no model_type; by its {told} it was read as one of model_type={kind}:"
        ' if that is wrong, add "model_type" to it'
    )


def base_class(architecture: str) -> str:
    """The class of a model without heads, from the one with its usual heads."""
    if architecture.endswith("EncoderModel"):
        return architecture
    return HEADS.sub("", architecture) + "Model"


def head_class_of(family: ModelFamily, settings: dict[str, Any]) -> HeadClass | None:
    """The class with a head on labels that a config.json names."""
    stem, named = HEADS.sub("", family.architecture), architectures(settings)
    return next((kind for kind in family.heads if stem + kind.ending in named), None)


def of_labels(family: ModelFamily, kind: HeadClass, head: HeadConfig) -> ModelFamily:
    """The family as one class with a head on labels has it: its tensors, and the class's name."""
    names = []
    for line in family.names:
        if line.ours[0].startswith(("head.", "head_", "classifier.")):
            continue  # heads of other classes
        if kind.prefix is not None:
            theirs = kind.prefix + line.theirs.removeprefix(family.prefix)
            line = dataclasses.replace(line, theirs=theirs)
        names.append(line)
    return dataclasses.replace(
        family,
        architecture=HEADS.sub("", family.architecture) + kind.ending,
        names=(*names, *kind.tensors(head.name)),
        prefix=family.prefix if kind.prefix is None else kind.prefix,
    )


def with_labels(
    family: ModelFamily, config: TransformerConfig
) -> tuple[ModelFamily, dict[str, Any]]:
    """The family as `of_labels` for a config's head on labels, and what config.json says of it."""
    if len(config.heads) > 1:
        names = ", ".join(head.name for head in config.heads)
        raise UserError(
            f"transformers has models with one head on labels, this one has several ({names}):"
            " write it once for each, with replace(config, heads=(head,))"
        )
    (head,) = config.heads
    for kind in family.heads:
        if kind.fits(head):
            return of_labels(family, kind, head), kind.write(head)
    known = ", ".join(to_text(kind.head).replace("\n", " ") for kind in family.heads) or "none"
    raise UserError(
        f"transformers has no {family.model_type} with the head {head.name!r}"
        f" ({type(head).__name__.removesuffix('Config')}); it has these: {known}"
    )


def without_heads(config: TransformerConfig) -> TransformerConfig:
    """The model, of which hidden states are all that it gives."""
    return replace(config, word_head=False, classifier=None, heads=())


def family_of(config: TransformerConfig) -> tuple[ModelFamily, dict[str, Any]]:
    """The family that a config belongs to, and its config.json.

    Raises:
      UserError: none; says in what the nearest one differs. Or it has no class with the heads.
    """
    whole = replace(config, word_head=True, heads=())
    differences = {}
    for family in families():
        settings = family.write(whole)
        wanted = to_text(architecture_of(whole)).splitlines()
        try:
            found = replace(family.read(family.settings(settings)), word_head=True)
            again = to_text(architecture_of(found)).splitlines()
        except UserError:  # what this family cannot have
            continue
        if again == wanted:
            if config.heads:
                family, of_head = with_labels(family, config)
                settings |= of_head | {"architectures": [family.architecture]}
            kind = {"architectures": [family.architecture], "model_type": family.model_type}
            if not config.heads and not config.word_head:
                settings |= {"architectures": [base_class(family.architecture)]}
            return family, kind | settings
        differences[family.model_type] = [line for line in wanted if line not in again]
    nearest = min(differences, key=lambda kind: len(differences[kind]))
    raise UserError(
        f"transformers has no model like this one; nearest is {nearest}, which cannot have"
        f" {', '.join(differences[nearest][:5]) or 'what this one lacks'}"
    )


def ranked(config: TransformerConfig) -> bool:
    """Returns whether ranks say what tokens of a text see: those of models that fill blanks."""
    two = BlockPositions, BlockRotary
    if isinstance(config.positions, two) or isinstance(config.attention.positions, two):
        return True
    try:
        return isinstance(family_of(config)[0].infill, BlankFormat)
    except UserError:  # of no public family
        return False


def architecture_of(config: TransformerConfig) -> TransformerConfig:
    """The config without what changes no logits, only how a model is drawn, trained or computed.

    Adapters are left out too, and how weights are kept: they belong to no family.
    """
    attention = replace(
        config.attention,
        implementation=None,
        windows=pattern(config.windows),
        num_kv_heads=config.attention.kv_heads,
        dropout=0.0,
    )
    return replace(
        config,
        # Where there is no table of positions, how long a text may be changes no number.
        max_length=config.max_length if config.positions is not None else None,
        attention=attention,
        feed_forward=config.feed_forward.architecture,
        lora=None,
        quantization=None,
        dropout=0.0,
        top_dropout=None,
        embedding_noise=0.0,
        initializer=Normal(),
        dtype="float32",
        remat="none",
        unroll=1,
    )
