"""The harness's side of `benchmarks.evaluation`: a worker that needs lm-eval and transformers."""

import json
import resource
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, serve

END = "<|endoftext|>"
TASKS = {"arc": "arc/arc_challenge.yaml", "lambada": "lambada/lambada_openai.yaml"}
HELLASWAG = """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


class Side:
    """The harness's `hf` model over its own tasks, whose files are ours."""

    def prepare(
        self,
        folder: str,
        batch: int,
        cores: int,
        layers: int,
        hidden: int,
        vocabulary: int,
        shots: int,
    ) -> dict[str, Any]:
        """Writes model and tokenizer, and the tasks."""
        threads = keep_to_cores(cores)
        import lm_eval
        import torch
        import transformers
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        tokenizer = make_tokenizer(json.loads(Path(folder, "texts.json").read_text()), vocabulary)
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=hidden, n_head=hidden // 64, vocab_size=vocabulary,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config).eval()
        model.save_pretrained(Path(folder, "model"))
        tokenizer.save_pretrained(Path(folder, "model"))
        self.model = Timed(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=1024)
        )
        write_tasks(Path(lm_eval.__file__).parent / "tasks", Path(folder), shots)
        self.manager = TaskManager(include_path=folder, include_defaults=False)
        versions = f"lm-eval {lm_eval.__version__}, transformers {transformers.__version__}"
        return {
            "version": f"{versions}, torch {torch.__version__}",
            "threads": threads,
            "parameters": sum(p.numel() for p in model.parameters()),
        }

    def score(self, task: str) -> dict[str, Any]:
        """Seconds until all requests of a task are answered, the answers and the scores."""
        from lm_eval import simple_evaluate

        self.model.seconds = 0.0
        found = simple_evaluate(
            self.model.lm,
            tasks=[f"bench_{task}"],
            task_manager=self.manager,
            log_samples=True,
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"][f"bench_{task}"], key=lambda one: one["doc_id"])
        answers = [given[0] for sample in samples for given in sample["resps"]]
        scores = found["results"][f"bench_{task}"]
        return {
            "seconds": self.model.seconds,
            "answers": [[float(value), str(greedy) == "True"] for value, greedy in answers],
            "scores": {k.removesuffix(",none"): v for k, v in scores.items() if "stderr" not in k},
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


class Timed:
    """The harness's model, whose answers to log-likelihood requests are timed."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.seconds = lm, 0.0
        original = lm.loglikelihood

        def loglikelihood(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            found = original(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            return found

        lm.loglikelihood = loglikelihood


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Byte-level BPE, as GPT-2's, of the tasks' own texts."""
    import tokenizers
    import transformers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocabulary, 2, False, [END])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def write_tasks(theirs: Path, folder: Path, shots: int) -> None:
    """Writes the harness's tasks with its own settings, but for where the data lie."""
    for name in ("arc", "hellaswag", "lambada"):
        head = f"include: {theirs / TASKS[name]}\n" if name in TASKS else HELLASWAG
        files, examples = f"test: {folder / name}.jsonl", ""
        if shots and name != "lambada":
            files += f", train: {folder / name}_shown.jsonl"
            examples = "fewshot_split: train\nfewshot_config: {sampler: first_n}\n"
            examples += f"num_fewshot: {shots}\n"
        (folder / f"bench_{name}.yaml").write_text(
            f"{head}task: bench_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{files}}}}}\n"
            f"test_split: test\nvalidation_split: null\ntraining_split: null\n{examples}"
        )


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "score": side.score})
