"""Baichuan2-13B.

python -m experiments.baichuan2_13b

256 A100 80 GB, 71 days at 45 % of their peak: 619,889 steps, 2,600 B tokens, 2.20e+23 FLOPs. It has
not been run to its end with this code.
13,896,668,160 parameters with their gradient and AdamW's two means are 0.9 GB on each of the 256
devices, the layers' inputs of 4 rows at a time 6.7 GB; one layer's gathered weights and activations
come on top.

The recipe is `baichuan2_recipe` (Yang et al. 2023), whose docstring says what of it is chosen here.
The shares of the text are not published: it is one domain here.
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import baichuan2_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = baichuan2_recipe("13B").experiment(
    output="runs/baichuan2_13b",
    data=text(125_696, corpus=1),
    mesh=Mesh(fsdp=256),
)

if __name__ == "__main__":
    run(experiment)
