"""Streams text from a trained model, or fills the blanks of a text.

python -m lmjax.generation runs/quickstart prompt="The list" temperature=0.8
python -m lmjax.generation runs/quickstart prompt="The list" samples=3
python -m lmjax.generation runs/quickstart prompt="The list" beams=4
python -m lmjax.generation models/Mistral-7B-v0.1 prompt="The list" mesh.tensor=8
python -m lmjax.generation models/Qwen-7B-Chat chat=true
python -m lmjax.generation Mistral-7B-v0.1.Q8_0.gguf prompt="The list"
python -m lmjax.generation models/Qwen3-8B prompt="<|im_start|>user" special=true
python -m lmjax.generation runs/quickstart_glm prompt="The [MASK] module provides [MASK]."
python -m lmjax.generation models/t5-base prompt="The <extra_id_0> module provides <extra_id_1>."
python -m lmjax.generation models/t5-base prompt="translate English to German: That is good."
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from lmjax.config import UserError, config
from lmjax.data.chat.messages import Message
from lmjax.generation.beams import check_search
from lmjax.generation.chat import chat_format, check_chat
from lmjax.generation.fill import MaskedTokenInfiller
from lmjax.generation.run import load, tell
from lmjax.generation.sampling import Sampling
from lmjax.generation.text import TextGenerator
from lmjax.interop.gguf_source import as_folder
from lmjax.interop.kept_files import read_recommended
from lmjax.launch import import_modules, is_first, run
from lmjax.models.empty_cache import CacheKind
from lmjax.parallel import Mesh
from lmjax.remote import check_path, local_copy

# Settings of how a text is drawn, and of how it is written, one token after another.
DRAWING = "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"
WRITING = *DRAWING, "max_tokens", "samples", "beams", "length_penalty", "cache"


@config
class Generate(Sampling):
    """Text from a run, from a model folder of Hugging Face's kind, or from a GGUF file."""

    model: str | None = None  # the run folder, the model folder, or the GGUF file
    # the text to continue; empty: the beginning of a document. For GLM, T5 and BERT a text with
    # blanks: [MASK] or [gMASK], <extra_id_0>, [MASK]; for T5 also a request, which it replies to
    prompt: str = ""
    max_tokens: int = 200  # most tokens; of a blank, where blanks are filled
    # the text ends before the first of these strings, or of these special tokens
    stop: tuple[str, ...] = ()
    special: bool = False  # names of special tokens in the prompt are these tokens, not text
    # talk in the terminal: true, in the format that the folder spells out or that is known of the
    # model's family, or in that of a name: one of the folder's several, or plain, chatml, qwen2,
    # qwen2.5, qwen3, llama2, mistral, gemma, baichuan, baichuan2, falcon, falcon_180b, chatglm2,
    # chatglm3
    chat: str | None = None
    samples: int = 1  # texts; more than one are printed when all are there
    # the most likely texts that a search with so many beams finds, with their scores; none: one is
    # drawn
    beams: int | None = None
    length_penalty: float = 1.0  # of beams: log-probabilities are divided by length to this power
    # what is computed in; none: what the run was trained in, but float32 on a CPU
    dtype: Literal["float32", "bfloat16"] | None = None
    # what keys and values are kept in: int8, in little more than a quarter of float32's memory, or
    # fp8, in a quarter, less exact; none: what is computed in
    cache: CacheKind | None = None
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own whose classes the run has

    def validate(self) -> None:
        """Raises UserError for settings that no text could satisfy."""
        super().validate()
        check_path(self.model or "", "model")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be 1 or more")
        if self.samples < 1:
            raise UserError(f"samples={self.samples}: must be 1 or more")
        other = self.stop or self.samples > 1 or self.beams is not None or self.special
        if self.chat is not None and other:
            raise UserError(
                "chat: a conversation has neither stop, samples nor beams, and no special"
            )
        if self.beams is not None:
            check_search(self.beams, self.length_penalty)
            if self.stop or self.samples > 1:
                raise UserError("beams: a search has neither stop strings nor samples")
            if given := changed(self, DRAWING):
                raise UserError(f"{', '.join(given)}: for texts that are drawn; beams are searched")

    def run(self) -> None:
        """Loads the model, and continues the prompt, fills its blanks, or talks.

        Raises:
            UserError: the model or the settings cannot serve; nothing is named.
        """
        if self.model is None:
            raise UserError("Which model? For instance: python -m lmjax.generation runs/quickstart")
        import_modules(self.imports)
        mesh = self.mesh.build()
        with jax.set_mesh(mesh), as_folder(local_copy(self.model, "model")) as folder:
            if self.chat is not None:
                check_chat(folder, self.chat)
            generator = load(folder, dtype=self.dtype, cache=self.cache)
            tell_recommended(self, folder)
            if generator.filling is not None:
                show_filled(generator, self)
            elif self.chat is None:
                show(generator, self)
            else:
                talk(generator, folder, self)


def say(text: str) -> None:
    """Writes to stdout, once for all processes."""
    if is_first():
        print(text, end="", flush=True)


def changed(settings: Generate, names: Sequence[str]) -> list[str]:
    """Those of the settings that are not as usual."""
    usual = Generate()
    return [name for name in names if getattr(settings, name) != getattr(usual, name)]


def tell_recommended(settings: Generate, folder: Path) -> None:
    """Says which settings the folder recommends that are not given: it is the user who chooses."""
    wanted = read_recommended(folder)
    missing = [f"{k}={json.dumps(v)}" for k, v in wanted.items() if getattr(settings, k, None) != v]
    if missing:
        tell(f"{settings.model} recommends {', '.join(missing)}; only what is given here counts")


def show(generator: TextGenerator, settings: Generate) -> None:
    """Prints the prompt and what follows it; a single drawn text as it is decoded."""
    prompt, max_tokens = settings.prompt, settings.max_tokens
    if settings.beams is not None:
        search = settings.beams, settings.length_penalty, max_tokens, settings.special
        found = generator.search(prompt, *search)
        for text, score in found:
            say(f"[{score:.3f}] {prompt}{text}\n")
    elif settings.samples > 1:
        how = settings, max_tokens, settings.stop, settings.samples, settings.special
        texts = generator.generate([prompt], *how)
        for number, text in enumerate(texts, 1):
            say(f"[{number}] {prompt}{text}\n")
    else:
        pieces = generator.stream(prompt, settings, max_tokens, settings.stop, settings.special)
        first = next(pieces, "")  # mistakes in the prompt come before anything is printed
        say(prompt + first)
        for piece in pieces:
            say(piece)
        say("\n")


def show_filled(generator: TextGenerator, settings: Generate) -> None:
    """Prints the prompt with its blanks filled, or what each of its masks may be."""
    if settings.stop or settings.chat is not None or settings.special:
        raise UserError(
            "stop, chat and special are for models that continue texts; this one fills blanks"
        )
    if isinstance(generator.filling, MaskedTokenInfiller):
        if given := changed(settings, WRITING):
            raise UserError(
                f"{', '.join(given)}: for models that write; this one guesses a word for each mask,"
                " and tells the likeliest"
            )
        for number, found in enumerate(generator.guess(settings.prompt), 1):
            guesses = ", ".join(f"{text} {probability:.3f}" for text, probability in found)
            say(f"[MASK] {number}: {guesses}\n")
        return
    search = settings.beams, settings.length_penalty
    filled = generator.fill(
        [settings.prompt], settings, settings.max_tokens, settings.samples, *search
    )
    for number, found in enumerate(filled, 1):
        say(f"[{number}] {found.text}\n" if settings.samples > 1 else f"{found.text}\n")


def talk(generator: TextGenerator, folder: Path, settings: Generate) -> None:
    """A conversation: a line of the user's, a reply, and so on until the input ends (Ctrl-D).

    The prompt, if there is one, is the user's first message.
    """
    if jax.process_count() > 1:
        raise UserError("chat: a conversation needs all devices in one process")
    template = chat_format(folder, generator.tokenizer, settings.chat)
    print(f"chat format: {template.title}", file=sys.stderr)
    messages: list[Message] = []
    line = settings.prompt or _line()
    while line is not None:
        messages.append(Message("user", line))
        text = ""
        for piece in generator.reply(template, messages, settings, settings.max_tokens):
            say(piece)
            text += piece
        say("\n")
        messages.append(template.read_reply(text))
        line = _line()


def _line() -> str | None:
    """The user's next line; None when the input has ended."""
    try:
        return input("> ")
    except EOFError:
        return None


if __name__ == "__main__":
    run(Generate(), positional="model")
