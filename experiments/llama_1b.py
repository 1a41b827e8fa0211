r"""A LLaMA of 1.1 B parameters, trained as long as Chinchilla's rule says: 22 B tokens.

python -m experiments.llama_1b ...data_dir=/data/tfds
on TFDS's c4/en, prepared there as array_record (C4 takes Apache Beam to prepare); or, on files like
Hugging Face's (a "text" on each line) and with LLaMA's own tokenizer:
python -m experiments.llama_1b data.train.0.source=JsonLines \
    data.train.0.source.path='slimpajama/*.jsonl.zst' data.train.0.evaluation=none \
    data.held_out=1e-4 data.tokenizer=SentencePiece data.tokenizer.path=tokenizer.model

8 x A100 40 GB or more. Sizes, batch (2 M tokens) and rates are TinyLlama's
(https://github.com/jzhang38/TinyLlama), whose authors report 24,000 tokens/s on an A100 40 GB with
their code, and so 32 hours on 8 of them for these 22 B tokens. They publish no loss for this
length; this experiment has not been run to its end with this code.
"""

from lmjax.config import replace
from lmjax.data import TFDS, Data, Domain, TrainedBPE
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation, Log
from lmjax.launch import run
from lmjax.models import AttentionConfig, GatedFeedForwardConfig, Rotary, llama2
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

experiment = Pretrain(
    output="runs/llama_1b",
    steps=10_490,
    model=replace(
        llama2("7B"),
        hidden=2048,
        num_layers=22,
        max_length=2048,
        attention=AttentionConfig(
            num_heads=32,
            num_kv_heads=4,
            head_dim=64,
            bias=False,
            output_bias=False,
            positions=Rotary(),
        ),
        feed_forward=GatedFeedForwardConfig(size=5632),
        dtype="bfloat16",
        remat="dots",
    ),
    data=Data(
        train=(
            Domain(
                name="web",
                source=TFDS(name="c4/en"),
                evaluation=TFDS(name="c4/en", split="validation"),
            ),
        ),
        tokenizer=TrainedBPE(vocab_size=32_000, sample_bytes=200_000_000),
        length=2048,
        batch_size=1024,
        workers=4,
        tokenize_workers=32,
    ),
    optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
    schedule=Cosine(peak=4e-4, warmup=2000, final=0.1),
    accumulation=16,
    evaluation=Evaluation(every=500, tokens=4_000_000, prompts=("The", "Once upon a time")),
    checkpoint=Checkpoints(every=500, keep_every=2000),
    log=Log(every=10),
)

if __name__ == "__main__":
    run(experiment)
