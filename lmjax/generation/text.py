"""Text in, text out: prompts to tokens, and the texts that follow them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lmjax.config import UserError, replace
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.tokenizers import Tokenizer, cut_at_names
from lmjax.generation.beams import BeamSearch
from lmjax.generation.fill import (
    AutoregressiveInfiller,
    Filled,
    Infiller,
    MaskedTokenInfiller,
    SentinelInfiller,
    put_together,
    write_blanks,
)
from lmjax.generation.generator import Generator, require_numbers
from lmjax.generation.prompts import Prompt, prefix_row
from lmjax.generation.sampling import Sampling
from lmjax.generation.stream import TextStream, pieces, whole_texts
from lmjax.models import Batch, TransformerConfig, abstract, check_tokens, plain_batch
from lmjax.parallel import Layout

INTERVAL = 16  # tokens between two looks for stop strings where nobody reads along
STRIDE = 1 << 16  # between the seeds of two blanks of a text


@dataclasses.dataclass(frozen=True)
class TextGenerator:
    """A model and its tokenizer, ready to continue texts; see `load_run`.

    A mesh must be set, the one that the model lies on.

    Attributes:
      generator: continues tokens.
      tokenizer: what the model was trained with.
      filling: how it fills blanks; None where it continues texts.
      ends: ids that end a text, besides the tokenizer's end.
      reads_prefix: a prompt's tokens see each other both ways; see `PrefixLM`.
    """

    generator: Generator
    tokenizer: Tokenizer
    filling: Infiller | None = None
    ends: tuple[int, ...] = ()
    reads_prefix: bool = False

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop: Sequence[str] = (),
        samples: int = 1,
        special: bool = False,
    ) -> list[str]:
        """Continuations of each prompt: `samples` texts of the first, then those of the second, ...

        See `stream`; text i draws with seed `sampling.seed + i`.
        """
        rows = [prompt_tokens(self.tokenizer, prompt, special) for prompt in prompts]
        at_start = [not prompt for prompt in prompts]
        return self.texts_behind(rows, at_start, sampling, max_tokens, stop, samples)

    def texts_behind(
        self,
        rows: Sequence[Sequence[int]],
        at_start: Sequence[bool],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop: Sequence[str] = (),
        samples: int = 1,
    ) -> list[str]:
        """Continuations of tokens, as `generate` gives those of prompts.

        Args:
          rows: tokens of each prompt.
          at_start: of each prompt, whether its continuation begins a text.
          sampling, max_tokens, stop, samples: see `generate`.
        """
        rows, sources, ends = self._asked(rows, self.stop_tokens(stop))
        streams = [
            TextStream(self.tokenizer, stop, at_start=start or self.writes_replies)
            for start in at_start
            for _ in range(samples)
        ]
        settings = sampling, max_tokens, ends, INTERVAL, samples
        return whole_texts(self.generator.stream(rows, *settings, sources=sources), streams)

    def stream(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        stop: Sequence[str] = (),
        special: bool = False,
    ) -> Iterator[str]:
        """Yields what follows the prompt, in whole characters, as it is decoded.

        A model that writes into blanks writes it into the blank of the text's rest.

        Args:
          prompt: the text to continue; empty: begin a document.
          sampling: how tokens are chosen; None is `Sampling()`.
          max_tokens: most tokens; the text ends before it when the document does, or when the
            model's context is full.
          stop: the text ends before the first of these strings, or of these special tokens.
          special: names of special tokens in the prompt are these tokens; else they are text.

        Raises:
          UserError: a prompt longer than the context, or one that the tokenizer cannot spell; a
            stop string in which a special token stands beside text.
        """
        row = prompt_tokens(self.tokenizer, prompt, special)
        text = TextStream(self.tokenizer, stop, at_start=not prompt or self.writes_replies)
        rows, sources, ends = self._asked([row], self.stop_tokens(stop))
        parts = self.generator.stream(rows, sampling, max_tokens, ends, sources=sources)
        return pieces(parts, text)

    def reply(
        self,
        template: ChatFormat,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
    ) -> Iterator[str]:
        """Yields the assistant's next message, as it is decoded.

        Args:
          template: the chat format that the model was trained with.
          messages: the conversation so far.
          sampling: how tokens are chosen; None is `Sampling()`.
          max_tokens: most tokens of the reply.

        Raises:
          UserError: a conversation longer than the context, or one that the format cannot express.
        """
        row = template.encode(self.tokenizer, messages)
        text = TextStream(self.tokenizer, template.stop_strings, at_start=True)
        ends = sorted({*template.stop_tokens(self.tokenizer), *self.ends})
        return pieces(self.generator.stream(self._prompts([row]), sampling, max_tokens, ends), text)

    def replies(
        self,
        template: ChatFormat,
        messages: Sequence[Message],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        samples: int = 1,
    ) -> list[str]:
        """Several of the assistant's next messages; see `reply`.

        Number i draws with seed `sampling.seed + i`.
        """
        row = template.encode(self.tokenizer, messages)
        ends = sorted({*template.stop_tokens(self.tokenizer), *self.ends})
        stop = template.stop_strings
        streams = [TextStream(self.tokenizer, stop, at_start=True) for _ in range(samples)]
        settings = sampling, max_tokens, ends, INTERVAL, samples
        parts = self.generator.stream(self._prompts([row]), *settings)
        return whole_texts(parts, streams)

    @property
    def writes_replies(self) -> bool:
        """True where a decoder begins a text of its own, which answers the prompt."""
        return isinstance(self.filling, SentinelInfiller) and self.filling.replies

    def _prompts(self, rows: Sequence[Sequence[int]]) -> Sequence[Prompt]:
        """Tokens as the model reads what it goes on from."""
        return [prefix_row(row) for row in rows] if self.reads_prefix else rows

    def _asked(
        self, rows: Sequence[Sequence[int]], ends: Sequence[int]
    ) -> tuple[Sequence[Prompt], Sequence[Sequence[int]] | None, Sequence[int]]:
        """Prompts that are decoded to go on from tokens, texts of an encoder, and stop tokens."""
        filling = self.filling
        if not isinstance(filling, AutoregressiveInfiller):
            return self._prompts(rows), None, ends
        blanked = [filling.before_rest(self.tokenizer, row) for row in rows]
        asked = [filling.prompt(self.tokenizer, prompt, ()) for prompt in blanked]
        sources = [source for _, source in asked if source is not None]
        ends = sorted({*ends, *filling.stop_tokens(self.tokenizer)})
        return [row for row, _ in asked], sources or None, ends

    def stop_tokens(self, stop: Sequence[str] = ()) -> list[int]:
        """The ids that end a text, with those of the special tokens among the stop strings.

        Raises:
          UserError: a special token stands beside text in a stop string: it makes no text, so the
            string would never be found.
        """
        special = self.tokenizer.special
        for text in stop:
            pieces = cut_at_names(text, special)
            if len(pieces) > 1 and (names := [piece.text for piece in pieces if piece.special]):
                raise UserError(
                    f"stop: {text!r} holds the special token {names[0]!r}, which is no text; give"
                    " the token alone, and texts without it"
                )
        return sorted({self.tokenizer.end, *self.ends, *(special[t] for t in stop if t in special)})

    def search(
        self,
        prompt: str,
        beams: int = 4,
        length_penalty: float = 1.0,
        max_tokens: int = 100,
        special: bool = False,
    ) -> list[tuple[str, float]]:
        """The best texts after the prompt, with their scores; see `stream` and `BeamSearch`."""
        row = prompt_tokens(self.tokenizer, prompt, special)
        rows, sources, ends = self._asked([row], self.stop_tokens())
        found = []
        for row in self._beam_search(rows, beams, length_penalty, max_tokens, ends, sources)[0]:
            text = TextStream(self.tokenizer, at_start=not prompt or self.writes_replies)
            found.append((text.add(row.tokens) + text.rest(), row.score))
        return found

    def fill(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        max_tokens: int = 100,
        samples: int = 1,
        beams: int | None = None,
        length_penalty: float = 1.0,
    ) -> list[Filled]:
        """Each prompt with its blanks filled, `samples` times the first, then the second, ...

        Blanks are filled one after another, from the left; each sees those before it.

        Args:
          prompts: texts with mask tokens (GLM: [MASK], [gMASK]) or sentinels (T5: <extra_id_0>).
          sampling: how tokens are chosen; None is `Sampling()`.
          max_tokens: most tokens of a blank; fewer where the context has no room for so many in
            each blank of the prompt.
          samples: ways to fill each prompt.
          beams: put the best that a search with so many beams finds into each blank, instead.
          length_penalty: of the search.

        Raises:
          UserError: a model that does not fill blanks so, a prompt without a blank, more blanks
            than the context holds, or a tokenizer without the special tokens.
        """
        filling = self.filling
        if not isinstance(filling, AutoregressiveInfiller):
            raise UserError(
                "this model does not write into blanks: "
                + ("it continues texts" if filling is None else "it guesses masks, see `guess`")
            )
        sampling = Sampling() if sampling is None else sampling
        texts = [filling.read(self.tokenizer, prompt) for prompt in prompts for _ in range(samples)]
        stop = filling.stop_tokens(self.tokenizer)

        def decode(rows, sources, number) -> list[list[int]]:
            if beams is not None:
                settings = beams, length_penalty, max_tokens, stop, sources
                return [found[0].tokens for found in self._beam_search(rows, *settings)]
            seed = (sampling.seed + number * STRIDE) % 2**31
            settings = replace(sampling, seed=seed), max_tokens, stop
            return self.generator.generate(rows, *settings, sources=sources)

        most = self.generator.config.max_length
        spans = write_blanks(filling, self.tokenizer, texts, most, decode)
        return [put_together(self.tokenizer, *pair) for pair in zip(texts, spans, strict=True)]

    def guess(self, prompt: str, count: int = 5) -> list[list[tuple[str, float]]]:
        """The likeliest tokens of each mask in the prompt, as text, with their probabilities.

        Raises:
          UserError: a model that does not guess masks, a prompt without one or longer than the
            context, or a tokenizer without the special tokens.
        """
        if not isinstance(self.filling, MaskedTokenInfiller):
            raise UserError("this model does not guess masks: it is no encoder")
        blanked = self.filling.read(self.tokenizer, prompt)
        most, length = self.generator.config.max_length, len(blanked.tokens)
        if most is not None and length > most:
            raise UserError(f"the prompt has {length} tokens, more than the {most} of the context")
        logits = self._whole(plain_batch(np.array([blanked.tokens], np.int32)))
        found = []
        for position in blanked.positions:
            probabilities = jax.nn.softmax(logits[0, position, : self.generator.config.vocab_size])
            best = jax.lax.top_k(probabilities, min(count, len(probabilities)))
            values, tokens = map(np.asarray, best)
            require_numbers(values)
            texts = [self.tokenizer.decode([token]).strip() for token in tokens.tolist()]
            found.append(list(zip(texts, values.tolist(), strict=True)))
        return found

    def _whole(self, batch) -> np.ndarray:
        """Logits of a batch that is read at once, without a cache."""
        generator = self.generator
        check_tokens(batch, generator.config.vocab_size)
        own = generator.config, generator.layout, generator.params
        return np.asarray(_logits(*own, generator.put_on_devices(batch)))

    @functools.cached_property
    def _beam_search(self) -> BeamSearch:
        return BeamSearch(self.generator)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    config: TransformerConfig, layout: Layout, params: dict, batch: Batch
) -> Float[Array, "batch seq vocab"]:
    """Logits of whole rows; models of one config share the program."""
    model = nnx.merge(abstract(config, layout)[0], params)
    return model.logits(model(batch)[0])


def prompt_tokens(tokenizer: Tokenizer, prompt: str, special: bool = False) -> list[int]:
    """A prompt as the beginning of a document, with what the model's own program puts before it.

    An empty prompt is the place where a document begins: `begin`, else the `end` of one before.

    Args:
      tokenizer: of the model.
      prompt: the text.
      special: names of special tokens in it are these tokens. What stands before a document is
        then not put twice.

    Raises:
      UserError: the prompt's text makes no token at all.
    """
    opening = list(tokenizer.opening)
    if not prompt:
        return opening or [tokenizer.end]
    tokens = tokenizer.encode_special(prompt) if special else tokenizer.encode(prompt)
    if not special or tokens[: len(opening)] != opening:
        tokens = opening + tokens
    if not tokens:
        raise UserError("this tokenizer makes no token of the prompt's text: give some other text")
    return tokens
