"""TRL's side of `benchmarks.alignment`: a worker that needs trl, torch, transformers, datasets."""

import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep_to_cores, serve

WARM_UP = 1  # steps
RATE = 1e-5
REGULAR = {
    "max_steps": 1_000_000,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1_000_000,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


class Side:
    """A trainer in a thread of its own, which stops before each step until it may take it."""

    def prepare(self, folder: str, task: str, cores: int, **shape: int) -> dict[str, Any]:
        """Makes the model's folder where it is missing, and the trainer; takes a first step."""
        threads = keep_to_cores(cores)
        import torch
        import trl

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = Path(folder, "model")
        if not model.exists():
            write_model(model, Path(folder), **shape)
        self.task, self.units = task, 0
        self.allowed, self.done = threading.Semaphore(0), threading.Semaphore(0)
        trainer = make_trainer(self, model, Path(folder), task, **shape)
        self.thread = threading.Thread(target=self.train, args=[trainer], daemon=True)
        self.failure: BaseException | None = None
        self.thread.start()
        self.steps(WARM_UP)
        return {
            "version": f"trl {trl.__version__}, torch {torch.__version__}",
            "threads": threads,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
        }

    def train(self, trainer: Any) -> None:
        """Trains until the process ends."""
        try:
            trainer.train()
        except BaseException as error:
            self.failure = error
            self.done.release()

    def steps(self, count: int) -> dict[str, float]:
        """Seconds of `count` steps, and what was done in them."""
        self.units, begin = 0, time.perf_counter()
        for _ in range(count):
            self.allowed.release()
            self.done.acquire()
            if self.failure is not None:
                raise self.failure
        return {"seconds": time.perf_counter() - begin, "units": self.units}


def write_model(model: Path, folder: Path, **shape: int) -> None:
    """A LLaMA of random parameters, with a tokenizer trained on the lines."""
    import json

    import tokenizers
    import transformers

    lines = (folder / "sft.jsonl").read_text("utf-8").splitlines()
    texts = [" ".join(json.loads(line).values()) for line in lines]
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts, shape["vocabulary"], 2, False, ["<pad>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    fast.save_pretrained(model)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=shape["hidden"] * 8 // 3 // 32 * 32,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(model)


def make_trainer(side: Side, model: Path, folder: Path, task: str, **shape: int) -> Any:
    """The trainer of a task."""
    import datasets
    import transformers
    import trl

    regular = {"output_dir": str(folder / f"trl_{task}"), **REGULAR}
    llama = transformers.LlamaForCausalLM.from_pretrained(model)
    given = {
        "model": llama,
        "processing_class": transformers.AutoTokenizer.from_pretrained(model),
        "train_dataset": datasets.load_dataset(
            "json", data_files=str(folder / f"{task}.jsonl"), split="train"
        ),
        "callbacks": [gate(side)],
    }
    if task == "sft":
        args = trl.SFTConfig(
            per_device_train_batch_size=shape["batch"],
            packing=True,
            max_length=shape["length"],
            **regular,
        )
        trainer = trl.SFTTrainer(args=args, **given)
        count(side, trainer, lambda batch: batch["input_ids"].numel())
    elif task == "dpo":
        args = trl.DPOConfig(
            per_device_train_batch_size=shape["pairs"],
            max_length=shape["pair_length"],
            beta=0.1,
            **regular,
        )
        trainer = trl.DPOTrainer(args=args, **given)
        count(side, trainer, lambda batch: len(batch["input_ids"]) // 2)
    else:
        replies = shape["prompts"] * shape["samples"]
        args = trl.GRPOConfig(
            per_device_train_batch_size=replies,
            num_generations=shape["samples"],
            max_completion_length=shape["reply"],
            beta=0.04,
            temperature=1.0,
            generation_kwargs={"min_new_tokens": shape["reply"]},
            **regular,
        )
        trainer = trl.GRPOTrainer(args=args, reward_funcs=[distinct_letters], **given)
        count(side, trainer, lambda batch: replies)
    return trainer


def distinct_letters(completions: list[str], **columns: Any) -> list[float]:
    """Number of distinct letters of each reply: a reward that costs next to nothing."""
    return [float(len(set(text))) for text in completions]


def count(side: Side, trainer: Any, units: Any) -> None:
    """Adds what a step does to `side.units`."""
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        side.units += units(inputs)
        return step(model, inputs, *more, **named)

    trainer.training_step = counted


def gate(side: Side) -> Any:
    """A callback that waits before each step, and tells of its end."""
    import transformers

    class Gate(transformers.TrainerCallback):
        """See `gate`."""

        def on_step_begin(self, *_: Any, **named: Any) -> None:
            side.allowed.acquire()

        def on_step_end(self, *_: Any, **named: Any) -> None:
            side.done.release()

    return Gate()


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "steps": side.steps})
