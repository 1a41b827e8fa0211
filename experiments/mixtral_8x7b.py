r"""A Mixtral 8x7B, from random parameters or from Mistral 7B, each expert a copy of its layers.

python -m experiments.mixtral_8x7b
python -m experiments.mixtral_8x7b begin_with=models/Mistral-7B-v0.1 \
    data.tokenizer='TokenizerFolder(path="models/Mistral-7B-v0.1")' schedule.peak=1e-4

64 A100 80 GB, 10 days at 45 % of their peak: 23,842 steps, 100 B tokens, 7.97e+21 FLOPs. It has not
been run to its end with this code. How Mixtral was trained is not published: batch (4 M tokens),
rates and length are chosen, the weights of the losses are those of Switch and ST-MoE.

The experts of each layer and the rows are divided over 8 devices (mesh.expert), weights over the
other 8 as well (mesh.fsdp). No token is dropped, so the 8 devices gather each other's tokens;
model.feed_forward.router.capacity=1.25 exchanges as many as fit instead.
"""

from lmjax.config import replace
from lmjax.jobs.domain_text import text
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.recipe import ADAMW
from lmjax.jobs.settings import Checkpoints, Evaluation, Log
from lmjax.launch import run
from lmjax.models import mixtral
from lmjax.parallel import Mesh
from lmjax.training.schedules import Cosine

experiment = Pretrain(
    output="runs/mixtral_8x7b",
    steps=23_842,
    model=replace(mixtral("8x7B"), dtype="bfloat16", remat="full"),
    data=replace(text(32_000, web=1.0), length=4096, batch_size=1024),
    optimizer=ADAMW,
    schedule=Cosine(peak=3e-4, warmup=1000, final=0.1),
    mesh=Mesh(fsdp=8, expert=8),
    accumulation=8,
    evaluation=Evaluation(every=500, tokens=4_000_000),
    checkpoint=Checkpoints(every=500, keep_every=5000),
    log=Log(every=10),
)

if __name__ == "__main__":
    run(experiment)
