"""Scores of a model on ARC, HellaSwag and LAMBADA, beside EleutherAI's harness with transformers.

python -m benchmarks.evaluation folder=DATA python=PYTHON_WITH_LM_EVAL [items=1000] [json=FILE]

Both sides score a GPT-2 of 124M random parameters in float32, on the same items with the same
tokens. Timed is what lies between the requests as texts and their log-likelihoods. The sides take
turns, a task each; in the first turn ours compiles. Then the numbers are compared by request.
The harness's environment: pip install lm-eval==0.4.13 transformers torch.
"""

import json
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Worker, WorkerError, save, table
from lmjax.config import UserError, config
from lmjax.evaluation.tasks import Arc, HellaSwag, Item, Lambada
from lmjax.evaluation.tasks.records import read_files
from lmjax.evaluation.tasks.task import EvaluationTask
from lmjax.launch import exit_on_user_error, from_command_line

PAUSE = 0.3  # seconds until the threads of the side before have stopped waiting for work
SIDES = ("lmjax", "lm_eval")
FILES = {
    "arc": "arc/ARC-Challenge-Test.jsonl",
    "hellaswag": "hellaswag/hellaswag_val_full.txt.bz2",
    "lambada": "lambada/lambada_test.jsonl.gz",
}
# By task: names of its scores here and in the harness.
SCORES = {
    "arc": {"acc": "acc", "acc_norm": "acc_norm"},
    "hellaswag": {"acc": "acc", "acc_norm": "acc_norm"},
    "lambada": {"acc": "acc", "perplexity": "perplexity"},
}


@config
class EvaluationBenchmark:
    """Three tasks; ARC and HellaSwag may have examples in the prompt, the same for all items."""

    folder: str = ""  # with arc, hellaswag and lambada, as their authors publish them
    items: int = 1000  # of each task, the first ones
    shots: int = 0  # examples in front of each item of ARC and HellaSwag, the items behind these
    layers: int = 12  # blocks of the model
    hidden: int = 768  # width, of heads of 64
    vocabulary: int = 50_257  # rows of the table; tokens are learnt from the tasks' own texts
    batch: int = 16  # most rows that are run at once, on both sides
    cores: int = 0  # that each side may use; 0: all
    rounds: int = 2  # turns of each side with each task
    python: str = ""  # interpreter that has lm-eval, with this repository's folder in reach
    json: str = ""  # file for the results


def main() -> None:
    """Measures, prints, and ends with 1 where the numbers differ."""
    settings = from_command_line(EvaluationBenchmark())
    if not settings.folder:
        raise UserError("folder: give that of the test sets, with arc, hellaswag and lambada")
    with tempfile.TemporaryDirectory() as folder:
        write_items(settings, Path(folder))
        facts, rounds = measure(settings, folder)
    differences = {
        task: compare(task, *(rounds[task][side][-1] for side in SIDES)) for task in FILES
    }
    rows, ratios = [], {}
    for task, sides in rounds.items():
        for number, pair in enumerate(zip(*(sides[side] for side in SIDES), strict=True), 1):
            ours, theirs = (one["seconds"] for one in pair)
            ratios.setdefault(task, []).append(theirs / ours)
            rows.append([f"{task}, turn {number}", ours, theirs, theirs / ours])
    for number in range(settings.rounds):
        ours, theirs = (
            sum(rounds[task][side][number]["seconds"] for task in FILES) for side in SIDES
        )
        ratios.setdefault("all", []).append(theirs / ours)
        rows.append([f"all, turn {number + 1}", ours, theirs, theirs / ours])
    print(table(["seconds", *SIDES, "ratio"], rows), "\n")
    columns = ("numbers", "requests", "largest difference", "other choices", "scores differ by")
    print(table(columns, [[task, *found.values()] for task, found in differences.items()]))
    timed = {
        task: {side: [one["seconds"] for one in found] for side, found in sides.items()}
        for task, sides in rounds.items()
    }
    save(
        settings.json,
        "evaluation",
        sides=facts,
        seconds=timed,
        ratio=ratios,
        differences=differences,
        memory={side: rounds["lambada"][side][-1]["memory"] for side in SIDES},
    )
    if any(found["log_likelihood"] > 1e-2 for found in differences.values()):
        sys.exit(1)


def tasks(folder: str, shots: int) -> dict[str, EvaluationTask]:
    """Our tasks over the files that `write_items` writes."""

    def given(name: str, ending: str) -> dict[str, Any]:
        path = f"{folder}/{name}"
        more = {"shots": shots, "examples_path": f"{path}_examples{ending}"} if shots else {}
        return {"path": f"{path}{ending}", **more}

    return {
        "arc": Arc(**given("arc", ".jsonl")),
        "hellaswag": HellaSwag(**given("hellaswag", ".txt")),
        "lambada": Lambada(path=f"{folder}/lambada.jsonl"),
    }


def write_items(settings: EvaluationBenchmark, folder: Path) -> None:
    """Writes the first items of each task, as both sides read them, and all their text."""
    data, several = Path(settings.folder), settings.items + settings.shots
    arc = [
        {
            "question": item.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": list(item.choices), "label": list("ABCDE"[: len(item.choices)])},
            "answerKey": "ABCDE"[item.gold],
        }
        for item in Arc(path="arc").read_items(str(data / FILES["arc"]))[:several]
    ]
    hellaswag = HellaSwag(path="hellaswag").read_items(str(data / FILES["hellaswag"]))
    hellaswag = hellaswag[:several]
    texts = Lambada(path="lambada").read_items(str(data / FILES["lambada"]))[: settings.items]
    records = {
        "arc": arc,
        "hellaswag": [
            {"query": one.prompt, "choices": list(one.choices), "label": one.gold}
            for one in hellaswag
        ],
        "lambada": [{"text": f"{one.prompt} {one.answer}"} for one in texts],
    }

    def write(name: str, lines: list[dict]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")

    def write_blocks(name: str, items: list[Item]) -> None:
        blocks = [line for one in items for line in (one.prompt, str(one.gold), *one.choices)]
        (folder / f"{name}.txt").write_text("\n".join(blocks) + "\n", "utf-8")

    for name, lines in records.items():
        write(name, lines[: settings.items])
    write_blocks("hellaswag", hellaswag[: settings.items])
    if settings.shots:
        write("arc_examples", arc[settings.items :])
        write_blocks("hellaswag_examples", hellaswag[settings.items :])
        for name, task in tasks(str(folder), settings.shots).items():
            # The harness shows examples as they stand in a file: in the order of ours.
            shown = task.questions()[0].context if task.shots else ""
            key = {"arc": "question", "hellaswag": "query"}.get(name)
            lines = records[name][settings.items :] if key else []
            write(f"{name}_shown", sorted(lines, key=lambda line: shown.index(line[key])))
    whole = [file.text for name in FILES.values() for file in read_files(str(data / name))]
    (folder / "texts.json").write_text(json.dumps(whole), "utf-8")


def measure(settings: EvaluationBenchmark, folder: str) -> tuple[dict, dict]:
    """Facts of both sides; and by task and side, what each turn gave."""
    shape = {
        name: getattr(settings, name)
        for name in ("layers", "hidden", "vocabulary", "batch", "cores", "shots")
    }
    facts: dict[str, Any] = {}
    rounds: dict[str, dict[str, list]] = {task: {side: [] for side in SIDES} for task in FILES}
    with ExitStack() as stack:
        sides = {}
        # The harness's is first: it writes the folder that both read.
        for name in SIDES[::-1]:
            python = sys.executable if name == "lmjax" else settings.python or sys.executable
            worker = stack.enter_context(Worker(f"benchmarks.evaluation_{name}", python))
            begin = time.perf_counter()
            try:
                facts[name] = worker.ask("prepare", folder=folder, **shape)
            except WorkerError as error:
                raise UserError(
                    f"{name} cannot be measured: {error}. python=... names an interpreter that has "
                    "lm-eval, transformers and torch"
                ) from None
            sides[name] = worker
            seconds = time.perf_counter() - begin
            print(f"{name:8} {facts[name]['version']}, ready in {seconds:.0f} s", flush=True)
        for number in range(settings.rounds):
            for task in FILES:
                for name in SIDES[:: -1 if number % 2 else 1]:
                    time.sleep(PAUSE)
                    found = sides[name].ask("score", task=task)
                    rounds[task][name].append(found)
                    print(f"{task} {name} {found['seconds']:.1f} s", flush=True)
    return facts, rounds


def compare(task: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Differences of what both sides gave for the same requests."""
    pairs = list(zip(ours["answers"], theirs["answers"], strict=True))
    apart = [abs(one[0] - other[0]) for one, other in pairs]
    scores = [
        abs(ours["scores"][name] - theirs["scores"][other]) / max(1.0, abs(ours["scores"][name]))
        for name, other in SCORES[task].items()
    ]
    return {
        "requests": len(pairs),
        "log_likelihood": max(apart, default=math.nan),
        "greedy": sum(one[1] != other[1] for one, other in pairs),
        "scores": max(scores),
    }


if __name__ == "__main__":
    with exit_on_user_error():
        main()
