"""Seconds to read a public folder's tokenizer and to encode 20 MB of text, beside transformers.

python -m benchmarks.tokenizer folder=FOLDER [texts=FOLDER] [json=FILE]

Both sides get the same list of documents, read the tokenizer anew in every turn, and take turns.
"""

import gzip
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

PARAGRAPHS = 10  # of a plain text that make a document
SHORTEST = 100  # characters of a string in a JSON file that is a text
SAMPLE = 300  # documents whose tokens are compared


@config
class TokenizerBenchmark:
    """A tokenizer is read and encodes all documents, which are whole texts in any order."""

    folder: str = ""  # with the tokenizer, a public model's
    texts: str = "../shared/data"  # with .txt, .py and .json files, also compressed by gzip
    megabytes: float = 20.0  # of text; texts are repeated where there are fewer
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 5  # turns of each side
    python: str = ""  # interpreter that has transformers
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for settings that measure nothing."""
        if self.rounds < 1 or self.megabytes <= 0:
            raise UserError("rounds must be at least 1, and megabytes above 0")


def documents(settings: TokenizerBenchmark) -> list[str]:
    """Texts of all files in turn, until there are enough. UserError where there are none."""
    found = [
        text
        for root in (Path(settings.texts), Path(__file__).parents[1] / "lmjax")
        for path in sorted(root.rglob("*"))
        if path.name.removesuffix(".gz").endswith((".txt", ".py", ".json"))
        for text in _texts(path)
    ]
    if not found:
        raise UserError(f"texts={settings.texts}: there are no texts")
    random.Random(0).shuffle(found)
    chosen, size = [], 0
    while size < settings.megabytes * 1e6:
        chosen.append(found[len(chosen) % len(found)])
        size += len(chosen[-1].encode("utf-8"))
    return chosen


def _texts(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
    if path.name.removesuffix(".gz").endswith(".json"):
        yield from _strings(json.loads(text))
        return
    paragraphs = text.split("\n\n")
    for first in range(0, len(paragraphs), PARAGRAPHS):
        yield "\n\n".join(paragraphs[first : first + PARAGRAPHS])


def _strings(value: Any) -> Iterator[str]:
    """The longer texts in a JSON value; a list of short ones is a text."""
    if isinstance(value, str):
        if len(value) >= SHORTEST:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        if value and all(isinstance(inner, str) for inner in value):
            yield "\n".join(value)
        else:
            for inner in value:
                yield from _strings(inner)


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(TokenizerBenchmark())
    if not settings.folder or not Path(settings.folder).is_dir():
        raise UserError(f"folder={settings.folder!r}: give the folder of a tokenizer")
    texts = documents(settings)
    size = sum(len(text.encode("utf-8")) for text in texts)
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB, {len(set(texts))} of them different")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "documents.json")
        path.write_text(json.dumps(texts), "utf-8")
        sides, facts = start(settings, path, stack)
        samples = {name: side.ask("sample", count=SAMPLE) for name, side in sides.items()}
        rounds = alternate(settings, sides)
    same = {
        name: sum(a == b for a, b in zip(theirs, samples["lmjax"], strict=True)) / len(theirs)
        for name, theirs in samples.items()
    }
    summary = summarise(rounds, same, size)
    save(settings.json, "tokenizer", bytes=size, sides=facts, rounds=rounds, summary=summary)


def start(settings: TokenizerBenchmark, path: Path, stack: ExitStack) -> tuple[dict, dict]:
    """The sides by name with their documents, and what they tell of themselves."""
    sides, facts = {}, {}
    for name, python in (
        ("lmjax", sys.executable),
        ("transformers", settings.python or sys.executable),
    ):
        worker = stack.enter_context(Worker(f"benchmarks.tokenizer_{name}", python))
        folder = str(Path(settings.folder).resolve())
        try:
            facts[name] = worker.ask(
                "prepare", folder=folder, documents=str(path), cores=settings.cores
            )
        except WorkerError as error:
            if name == "lmjax":
                raise
            print(f"{name:12}  left out: {error}; give python=... one that has it")
            continue
        sides[name] = worker
        print(f"{name:12}  {facts[name]['version']}, {facts[name]['threads']} cores")
    return sides, facts


def alternate(settings: TokenizerBenchmark, sides: Mapping[str, Worker]) -> list[dict[str, Any]]:
    """Measurements of each side in each round, first the one, then the other."""
    rounds = []
    for number in range(settings.rounds):
        print(f"round {number + 1}", file=sys.stderr)
        names = list(sides)[:: -1 if number % 2 else 1]
        rounds.append({name: sides[name].ask("encode") for name in names})
    return rounds


def summarise(rounds: list[dict], same: Mapping[str, float], size: int) -> dict[str, Any]:
    """Prints the table; times of each side and the ratios of every round."""
    rows, summary = [], {}
    for name in sorted(rounds[0]):
        turns = [turn[name] for turn in rounds]
        seconds = spread([turn["seconds"] for turn in turns])
        load = spread([turn["load_seconds"] for turn in turns])
        used = spread([turn["processor_seconds"] for turn in turns])
        rows.append([name, seconds["min"], seconds["median"], load["median"], used["median"]])
        rows[-1] += [size / 1e6 / seconds["median"], turns[0]["tokens"], same[name]]
        summary[name] = {"seconds": seconds, "load_seconds": load, "processor_seconds": used}
        summary[name] |= {
            "tokens": turns[0]["tokens"],
            "documents_with_the_same_tokens": same[name],
        }
    columns = ["", "s (min)", "(median)", "of it to read", "of processors", "MB/s", "tokens"]
    print(table([*columns, "same documents"], rows))
    if "transformers" in summary:
        for key in ("seconds", "processor_seconds"):
            ratio = spread([turn["transformers"][key] / turn["lmjax"][key] for turn in rounds])
            summary[f"transformers_over_lmjax_{key}"] = ratio
            print(
                f"transformers' {key.replace('_', ' ')} / lmjax's: {ratio['median']:.2f} "
                f"({ratio['min']:.2f} to {ratio['max']:.2f})"
            )
    return summary


if __name__ == "__main__":
    with exit_on_user_error():
        main()
