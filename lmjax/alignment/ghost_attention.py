"""Ghost Attention: dialogues that show a model to keep to an instruction of long ago."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lmjax.config import config
from lmjax.data.chat.messages import Message
from lmjax.data.permutation import random_bits


@config
class GhostAttention:
    """The instruction in every message of a user while sampling, and once while training.

    LLaMA 2 (Touvron et al. 2023, arXiv:2307.09288, section 3.3). The instruction is the system
    message of a dialogue, which most formats write before the first message of the user or into
    it. The replies are to be trained on with `ChatLM(loss_on="last")`: earlier replies of the
    dialogue were written without the instruction.
    """

    # one is drawn for each dialogue without a system message; none: such ones stay as they are
    instructions: tuple[str, ...] = ()

    def instruct(self, messages: Sequence[Message], *keys: int) -> list[Message]:
        """The dialogue with its instruction, as it is trained on.

        Args:
          messages: of the dialogue.
          keys: what the instruction is drawn by.
        """
        if not self.instructions or messages[0].role == "system":
            return list(messages)
        number = random_bits(*keys).item() % len(self.instructions)
        return [Message("system", self.instructions[number]), *messages]


def remind(messages: Sequence[Message]) -> list[Message]:
    """The dialogue with its system text in each message of the user after the first one, too."""
    if messages[0].role != "system":
        return list(messages)
    asked = [number for number, message in enumerate(messages) if message.role == "user"]
    return [
        dataclasses.replace(message, content=f"{messages[0].content}\n\n{message.content}")
        if number in asked[1:]
        else message
        for number, message in enumerate(messages)
    ]
