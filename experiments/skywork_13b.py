"""Skywork-13B in its two stages: 3 T tokens of everything, then 130 B with exercises and science.

python -m experiments.skywork_13b

512 A100 80 GB, 44 days at 45 % of their peak: 186,563 steps, 3,130 B tokens, 2.73e+23 FLOPs. It has
not been run to its end with this code.
13,854,113,280 parameters with their gradient and AdamW's two means are 0.4 GB on each of the 512
devices, the layers' inputs of 8 rows at a time 15.7 GB; one layer's gathered weights and
activations come on top.

The recipe is `skywork_recipe`, the weights are table 1 of the report (Wei et al. 2023, who report
39 days on 512 A800). After 2 T tokens the rate has come down to 6e-5 and stays there. The second
stage takes a tenth of its rows from the domain `stem` at first and four tenths in the end, a fifth
in all; the report does not say how fast, and these four steps are chosen. It is the same run: the
loader goes on in every other domain where the first stage left it.
"""

import math

from lmjax.data import Stage
from lmjax.jobs.domain_text import text
from lmjax.jobs.recipes import skywork_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

MAIN = {
    "english_webpages": 39.8,
    "english_books": 3.6,
    "english_papers": 3.0,
    "english_encyclopedia": 0.5,
    "english_miscellany": 2.9,
    "chinese_webpages": 30.4,
    "chinese_social_media": 5.5,
    "chinese_encyclopedia": 0.8,
    "chinese_miscellany": 3.1,
    "other_languages": 2.4,
    "code": 8.0,
}
# First step, and the share of rows from `stem`. The first of them follows 3 T tokens.
STEM = ((178_814, 0.1), (181_914, 0.2), (184_239, 0.3), (185_789, 0.4))
REST = math.fsum(MAIN.values())  # to the same bit on every Python
STAGES = tuple(
    Stage(first_step=step, weights=(*MAIN.values(), REST * share / (1 - share)))
    for step, share in STEM
)

experiment = skywork_recipe("13B").experiment(
    output="runs/skywork_13b",
    data=text(65_519, STAGES, **MAIN, stem=0),
    mesh=Mesh(fsdp=512),
)

if __name__ == "__main__":
    run(experiment)
