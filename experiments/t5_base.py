"""T5-base, as it was released.

python -m experiments.t5_base

16 A100 80 GB, 8 days at 45 % of their peak: 1,000,000 steps, 1,049 B tokens, 1.55e+21 FLOPs. It has
not been run to its end with this code.
222,903,552 parameters with their gradient and Adafactor's means are 0.1 GB on each of the 16
devices, the layers' inputs of 32 rows at a time 0.3 GB; the encoder's are as many, and one layer's
gathered weights and activations come on top.

The recipe is `t5_recipe`, the text C4 (Raffel et al. 2020). The released models also saw supervised
tasks, which are left out.
"""

from lmjax.jobs.domain_text import text, with_tokens
from lmjax.jobs.recipes import t5_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = t5_recipe("base").experiment(
    output="runs/t5_base",
    data=with_tokens(
        text(32_000, c4=1), "<pad>", *(f"<extra_id_{number}>" for number in range(100))
    ),
    mesh=Mesh(fsdp=16),
    accumulation=4,
)

if __name__ == "__main__":
    run(experiment)
