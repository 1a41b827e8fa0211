"""Mixtures of experts from dense models (Komatsuzaki et al. 2023, arXiv:2212.05055)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import PRNGKeyArray

from lmjax.config import UserError, replace
from lmjax.models.parameters import draw_parameters
from lmjax.models.transformer import TransformerConfig
from lmjax.parallel import Layout

EXPERTS = "experts"


def dense_model(config: TransformerConfig) -> TransformerConfig:
    """The model whose feed-forward layers are like one expert of this mixture.

    Raises:
      UserError: the mixture has a shared expert, which nothing of a dense model becomes, or
        sparse layers between dense ones.
    """
    if config.alternate_feed_forward is not None:
        raise UserError(
            "alternate_feed_forward: a model begins with a dense one where all of its layers become"
            " mixtures of experts; set it to none"
        )
    if config.feed_forward.shared is not None:
        raise UserError(
            "feed_forward.shared: the experts of a model that begins with a dense one are copies of"
            " its feed-forward layers, and a shared expert would count twice; set it to none"
        )
    return replace(config, feed_forward=config.feed_forward.dense)


def upcycled(params: dict, config: TransformerConfig, layout: Layout, key: PRNGKeyArray) -> dict:
    """Parameters of a mixture, each of whose experts is a copy of the dense layer.

    Routers are drawn from `key`. Where the weights of a token's experts add up to 1 and nothing is
    dropped, the mixture gives what the dense model gives. A mesh must be set.

    Args:
      params: of `dense_model(config)`, a nested dictionary; not given up.
      config: of the mixture.
      layout: how the parameters are cut over the mesh.
      key: of the routers.
    """
    given = traverse_util.flatten_dict(params)

    @jax.jit
    def make(given: dict) -> dict:
        made = {}
        # Of what is drawn, the compiler makes only what is returned.
        for path, drawn in traverse_util.flatten_dict(draw_parameters(config, layout, key)).items():
            dense = tuple(name for name in path if name != EXPERTS)
            if dense not in given:
                made[path] = drawn
            elif EXPERTS in path:
                copies = jnp.broadcast_to(given[dense][:, None], drawn.shape)
                made[path] = jax.reshard(copies, jax.typeof(drawn).sharding.spec)
        return made

    made = make(given)
    copied = {tuple(name for name in path if name != EXPERTS) for path in made}
    kept = {path: leaf for path, leaf in given.items() if path not in copied}
    return traverse_util.unflatten_dict(kept | made)
