"""LLaMA 65B on a mixture like its own.

python -m experiments.llama_65b

2,048 A100 80 GB, 22 days at 45 % of their peak: 333,787 steps, 1,400 B tokens, 5.57e+23 FLOPs. It
has not been run to its end with this code.
65,285,660,672 parameters with their gradient and AdamW's two means are 0.5 GB on each of the 2,048
devices, the layers' inputs of 4 rows at a time 10.7 GB; one layer's gathered weights and
activations come on top.

The recipe is `llama_recipe` (Touvron et al. 2023a, who report 21 days on 2,048 A100); the weights
of the text are the paper's table 1. To train on LLaMA's own tokens:

python -m experiments.llama_65b data.tokenizer=SentencePiece data.tokenizer.path=tokenizer.model
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import llama_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = llama_recipe("65B").experiment(
    output="runs/llama_65b",
    data=text(
        32_000,
        common_crawl=67.0,
        c4=15.0,
        github=4.5,
        wikipedia=4.5,
        books=4.5,
        arxiv=2.5,
        stack_exchange=2.0,
    ),
    mesh=Mesh(fsdp=256, tensor=8),
    accumulation=2,
)

if __name__ == "__main__":
    run(experiment)
