"""InstructGPT 1.3B: fine-tuning, a reward model of 6B, and PPO with pretraining text.

python -m experiments.instructgpt_1_3b

8 A100 80 GB, about a day at 45 % of their peak without the sampling: PPO-ptx reads 4.2 B tokens of
text, and most of the rest is the critic of 6.7 B. It has not been run to its end with this code.

The recipe is `instructgpt` (Ouyang et al. 2022, arXiv:2203.02155), whose docstring says what of it
is published. GPT-3 is not public: runs/gpt3_1_3b, and for the reward model runs/gpt3_6_7b, are
pretrained before, by `gpt3_recipe` of lmjax/jobs/recipes.py. To take OPT, set begin_with and model
of jobs 0, 1 and 3.

data/demonstrations.jsonl has a prompt and a completion a line, data/rankings.jsonl a prompt, up to
nine answers and their ranks, data/prompts.jsonl prompts alone; OpenAI's are not public, and those
of OpenAssistant or hh-rlhf take their place. text/pretraining/*.jsonl.zst is GPT-3's text.
"""

from lmjax.jobs.assistant_recipes import instructgpt
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = instructgpt("1.3B", "runs/instructgpt_1_3b", Mesh(fsdp=8), accumulation=8)

if __name__ == "__main__":
    run(experiment)
