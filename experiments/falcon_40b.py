"""Falcon-40B on a mixture like its own.

python -m experiments.falcon_40b

192 A100 80 GB, 109 days at 45 % of their peak: 562,316 steps, 1,000 B tokens, 2.54e+23 FLOPs. It
has not been run to its end with this code.
41,303,293,952 parameters with their gradient and AdamW's two means are 10.4 GB on each of the 192
devices, the layers' inputs of 4 rows at a time 8.1 GB; one layer's gathered weights and activations
come on top.

The recipe is `falcon_recipe`; it and the weights of the text are the model card's
(huggingface.co/tiiuae/falcon-40b, which reports two months on 384 A100 40 GB).
"""

from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import falcon_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = falcon_recipe("40B").experiment(
    output="runs/falcon_40b",
    data=text(
        65_024,
        refinedweb_english=75,
        refinedweb_europe=7,
        books=6,
        conversations=5,
        code=5,
        technical=2,
    ),
    mesh=Mesh(data=3, fsdp=8, tensor=8),
    accumulation=12,
)

if __name__ == "__main__":
    run(experiment)
