"""OPT-175B.

python -m experiments.opt_175b

1,024 A100 80 GB, 26 days at 45 % of their peak: 143,052 steps, 300 B tokens, 3.19e+23 FLOPs. It has
not been run to its end with this code.
174,604,468,224 parameters with their gradient and AdamW's two means are 2.8 GB on each of the 1,024
devices, the layers' inputs of 4 rows at a time 19.3 GB; one layer's gathered weights and
activations come on top.

The recipe is `opt_recipe` (Zhang et al. 2022, who report 992 A100). What the authors changed by
hand during their run, rates and clipping, is history and not in it. The shares of their text are
not published: it is one domain here.
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import opt_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = opt_recipe("175B").experiment(
    output="runs/opt_175b",
    data=text(50_272, corpus=1),
    mesh=Mesh(fsdp=128, tensor=8),
    accumulation=2,
)

if __name__ == "__main__":
    run(experiment)
