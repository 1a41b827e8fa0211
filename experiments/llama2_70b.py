"""LLaMA 2 70B.

python -m experiments.llama2_70b

1,024 A100 80 GB, 69 days at 45 % of their peak: 476,838 steps, 2,000 B tokens, 8.57e+23 FLOPs. It
has not been run to its end with this code.
68,976,648,192 parameters with their gradient and AdamW's two means are 1.1 GB on each of the 1,024
devices, the layers' inputs of 4 rows at a time 21.5 GB; one layer's gathered weights and
activations come on top.

The recipe is `llama2_recipe` (Touvron et al. 2023b). The text is not published: it is one domain
here. To train on LLaMA's own tokens:

python -m experiments.llama2_70b data.tokenizer=SentencePiece data.tokenizer.path=tokenizer.model
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import llama2_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = llama2_recipe("70B").experiment(
    output="runs/llama2_70b",
    data=text(32_000, corpus=1),
    mesh=Mesh(fsdp=128, tensor=8),
    accumulation=2,
)

if __name__ == "__main__":
    run(experiment)
