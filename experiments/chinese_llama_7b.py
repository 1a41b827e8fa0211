"""LLaMA-7B with 17,953 tokens for Chinese, second stage: adapters of attention, and both tables.

python -m experiments.chinese_llama_7b_embeddings && python -m experiments.chinese_llama_7b
16 A100 80 GB, about 11 hours at 45 % of their peak: 6,000 steps of 524,288 tokens. It has not been
run to its end with this code.

Chinese-LLaMA (Cui et al. 2023, arXiv:2304.08177): 20 GB of Chinese text in rows of 512 tokens,
1,024 of them a step, a peak rate of 2e-4 in the first stage and 1e-4 in the second; adapters of
rank 8 beside queries, keys, values and outputs, trained with both tables, 6.06 % of the parameters.
Alpha 32, dropout 0.05, the cosine to 0 after 5 % of warm-up and the weight decay of 0.01 are those
of the authors' script (github.com/ymcui/Chinese-LLaMA-Alpaca, run_pt.sh). They replay nothing; 5 %
of English text keeps more of what LLaMA knew,

    data.train.1='Domain(name="english", source=JsonLines(path="text/english/*.jsonl.zst"),
    weight=0.05)'

and `python -m lmjax.jobs.transfer` says how much.
"""

from experiments.chinese_llama_7b_embeddings import experiment as embeddings
from lmjax.config import replace
from lmjax.launch import run
from lmjax.models import LoRA
from lmjax.parallel import Mesh
from lmjax.training.schedules import Cosine
from lmjax.training.trainable import Matching

LORA = LoRA(rank=8, alpha=32.0, dropout=0.05, layers=("query", "key", "value", "output"))

experiment = replace(
    embeddings,
    output="runs/chinese_llama_7b",
    steps=6000,
    model=replace(embeddings.model, lora=LORA),
    begin_with=embeddings.output,
    trainable=Matching(patterns=("*.adapter.*", "embedding.*", "head.*")),
    schedule=Cosine(peak=1e-4, warmup=300, final=0.0),
    mesh=Mesh(fsdp=16),
    accumulation=8,
)

if __name__ == "__main__":
    run(experiment)
