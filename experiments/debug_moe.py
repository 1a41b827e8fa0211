"""A small mixture of experts, to try a change of routers or of the mesh.

python -m experiments.debug_moe
python -m experiments.debug_moe model.feed_forward.router=ExpertChoiceRouter
JAX_NUM_CPU_DEVICES=8 python -m experiments.debug_moe mesh.fsdp=2 mesh.expert=4

`experiments.debug` with eight experts in each layer, of which a token uses two. Any CPU, half a
minute; it learns next to nothing.
"""

from experiments.debug import experiment as debug
from lmjax.config import replace
from lmjax.launch import run
from lmjax.models import ExpertsConfig, TopKRouter

experiment = replace(
    debug,
    output="runs/debug_moe",
    model=replace(
        debug.model,
        feed_forward=ExpertsConfig(size=128, experts=8, router=TopKRouter(chosen=2)),
    ),
)

if __name__ == "__main__":
    run(experiment)
