"""PaLM 540B on a mixture like its own.

python -m experiments.palm_540b

4,096 TPU v4 chips, 58 days at 45 % of their peak: 255,000 steps, 776 B tokens, 2.53e+24 FLOPs. It
has not been run to its end with this code.
540,356,474,880 parameters with their gradient and Adafactor's two means are 4.3 GB on each of the
4,096 devices, the layers' inputs of 1 row at a time 8.9 GB; one layer's gathered weights and
activations come on top.

The recipe is `palm_recipe`, the weights of the text are table 2 of the paper (Chowdhery et al.
2022, who report 46.2 % of the peak on 6,144 chips). Their 12-way tensor axis does not divide the
vocabulary's rows; 8 does, and 512 shards of the batch are as many as its first 512 rows allow.
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import palm_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = palm_recipe("540B").experiment(
    output="runs/palm_540b",
    data=text(
        256_000,
        social_media=50,
        webpages=27,
        books=13,
        github=5,
        wikipedia=4,
        news=1,
    ),
    mesh=Mesh(data=2, fsdp=256, tensor=8),
    accumulation=4,
)

if __name__ == "__main__":
    run(experiment)
