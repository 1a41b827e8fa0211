"""Logits of whole rows, by programs that all models of one structure share."""

import functools

import jax
import numpy as np
from flax import nnx

from lmjax.models import abstract
from lmjax.parallel import training_layout


def logits_of_config(config, params, batch, key=None):
    """Of the real vocabulary in numpy; the rows are cut over the mesh that is set."""
    layout = training_layout()
    found = program(abstract(config, layout)[0], layout, params, batch, key)
    return np.asarray(found)[..., : config.vocab_size]


@functools.partial(jax.jit, static_argnums=(0, 1))
def program(graph, layout, params, batch, key=None):
    """Of the padded vocabulary; without a layout rows lie as they are given."""
    model = nnx.merge(graph, params)
    if layout is not None:
        batch = jax.tree.map(lambda a: layout.reshard(a, "batch", "seq"), batch)
    return model.logits(model(batch, key=key)[0])
