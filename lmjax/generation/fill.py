"""Infilling: blanks of a prompt, and how each kind of model fills them: GLM, T5 and BERT."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Sequence

from lmjax.config import UserError
from lmjax.data.chat.messages import ChatFormat, Message
from lmjax.data.tokenizers import Tokenizer
from lmjax.generation.prompts import Prompt
from lmjax.models import blank_row
from lmjax.models.infill import BlankFormat, InfillFormat, MaskFormat, SentinelFormat
from lmjax.objectives import (
    Objective,
)


@dataclasses.dataclass(frozen=True)
class InfillPrompt:
    """A prompt with blanks.

    Attributes:
      texts: what stands before the first blank, between two of them, and after the last. A space
        before a blank belongs to it: tokens of words begin with theirs.
      names: of the tokens that stand for the blanks.
      tokens: the prompt as the model reads it.
      positions: of the blanks in `tokens`.
    """

    texts: list[str]
    names: list[str]
    tokens: list[int]
    positions: list[int]


@dataclasses.dataclass(frozen=True)
class Filled:
    """A prompt whose blanks are filled.

    Attributes:
      text: all of it.
      blanks: what stands in each blank, without spaces around it.
    """

    text: str
    blanks: list[str]


class Infiller(abc.ABC):
    """Base of the ways to mark and fill what is missing in a text."""

    @abc.abstractmethod
    def names(self, tokenizer: Tokenizer) -> list[str]:
        """Tokens that can stand for a blank."""

    @abc.abstractmethod
    def frame(self, tokenizer: Tokenizer, names: list[str], last: str) -> tuple[list, list]:
        """Tokens before and after a text with these blanks that ends with `last`."""

    def read(self, tokenizer: Tokenizer, prompt: str) -> InfillPrompt:
        """Finds the blanks.

        Raises:
          UserError: there is none, or the tokenizer lacks a token.
        """
        known = self.names(tokenizer)
        longest_first = sorted(known, key=len, reverse=True)
        *parts, last = re.split(f"( ?(?:{'|'.join(map(re.escape, longest_first))}))", prompt)
        texts, names = [*parts[::2], last], [name.removeprefix(" ") for name in parts[1::2]]
        if not names:
            shown = ", ".join(known[:3]) + ", ..." * (len(known) > 3)
            raise UserError(
                f"the prompt {prompt[:40]!r} has no blank, and this model fills blanks: put "
                f"{shown} where something is missing"
            )
        before, after = self.frame(tokenizer, names, last)
        tokens, positions = list(before), []
        for text, name in zip(texts, names):
            tokens += tokenizer.encode(text)
            positions.append(len(tokens))
            tokens.append(tokenizer.special[name])
        return InfillPrompt(texts, names, [*tokens, *tokenizer.encode(last), *after], positions)


class AutoregressiveInfiller(Infiller):
    """A filling that is decoded, one blank after another, each with those before it in sight."""

    @abc.abstractmethod
    def prompt(
        self, tokenizer: Tokenizer, blanked: InfillPrompt, spans: Sequence[Sequence[int]]
    ) -> tuple[Prompt, Sequence[int] | None]:
        """Prompt that is continued to fill the blank after these spans, and the encoder's text."""

    @abc.abstractmethod
    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens that end a blank's content."""

    @abc.abstractmethod
    def beginning(self, blanked: InfillPrompt) -> int:
        """Number of tokens that the decoding model reads before the first blank's."""

    @abc.abstractmethod
    def before_rest(self, tokenizer: Tokenizer, text: Sequence[int]) -> InfillPrompt:
        """The prompt with one blank, which stands for the rest of a text.

        Args:
          tokenizer: of the model.
          text: tokens that the text begins with.

        Raises:
          UserError: the tokenizer lacks the token of the blank.
        """

    @abc.abstractmethod
    def room(self, max_length: int, most: int) -> int:
        """Most tokens of a text whose rest has `most` tokens; 0 or less: there is no room."""

    def share(self, blanked: InfillPrompt, max_length: int | None) -> int | None:
        """Most tokens of each blank, so that all have the same room; None: there is no limit.

        Raises:
          UserError: the context does not hold one token for each.
        """
        if max_length is None:
            return None
        blanks, used = len(blanked.positions), self.beginning(blanked)
        share = (max_length + 1 - used - blanks) // blanks
        if share < 1:
            raise UserError(
                f"the prompt has {used} tokens and {blanks} blanks; the model's context of "
                f"{max_length} has no room to fill them, which takes 2 tokens or more for each"
            )
        return share


class BlankInfiller(BlankFormat, AutoregressiveInfiller):
    """GLM's way: spans behind the text, at the positions of their masks; see `blank_row`."""

    def names(self, tokenizer: Tokenizer) -> list[str]:
        """See `Infiller.names`."""
        found = [name for name in self.masks if name in tokenizer.special]
        return found or [name for name in self.masks[:1] if token(tokenizer, name)]

    def frame(self, tokenizer: Tokenizer, names: list[str], last: str) -> tuple[list, list]:
        """A document's begin and end; no end where the rest is missing."""
        if len({name in self.run_on for name in names}) > 1:
            raise UserError(
                f"blanks {', '.join(sorted(set(names)))} cannot stand in one prompt: what fills "
                f"{', '.join(self.run_on)} has other positions"
            )
        begin = [] if tokenizer.begin is None else [tokenizer.begin]
        goes_on = not last and names[-1] in self.rest
        return begin, [] if goes_on or tokenizer.end == tokenizer.begin else [tokenizer.end]

    def prompt(
        self, tokenizer: Tokenizer, blanked: InfillPrompt, spans: Sequence[Sequence[int]]
    ) -> tuple[Prompt, Sequence[int] | None]:
        """See `AutoregressiveInfiller.prompt`."""
        sop = token(tokenizer, self.sop)
        contents = [[sop, *span] for span in [*spans, ()]]
        run_on = blanked.names[0] in self.run_on
        return blank_row(blanked.tokens, list(zip(blanked.positions, contents)), run_on), None

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The end of the blank or, where it is a text's rest, of the text."""
        return [token(tokenizer, self.eop), tokenizer.end]

    def beginning(self, blanked: InfillPrompt) -> int:
        """See `AutoregressiveInfiller.beginning`."""
        return len(blanked.tokens)

    def before_rest(self, tokenizer: Tokenizer, text: Sequence[int]) -> InfillPrompt:
        """See `AutoregressiveInfiller.before_rest`."""
        known = [name for name in (*self.rest, *self.masks) if name in tokenizer.special]
        name = known[0] if known else self.masks[0]
        return InfillPrompt(["", ""], [name], [*text, token(tokenizer, name)], [len(text)])

    def room(self, max_length: int, most: int) -> int:
        """See `AutoregressiveInfiller.room`: the blank's two marks, without the last token."""
        return max_length - 1 - most


@dataclasses.dataclass(frozen=True)
class SentinelInfiller(SentinelFormat, AutoregressiveInfiller):
    """T5's way: an encoder reads the text, the decoder is given each sentinel and goes on.

    Where the model replies to texts, one without a sentinel is a request, and the text that it is
    filled to is the reply alone.

    Attributes:
      template: the chat format that requests are written in; None: they are read as they are.
    """

    template: ChatFormat | None = None

    def read(self, tokenizer: Tokenizer, prompt: str) -> InfillPrompt:
        """See `Infiller.read`; UserError also for an empty request."""
        if not self.replies or any(name in prompt for name in self.names(tokenizer)):
            return super().read(tokenizer, prompt)
        if not prompt:
            raise UserError("prompt: give the text that the model's encoder is to read")
        if self.template is None:
            tokens = tokenizer.encode(prompt)
        else:
            tokens = self.template.encode(tokenizer, [Message("user", prompt)])
        tokens += [tokenizer.end] * (tokens[-1:] != [tokenizer.end])
        return InfillPrompt(["", ""], [""], tokens, [len(tokens)])

    def names(self, tokenizer: Tokenizer) -> list[str]:
        """See `Infiller.names`; there may be none where the model replies."""
        if not self.replies:
            token(tokenizer, self.sentinel.format(0))
        numbers = range(len(tokenizer.special))
        names = [self.sentinel.format(number) for number in numbers]
        return [name for name in names if name in tokenizer.special]

    def frame(self, tokenizer: Tokenizer, names: list[str], last: str) -> tuple[list, list]:
        """The end of the text."""
        wanted = [self.sentinel.format(number) for number in range(len(names))]
        if names != wanted:
            raise UserError(
                f"the blanks of the prompt are {', '.join(names)}; they are numbered from 0 on, in "
                f"the order of the text: {', '.join(wanted)}"
            )
        return [], [tokenizer.end]

    def prompt(
        self, tokenizer: Tokenizer, blanked: InfillPrompt, spans: Sequence[Sequence[int]]
    ) -> tuple[Prompt, Sequence[int] | None]:
        """See `AutoregressiveInfiller.prompt`."""
        tokens = [token(tokenizer, self.start)]
        for name, span in zip(blanked.names, [*spans, ()]):
            tokens += [*([tokenizer.special[name]] if name else []), *span]
        return tokens, blanked.tokens

    def stop_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Any sentinel, the end of the text, and what ends a reply."""
        ends = [] if self.template is None else self.template.stop_tokens(tokenizer)
        sentinels = map(tokenizer.special.__getitem__, self.names(tokenizer))
        return [*dict.fromkeys((*sentinels, tokenizer.end, *ends))]

    def beginning(self, blanked: InfillPrompt) -> int:
        """The token that the decoder begins with."""
        return 1

    def before_rest(self, tokenizer: Tokenizer, text: Sequence[int]) -> InfillPrompt:
        """See `AutoregressiveInfiller.before_rest`; no sentinel where the model replies."""
        name = "" if self.replies else self.sentinel.format(0)
        marks = [token(tokenizer, name)] if name else []
        kept = [known for known in text if known != tokenizer.end]
        read = [*kept, *marks, tokenizer.end]
        return InfillPrompt(["", ""], [name], read, [len(kept)])

    def room(self, max_length: int, most: int) -> int:
        """See `AutoregressiveInfiller.room`: the rest is the decoder's, with two marks on each."""
        return max_length - 2 if most < max_length else 0


class MaskedTokenInfiller(MaskFormat, Infiller):
    """BERT's way: each mask is one token, guessed from all the others at once."""

    def names(self, tokenizer: Tokenizer) -> list[str]:
        """See `Infiller.names`."""
        token(tokenizer, self.mask)
        return [self.mask]

    def frame(self, tokenizer: Tokenizer, names: list[str], last: str) -> tuple[list, list]:
        """Tokens before and after a text in training."""
        begin = tokenizer.begin if self.cls is None else token(tokenizer, self.cls)
        end = tokenizer.end if self.sep is None else token(tokenizer, self.sep)
        return [] if begin is None else [begin], [] if begin == end else [end]


FILLINGS: dict[type[InfillFormat], type[Infiller]] = {
    BlankFormat: BlankInfiller,
    SentinelFormat: SentinelInfiller,
    MaskFormat: MaskedTokenInfiller,
}


def infiller_by(infill: InfillFormat | Infiller | None) -> Infiller | None:
    """Filling of blanks by this format; None for no format. An `Infiller` stays itself.

    Raises:
      UserError: the format is neither one that is known here nor an `Infiller`.
    """
    if infill is None or isinstance(infill, Infiller):
        return infill
    kind = next((kind for known, kind in FILLINGS.items() if isinstance(infill, known)), None)
    if kind is None:
        raise UserError(
            f"infill={infill}: it is one of {', '.join(known.__name__ for known in FILLINGS)}, or"
            " an Infiller of your own (lmjax/generation/fill.py)"
        )
    return kind(**{field.name: getattr(infill, field.name) for field in dataclasses.fields(infill)})


def infiller_of(objective: Objective | None, template: ChatFormat | None = None) -> Infiller | None:
    """The filling of blanks that a model learned by its objective; None: it continues texts.

    `template` is the chat format that the requests of its training were written in.
    """
    filling = None if objective is None else infiller_by(objective.infill_format())
    if isinstance(filling, SentinelInfiller) and filling.replies:
        filling = dataclasses.replace(filling, template=template)
    return filling


# (prompts, what encoders read, number of the blank in each text) -> tokens of each blank
Decode = Callable[[list[Prompt], list[Sequence[int]] | None, int], list[list[int]]]


def write_blanks(
    filling: AutoregressiveInfiller,
    tokenizer: Tokenizer,
    prompts: Sequence[InfillPrompt],
    max_length: int | None,
    decode: Decode,
) -> list[list[list[int]]]:
    """The tokens of every blank of every prompt, the first blank of all of them first.

    Args:
      filling: how the model does it.
      tokenizer: the model's.
      prompts: as `filling.read` gives them.
      max_length: of the model's context; None: it has no end.
      decode: continues prompts up to a stop token.

    Raises:
      UserError: the context does not hold the prompt and a token for each of its blanks.
    """
    shares = [filling.share(blanked, max_length) for blanked in prompts]
    spans: list[list[list[int]]] = [[] for _ in prompts]
    for number in range(max((len(blanked.positions) for blanked in prompts), default=0)):
        rows = [row for row, blanked in enumerate(prompts) if number < len(blanked.positions)]
        asked = [filling.prompt(tokenizer, prompts[row], spans[row]) for row in rows]
        texts = [text for text, _ in asked]
        sources = None if asked[0][1] is None else [source for _, source in asked]
        for row, tokens in zip(rows, decode(texts, sources, number)):
            spans[row].append(tokens[: shares[row]])
    return spans


def put_together(
    tokenizer: Tokenizer, blanked: InfillPrompt, spans: Sequence[Sequence[int]]
) -> Filled:
    """The prompt's text with these tokens in its blanks."""
    pieces, blanks = [blanked.texts[0]], []
    for span, text in zip(spans, blanked.texts[1:]):
        data = b"".join(map(tokenizer.token_bytes, span))
        new = data.decode("utf-8", "replace")
        pieces += [new if "".join(pieces) else new.removeprefix(" "), text]
        blanks.append(new.strip())
    return Filled("".join(pieces), blanks)


def token(tokenizer: Tokenizer, name: str) -> int:
    """The id of a special token. UserError where the tokenizer has none of that name."""
    if name not in tokenizer.special:
        known = ", ".join(sorted(tokenizer.special)[:12])
        raise UserError(
            f"filling blanks needs the token {name!r}, which the tokenizer lacks (its special "
            f"tokens: {known or 'none'}). A model learns it where the tokenizer has it: "
            f"""data.tokenizer='WithTokens(tokenizer=..., tokens=("{name}", ...))' in training. """
            "The tokenizer of a public model has it with all of the published folder's files: "
            "tokenizer_config.json, special_tokens_map.json and added_tokens.json too"
        )
    return tokenizer.special[name]
