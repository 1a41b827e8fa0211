"""Reading of tasks from YAML files of EleutherAI's lm-evaluation-harness (0.4).

tasks='(harness_task(yaml="sciq.yaml", path="sciq-test.jsonl"),)'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmjax.config import UserError, preset
from lmjax.evaluation.tasks.harness_task import AnswerFilter, HarnessTask
from lmjax.evaluation.tasks.task import Drawing

# Fields that a run here has no use for: names, where the harness finds the data, its reports.
UNUSED = {
    *("task", "task_alias", "tag", "group", "dataset_path", "dataset_name", "dataset_kwargs"),
    *("training_split", "validation_split", "test_split", "fewshot_split", "metadata"),
    *("should_decontaminate", "doc_to_decontamination_query", "num_fewshot", "include", "repeats"),
    "unsafe_code",
}
TAKEN = {
    *("output_type", "description", "doc_to_text", "doc_to_target", "doc_to_choice"),
    *("target_delimiter", "fewshot_delimiter", "metric_list", "generation_kwargs", "filter_list"),
    "fewshot_config",
}
AGGREGATIONS = {
    "perplexity": ("perplexity",),
    "word_perplexity": ("weighted_perplexity",),
    "byte_perplexity": ("weighted_perplexity",),
    "bits_per_byte": ("bits_per_byte",),
    "bleu": ("bleu",),
    "chrf": ("chrf",),
}
COMPARED = ("ignore_case", "ignore_punctuation", "ignore_numbers")


@preset
def harness_task(
    yaml: str,
    path: str,
    shots: int | None = None,
    examples_path: str | None = None,
    limit: int | None = None,
    drawing: Drawing = "once",
) -> HarnessTask:
    """A task of the harness over a file here, which has the fields of its data set.

    Args:
      yaml: the task's file.
      path: see `EvaluationTask`; `datasets.load_dataset(...)["test"].to_json(path)` writes one.
      shots: number of examples; None: as the file says, or 0.
      examples_path, limit, drawing: see `EvaluationTask`.

    Raises:
      UserError: the file is no task, or needs code, or what is not known here.
    """
    values = read_yaml(Path(yaml))
    if unknown := values.keys() - UNUSED - TAKEN:
        known = ", ".join(sorted(TAKEN))
        raise UserError(f"{yaml}: {min(unknown)} is not known here; known: {known}")
    if not isinstance(values.get("task"), str):
        raise UserError(f"{yaml}: `task` names no task: a group is given as its tasks")
    if missing := {"doc_to_text", "doc_to_target"} - values.keys():
        raise UserError(f"{yaml}: {min(missing)} is missing")
    if values.get("repeats", 1) != 1:
        raise UserError(f"{yaml}: repeats: an item is asked once here")
    kind = values.get("output_type", "generate_until")
    try:
        return HarnessTask(
            title=values["task"],
            path=path,
            shots=int(values.get("num_fewshot") or 0) if shots is None else shots,
            examples_path=examples_path,
            limit=limit,
            drawing=drawing,
            output_type=kind,
            preamble=values.get("description") or "",
            doc_to_text=str(values["doc_to_text"]),
            doc_to_target=str(values["doc_to_target"]),
            doc_to_choice=_choices(values.get("doc_to_choice")),
            target_delimiter=values.get("target_delimiter", " "),
            fewshot_delimiter=values.get("fewshot_delimiter", "\n\n"),
            spare_example=_draws_one_more(values),
            **_sampler(values),
            **_metrics(values, kind),
            **_generation(values),
            **_filters(values),
        )
    except (UserError, TypeError) as error:
        raise UserError(f"{yaml}: {error}") from None


def read_yaml(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Fields of a task's file over those of the files that it includes.

    Raises:
      UserError: a file cannot be read, includes itself, or names code.
    """
    import yaml  # flax brings it

    class PlainLoader(yaml.SafeLoader):
        """Without Python's objects."""

    def refuse(loader: Any, node: Any) -> Any:
        code = f": {node.value}" if isinstance(node.value, str) else ""
        raise UserError(f"{path}, line {node.start_mark.line + 1}: the task needs code{code}")

    PlainLoader.add_constructor("!function", refuse)
    if path in above:
        raise UserError(f"{path} includes itself")
    try:
        values = yaml.load(path.read_text("utf-8"), PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is no task: it has no fields")
    found: dict[str, Any] = {}
    included = values.get("include", ())
    for name in (included,) if isinstance(included, str) else included:
        found |= read_yaml(path.parent / name, (*above, path))
    return found | {str(name): value for name, value in values.items()}


def _choices(value: Any) -> str | tuple[str, ...] | None:
    if isinstance(value, Mapping):
        value = list(value.values())
    return value if value is None or isinstance(value, str) else tuple(map(str, value))


def _draws_one_more(values: Mapping[str, Any]) -> bool:
    """Returns whether the harness looks for the question among its examples, whose split it is."""
    split = (values.get("fewshot_config") or {}).get("split", values.get("fewshot_split"))
    return split == values.get("test_split")


def _sampler(values: Mapping[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in (values.get("fewshot_config") or {}).items() if k != "split"}
    sampler = given.pop("sampler", "default")
    if given or sampler not in ("default", "first_n"):
        raise UserError(f"fewshot_config: {min(given, default=sampler)} is not known here")
    return {"sampler": sampler}


def _metrics(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Names of measures, and how texts are compared."""
    given = values.get("metric_list") or [{"metric": one} for one in DEFAULTS.get(kind, ())]
    names, compared = [], {}
    for one in given:
        name, rest = one["metric"], {k: v for k, v in one.items() if k != "metric"}
        rest.pop("higher_is_better", None)
        aggregation = rest.pop("aggregation", None)
        if aggregation not in (None, *AGGREGATIONS.get(name, ("mean",))):
            raise UserError(f"metric {name}: the aggregation {aggregation!r} is not known here")
        names.append(name)
        for key in COMPARED:
            compared[key] = bool(rest.pop(key, False))
        compared["regexes_to_ignore"] = tuple(rest.pop("regexes_to_ignore", None) or ())
        if rest:
            raise UserError(f"metric {name}: {min(rest)} is not known here")
    return {"metrics": tuple(names), **compared}


DEFAULTS = {
    "multiple_choice": ("acc", "acc_norm"),
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate_until": ("exact_match",),
}


def _generation(values: Mapping[str, Any]) -> dict[str, Any]:
    """End and length of written answers, which are the likeliest ones."""
    given = dict(values.get("generation_kwargs") or {})
    if given.pop("do_sample", False) or float(given.pop("temperature", 0) or 0) > 0:
        raise UserError("generation_kwargs: answers are the likeliest texts here, not drawn ones")
    until = given.pop("until", values.get("fewshot_delimiter", "\n\n"))
    until = (until,) if isinstance(until, str) else tuple(until)
    most = {"max_gen_toks": int(given.pop("max_gen_toks", 256))}
    if given:
        raise UserError(f"generation_kwargs: {min(given)} is not known here")
    return {"until": until, **most}


def _filters(values: Mapping[str, Any]) -> dict[str, Any]:
    """The pipelines of `filter_list`."""
    pipelines = values.get("filter_list") or []
    names = len(pipelines) > 1
    found = [_filter(one["filter"], one["name"] if names else "") for one in pipelines]
    return {"filters": tuple(found)} if found else {}


def _filter(steps: Sequence[Mapping[str, Any]], name: str) -> AnswerFilter:
    settings: dict[str, Any] = {"name": name}
    for step in steps:
        step = dict(step)
        function = step.pop("function")
        if function == "regex" and "pattern" not in settings and len(settings) == 1:
            settings["pattern"] = step.pop("regex_pattern", r"#### (\-?[0-9\.\,]+)")
            settings |= {k: step.pop(k) for k in ("group_select", "fallback") if k in step}
        elif function == "remove_whitespace":
            settings["strip"] = True
        elif function in ("lowercase", "uppercase"):
            settings["case"] = function.removesuffix("case")
        elif function not in ("take_first", "none"):
            raise UserError(f"filter_list: {function} is not known here")
        if step:
            raise UserError(f"filter_list: {function}: {min(step)} is not known here")
    return AnswerFilter(**settings)
