"""Qwen-7B-Chat: fine-tuning, preference pretraining, a reward model, PPO with pretraining text.

python -m experiments.qwen_chat

16 A100 80 GB, about a day at 45 % of their peak without the sampling: 1 B tokens of conversations,
and PPO, most of it its pretraining text. It has not been run to its end with this code.
7,721,324,544 parameters of the policy and as many of the critic, with gradients and AdamW's means,
are 15.5 GB on each of the 16 devices, the reference and the reward model 3.9 GB.

Bai et al. 2023 (arXiv:2309.16609, section 3): 4,000 steps of 128 rows of 2,048 tokens in ChatML, a
peak of 2e-6 after 1,430 steps, dropout of 0.1; preference pretraining on comparisons of web pages'
answers, then an epoch on those of people, at 3e-6 throughout with 64 a step; PPO with two replies
to a request, a price of 0.04 for divergence, 1e-6 for the policy and 5e-6 for the critic, which is
trained alone for 50 steps and whose values are clipped to 0.15.

Chosen: AdamW's means (0.9, 0.95) and a cosine to a tenth in fine-tuning; 500 steps of PPO of 128
requests, eight updates each, and four rows of pretraining text for each reply, with weight 1. What
differs: replies are sampled from all tokens, where the paper's have top-p 0.9 (the policy that
samples is the one that is trained); rewards are shifted and scaled by those of a step, where the
paper keeps a running mean. Qwen's public folder is in models/Qwen-7B; data/instructions.jsonl has
`messages`, data/preference_pretraining.jsonl and data/comparisons.jsonl chosen and rejected,
data/prompts.jsonl prompts, and text/pretraining/*.jsonl.zst the field `text`.
"""

from lmjax.alignment import ClippedPolicy, FixedKL
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.value_network import ValueNetwork
from lmjax.config import replace
from lmjax.data import Data
from lmjax.data.chat.catalogue import chat_template
from lmjax.jobs.assistant_recipes import (
    TEXT,
    asked,
    compared,
    domain,
    for_accelerators,
    groups,
    instructions,
    mixture,
)
from lmjax.jobs.chain import Chain
from lmjax.jobs.finetune import Finetune
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.launch import run
from lmjax.models import qwen
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Constant, Cosine

CHATML = chat_template("chatml")
ADAM = AdamW(b1=0.9, b2=0.95, epsilon=1e-8, weight_decay=0.1)
mesh = Mesh(fsdp=16)

sft = Finetune(
    output="{output}/sft",
    begin_with="models/Qwen-7B",
    steps=4000,
    model=replace(for_accelerators(qwen("7B")), dropout=0.1),
    data=mixture(2048, 128, instructions("instructions", "data/instructions.jsonl", CHATML)),
    optimizer=ADAM,
    schedule=Cosine(peak=2e-6, warmup=1430, final=0.1),
    mesh=mesh,
    accumulation=8,
    evaluation=ChatEvaluation(every=500),
)
pretrained = RewardModel(
    output="{output}/preference_pretrained",
    begin_with="{output}/sft",
    epochs=1,
    data=groups(2048, 64, compared("web", "data/preference_pretraining.jsonl", CHATML)),
    optimizer=ADAM,
    schedule=Constant(peak=3e-6, warmup=0),
    mesh=mesh,
    accumulation=4,
)
reward = replace(
    pretrained,
    output="{output}/reward",
    begin_with="{output}/preference_pretrained",
    data=groups(2048, 64, compared("people", "data/comparisons.jsonl", CHATML)),
)
policy = PolicyOptimization(
    output="{output}/policy",
    begin_with="{output}/sft",
    steps=500,
    objective=ClippedPolicy(value_clip=0.15),
    data=groups(1024, 128, asked("data/prompts.jsonl", CHATML)),
    rewards=(ModelReward(folder="{output}/reward"),),
    reward_kl=FixedKL(beta=0.04),
    samples=2,
    reply_length=1024,
    whiten_rewards=True,
    advantage="gae",
    value_network=ValueNetwork(
        folder="{output}/reward", optimizer=ADAM, schedule=Constant(peak=5e-6, warmup=0)
    ),
    value_warmup=50,
    pretraining=Data(train=(domain("text", TEXT),), held_out=1e-4, length=2048, batch_size=1024),
    pretraining_weight=1.0,
    updates=8,
    optimizer=ADAM,
    schedule=Constant(peak=1e-6, warmup=0),
    mesh=mesh,
    accumulation=2,
    checkpoint=Checkpoints(every=50),
)
experiment = Chain(output="runs/qwen_chat", jobs=(sft, pretrained, reward, policy))

if __name__ == "__main__":
    run(experiment)
