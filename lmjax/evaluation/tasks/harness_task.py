"""Tasks as YAML files of EleutherAI's lm-evaluation-harness describe them."""

from __future__ import annotations

import ast
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lmjax.config import UserError, config
from lmjax.evaluation.bleu import bleu_counts
from lmjax.evaluation.chrf import chrf_counts
from lmjax.evaluation.requests import (
    ContinuationRequest,
    Likelihood,
    ModelAnswer,
    ModelRequest,
    RollingRequest,
    Written,
    WrittenRequest,
)
from lmjax.evaluation.tasks.choices import ACCURACY, BY_BYTES, BY_CHARACTERS, LENGTHS
from lmjax.evaluation.tasks.records import Record
from lmjax.evaluation.tasks.rolling import RATES, check_words, rates
from lmjax.evaluation.tasks.task import EvaluationTask, Item, ItemScores, Measure
from lmjax.evaluation.tasks.written_texts import CORPUS, corpus_row

OutputType = Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until"]
EXACT = Measure("exact_match")
# Measures of each kind of request by the harness's names.
KNOWN: dict[str, dict[str, Measure]] = {
    "multiple_choice": {one.name: one for one in (ACCURACY, BY_CHARACTERS, BY_BYTES, EXACT)},
    "loglikelihood": {
        "acc": ACCURACY,
        "perplexity": Measure("perplexity", False, "perplexity"),
    },
    "loglikelihood_rolling": {one.name: one for one in RATES},
    "generate_until": {"exact_match": EXACT, "bleu": CORPUS["bleu"], "chrf": CORPUS["chrf"]},
}


@config
class AnswerFilter:
    """The part of a written answer that counts: one pipeline of `filter_list`."""

    name: str = ""  # in the measures' names; empty: there is one pipeline alone
    pattern: str | None = None  # regular expression whose match counts; none: the whole answer
    group_select: int = 0  # number of the match, from behind where negative
    fallback: str = "[invalid]"  # what counts where nothing matches
    strip: bool = False  # white space at both ends is left out
    case: Literal["lower", "upper"] | None = None  # letters are changed to this case

    def validate(self) -> None:
        """Raises UserError for a pattern that is none."""
        if self.pattern is not None:
            _compiled(self.pattern)

    def __call__(self, text: str) -> str:
        """The part of a text that counts."""
        if self.pattern is not None:
            text = self._match(text)
        if self.strip:
            text = text.strip()
        return getattr(text, self.case)() if self.case else text

    def _match(self, text: str) -> str:
        found = _compiled(self.pattern).findall(text)
        if not -len(found) <= self.group_select < len(found):
            return self.fallback
        match = found[self.group_select]
        if isinstance(match, tuple):
            match = next(filter(None, match), self.fallback)
        return match.strip()


@config
class HarnessTask(EvaluationTask):
    """A task of the harness without code of its own, over a file here.

    `harness_task(yaml=...)` fills the fields from a YAML file; they have its names. With
    `drawing=harness` examples are the harness's; else they are drawn once for all questions.
    """

    output_type: OutputType = "generate_until"  # what the model is asked for
    preamble: str = ""  # template of the text in front of everything (`description`)
    doc_to_text: str  # template of the question, or the name of a field
    doc_to_target: str  # template of the answer or of its number, or the name of a field
    # template of the list of choices, or the name of a field, or the choices themselves
    doc_to_choice: str | tuple[str, ...] | None = None
    target_delimiter: str = " "  # between a question and its answer
    fewshot_delimiter: str = "\n\n"  # between examples
    sampler: Literal["default", "first_n"] = "default"  # examples are drawn, or the first ones
    # one example more is drawn than is shown, as the harness does where a set has no test part
    spare_example: bool = False
    metrics: tuple[str, ...] = ("acc",)  # measures, by the harness's names
    until: tuple[str, ...] = ("\n\n",)  # a written answer ends before the first of them
    max_gen_toks: int = 256  # most tokens of a written answer
    filters: tuple[AnswerFilter, ...] = (AnswerFilter(),)  # what of a written answer counts
    regexes_to_ignore: tuple[str, ...] = ()  # removed before texts are compared
    ignore_case: bool = False  # texts are compared in lower case
    ignore_punctuation: bool = False  # they are compared without punctuation
    ignore_numbers: bool = False  # they are compared without digits

    def validate(self) -> None:
        """Raises UserError for measures that there are not, and patterns that are none."""
        super().validate()
        known = KNOWN[self.output_type]
        if not self.metrics or (unknown := [one for one in self.metrics if one not in known]):
            named = unknown[0] if self.metrics else "none"
            raise UserError(
                f"metrics: {named!r} is not known for output_type={self.output_type}; known: "
                f"{', '.join(known)}"
            )
        if not self.filters:
            raise UserError("filters: give one or more")
        for pattern in self.regexes_to_ignore:
            _compiled(pattern)
        if (self.doc_to_choice is None) == (self.output_type == "multiple_choice"):
            raise UserError(
                "doc_to_choice is for output_type=multiple_choice, which needs it; got "
                f"{self.output_type} and {self.doc_to_choice}"
            )
        if self.shots and self.output_type == "loglikelihood_rolling":
            raise UserError(f"{self.name}: shots={self.shots}: whole texts have no examples")

    @property
    def generates(self) -> bool:
        """Returns whether the model writes its answers."""
        return self.output_type == "generate_until"

    @property
    def draws(self) -> bool:
        """Returns whether examples are drawn."""
        return self.sampler == "default"

    @property
    def draws_one_more(self) -> bool:
        """Returns whether one example more is drawn than is shown."""
        return self.spare_example

    @property
    def separator(self) -> str:
        """Text between examples."""
        return self.fewshot_delimiter

    @property
    def delimiter(self) -> str:
        """Text between a question and its answer."""
        return self.target_delimiter

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Numbers of `metrics`; of several filters, one for each."""
        known = [KNOWN[self.output_type][name] for name in self.metrics]
        if not self.generates:
            return tuple(known)
        return tuple(
            measure._replace(name=_filtered(measure.name, one))
            for one in self.filters
            for measure in known
        )

    def read_item(self, record: Record) -> Item:
        """See `EvaluationTask.read_item`: the templates filled with the record's fields."""
        if self.output_type == "loglikelihood_rolling":
            text = str(self._value(record, "doc_to_target"))
            if "word_perplexity" in self.metrics:
                check_words(text, record.where, "leave it out of metrics")
            return Item(text, "", identity=record.where)
        details: dict[str, Any] = {"preamble": self._value(record, "preamble")}
        prompt, target = str(self._value(record, "doc_to_text")), self._target(record)
        if self.output_type != "multiple_choice":
            details["targets"] = wanted = tuple(map(str, _several(target)))
            return Item(prompt, wanted[0], identity=record.where, details=details)
        if prompt.isdigit():
            raise record.wrong("doc_to_text", prompt, "a text: several questions are not known")
        choices = self._choices(record)
        details["golds"] = golds = [_number(record, one, choices) for one in _several(target)]
        gold = golds[0]
        return Item(prompt, choices[gold], choices, gold, identity=record.where, details=details)

    def opening(self, item: Item) -> str:
        """See `EvaluationTask.opening`; the preamble may name fields of the item."""
        return item.details.get("preamble", "")

    def requests(self, item: Item, context: str) -> tuple[ModelRequest, ...]:
        """See `EvaluationTask.requests`."""
        if self.output_type == "loglikelihood_rolling":
            return (RollingRequest(item.prompt),)
        if self.output_type == "loglikelihood":
            return (ContinuationRequest(context, item.answer),)
        if self.generates:
            return (WrittenRequest(context, self.until, self.max_gen_toks),)
        delimiter = self.target_delimiter
        return tuple(ContinuationRequest(context, delimiter + choice) for choice in item.choices)

    def measure(self, item: Item, answers: Sequence[ModelAnswer]) -> ItemScores:
        """See `EvaluationTask.measure`."""
        if self.output_type == "multiple_choice":
            return {name: self._chosen(name, item, answers) for name in self.metrics}
        answer = answers[0]
        if isinstance(answer, Written):
            return {
                _filtered(name, one): self._written(name, one(answer.texts[0]), item)
                for one in self.filters
                for name in self.metrics
            }
        value = answer.log_probability
        if self.output_type == "loglikelihood":
            found = {"acc": float(answer.is_greedy), "perplexity": value}
            return {name: found[name] for name in self.metrics}
        return rates(answer, item.prompt, self.measures)

    def chance(self, item: Item) -> ItemScores:
        """See `EvaluationTask.chance`."""
        if self.output_type != "multiple_choice":
            return {}
        share = len(set(item.details["golds"])) / len(item.choices)
        return {m.name: share for m in self.measures if m in LENGTHS}

    def stop_rule(self) -> str:
        """See `EvaluationTask.stop_rule`."""
        if not self.generates:
            return ""
        ends = [*map(repr, self.until), f"the end token, or {self.max_gen_toks} tokens"]
        return ", ".join(ends)

    def _chosen(self, name: str, item: Item, answers: Sequence[Likelihood]) -> float:
        golds = item.details["golds"]
        if name == EXACT.name:
            return float(any(answers[gold].is_greedy for gold in golds))
        values = np.array([answer.log_probability for answer in answers])
        lengths = LENGTHS[KNOWN["multiple_choice"][name]](item.choices)
        return float(int(np.argmax(values / lengths)) in golds)

    def _written(self, name: str, text: str, item: Item) -> float | tuple[float, ...]:
        wanted = item.details["targets"]
        if name == "bleu":
            return corpus_row(bleu_counts([text], [wanted]))
        if name == "chrf":
            return corpus_row(chrf_counts([text], [wanted]))
        return float(self._compared(text) in map(self._compared, wanted))

    def _compared(self, text: str) -> str:
        """A text as it is compared."""
        for pattern in self.regexes_to_ignore:
            text = _compiled(pattern).sub("", text)
        text = text.lower() if self.ignore_case else text
        left_out = string.punctuation if self.ignore_punctuation else ""
        left_out += string.digits if self.ignore_numbers else ""
        return text.translate(str.maketrans("", "", left_out))

    def _value(self, record: Record, field: str) -> Any:
        """A field of the record that a setting names, or the setting as a template."""
        template = getattr(self, field)
        if template in record.values:
            return record.values[template]
        try:
            return _template(template).render(**record.values)
        except Exception as error:  # whatever the expressions of a template raise
            known = ", ".join(map(str, record.values))
            raise UserError(f"{record.where}: {field}: {error}; fields: {known}") from None

    def _target(self, record: Record) -> Any:
        """The answer or its number, or a list of them; figures of a template are a number."""
        value = self._value(record, "doc_to_target")
        if self.doc_to_target in record.values:
            return value
        if value.isdigit() and self.doc_to_choice is not None:
            return int(value)
        return _literal(value) if value[:1] == "[" and value[-1:] == "]" else value

    def _choices(self, record: Record) -> tuple[str, ...]:
        if isinstance(self.doc_to_choice, tuple):
            return self.doc_to_choice
        value = self._value(record, "doc_to_choice")
        value = _literal(value) if isinstance(value, str) else value
        if not isinstance(value, (list, tuple)) or not value:
            raise record.wrong("doc_to_choice", value, "a list of texts")
        return tuple(map(str, value))


def _number(record: Record, target: Any, choices: tuple[str, ...]) -> int:
    """Number of the right choice, which is given by number or by text."""
    if isinstance(target, str) and target in choices:
        return choices.index(target)
    if isinstance(target, int) and target < len(choices):
        return int(target)
    raise record.wrong("doc_to_target", target, f"one of {len(choices)} choices, or its number")


def _filtered(name: str, one: AnswerFilter) -> str:
    return f"{name}, {one.name}" if one.name else name


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _literal(text: str) -> Any:
    """A list that a template has written; what is none, as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


@functools.lru_cache(64)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression. UserError: it is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from None


@functools.lru_cache(64)
def _template(source: str) -> Any:
    """A template of the harness, in a sandbox. UserError: it is none."""
    jinja2, environment = _environment()
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{source[:60]!r} is no template: {error.message}") from None


@functools.cache
def _environment() -> tuple[Any, Any]:
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError("tasks of the harness need jinja2: pip install 'lmjax[chat]'") from None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )

    def regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
        return re.sub(pattern, replacement, text, count=count)

    filters: dict[str, Callable[..., str]] = {"regex_replace": regex_replace}
    environment.filters.update(filters)
    return jinja2, environment
