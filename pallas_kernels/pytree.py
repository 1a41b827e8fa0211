"""Frozen dataclasses as pytrees whose arrays may be any objects while jax rebuilds them."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax

Class = TypeVar("Class", bound=type)


def pytree(cls: Class) -> Class:
    """Registers a dataclass: fields with the metadata `static` are part of its structure.

    Unlike `jax.tree_util.register_dataclass` it does not go through `__init__`, which may check
    what it is given.
    """
    fields = dataclasses.fields(cls)
    static = [field.name for field in fields if field.metadata.get("static")]
    arrays = [field.name for field in fields if field.name not in static]

    def flatten(instance):
        children = [(jax.tree_util.GetAttrKey(name), getattr(instance, name)) for name in arrays]
        return children, tuple(getattr(instance, name) for name in static)

    def unflatten(values, children):
        instance = object.__new__(cls)
        for name, value in (*zip(static, values), *zip(arrays, children)):
            object.__setattr__(instance, name, value)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls
