"""Alpaca: LLaMA-7B learns to follow 52,002 instructions.

python -m experiments.alpaca_7b

4 A100 80 GB, half an hour at 45 % of their peak: three epochs of some 7 M tokens. It has not been
run to its end with this code.
6,738,415,616 parameters with their gradient and AdamW's two means are 27.0 GB on each of the 4
devices.

Taori et al. 2023, as the script of github.com/tatsu-lab/stanford_alpaca has it (as remembered):
AdamW without decay at 2e-5, warm-up over 3 % and a cosine to 0, rows of 512 tokens, all of them
trained on, the loss on replies alone. It has 128 instructions a step; a row of 512 tokens holds
four or so, so that a step has 32 rows here. The learning begins with LLaMA's folder in
models/llama-7b. data/alpaca_data.jsonl has the set of that repository with a line for each of its
records: jq -c '.[]' alpaca_data.json > data/alpaca_data.jsonl
"""

from lmjax.data.chat.catalogue import chat_template
from lmjax.jobs.assistant_recipes import for_accelerators, instructions, mixture
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.models import llama
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine

experiment = Finetune(
    output="runs/alpaca_7b",
    begin_with="models/llama-7b",
    epochs=3,
    model=for_accelerators(llama("7B")),
    data=mixture(
        512,
        32,
        instructions("alpaca", "data/alpaca_data.jsonl", chat_template("alpaca")),
        held_out=0.01,
    ),
    optimizer=AdamW(b1=0.9, b2=0.999, weight_decay=0.0),
    schedule=Cosine(peak=2e-5, warmup=37, final=0.0),
    mesh=Mesh(fsdp=4),
    evaluation=ChatEvaluation(every=200, prompts=("Give three tips for staying healthy.",)),
    checkpoint=Checkpoints(every=200),
)

if __name__ == "__main__":
    run(experiment)
