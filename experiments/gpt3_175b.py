"""GPT-3 175B on a mixture like its own.

python -m experiments.gpt3_175b

128 A100 80 GB, 204 days at 45 % of their peak: 116,611 steps, 300 B tokens, 3.17e+23 FLOPs. It has
not been run to its end with this code.
174,604,259,328 parameters with their gradient and AdamW's two means are 21.9 GB on each of the 128
devices, the inputs of 48 pairs of layers of 1 row at a time 2.4 GB; a pair's gathered weights and
activations come on top.

The recipe is `gpt3_recipe` (Brown et al. 2020). The batch begins with 16 rows, which no more than
16 shards of it can share: that sets mesh.fsdp. When it has 1,536 rows, after step 25,058, the same
command goes on with mesh.fsdp=96 accumulation=16 on six times the devices. The weights of the text
are the paper's, which add up to 101.
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import gpt3_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = gpt3_recipe("175B").experiment(
    output="runs/gpt3_175b",
    data=text(50_257, common_crawl=60, webtext2=22, books1=8, books2=8, wikipedia=3),
    mesh=Mesh(fsdp=16, tensor=8),
    accumulation=96,
)

if __name__ == "__main__":
    run(experiment)
