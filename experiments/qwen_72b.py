"""Qwen-72B.

python -m experiments.qwen_72b

1,024 A100 80 GB, 111 days at 45 % of their peak: 715,256 steps, 3,000 B tokens, 1.38e+24 FLOPs. It
has not been run to its end with this code.
72,287,920,128 parameters with their gradient and AdamW's two means are 1.2 GB on each of the 1,024
devices, the layers' inputs of 2 rows at a time 21.5 GB; one layer's gathered weights and
activations come on top.

Of this size's recipe nothing but the number of tokens is published: `qwen_recipe` says what is
chosen. The shares of the text are not published either: it is one domain here. To train on Qwen's
own tokens (the folder of any Qwen):

python -m experiments.qwen_72b data.tokenizer=TokenizerFolder data.tokenizer.path=models/Qwen-7B
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import qwen_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = qwen_recipe("72B").experiment(
    output="runs/qwen_72b",
    data=text(152_064, corpus=1),
    mesh=Mesh(fsdp=128, tensor=8),
    accumulation=2,
)

if __name__ == "__main__":
    run(experiment)
