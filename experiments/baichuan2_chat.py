"""Baichuan2-7B-Chat: fine-tuning, a reward model, PPO with a falling price of divergence.

python -m experiments.baichuan2_chat

16 A100 80 GB, about 10 hours at 45 % of their peak without the sampling: four epochs of 100,000
conversations, an epoch of comparisons, 350 steps of PPO. It has not been run to its end with this
code.
7,505,973,248 parameters of the policy and as many of the critic, with gradients and AdamW's means,
are 15.0 GB on each of the 16 devices, the reference and the reward model 3.8 GB.

Yang et al. 2023 (arXiv:2309.10305, section 4), as remembered: fine-tuning on more than 100,000
conversations; PPO of 350 steps at 5e-6 with clipping to 0.1 and gradients to 0.5, the critic alone
for 20 steps before, and a price of divergence from 0.2 down to 0.005. Fine-tuning has the numbers
of fine-tune.py of github.com/baichuan-inc/Baichuan2, four epochs at 2e-5 with decay of 1e-4; there
a step has as many conversations as devices hold, here 16 rows of 4,096 tokens.

Chosen: the reward model's numbers are LLaMA 2's; 256 requests a step of PPO, with eight updates.
The price falls by a factor a step: how it falls is not published. The public folder is in
models/Baichuan2-7B-Base; data/instructions.jsonl has `messages`, data/comparisons.jsonl chosen and
rejected, data/prompts.jsonl prompts. Instructions that are balanced by three levels of kinds, as
the paper has them, take balance=TagBalance of a domain with a taxonomy file.
"""

from lmjax.alignment import ClippedPolicy, FallingKL
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.value_network import ValueNetwork
from lmjax.config import replace
from lmjax.data.chat.catalogue import chat_template
from lmjax.jobs.assistant_recipes import (
    asked,
    compared,
    for_accelerators,
    groups,
    instructions,
    mixture,
)
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import Checkpoints
from lmjax.launch import run
from lmjax.models import baichuan2
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant, Cosine

TURNS = chat_template("baichuan2")
ADAM = AdamW(b1=0.9, b2=0.98, epsilon=1e-8, weight_decay=1e-4)
mesh = Mesh(fsdp=16)

sft = Finetune(
    output="{output}/sft",
    begin_with="models/Baichuan2-7B-Base",
    epochs=4,
    model=for_accelerators(baichuan2("7B")),
    data=mixture(4096, 16, instructions("instructions", "data/instructions.jsonl", TURNS)),
    optimizer=ADAM,
    schedule=Constant(peak=2e-5, warmup=0),
    mesh=mesh,
)
reward = RewardModel(
    output="{output}/reward",
    begin_with="{output}/sft",
    epochs=1,
    data=groups(4096, 512, compared("people", "data/comparisons.jsonl", TURNS)),
    optimizer=replace(ADAM, weight_decay=0.1),
    schedule=Cosine(peak=1e-5, warmup=5, final=0.1),
    mesh=mesh,
    accumulation=32,
)
policy = PolicyOptimization(
    output="{output}/policy",
    begin_with="{output}/sft",
    steps=370,
    objective=ClippedPolicy(clip=0.1),
    data=groups(2048, 256, asked("data/prompts.jsonl", TURNS)),
    rewards=(ModelReward(folder="{output}/reward"),),
    reward_kl=FallingKL(beta=0.2, final=0.005, steps=370),
    samples=1,
    reply_length=1024,
    advantage="gae",
    value_network=ValueNetwork(
        folder="{output}/reward", optimizer=ADAM, schedule=Constant(peak=5e-6, warmup=0)
    ),
    value_warmup=20,
    updates=8,
    optimizer=ADAM,
    schedule=Constant(peak=5e-6, warmup=0),
    gradient_clip=0.5,
    mesh=mesh,
    checkpoint=Checkpoints(every=50),
)
experiment = Chain(output="runs/baichuan2_chat", jobs=(sft, reward, policy))

if __name__ == "__main__":
    run(experiment)
