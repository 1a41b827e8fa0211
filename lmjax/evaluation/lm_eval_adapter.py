"""Models of ours in EleutherAI's lm-evaluation-harness: pip install 'lmjax[lm-eval]'

python -m lmjax.evaluation.lm_eval_adapter --model lmjax --model_args folder=runs/x --tasks arc_easy
takes the arguments of `lm_eval`, in which no other package can register a model by itself. From
Python: `simple_evaluate(model=lmjax_model(folder="runs/x"), tasks=[...])`.

Numbers are those of our own evaluation: the same requests go the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lmjax.config import UserError
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.evaluation.answering import Answering
from lmjax.evaluation.chat_questions import reply_ends
from lmjax.evaluation.requests import (
    ContinuationRequest,
    ModelAnswer,
    ModelRequest,
    RollingRequest,
    WrittenRequest,
)
from lmjax.generation.chat import chat_format
from lmjax.generation.run import load
from lmjax.interop.folder import begin_token
from lmjax.parallel import Mesh

NAME = "lmjax"  # of the model in the harness
MAX_TOKENS = 256  # of a text for which a task does not say it
# What a task may say of a text, beside where it stops.
WRITING = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


class AskedModel:
    """A model in a folder, as the harness asks it; `adapter_class` makes it one of its models."""

    def __init__(
        self,
        folder: str,
        batch_size: int | str = 32,
        dtype: str | None = None,
        chat: str = "true",
        **unused: Any,
    ) -> None:
        """
        Args:
          folder: run folder or public model folder.
          batch_size: most rows that are run at once; "auto" is 32.
          dtype: precision of the computation; see `load`.
          chat: name of the chat format, where the harness applies one; see `chat_format`.
          unused: what the harness tells every model, such as a device.
        """
        super().__init__()
        if strange := unused.keys() - {"device", "max_batch_size"}:
            raise UserError(f"model_args: there is no {min(strange)}; give folder=RUN_FOLDER")
        self.folder, self.chat, self.mesh = folder, chat, Mesh().build()
        size = int(batch_size) if str(batch_size).isdigit() else 32
        with jax.set_mesh(self.mesh):
            text = load(folder, dtype=dtype)
            begin = begin_token(folder, text.tokenizer)
            self.answering = Answering(text, size, begin)
        self.rendered: set[str] = set()  # conversations as the harness got them from us

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is greedy."""
        asked = [
            ContinuationRequest(*request.args, request.args[0] in self.rendered)
            for request in requests
        ]
        return [(one.log_probability, one.is_greedy) for one in self._answers(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Log-likelihood of each text."""
        asked = [RollingRequest(*request.args) for request in requests]
        return [one.log_probability for one in self._answers(asked)]

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Each prompt's text, cut before its stop string, which the harness does not do."""
        asked = [self._written(*request.args) for request in requests]
        return [one.texts[0] for one in self._answers(asked)]

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps rendered prompts."""
        return f"{NAME}-{self.answering.text.tokenizer.fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Title of the chat format, for the harness's records."""
        if isinstance(chat_template, str):
            self.chat = chat_template
        return self._format.title

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, in which names of special tokens are these tokens."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
        pieces = self._format.render(messages, reply=add_generation_prompt)
        text = "".join(piece.text for piece in pieces)
        self.rendered.add(text)
        return text

    @functools.cached_property
    def _format(self) -> ChatFormat:
        return chat_format(self.folder, self.answering.text.tokenizer, self.chat)

    def _written(self, prompt: str, settings: Mapping[str, Any]) -> WrittenRequest:
        """A text's request; a reply to a rendered conversation ends where its format says."""
        if prompt not in self.rendered:
            return written_request(prompt, settings, False)
        ends = reply_ends(self._format, self.answering.text.tokenizer)
        return written_request(prompt, settings, True, ends)

    def _answers(self, requests: Sequence[ModelRequest]) -> list[ModelAnswer]:
        with jax.set_mesh(self.mesh):
            return self.answering.answers(requests)


@functools.cache
def adapter_class() -> type:
    """The class that the harness calls. UserError: the harness is not installed."""
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise UserError("this needs the harness: pip install 'lmjax[lm-eval]'") from None
    return type("LmEvalModel", (AskedModel, LM), {"__doc__": AskedModel.__doc__})


def lmjax_model(folder: str, **settings: Any) -> Any:
    """A model in a folder for the harness's `simple_evaluate`; see the class for the settings."""
    return adapter_class()(folder, **settings)


def written_request(
    prompt: str, settings: Mapping[str, Any], special: bool, ends: tuple[str, ...] = ()
) -> WrittenRequest:
    """Requests of the harness with its settings of a text.

    Args:
      prompt: of the text.
      settings: the harness's generation_kwargs.
      special: see `WrittenRequest`.
      ends: what ends it beside what the settings say.

    Raises:
      UserError: a setting that this model does not have.
    """
    if strange := settings.keys() - {*WRITING}:
        raise UserError(f"generation_kwargs: {min(strange)} is none of {', '.join(WRITING)}")
    until = settings.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(until)
    drawn = settings.get("do_sample", settings.get("temperature", 0) > 0)
    return WrittenRequest(
        prompt,
        tuple(dict.fromkeys(text for text in (*stop, *ends) if text)),
        settings.get("max_gen_toks", MAX_TOKENS),
        float(settings.get("temperature", 1.0)) if drawn else 0.0,
        settings.get("top_p") if drawn else None,
        special=special,
    )


def register() -> None:
    """Makes the model known to the harness under `NAME`."""
    from lm_eval.api.registry import register_model

    register_model(NAME)(adapter_class())


def main() -> None:
    """Runs the harness's own command with the model known to it."""
    from lmjax.launch import exit_on_user_error

    with exit_on_user_error():
        adapter_class()
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    main()
