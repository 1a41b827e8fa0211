"""Classes of transformers' with one head on labels: their tensors and their part of config.json."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from lmjax.config import UserError, replace
from lmjax.models.label_heads import HeadConfig, SpanHeadConfig, TextHeadConfig, TokenHeadConfig
from lmjax.models.names import Matrix, Name, Settings, dense

HEAD = "heads.label"  # of the parameters of a head, before it gets the name that a config gives it


@dataclasses.dataclass(frozen=True)
class HeadClass:
    """A kind of class that many families have, such as BertForTokenClassification.

    Attributes:
      ending: of the class's name, behind the family's.
      head: its head, but for names, labels and dropout.
      names: tensors of the head, as of one named "label".
      dropout: keys of config.json that give the head's dropout, the first that is there counting,
        and the rate where none is; None: the class drops nothing.
      prefix: what the names of all other tensors begin with instead of the family's prefix; None:
        with that one.
    """

    ending: str
    head: HeadConfig
    names: tuple[Name, ...]
    dropout: tuple[tuple[str, ...], float] | None = None
    prefix: str | None = None

    def read(self, settings: Settings) -> HeadConfig:
        """The head that a config.json, completed with the family's defaults, describes."""
        changes: dict[str, Any] = {}
        if self.dropout is not None:
            keys, usual = self.dropout
            given = (settings[key] for key in keys if settings.get(key) is not None)
            changes["dropout"] = float(next(given, usual))
        if not isinstance(self.head, SpanHeadConfig):
            count, names = read_labels(settings)
            changes |= {"outputs": count, "labels": names}
        if isinstance(self.head, TextHeadConfig):
            changes["problem"] = settings.get("problem_type")
        try:
            return replace(self.head, **changes)
        except (TypeError, ValueError) as error:
            raise UserError(f"problem_type or dropout of a head: {error}") from None

    def write(self, head: HeadConfig) -> dict[str, Any]:
        """The part of config.json that describes a head."""
        settings: dict[str, Any] = {}
        if not isinstance(head, SpanHeadConfig):
            labels = head.labels or usual_labels(head.outputs)
            settings["id2label"] = {str(number): label for number, label in enumerate(labels)}
            settings["label2id"] = {label: number for number, label in enumerate(labels)}
        if isinstance(head, TextHeadConfig) and head.problem is not None:
            settings["problem_type"] = head.problem
        if self.dropout is not None:
            settings[self.dropout[0][0]] = head.dropout
        return settings

    def fits(self, head: HeadConfig) -> bool:
        """Returns whether the class has such a head."""
        if type(head) is not type(self.head):
            return False
        free = {"name": head.name, "outputs": head.outputs, "dropout": head.dropout}
        free |= {key: getattr(head, key) for key in ("labels", "problem") if hasattr(head, key)}
        return replace(self.head, **free) == head

    def tensors(self, name: str) -> tuple[Name, ...]:
        """The lines of the head's tensors, for a head of this name."""
        ours = [tuple(path.replace(HEAD, f"heads.{name}") for path in n.ours) for n in self.names]
        return tuple(dataclasses.replace(n, ours=paths) for n, paths in zip(self.names, ours))


def usual_labels(count: int) -> tuple[str, ...]:
    """The labels that transformers gives to classes without names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def read_labels(settings: Settings) -> tuple[int, tuple[str, ...]]:
    """Number of the labels of a config.json, and their names; () for those without."""
    given = settings.get("id2label")
    if given is None:
        return settings.get("num_labels") or 2, ()
    try:
        labels = tuple(given[str(number)] for number in range(len(given)))
        if not labels or not all(isinstance(label, str) for label in labels):
            raise TypeError
    except (TypeError, KeyError):
        raise UserError(
            f"id2label={json.dumps(given)}: should have a text for each of 0, 1, ..."
        ) from None
    return len(labels), () if labels == usual_labels(len(labels)) else labels


def linear(theirs: str, ours: str = "outputs") -> tuple[Name, Name]:
    """A dense layer of the head."""
    return dense(theirs, f"{HEAD}.{ours}", transform=Matrix())


TEXTS, TOKENS = "ForSequenceClassification", "ForTokenClassification"
SPANS = "ForQuestionAnswering"
DROPOUT = ("classifier_dropout", "hidden_dropout"), 0.1
# The last token of a causal model, whose layer has no bias.
SCORE = HeadClass(TEXTS, TextHeadConfig(bias=False), linear("score"))
ANSWERS = HeadClass(SPANS, SpanHeadConfig(), linear("qa_outputs"))
GPT_TOKENS = HeadClass(TOKENS, TokenHeadConfig(), linear("classifier"), DROPOUT)
GPT_HEADS = (SCORE, GPT_TOKENS, ANSWERS)
LLAMA_TOKENS = HeadClass(TOKENS, TokenHeadConfig(), linear("score"), DROPOUT)
# For question answering the model has another name than in the family's other classes.
LLAMA_HEADS = (SCORE, LLAMA_TOKENS, dataclasses.replace(ANSWERS, prefix="transformer."))
BERT_DROPOUT = ("classifier_dropout", "hidden_dropout_prob"), 0.1
BERT_HEADS = (
    HeadClass(
        TEXTS,
        TextHeadConfig(token="first", pooler=True),
        (*linear("bert.pooler.dense", "pooler"), *linear("classifier")),
        BERT_DROPOUT,
    ),
    HeadClass(TOKENS, TokenHeadConfig(), linear("classifier"), BERT_DROPOUT),
    ANSWERS,
)
T5_DROPOUT = ("classifier_dropout",), 0.0
T5_HEADS = (
    # Of the decoder, which reads the same text as the encoder, its end left out.
    HeadClass(
        TEXTS,
        TextHeadConfig(token="last", pooler=True),
        (
            *linear("classification_head.dense", "pooler"),
            *linear("classification_head.out_proj"),
        ),
        T5_DROPOUT,
        prefix="transformer.",
    ),
    ANSWERS,
)
T5_ENCODER_HEADS = (
    HeadClass(TOKENS, TokenHeadConfig(), linear("classifier"), T5_DROPOUT, prefix="transformer."),
)
