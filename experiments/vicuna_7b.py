"""Vicuna v1.1: LLaMA-7B learns from conversations of ChatGPT's users.

python -m experiments.vicuna_7b

8 A100 80 GB, about 5 hours at 45 % of their peak: three epochs of some 150 M tokens. It has not
been run to its end with this code.
6,738,415,616 parameters with their gradient and AdamW's two means are 13.5 GB on each of the 8
devices.

Chiang et al. 2023, as the script of github.com/lm-sys/FastChat has it (as remembered): AdamW
without decay at 2e-5, warm-up over 3 % and a cosine to 0, 128 rows of 2,048 tokens, the loss on
replies alone. Conversations that are longer are divided before; a row holds more than one of those
that are shorter here, and an epoch has fewer steps. The learning begins with LLaMA's folder in
models/llama-7b. ShareGPT's conversations are not published by the authors;
data/sharegpt.jsonl has a line for each, with the field `conversations` of messages (from, value).
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
    output="runs/vicuna_7b",
    begin_with="models/llama-7b",
    epochs=3,
    model=for_accelerators(llama("7B")),
    data=mixture(
        2048,
        128,
        instructions("sharegpt", "data/sharegpt.jsonl", chat_template("vicuna")),
        held_out=0.01,
    ),
    optimizer=AdamW(b1=0.9, b2=0.999, weight_decay=0.0),
    schedule=Cosine(peak=2e-5, warmup=50, final=0.0),
    mesh=Mesh(fsdp=8),
    accumulation=4,
    evaluation=ChatEvaluation(every=200, prompts=("Give three tips for staying healthy.",)),
    checkpoint=Checkpoints(every=200),
)

if __name__ == "__main__":
    run(experiment)
