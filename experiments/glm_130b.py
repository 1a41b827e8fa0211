"""GLM-130B.

python -m experiments.glm_130b

192 A100 80 GB, 134 days at 45 % of their peak: 49,234 steps, 400 B tokens, 3.13e+23 FLOPs. It has
not been run to its end with this code.
128,697,794,560 parameters with their gradient and AdamW's two means are 10.8 GB on each of the 192
devices, the layers' inputs of 1 row at a time 3.5 GB; one layer's gathered weights and activations
come on top.

The recipe is `glm_recipe`, the mixture of blanks `glm_130b_objective` (Zeng et al. 2022). The batch
grows by 24 rows at a time, which no more than 24 shards of it can share: that sets mesh.fsdp.
Instructions, a "prompt" and its "answer" on every line, have a weight of 5 percent, here of the
rows, in the paper of the tokens; the halves of English and Chinese are chosen.
"""

from lmjax.config import replace
from lmjax.data import Domain, JsonPrompts
from lmjax.jobs.domain_text import text, with_tokens
from lmjax.jobs.recipes import glm_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

texts = text(150_000, pile=48, chinese=47)
instructions = Domain(
    name="instructions",
    source=JsonPrompts(path="text/instructions/*.jsonl.zst", closing="<eop>"),
    weight=5,
)
experiment = glm_recipe("130B").experiment(
    output="runs/glm_130b",
    data=with_tokens(
        replace(texts, train=(*texts.train, instructions)), "[MASK]", "[gMASK]", "<sop>", "<eop>"
    ),
    mesh=Mesh(fsdp=24, tensor=8),
    accumulation=176,
)

if __name__ == "__main__":
    run(experiment)
