"""Writes tests/data/evaluation: small test sets, and what the harness's own model gives for them.

    pip install 'lm-eval==0.4.13' 'transformers>=5,<6' torch
    python -m tests.lmjax.evaluation.harness_golden [MODEL ...]

lm-eval's `hf` model reads the models of tests/data/parity with a token a character, answers
the requests of its own tasks over these files, and aggregates them.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.parity_cases import finished_folder

FOLDER = Path(__file__).parents[2] / "data" / "evaluation"
GOLDEN = FOLDER / "harness.json"
# By name: most tokens that the model reads; beyond those of its file where positions are computed.
LENGTHS = {
    "train_gpt2": 32,  # after twelve steps of training
    "train_llama": 64,
    "llama2_gqa": 64,
    "mistral": 512,
    "bloom": 512,
    "opt": 32,
    "falcon_7b": 512,
    "qwen2": 512,
    "gemma2": 512,
}
ARC = (
    ("Which of these melts in the sun?", ("ice", "a stone", "glass", "iron"), 0),
    ("What do plants take from the air?", ("sand", "carbon dioxide", "salt"), 1),
    ("A magnet attracts a", ("wooden spoon", "cup of tea", "paper bag", "steel nail"), 3),
    ("Sound is slowest in", ("air", "water", "steel", "oak"), 0),
    ("Why is the Moon bright?", ("It burns.", "It reflects sunlight."), 1),
    ("Which unit is one of mass?", ("metre", "second", "gram", "volt"), 2),
)
SCENES = (
    ("Baking: A man breaks two eggs. he", ("stirs them with flour.", "rides away."), 0),
    ("Sailing: The wind turns. the crew", ("plants a tree.", "moves the sail.", "sleeps"), 1),
    ("Chess: She takes the rook. her rival", ("frowns", "boils water", "paints it"), 0),
)
PASSAGES = (
    "She asked for tea, and he brought her a cup of tea",
    "They had one dog. In the yard barked the dog",
    'He said "no" twice. The answer was still no',
    "The bridge was old, so nobody crossed the bridge",
)
TRUTH = (
    ("Can pigs fly?", {"No, they cannot.": 1, "Yes": 0}, {"No": 1, "They can't": 1, "Yes": 0}),
    ("Is the sea red?", {"It is blue or grey": 1, "All red": 0, "It is": 0},
     {"No": 1, "Often blue": 1, "It is red": 0, "Only at night": 0}),
)  # fmt: skip
TEXTS = (" = A = \n words , and : more words . \n", "One line of a text that has no end" * 6)


def write_files():
    """The test sets, in the layouts of the public ones."""
    FOLDER.mkdir(exist_ok=True)
    arc = [
        {
            "id": f"own-{n}",
            "question": question,
            "choices": {"text": list(texts), "label": list("ABCD"[: len(texts)])},
            "answerKey": "ABCD"[gold],
        }
        for n, (question, texts, gold) in enumerate(ARC)
    ]
    truth = [
        {
            "question": question,
            **{
                name: {"choices": list(t), "labels": list(t.values())}
                for name, t in (("mc1_targets", one), ("mc2_targets", two))
            },
        }
        for question, one, two in TRUTH
    ]
    scenes = [
        {"query": query, "choices": list(endings), "label": gold} for query, endings, gold in SCENES
    ]
    files = {
        "arc": arc,
        "truthfulqa": truth,
        "hellaswag": scenes,
        "lambada": [{"text": text} for text in PASSAGES],
        "texts": [{"page": text} for text in TEXTS],
    }
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (FOLDER / f"{name}.jsonl").write_text(lines)
    lines = [line for query, ends, gold in SCENES for line in (query, str(gold), *pad(ends))]
    (FOLDER / "hellaswag.txt").write_text("\n".join(lines) + "\n")


def pad(endings):
    """Four endings, as the text layout wants them."""
    return (*endings, *("and so on", "the end"))[:4]


def library_tokenizer():
    """The characters of the tests' tokenizer, and its separator in front of every text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.lmjax.evaluation.scored_models import TOKENIZER

    names = [TOKENIZER.decode([n]) for n in range(96)] + ["<|endoftext|>"]
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: n for n, name in enumerate(names)}, unk_token=" ")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    library.decoder = tokenizers.decoders.Fuse()
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 96)]
    )
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=library, pad_token="<|endoftext|>", **ends)


def tasks(folder):
    """The harness's tasks over our files: its own settings, but for where the data lie."""
    import lm_eval

    theirs = Path(lm_eval.__file__).parent / "tasks"
    rows = {
        "own_arc": ("arc/arc_easy.yaml", "arc"),
        "own_mc1": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa"),
        "own_mc2": ("truthfulqa/truthfulqa_mc2.yaml", "truthfulqa"),
        "own_lambada": ("lambada/lambada_openai.yaml", "lambada"),
        "own_wikitext": ("wikitext/wikitext.yaml", "texts"),
    }
    for name, (base, data) in rows.items():
        lines = [
            f"include: {theirs / base}",
            f"task: {name}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {{test: {FOLDER / data}.jsonl}}}}",
            *("test_split: test", "validation_split: null", "training_split: null"),
        ]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    (folder / "own_hellaswag.yaml").write_text(
        "task: own_hellaswag\ndataset_path: json\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {FOLDER}/hellaswag.jsonl}}}}\ntest_split: test\n"
        'doc_to_text: "{{query}}"\ndoc_to_target: "{{label}}"\ndoc_to_choice: "choices"\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n  - metric: acc_bytes\n"
    )
    return [*rows, "own_hellaswag"]


def run(name):
    """Requests, answers and scores of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished_folder(name), dtype="float32")
    # The separator ends a text in our runs; the end token of the folder is a character here.
    model.generation_config.eos_token_id = 96
    lm = HFLM(
        pretrained=model.eval(),
        tokenizer=library_tokenizer(),
        batch_size=4,
        max_length=LENGTHS[name],
    )
    with tempfile.TemporaryDirectory() as folder:
        names = tasks(Path(folder))
        manager = TaskManager(include_path=folder, include_defaults=False)
        found = simple_evaluate(
            lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0
        )
    requests, answers = [], []
    for task in names:
        for sample in sorted(found["samples"][task], key=lambda one: one["doc_id"]):
            for number, given in enumerate(sample["resps"]):
                arguments = sample["arguments"]
                asked = (
                    arguments[number]
                    if isinstance(arguments, list)
                    else (arguments[f"gen_args_{number}"].values())
                )
                requests.append([task, *asked])
                answers.append(given[0] if isinstance(given[0], (int, float)) else [*given[0]])
    settings = {"until": ["e"], "max_gen_toks": 8, "do_sample": False}
    prompts = ["Q: 1", "a longer prompt than that", "once"]
    asked = [
        Instance("generate_until", {}, (prompt, settings), number)
        for number, prompt in enumerate(prompts)
    ]
    scores = {
        task: {k: v for k, v in found["results"][task].items() if k != "alias"} for task in names
    }
    return requests, {
        "answers": answers,
        "scores": scores,
        "written": [prompts, lm.generate_until(asked)],
    }


def main():
    write_files()
    golden = json.loads(GOLDEN.read_text()) if sys.argv[1:] else {"models": {}}
    for name in sys.argv[1:] or LENGTHS:
        requests, found = run(name)
        assert golden.setdefault("requests", requests) == requests
        golden["models"][name] = {"max_length": LENGTHS[name], **found}
        GOLDEN.write_text(json.dumps(golden, separators=(",", ":"), default=str) + "\n")
        print(name, found["scores"], flush=True)


if __name__ == "__main__":
    main()
