"""LIMA: LLaMA-65B learns from a thousand chosen examples, with dropout that rises by layer.

python -m experiments.lima_65b

32 A100 80 GB, about 20 minutes at 45 % of their peak: 15 epochs of 750,000 tokens. It has not been
run to its end with this code.
65,285,677,056 parameters with their gradient and AdamW's two means are 32.6 GB on each of the 32
devices.

Zhou et al. 2023 (arXiv:2305.11206, section 3): AdamW with decay of 0.1 at 1e-5, in a line to 1e-6
without warm-up; dropout from 0.0 in the first layer to 0.3 in the last one; a token of its own ends
each turn. The paper has 32 examples a step; as a row of 2,048 tokens holds some 2.7 of them, a step
has 12 rows here, and an epoch 31 steps as there. Loss on held-out examples does not tell which
model writes better: people chose a checkpoint between the 5th and 10th epoch by 50 held-out
requests, and so all 15 are kept, with 50 examples held out. LLaMA's folder is in models/llama-65b;
data/lima.jsonl is train.jsonl of the public data set GAIR/lima with its texts as `messages`.
"""

from lmjax.config import replace
from lmjax.data import ChatTemplate, WithTokens
from lmjax.jobs.assistant_recipes import for_accelerators, instructions, mixture
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.models import llama
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Linear

END = "<|end_of_turn|>"
TURNS = ChatTemplate(special=(END,), user=("{content}", END), assistant=("{content}", END))
data = mixture(2048, 12, instructions("lima", "data/lima.jsonl", TURNS), held_out=0.05)

experiment = Finetune(
    output="runs/lima_65b",
    begin_with="models/llama-65b",
    epochs=15,
    model=replace(for_accelerators(llama("65B")), vocab_size=32_001, top_dropout=0.3),
    data=replace(data, tokenizer=WithTokens(tokens=(END,))),
    optimizer=AdamW(b1=0.9, b2=0.95, weight_decay=0.1),
    schedule=Linear(peak=1e-5, warmup=0, final=0.1),
    mesh=Mesh(fsdp=4, tensor=8),
    evaluation=ChatEvaluation(every=31, prompts=("Write a letter to an old friend.",)),
    checkpoint=Checkpoints(every=31, keep=16),
)

if __name__ == "__main__":
    run(experiment)
