"""Questions of tasks as a user's messages, in the chat format of a model."""

from __future__ import annotations

import dataclasses

from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.tokenizers import Tokenizer
from lmjax.evaluation.requests import (
    ContinuationRequest,
    ModelRequest,
    RollingRequest,
    WrittenRequest,
)
from lmjax.evaluation.tasks.task import EvaluationTask, Question


def reply_ends(chat: ChatFormat, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Texts and names of special tokens that end a reply in a format.

    Raises:
      UserError: the tokenizer lacks a token of the format.
    """
    names = {token: name for name, token in tokenizer.special.items()}
    tokens = [names[token] for token in chat.stop_tokens(tokenizer) if token in names]
    return (*chat.stop_strings, *tokens)


def in_chat(
    task: EvaluationTask, question: Question, chat: ChatFormat, ends: tuple[str, ...] = ()
) -> Question:
    """The question as a conversation, which the model's answer goes on from.

    As EleutherAI's harness with --apply_chat_template: the text in front of the examples is the
    system's message, examples and question are one message of the user, and choices are scored
    without the space before them. Texts that are scored as a whole stay as they are.

    Args:
      task: the task.
      question: as it asks it.
      chat: the format.
      ends: what ends a reply that is written, beside the task's own; see `reply_ends`.

    Raises:
      UserError: the format has no system's message, and the task has a text for it.
    """
    opening = task.opening(question.item)

    def rendered(text: str) -> str:
        turns = [Message("system", opening)] if opening else []
        turns.append(Message("user", text.removeprefix(opening)))
        return "".join(piece.text for piece in chat.render(turns))

    def asked(request: ModelRequest) -> ModelRequest:
        if isinstance(request, RollingRequest):
            return request
        if isinstance(request, WrittenRequest):
            stop = tuple(dict.fromkeys((*request.stop, *ends)))
            prompt = rendered(request.prompt)
            return dataclasses.replace(request, prompt=prompt, stop=stop, special=True)
        continuation = request.continuation
        if question.item.choices:
            continuation = continuation.removeprefix(task.delimiter)
        return ContinuationRequest(rendered(request.context), continuation, special=True)

    requests = tuple(map(asked, question.requests))
    whole = all(isinstance(request, RollingRequest) for request in requests)
    context = question.context if whole else rendered(question.context)
    return dataclasses.replace(question, context=context, requests=requests)
