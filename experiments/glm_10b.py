"""GLM-10B: blanks of words, sentences and documents.

python -m experiments.glm_10b

32 A100 80 GB, 20 days at 45 % of their peak: 250,000 steps, 131 B tokens, 7.84e+21 FLOPs. It has
not been run to its end with this code.
9,880,682,496 parameters with their gradient and AdamW's two means are 5.0 GB on each of the 32
devices, the layers' inputs of 16 rows at a time 3.2 GB; one layer's gathered weights and
activations come on top.

The recipe is `glm_recipe`, the mixture of blanks `glm_objective` (THUDM/GLM's launch files). The
text is the Pile and CC-News; their weights are not published, 97 and 3 are chosen.
"""

from lmjax.jobs.domain_text import text, with_tokens
from lmjax.jobs.recipes import glm_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = glm_recipe("10B").experiment(
    output="runs/glm_10b",
    data=with_tokens(
        text(50_257, pile=97, cc_news=3),
        "[MASK]",
        "[sMASK]",
        "[gMASK]",
        "[dBLOCK]",
        "<|startofpiece|>",
        "<|endofpiece|>",
    ),
    mesh=Mesh(fsdp=32),
    accumulation=2,
)

if __name__ == "__main__":
    run(experiment)
