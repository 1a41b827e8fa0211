"""BLOOM 176B.

python -m experiments.bloom_176b

128 A100 80 GB, 310 days at 45 % of their peak: 115,312 steps, 451 B tokens, 4.82e+23 FLOPs. It has
not been run to its end with this code.
176,247,271,424 parameters with their gradient and AdamW's two means are 22.1 GB on each of the 128
devices, the layers' inputs of 2 rows at a time 8.2 GB; one layer's gathered weights and activations
come on top.

The recipe is `bloom_recipe` (Le Scao et al. 2022, and BigScience's launch scripts), for the 450 B
tokens that the scripts ask for; BLOOM itself was ended after 366 B (step 95,000 or so). The batch
grows by 16 rows at a time, which no more than 16 shards of it can share: that sets mesh.fsdp. When
it has 2,048 rows, after step 12,658, the same command goes on with mesh.fsdp=64 accumulation=16 on
four times the devices. The text is one domain here, where ROOTS has 59 languages.
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import bloom_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = bloom_recipe("176B").experiment(
    output="runs/bloom_176b",
    data=text(250_680, roots=1),
    mesh=Mesh(fsdp=16, tensor=8),
    accumulation=64,
)

if __name__ == "__main__":
    run(experiment)
