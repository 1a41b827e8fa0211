"""Samples: what the model makes of given prompts."""

from __future__ import annotations

from lmjax.config import UserError, config
from lmjax.console import Table
from lmjax.evaluation.evaluator import Context, Evaluate, Evaluator
from lmjax.generation.fill import AutoregressiveInfiller, Infiller, MaskedTokenInfiller, infiller_of
from lmjax.generation.generator import Generator
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator, prompt_tokens
from lmjax.models import TransformerConfig
from lmjax.training.feed import TextFeed

COLUMNS = ("prompt", "text")


@config
class TextSamples(Evaluator):
    """Texts that the model writes: continuations of prompts, or what it fills into blanks."""

    prompts: tuple[str, ...] = ()  # beginnings of text, or texts with blanks
    length: int = 80  # most tokens that are added to each
    sampling: Sampling = Sampling(temperature=0.8, top_k=50)  # how tokens are drawn

    def prepare(self, context: Context) -> Evaluate:
        """See `Evaluator.prepare`; the feed is a `TextFeed`.

        Raises:
          UserError: the model cannot continue a prompt, a prompt leaves no room for an answer, or
            its blanks cannot be filled.
        """
        feed: TextFeed = context.feed
        model, filling = context.learner.model, infiller_of(feed.objective)
        if self.prompts and filling is None and not model.attention.causal:
            raise UserError(
                "evaluation.prompts: the model is an encoder (model.attention.causal=False), which"
                " continues no text, and its objective names no blanks that it fills"
                f" ({type(feed.objective).__name__}.infill_format): set evaluation.prompts=()"
            )
        for prompt in self.prompts:
            _check_prompt(prompt, feed, filling, model)

        def evaluate(step: int, params: dict) -> tuple[Table, ...]:
            if not self.prompts:
                return ()
            prefix = feed.objective.reads_prefix
            trained = Generator(model, params, merge=False)
            generator = TextGenerator(trained, feed.tokenizer, filling, reads_prefix=prefix)
            rows = zip(self.prompts, self._texts(generator), strict=True)
            return (Table("Samples", COLUMNS, tuple(rows), describe_sampling(self.sampling)),)

        return evaluate

    def _texts(self, generator: TextGenerator) -> list[str]:
        """One text a prompt; filled blanks stand on a line of their own."""
        if isinstance(generator.filling, MaskedTokenInfiller):
            return [_guesses(generator, prompt) for prompt in self.prompts]
        if generator.filling is None:
            return generator.generate(self.prompts, self.sampling, self.length)
        filled = generator.fill(self.prompts, self.sampling, self.length)
        return [f"\n{text.text}" for text in filled]


def _check_prompt(
    prompt: str, feed: TextFeed, filling: Infiller | None, model: TransformerConfig
) -> None:
    """Raises UserError for a prompt that cannot be completed."""
    room = model.max_length
    if filling is None:
        length = len(prompt_tokens(feed.tokenizer, prompt))
    else:
        blanked = filling.read(feed.tokenizer, prompt)
        length = len(blanked.tokens)
        if isinstance(filling, AutoregressiveInfiller):
            filling.share(blanked, room)
    if room is not None and length >= room:
        raise UserError(
            f"evaluation.prompts: {prompt[:40]!r}... has {length:,} tokens and leaves no "
            f"room in model.max_length={room:,}"
        )


def _guesses(generator: TextGenerator, prompt: str) -> str:
    """A line for each mask of the prompt: the likeliest tokens, with their probabilities."""
    lines = (
        ", ".join(f"{text} {probability:.3f}" for text, probability in mask)
        for mask in generator.guess(prompt)
    )
    return "".join(f"\n{line}" for line in lines)


def describe_sampling(sampling: Sampling) -> str:
    """Description of how samples were drawn."""
    if sampling.temperature == 0:
        return "always the likeliest token"
    words = f"sampled at temperature {sampling.temperature:g}"
    if sampling.top_k is not None:
        words += f" from the {sampling.top_k} likeliest tokens"
    if sampling.top_p is not None:
        words += f" from the likeliest tokens that hold {sampling.top_p:g} of the probability"
    if sampling.min_p is not None:
        words += f" from those at least {sampling.min_p:g} times as likely as the likeliest"
    if sampling.repetition_penalty != 1:
        words += f", repetitions penalised by {sampling.repetition_penalty:g}"
    return words
