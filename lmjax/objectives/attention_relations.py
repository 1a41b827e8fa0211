"""Attention of a student beside a teacher's: the distributions of both, and how values relate.

MiniLM (Wang et al. 2020, arXiv:2002.10957, equations 2 to 4) compares the last layers: KL(teacher
|| student) of the attention of each query, softmax(q k^T / sqrt d), and of the value relation
softmax(v v^T / sqrt d), means over heads. MiniLMv2 (Wang et al. 2020, arXiv:2012.15828, section
3.1) cuts the vectors of all heads again into relation heads, as many for both models.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from lmjax.config import UserError
from lmjax.models.attention import AttentionConfig
from lmjax.models.last_attention import AttendedHeads
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.divergences import kl
from lmjax.parallel import Layout

HIDDEN = -1e30  # score of a key that a query does not see


def check_relations(
    student: TransformerConfig, teacher: TransformerConfig, relation_heads: int | None, where: str
) -> None:
    """Raises UserError for models whose attention cannot be compared.

    Args:
      student: the model that learns.
      teacher: the other one.
      relation_heads: see `TeacherLoss`.
      where: the setting that asks for it, for messages.
    """
    theirs, ours = teacher.attention, student.attention
    widths = [each.num_heads * each.head_dim for each in (theirs, ours)]
    if relation_heads is None:
        for name, model in (("teacher", theirs), ("student", ours)):
            if model.position_rule.biased or model.softcap is not None:
                kind = "a bias by distance" if model.position_rule.biased else "a softcap"
                raise UserError(
                    f"{where}: scores of the {name} have {kind}, which is not compared; compare"
                    " relations of its vectors instead, as in distillation.relation_heads="
                    f"{model.num_heads}"
                )
        if theirs.num_heads != ours.num_heads:
            raise UserError(
                f"{where}: the teacher has {theirs.num_heads} heads, the student {ours.num_heads}:"
                " cut the vectors of all heads into as many for both, as in"
                f" distillation.relation_heads={theirs.num_heads} (it must divide"
                f" {widths[0]} and {widths[1]})"
            )
    elif any(width % relation_heads for width in widths):
        raise UserError(
            f"distillation.relation_heads={relation_heads}: the heads of the teacher have"
            f" {widths[0]} numbers together, those of the student {widths[1]}; it must divide both"
        )


def sum_relations(
    teacher: tuple[AttendedHeads, AttentionConfig],
    student: tuple[AttendedHeads, AttentionConfig],
    relation_heads: int | None,
    weights: Float[Array, "batch seq"],
    layout: Layout,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over all places of weight times KL: of attention, and of value relations, in nats.

    One head after another, whose scores alone are in memory, and are computed again in backward.

    Args:
      teacher: heads of its last layer, and its config; no gradient goes to it.
      student: likewise.
      relation_heads: heads that the vectors are cut into again; None: they stay as they are.
      weights: of the places, each of which is a query.
      layout: of both models.
    """
    heads, length = student[0], weights.shape[1]
    mask = heads.mask.mapped(lambda a: a, lambda a: layout.reshard(a, "batch", None))
    seen = mask.dense(length, length)[:, 0]
    given = jax.lax.stop_gradient(_vectors(*teacher, relation_heads, layout))
    own = _vectors(*student, relation_heads, layout)

    @jax.checkpoint
    def one(given: tuple, own: tuple, seen: jax.Array, weights: jax.Array) -> tuple:
        found = []
        for (asking, asked), (asks, answers) in zip(_pairs(given), _pairs(own), strict=True):
            nats = kl(relation(asking, asked, seen), relation(asks, answers, seen))
            found.append(jnp.sum(nats * weights))
        return tuple(found)

    def add(total: tuple, pair: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, one(*pair, seen, weights)), None

    nothing = jnp.zeros((), jnp.float32)
    (attention, values), _ = jax.lax.scan(add, (nothing, nothing), (given, own))
    count = own[0].shape[0]
    return attention / count, values / count


def relation(
    queries: Float[Array, "batch query width"],
    keys: Float[Array, "batch key width"],
    seen: Bool[Array, "rows query key"],
) -> Float[Array, "batch query key"]:
    """Logarithm of the softmax over keys of the products, of vectors that are scaled already."""
    scores = jnp.einsum("bqw,bkw->bqk", queries, keys, precision="highest")
    return jax.nn.log_softmax(jnp.where(seen, scores, HIDDEN), axis=-1)


def _pairs(vectors: tuple) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """The vectors that are compared with each other: queries with keys, values with values."""
    query, keys, values, all_values = vectors
    return (query, keys), (values, all_values)


def _vectors(
    heads: AttendedHeads, config: AttentionConfig, relation_heads: int | None, layout: Layout
) -> tuple[Float[Array, "heads batch seq width"], ...]:
    """Scaled queries, keys, scaled values as queries, and values, by head.

    Rows of what is compared with all others may be divided over devices; the others are whole.
    """
    group = config.num_heads // config.kv_heads
    count = config.num_heads if relation_heads is None else relation_heads
    width = config.num_heads * config.head_dim // count

    def by_head(a: jax.Array, seq: str | None) -> jax.Array:
        a = layout.reshard(a.astype(jnp.float32), "batch", seq, None, None)
        a = jnp.repeat(a, config.num_heads // a.shape[2], axis=2) if group > 1 else a
        batch, rows, *_ = jax.typeof(a).sharding.spec
        spec = PartitionSpec(batch, rows, None, None)
        a = jax.lax.reshape(a, (*a.shape[:2], count, width), out_sharding=spec)
        return jnp.moveaxis(a, 2, 0)

    scale = config.scale if relation_heads is None and config.scale is not None else width**-0.5
    return (
        by_head(heads.query, "seq") * scale,
        by_head(heads.keys, None),
        by_head(heads.values, "seq") * width**-0.5,
        by_head(heads.values, None),
    )
