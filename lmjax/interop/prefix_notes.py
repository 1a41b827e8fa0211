"""Notes for the user on written models that read prompts from both sides (objective PrefixLM)."""

from __future__ import annotations

from lmjax.runs.trained_model import TrainedModel

MODEL = "the model reads prompts from both sides (objective PrefixLM)"


def left_to_right(trained: TrainedModel) -> list[str]:
    """Notes on a form whose programs read prompts from left to right alone."""
    if not trained.reads_prefix:
        return []
    return [
        f"{MODEL}, which this form cannot say: its programs read them from left to right, and give"
        " other probabilities"
    ]


def by_ranks(trained: TrainedModel) -> list[str]:
    """Notes on a form that has ranks as an input."""
    if not trained.reads_prefix:
        return []
    return [f"{MODEL}: the input `ranks` is 0 for the tokens of a prompt"]
