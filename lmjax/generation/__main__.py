"""Streams text from a trained model.

python -m lmjax.generation runs/quickstart prompt="The list" temperature=0.8
"""

import importlib

import jax

from lmjax.config import UserError, config, exit_on_user_error, from_command_line
from lmjax.generation.run import load_run
from lmjax.generation.sampling import Sampling
from lmjax.parallel import Mesh


@config
class Generate(Sampling):
    """Text from a run."""

    run: str | None = None  # the run folder
    prompt: str = ""  # the text to continue; empty: the beginning of a document
    max_tokens: int = 200  # most tokens
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    mesh: Mesh = Mesh()  # how the devices are arranged
    imports: tuple[str, ...] = ()  # modules of your own that declare parts of the model

    def validate(self) -> None:
        """Raises UserError for settings that no text could satisfy."""
        super().validate()
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}: must be 1 or more")


def import_module(name: str) -> None:
    """Imports a module that the user named. UserError where there is none."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"imports={name}: {error}") from None


def main() -> None:
    """Loads the run and prints the prompt and what follows it, as it is decoded."""
    settings = from_command_line(Generate(), positional="run")
    if settings.run is None:
        raise UserError("Which run? For instance: python -m lmjax.generation runs/quickstart")
    for module in settings.imports:
        import_module(module)
    with jax.set_mesh(settings.mesh.build()):
        generator = load_run(settings.run)
        pieces = generator.stream(settings.prompt, settings, settings.max_tokens, settings.stop)
        first = next(pieces, "")  # mistakes in the prompt come before anything is printed
        print(settings.prompt + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
