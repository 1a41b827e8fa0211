"""Candidates for the best reply to a request: sampled ones, and those of earlier rounds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lmjax.alignment.reward_functions import Reply
from lmjax.config import UserError
from lmjax.data.chat.conversations import Conversations
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.chat.records import message_record
from lmjax.data.tokenizers import Tokenizer

# Of a line: the dialogue with the best reply, and all candidates with their scores.
KEYS = ("messages", "prompt", "answers", "scores", "left_out", "earlier")
Line = dict[str, Any]


class Candidate(NamedTuple):
    """A reply that may be the best.

    Attributes:
      message: of the assistant.
      reply: for the rewards.
    """

    message: Message
    reply: Reply


def key_of(messages: Sequence[Message]) -> str:
    """Text that is the same for the same dialogues."""
    return json.dumps([message_record(message) for message in messages], sort_keys=True)


def earlier_replies(source: Conversations) -> dict[str, list[Message]]:
    """The last replies of conversations, by the key of what they reply to."""
    found: dict[str, list[Message]] = {}
    for dialogue in source.dialogues():
        if len(dialogue) > 1 and dialogue[-1].role == "assistant":
            found.setdefault(key_of(dialogue[:-1]), []).append(dialogue[-1])
    return found


def is_writable(template: ChatFormat, messages: Sequence[Message], reply: Message) -> bool:
    """Returns whether a reply can be trained on: it has a text that its format can express."""
    if not (reply.content or reply.calls):
        return False
    try:
        template.render_replies([*messages, reply])
    except UserError:
        return False
    return True


def sampled(
    template: ChatFormat, messages: Sequence[Message], replies: Sequence[Reply]
) -> Iterator[Candidate]:
    """Those of the sampled replies to a dialogue that came to an end and can be trained on."""
    for reply in replies:
        message = template.read_reply(reply.text)
        if reply.ended and is_writable(template, messages, message):
            yield Candidate(message, reply)


def of_before(
    template: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    replies: Sequence[Message],
    metadata: Mapping[str, Any],
    length: int,
) -> Iterator[Candidate]:
    """Replies of earlier rounds, as the policy would have written them.

    Args:
      template: format of the dialogue.
      tokenizer: of the policy.
      messages: of the dialogue, as the policy reads it.
      replies: to it.
      metadata: of the dialogue's line.
      length: most tokens of both; longer ones are left out.
    """
    request = tokenizer.decode(template.encode(tokenizer, messages))
    for message in replies:
        if not is_writable(template, messages, message):
            continue
        pieces = template.render_replies([*messages, message])
        tokens, spans = template.encode_replies(tokenizer, pieces)
        tokens = tokens[: spans[-1].end]
        if len(tokens) <= length:
            yield Candidate(message, Reply(request, message.content, True, dict(metadata), tokens))


def make_line(
    messages: Sequence[Message],
    metadata: Mapping[str, Any],
    candidates: Sequence[Candidate],
    scores: Sequence[float],
    left_out: int,
    earlier: int,
) -> Line:
    """JSON values of a dialogue with its candidates, which other commands read as they are.

    `Conversations` reads `messages`, with the first best reply at their end; `Comparisons` reads
    `prompt`, `answers` and `scores`; `Requests` reads `prompt`.

    Args:
      messages: of the request, as it is trained on.
      metadata: further fields of its line.
      candidates: at least one, those of earlier rounds last.
      scores: of the candidates.
      left_out: sampled replies that are no candidates.
      earlier: candidates that are of earlier rounds.
    """
    prompt = [message_record(message) for message in messages]
    replies = [message_record(candidate.message) for candidate in candidates]
    plain = [set(reply) == {"role", "content"} for reply in replies]
    answers = [r["content"] if p else [r] for r, p in zip(replies, plain, strict=True)]
    best = replies[int(np.argmax(scores))]
    values = [*prompt, best], prompt, answers, list(map(float, scores)), left_out, earlier
    return {**metadata, **dict(zip(KEYS, values, strict=True))}


def divergence_of_best(samples: int) -> float:
    """Bound of KL(best of n | policy) in nats: log n - (n - 1) / n, exact without ties.

    Stiennon et al. 2020 (arXiv:2009.01325), appendix G.3; Beirami et al. 2024 (arXiv:2401.01879)
    show that it is a bound.
    """
    return math.log(samples) - (samples - 1) / samples
