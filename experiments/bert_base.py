"""BERT-base.

python -m experiments.bert_base

4 A100 80 GB, 2 days at 45 % of their peak: 1,000,000 steps, 131 B tokens, 9.31e+19 FLOPs. It has
not been run to its end with this code.
110,106,428 parameters with their gradient and AdamW's two means are 0.4 GB on each of the 4
devices, the layers' inputs of 64 rows at a time 0.6 GB; one layer's gathered weights and
activations come on top.

The recipe is `bert_recipe` (Devlin et al. 2019). The tokenizer is byte-pair encoding, where BERT
has WordPiece; data.tokenizer=TokenizerFolder data.tokenizer.path=FOLDER takes one with vocab.txt.
"""

from lmjax.jobs.domain_text import text, with_tokens
from lmjax.jobs.recipes import bert_recipe
from lmjax.launch import run
from lmjax.parallel import Mesh

experiment = bert_recipe("base").experiment(
    output="runs/bert_base",
    data=with_tokens(text(30_000, wikipedia=3, books=1), "[MASK]", "[CLS]", "[SEP]"),
    mesh=Mesh(fsdp=4),
    accumulation=1,
)

if __name__ == "__main__":
    run(experiment)
