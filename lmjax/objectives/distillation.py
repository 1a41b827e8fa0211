"""Distillation: a student learns what a teacher predicts, beside what its objective teaches it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.batch import Batch
from lmjax.models.last_attention import AttendedHeads, last_heads
from lmjax.models.layer_states import layer_states
from lmjax.models.transformer import Transformer, TransformerConfig
from lmjax.objectives.attention_relations import check_relations, sum_relations
from lmjax.objectives.divergences import Divergence, ForwardKL
from lmjax.objectives.example import Example
from lmjax.objectives.extended import ExtendedObjective
from lmjax.objectives.mixed import Mixed
from lmjax.objectives.objective import Objective, TextObjective, head_key
from lmjax.objectives.prediction import Sums

TEACHER = "teacher"  # name of the frozen model
POSITIONS = 128  # about how many places of each row have their logits in memory at once


@config
class TeacherLoss:
    """The part of a loss that compares a student's predictions with a teacher's."""

    divergence: Divergence = ForwardKL()  # of the student's predictions from the teacher's
    # logits of both are divided by it, and the divergence is multiplied by its square, which keeps
    # the size of its gradient (Hinton et al. 2015, arXiv:1503.02531, section 2)
    temperature: float = 1.0
    weight: float = 0.5  # share of the divergence in the loss; that of the objective has the rest
    # weight of the mean squared distance between hidden states behind each of the student's layers
    # and those behind the teacher's at the same share of its depth (TinyBERT, Jiao et al. 2019,
    # arXiv:1909.10351, equation 8), which is added; 0: none
    hidden: float = 0.0
    # weight of KL(teacher || student) of the last layer's attention, and of the relations of its
    # values, which are added (MiniLM, Wang et al. 2020, arXiv:2002.10957); 0: none
    attention: float = 0.0
    # heads that the queries, keys and values of all heads are cut into again for that (MiniLMv2,
    # arXiv:2012.15828); none: they stay as they are, as many in both models
    relation_heads: int | None = None

    def validate(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: must be above 0")
        if not 0 < self.weight <= 1:
            raise UserError(
                f"weight={self.weight}: must be above 0 and at most 1, where nothing but the"
                " teacher is learnt"
            )
        for name in ("hidden", "attention"):
            if (number := getattr(self, name)) < 0:
                raise UserError(f"{name}={number}: must be 0 or more")
        if self.relation_heads is not None and (self.relation_heads < 1 or not self.attention):
            raise UserError(
                f"relation_heads={self.relation_heads}: must be 1 or more, and is for attention,"
                f" whose weight is attention={self.attention}"
            )


@config
class Distilled(ExtendedObjective):
    """An objective whose targets a teacher predicts too: (1 - weight) x its loss + weight x that.

    The frozen model "teacher" reads the same inputs, without dropout. Both are compared at the
    objective's targets, by their weights.
    """

    teacher_loss: TeacherLoss = TeacherLoss()  # terms of the comparison

    def check(self, model: TransformerConfig) -> None:
        """Raises UserError for an objective that does not predict words in one forward pass."""
        if not is_compared(self.objective):
            raise UserError(
                f"distillation: {type(self.objective).__name__} does not predict words of one batch"
                " by the model's head, which is what a teacher can be compared in; take CausalLM,"
                " ChatLM, BlankInfilling, MaskedLM or another of text"
            )
        super().check(model)

    def check_pair(self, student: TransformerConfig, teacher: TransformerConfig) -> None:
        """Raises UserError for models whose layers are to be compared and cannot be."""
        how = self.teacher_loss
        for name in ("attention", "hidden"):
            if not getattr(how, name):
                continue
            where = f"distillation.{name}={getattr(how, name)}"
            for model in (student, teacher):
                if getattr(model, "two_streams", False) or model.group > 1:
                    raise UserError(f"{where}: layers of two streams or kinds are not compared")
            if name == "attention":
                check_relations(student, teacher, how.relation_heads, where)
            else:
                self._check_states(student, teacher, where)

    def _check_states(
        self, student: TransformerConfig, teacher: TransformerConfig, where: str
    ) -> None:
        """Raises UserError for hidden states that cannot be compared."""
        if teacher.num_layers < student.num_layers:
            raise UserError(
                f"{where}: the teacher has {teacher.num_layers} layers, fewer than the student's"
                f" {student.num_layers}"
            )
        found = {head.name: head.outputs for head in student.heads if not head.of_texts}
        if student.hidden != teacher.hidden and found.get(TEACHER) != teacher.hidden:
            raise UserError(
                f"{where}: states of the teacher have {teacher.hidden} numbers, those of the"
                f" student {student.hidden}: give it a map that is learnt, as in model.heads="
                f"'(TokenHead(name=\"{TEACHER}\", outputs={teacher.hidden}),)'"
            )
        if TEACHER in found and student.embedding_size is not None:
            raise UserError(f"{where}: a map reads states of model.embedding_size; set it to none")

    def loss(
        self, model: Transformer, example: Example, key: PRNGKeyArray | None, frozen: Any = None
    ) -> Sums:
        """The weighted sums; `extra` has the mean divergence as "teacher_divergence".

        Raises:
          UserError: there is no teacher.
        """
        if TEACHER not in (frozen or {}):
            raise UserError(f"Distilled reads the frozen model {TEACHER!r}, and there is none")
        teacher, how = frozen[TEACHER], self.teacher_loss
        layers = range(1, model.config.num_layers + 1) if how.hidden else ()
        hidden, states, heads = self._run(model, example.inputs, layers, key)
        sums = self.objective.loss_of_hidden(model, hidden, example, head_key(key))
        theirs = [n * teacher.config.num_layers // model.config.num_layers for n in layers]
        given, taught, shown = self._run(teacher, example.inputs, theirs)
        with jax.named_scope("teacher"):
            given = jax.lax.stop_gradient(given)
            divergence = sum_divergence(
                how, (teacher, given), (model, hidden), example.targets.weights
            )
        loss = (1 - how.weight) * sums.loss + how.weight * how.temperature**2 * divergence
        extra = {"cross_entropy": sums.loss, **sums.extra, "teacher_divergence": divergence}
        if how.hidden:
            distance = sum_distance(model, states, taught, example)
            loss, extra = loss + how.hidden * distance, extra | {"hidden_distance": distance}
        if how.attention:
            pairs = (*shown, teacher.config.attention), (*heads, model.config.attention)
            more = how.relation_heads, example.targets.weights, model.layout
            with jax.named_scope("attention_relations"):
                attention, values = sum_relations(*pairs, *more)
            loss = loss + how.attention * (attention + values)
            extra |= {"attention_divergence": attention, "value_divergence": values}
        return Sums(loss, sums.weight, extra)

    def _run(
        self,
        model: Transformer,
        batch: Batch,
        layers: Sequence[int],
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq inner"], list[jax.Array], list[AttendedHeads]]:
        """Hidden states, those of some layers, and, where attention is compared, the last heads."""
        note = last_heads(model) if self.teacher_loss.attention else contextlib.nullcontext([])
        with note as heads:
            return *layer_states(model, batch, layers, key), heads


def is_compared(objective: Objective) -> bool:
    """Returns whether an objective predicts words at `TokenTargets`, from one forward pass."""
    if isinstance(objective, Mixed):
        return all(map(is_compared, objective.objectives))
    words = isinstance(objective, TextObjective) and objective.predicts_words
    return words and objective.slots is None and type(objective).loss is Objective.loss


def sum_divergence(
    how: TeacherLoss,
    teacher: tuple[Transformer, Float[Array, "batch seq width"]],
    student: tuple[Transformer, Float[Array, "batch seq inner"]],
    weights: Float[Array, "batch seq"],
) -> Float[Array, ""]:
    """Sum of weight times divergence over all places, in nats.

    The logits of a part of each row are in memory at once, and are computed again in backward.

    Args:
      how: terms of the comparison.
      teacher: the model and its hidden states.
      student: likewise; gradients go to both of them.
      weights: of the places.
    """

    def log_probabilities(model: Transformer, hidden: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(model.logits(hidden) / how.temperature, axis=-1)

    @jax.checkpoint
    def part(given: jax.Array, hidden: jax.Array, weights: jax.Array) -> jax.Array:
        found = how.divergence(
            jax.lax.stop_gradient(log_probabilities(teacher[0], given)),
            log_probabilities(student[0], hidden),
        )
        return jnp.sum(found * weights)

    arrays = teacher[1], student[1], weights
    count = _parts(weights)
    if count == 1:
        return part(*arrays)
    stacked = jax.tree.map(lambda a: _divided(a, count), arrays)
    total, _ = jax.lax.scan(
        lambda total, one: (total + part(*one), None), jnp.zeros((), jnp.float32), stacked
    )
    return total


def sum_distance(
    model: Transformer,
    states: Sequence[Float[Array, "batch seq embed"]],
    taught: Sequence[Float[Array, "batch seq wide"]],
    example: Example,
) -> Float[Array, ""]:
    """Sum of the targets' weights times the mean squared distance of states, over all layers.

    Args:
      model: the student; its head "teacher", if there is one, maps its states to the teacher's.
      states: of the student.
      taught: of the teacher.
      example: with the targets.
    """
    is_mapped = any(head.name == TEACHER for head in model.config.heads)
    total = jnp.zeros((), jnp.float32)
    for own, other in zip(states, taught, strict=True):
        if is_mapped:
            own = model.outputs(TEACHER, own, example.inputs)
        gap = own.astype(jnp.float32) - jax.lax.stop_gradient(other).astype(jnp.float32)
        total += jnp.sum(jnp.mean(jnp.square(gap), axis=2) * example.targets.weights)
    return total / len(states)


def _parts(weights: Float[Array, "batch seq"]) -> int:
    """Equal parts that rows are cut into; rows that lie on several devices stay whole there."""
    length = weights.shape[1]
    if jax.typeof(weights).sharding.spec[1] is not None:
        return 1
    return next(n for n in range(-(-length // POSITIONS), length + 1) if length % n == 0)


def _divided(a: Float[Array, "batch seq *rest"], count: int) -> jax.Array:
    """Parts of rows along a first axis: [count, batch, seq / count, *rest]."""
    batch, _, *rest = jax.typeof(a).sharding.spec
    length = a.shape[1] // count
    spec = PartitionSpec(batch, None, None, *rest)
    shape = a.shape[0], count, length, *a.shape[2:]
    return jnp.moveaxis(jax.lax.reshape(a, shape, out_sharding=spec), 1, 0)
