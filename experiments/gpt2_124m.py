r"""GPT-2 124M on the web pages of C4, by the recipe that nanoGPT published.

python -m experiments.gpt2_124m ...data_dir=/data/tfds
on TFDS's c4/en, prepared there as array_record (C4 takes Apache Beam to prepare); or, on files like
Hugging Face's (a "text" on each line), or plain text files:
python -m experiments.gpt2_124m data.train.0.source=JsonLines \
    data.train.0.source.path='openwebtext/*.jsonl.zst' data.train.0.evaluation=none \
    data.held_out=5e-4
python -m experiments.gpt2_124m data.train.0.source=TextFiles \
    data.train.0.source.path='books/**/*.txt' data.train.0.evaluation=none

8 x A100 of 40 or 80 GB. 600k steps of 491,520 tokens, 295 B tokens in all. nanoGPT's README reports
about 4 days on 8 x A100 40 GB and a validation loss of 2.85 on OpenWebText with GPT-2's own
tokenizer. This experiment trains its tokenizer on the text, so compare bits per byte, not losses;
it has not been run to its end with this code.
"""

from lmjax.config import replace
from lmjax.data import TFDS, Data, Domain, TrainedBPE
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation, Log
from lmjax.launch import run
from lmjax.models import gpt2
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

experiment = Pretrain(
    output="runs/gpt2_124m",
    steps=600_000,
    model=replace(gpt2("124M"), dtype="bfloat16"),
    data=Data(
        train=(
            Domain(
                name="web",
                source=TFDS(name="c4/en"),
                evaluation=TFDS(name="c4/en", split="validation"),
            ),
        ),
        tokenizer=TrainedBPE(vocab_size=50_257, sample_bytes=200_000_000),
        length=1024,
        batch_size=480,
        workers=4,
        tokenize_workers=32,
    ),
    optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
    schedule=Cosine(peak=6e-4, warmup=2000, final=0.1),
    accumulation=5,
    evaluation=Evaluation(every=1000, tokens=2_000_000, prompts=("The", "Once upon a time")),
    checkpoint=Checkpoints(every=1000, keep_every=50_000),
    log=Log(every=10),
)

if __name__ == "__main__":
    run(experiment)
