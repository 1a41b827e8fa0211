"""Tokens a second and time to the first token of the server's engine, beside other generators.

python -m benchmarks.serving [python=PYTHON_WITH_TRANSFORMERS] [json=FILE]
python -m benchmarks.serving layers=2 hidden=64 heads=4 vocabulary=512 tokens=16 prefix=96 rounds=2

One process has lmjax's sides, another one transformers' `generate`; they take turns, with one
random model in float32. Greedy tokens of one stream and of several clients at once; then prompts
whose beginning the cache knows, and others.
"""

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.generation import Generator, Sampling
from lmjax.interop import huggingface
from lmjax.launch import exit_on_user_error, from_command_line
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig, initialize
from lmjax.parallel import Mesh, generation_layout
from lmjax.serving.engine import Engine
from lmjax.serving.request import CollectedAnswer, ScoredToken, TokenRequest
from lmjax.serving.settings import EngineSettings
from lmjax.serving.weights import ServedWeights

GREEDY = Sampling(temperature=0.0)
PAUSE = 0.3  # seconds until the threads of the side before have stopped waiting for work


@config
class ServingBenchmark:
    """Greedy answers of a model with the shape of GPT-2."""

    layers: int = 12  # blocks
    hidden: int = 768  # width
    heads: int = 12  # of attention
    length: int = 2048  # longest sequence of the model
    vocabulary: int = 50_257  # tokens
    prompt: int = 32  # tokens of each prompt
    tokens: int = 64  # of each answer
    clients: int = 16  # at once
    prefix: int = 1000  # tokens of the beginning that the cache knows
    guesses: int = 8  # tokens that are guessed ahead, on text that repeats
    rounds: int = 5  # turns of each side
    python: str = ""  # interpreter that has torch, numpy and transformers
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for numbers that measure nothing."""
        for name in ("prompt", "clients", "prefix", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if self.tokens < 2:
            raise UserError(f"tokens={self.tokens}: must be 2 or more")
        if max(self.prompt + self.tokens, self.prefix) + self.tokens + 16 > self.length:
            raise UserError(f"the prompts and answers are more than the model's {self.length}")


class TimedAnswer(CollectedAnswer):
    """An answer that knows when its first token came."""

    first = 0.0

    def take(self, token: ScoredToken) -> bool:
        """See `Answer.take`."""
        self.first = self.first or time.perf_counter()
        return super().take(token)


class Sides:
    """The sides that take turns, compiled before they are timed."""

    def __init__(self, settings: ServingBenchmark):
        """Draws the model; a mesh must be set."""
        model = TransformerConfig(
            vocab_size=settings.vocabulary,
            hidden=settings.hidden,
            num_layers=settings.layers,
            max_length=settings.length,
            attention=AttentionConfig(
                num_heads=settings.heads, head_dim=settings.hidden // settings.heads
            ),
            feed_forward=FeedForwardConfig(size=4 * settings.hidden),
        )
        _, params = initialize(model, generation_layout(), jax.random.key(0))
        self.settings, self.generator = settings, Generator(model, params)
        self.parameters = model, params
        weights = {"": ServedWeights.of(self.generator)}
        most = settings.clients * (settings.prompt + settings.tokens + 32)
        sizes = EngineSettings(
            slots=settings.clients, cache_tokens=max(most, 4 * settings.length), chunk=256
        )
        self.engine = Engine(weights, sizes)
        self.guessing = Engine(weights, type(sizes)(guesses=settings.guesses))
        self._draw = np.random.default_rng(0)

    def text(self, length: int) -> list[int]:
        """A prompt that no cache knows."""
        return self._draw.integers(0, self.settings.vocabulary, length).tolist()

    def answer(
        self, engine: Engine, prompts: list[list[int]], tokens: int
    ) -> tuple[float, float, list[list[int]]]:
        """Seconds to the first token of the first prompt, seconds of all, and the tokens."""
        answers = [TimedAnswer() for _ in prompts]
        begin = time.perf_counter()
        for prompt, answer in zip(prompts, answers):
            engine.submit(TokenRequest(prompt, GREEDY, tokens), answer)
        while engine.step():
            pass
        end = time.perf_counter()
        return answers[0].first - begin, end - begin, [answer.ids for answer in answers]

    def turn(self) -> dict[str, float]:
        """One turn of all sides. UserError where they do not agree."""
        settings = self.settings
        prompt = self.text(settings.prompt)
        begin = time.perf_counter()
        (wanted,) = self.generator.generate([prompt], GREEDY, settings.tokens)
        generator = time.perf_counter() - begin
        _, one, (found,) = self.answer(self.engine, [prompt], settings.tokens)
        if found != wanted:
            raise UserError("the engine and the generator differ")
        many = [self.text(settings.prompt) for _ in range(settings.clients)]
        _, several, _ = self.answer(self.engine, many, settings.tokens)
        start = self.text(settings.prefix)
        fresh, _, _ = self.answer(self.engine, [[*start, *self.text(8)]], 2)
        known, _, _ = self.answer(self.engine, [[*start, *self.text(8)]], 2)
        repeats = [*prompt, *wanted]  # a random model's own answers go round sooner or later
        _, plain, (first,) = self.answer(self.engine, [repeats], settings.tokens)
        _, guessed, (second,) = self.answer(self.guessing, [repeats], settings.tokens)
        if first != second:
            raise UserError("guesses change the answer")
        count = settings.tokens
        return {
            "generator, one stream, tokens/s": count / generator,
            "server, one stream, tokens/s": count / one,
            f"server, {settings.clients} clients, tokens/s": count * settings.clients / several,
            "first token, unknown beginning, ms": 1000 * fresh,
            "first token, known beginning, ms": 1000 * known,
            "text that repeats, tokens/s": count / plain,
            "text that repeats, guessed, tokens/s": count / guessed,
        }


class Transformers:
    """transformers' `generate` of as many prompts at once as there are clients, and of one."""

    def __init__(self, settings: ServingBenchmark, sides: Sides, folder: Path, worker: Worker):
        """Gives the model to the process; WorkerError where it has no transformers."""
        huggingface.write(folder / "model", *sides.parameters)
        prompts = [sides.text(settings.prompt) for _ in range(settings.clients)]
        np.save(folder / "prompts.npy", np.asarray(prompts, np.int32))
        self.worker, self.settings = worker, settings
        how = {"prompt": settings.prompt, "tokens": settings.tokens, "cores": 0}
        batches = [1, settings.clients]
        worker.ask("prepare", folder=str(folder), batches=batches, **how)

    def turn(self) -> dict[str, float]:
        """Tokens a second."""
        found = {}
        for name, batch in (("one", 1), (str(self.settings.clients), self.settings.clients)):
            count = self.settings.tokens
            seconds = self.worker.ask("decode", batch=batch, tokens=count)["seconds"]
            found[f"transformers, {name} at once, tokens/s"] = count * batch / seconds
        return found


def ratios(turn: dict[str, float], clients: int) -> dict[str, float]:
    """Ratios of what one turn measured."""
    one, many = (turn[f"server, {n}, tokens/s"] for n in ("one stream", f"{clients} clients"))
    known, unknown = (turn[f"first token, {n} beginning, ms"] for n in ("known", "unknown"))
    plain, guessed = (turn[f"text that repeats{n}, tokens/s"] for n in ("", ", guessed"))
    found = {
        f"{clients} clients / one": many / one,
        "known / unknown beginning": known / unknown,
        "guessed / not": guessed / plain,
    }
    for name, ours in (("one", one), (str(clients), many)):
        if (theirs := turn.get(f"transformers, {name} at once, tokens/s")) is not None:
            found[f"server / transformers, {name} at once"] = ours / theirs
    return found


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(ServingBenchmark())
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(Mesh(fsdp=1).build(jax.devices()[:1])))
        sides = Sides(settings)
        sides.turn()  # compiles
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        all_sides = [sides]
        worker = Worker("benchmarks.decode_torch", settings.python or sys.executable)
        worker = stack.enter_context(worker)
        try:
            all_sides.append(Transformers(settings, sides, folder, worker))
        except WorkerError as error:
            print(f"transformers is left out: {error}; give python=... one that has it")
        turns = []
        for number in range(settings.rounds):
            turn = {}
            for side in all_sides[:: -1 if number % 2 else 1]:
                time.sleep(PAUSE)
                turn |= side.turn()
            turns.append(turn | ratios(turn, settings.clients))
    found = {name: [turn[name] for turn in turns] for name in turns[0]}
    results = {name: spread(values) for name, values in found.items()}
    rows = [[name, *result.values()] for name, result in results.items()]
    print(table(["measure", "min", "median", "max"], rows))
    save(settings.json, "serving", results=results)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
