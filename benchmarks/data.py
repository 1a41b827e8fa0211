"""Documents and megabytes a second of cleaning, beside datatrove, rensa and datasketch.

python -m benchmarks.data python=PYTHON [texts=FOLDER] [json=FILE]

Both sides get the same documents and take turns, on one core each; the processor's seconds count.
PYTHON has datatrove[io,processing], spacy, lxml_html_clean, rensa and datasketch.
"""

import gzip
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Worker, WorkerError, save, spread, table
from lmjax.config import UserError, config
from lmjax.data.cleaning.near_duplicates import ngrams
from lmjax.data.encodings import decode_page
from lmjax.launch import exit_on_user_error, from_command_line

FILTERS = ("GopherQuality", "GopherRepetition", "C4", "FineWeb")
STEPS = (*FILTERS, "MinHash", "extraction", "whole")
SHORT = 300  # characters of a paragraph that is signed beside rensa and datasketch, at least
SIMILAR = 0.8  # least similarity of pairs that have to be found


@config
class DataBenchmark:
    """Steps of a cleaning, whole cleanings, and what they need."""

    texts: str = "../shared/data/gutenberg"  # folder of .txt.gz, of which paragraphs are taken
    documents: int = 400  # texts of about 4 kB for the steps
    rounds: int = 3  # turns of each side
    larger: int = 20  # times as much text for which the memory is measured; 0: it is not
    megabytes: float = 4.0  # of text, once
    python: str = ""  # interpreter that has the others
    json: str = ""  # file for the results

    def validate(self) -> None:
        """Raises UserError for settings that measure nothing."""
        if min(self.rounds, self.documents) < 1:
            raise UserError("rounds and documents must be at least 1")


def read_texts(folder: str) -> list[str]:
    """Neighbouring paragraphs of books, about 4 kB together. UserError: there are none."""
    found: list[str] = []
    for path in sorted(Path(folder).glob("*.txt.gz")):
        part: list[str] = []
        for paragraph in (
            gzip.decompress(path.read_bytes()).decode("utf-8", "replace").split("\r\n\r\n")
        ):
            part.append(paragraph.replace("\r\n", " "))
            if sum(map(len, part)) > 4000:
                found.append("\n".join(part))
                part = []
    if not found:
        raise UserError(f"texts={folder} has no .txt.gz")
    return found


def read_pages() -> list[str]:
    """The pages of the tests."""
    paths = sorted((ROOT / "tests" / "data" / "pages").glob("*.html.gz"))
    return [decode_page(gzip.decompress(path.read_bytes())) for path in paths]


def compare(settings: DataBenchmark, texts: list[str]) -> dict[str, Any]:
    """Rates of both sides for each step, and the ratios of the rounds."""
    chosen = texts[:: max(1, len(texts) // settings.documents)][: settings.documents]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        paths = {"texts": chosen, "pages": read_pages()}
        for name, some in paths.items():
            paths[name] = str(Path(folder, name))
            Path(paths[name]).write_text(json.dumps(some), "utf-8")
        sides = {}
        for name, python in (("lmjax", sys.executable), ("others", settings.python)):
            if python:
                module = f"benchmarks.data_{name}"
                sides[name] = stack.enter_context(Worker(module, python))
                sides[name].ask("prepare", **paths)
        found = {step: _alternate(settings, sides, step) for step in STEPS}
        if "others" in sides:
            short = [part for text in texts for part in text.split("\n") if len(part) > SHORT]
            short = short[:: max(1, len(short) // 6000)]
            Path(paths["texts"]).write_text(json.dumps(short), "utf-8")
            for side in sides.values():
                side.ask("prepare", **paths)
            found |= _signing(settings, sides, short)
        return found


def _alternate(settings: DataBenchmark, sides: dict[str, Worker], step: str) -> dict[str, Any]:
    for side in sides.values():  # imports, and what is made once
        side.ask("run", name=step, share=0.02)
    rounds = []
    for number in range(settings.rounds):
        print(f"{step}, round {number + 1}", file=sys.stderr)
        names = list(sides)[:: -1 if number % 2 else 1]
        rounds.append({name: sides[name].ask("run", name=step) for name in names})
    return _summary(rounds)


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in rounds[0]:
        seconds = statistics.median(turn[name]["processor_seconds"] for turn in rounds)
        turn = rounds[0][name]
        found[name] = {
            "documents_a_second": turn["documents"] / seconds,
            "megabytes_a_second": turn["bytes"] / 1e6 / seconds,
            "kept": turn["kept"],
        }
    if len(found) > 1:
        one, other = ("lmjax", next(name for name in found if name != "lmjax"))
        found["ratio"] = spread(
            [turn[other]["processor_seconds"] / turn[one]["processor_seconds"] for turn in rounds]
        )
    return found


def _signing(settings: DataBenchmark, sides: dict[str, Worker], texts: list[str]) -> dict[str, Any]:
    """Signing beside rensa and datasketch, and the similar pairs that are found."""
    found = {}
    for library in ("rensa", "datasketch"):
        step = f"signing {library}"
        sides["others"].ask("run", name=step, share=0.02)
        rounds = []
        for number in range(settings.rounds):
            turn = [("lmjax", "MinHash"), ("others", step)]
            turn = turn[:: -1 if number % 2 else 1]
            rounds.append({name: sides[name].ask("run", name=what) for name, what in turn})
        found[step] = _summary(rounds)
    sets = [ngrams(text, 5) for text in texts]
    candidates = {name: {*map(tuple, side.ask("pairs"))} for name, side in sides.items()}
    every = set().union(*candidates.values())
    similar = {
        (a, b) for a, b in every if len(sets[a] & sets[b]) >= SIMILAR * len(sets[a] | sets[b])
    }
    found["recall"] = {
        name: len(similar & some) / len(similar) if similar else None
        for name, some in candidates.items()
    }
    found["similar_pairs"] = len(similar)
    return found


def measure_cleanings(settings: DataBenchmark, texts: list[str]) -> dict[str, Any]:
    """Seconds and memory of whole cleanings: of more text, and by two workers."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, settings.larger):
            corpus = Path(folder, f"corpus-{times}")
            corpus.mkdir()
            write_corpus(corpus, texts, times * settings.megabytes)
            for workers in (0,) if times == 1 else (1, 2, 2, 1):
                output = Path(folder, "output")
                command = [sys.executable, "-m", "benchmarks.data_lmjax", f"{corpus}/*.jsonl"]
                command += [str(output), str(workers)]
                print(f"{times} times the text, {workers} workers", file=sys.stderr)
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                found.setdefault(f"{times}x {workers}", []).append(json.loads(done.stdout))
                shutil.rmtree(output)
            if times != 1:
                output = Path(folder, "output")
                command[-1] = "0"
                done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
                found[f"{times}x 0"] = [json.loads(done.stdout)]
                shutil.rmtree(output)
    return found


def write_corpus(folder: Path, texts: list[str], megabytes: float) -> None:
    """Files of different documents: texts, of which later ones have their words turned round."""
    size = number = 0
    part = max(megabytes / 32, 0.1) * 1e6
    lines: list[str] = []
    while size < megabytes * 1e6:
        text, again = texts[number % len(texts)], number // len(texts)
        if again:
            shift = 7 * again
            text = "\n".join(" ".join(_turned(line.split(), shift)) for line in text.split("\n"))
        lines.append(json.dumps({"text": text}))
        size, number = size + len(text), number + 1
        if sum(map(len, lines)) > part:
            Path(folder, f"{number:06}.jsonl").write_text("\n".join(lines))
            lines = []
    if lines:
        Path(folder, f"{number:06}.jsonl").write_text("\n".join(lines))


def _turned(words: list[str], shift: int) -> list[str]:
    shift %= max(len(words), 1)
    return words[shift:] + words[:shift]


def main() -> None:
    """Measures and prints."""
    settings = from_command_line(DataBenchmark())
    texts = read_texts(settings.texts)
    try:
        steps = compare(settings, texts)
    except WorkerError as error:
        raise UserError(f"python={settings.python}: {error}") from None
    rows = []
    for name, found in steps.items():
        if isinstance(found, dict) and "lmjax" in found and isinstance(found["lmjax"], dict):
            other = next((side for side in found if side not in ("lmjax", "ratio")), None)
            rows.append([name, found["lmjax"]["documents_a_second"]])
            rows[-1].append(found["lmjax"]["megabytes_a_second"])
            rows[-1].append(found[other]["megabytes_a_second"] if other else "-")
            rows[-1].append(found["ratio"]["median"] if other else "-")
    print(table(["step", "documents/s", "MB/s", "others' MB/s", "times as fast"], rows))
    print({name: steps[name] for name in ("recall", "similar_pairs") if name in steps})
    cleanings = measure_cleanings(settings, texts) if settings.larger else {}
    for name, runs in cleanings.items():
        print(name, [{key: round(value, 1) for key, value in run.items()} for run in runs])
    save(settings.json, "data", steps=steps, cleanings=cleanings)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
