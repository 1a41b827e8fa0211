"""LLaMA 2 Chat 13B: fine-tuning, two reward models, rejection sampling, gated PPO.

python -m experiments.llama2_chat_13b

64 A100 80 GB, about 2 days at 45 % of their peak without the sampling: 2.9 M comparisons of two
answers for the helpful reward model, in rows of 2,048 tokens, and 0.8 B of replies for policy and
critic. It has not been run to its end with this code.

The recipe is `llama2_chat` (Touvron et al. 2023b, arXiv:2307.09288), whose docstring says what of
it is published. It begins with the public folder in models/Llama-2-13b-hf. Of the paper's data none
are: data/instructions.jsonl has conversations (`messages`), data/prompts.jsonl requests, each with
the field "safety", true where it was written to provoke; data/helpful_comparisons.jsonl,
safety_comparisons.jsonl and open_comparisons.jsonl have chosen and rejected, and perhaps a margin,
as hh-rlhf's helpful and harmless parts have them.
"""

from lmjax.jobs.assistant_recipes import llama2_chat
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = llama2_chat("13B", "runs/llama2_chat_13b", Mesh(fsdp=64), accumulation=8)

if __name__ == "__main__":
    run(experiment)
