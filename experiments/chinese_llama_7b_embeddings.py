"""LLaMA-7B with 17,953 tokens for Chinese, first stage: the new tokens find their meaning.

python -m experiments.chinese_llama_7b_embeddings
8 A100 80 GB, about 11 hours at 45 % of their peak: 3,000 steps of 524,288 tokens. It has not been
run to its end with this code. The second stage is chinese_llama_7b, which see.

The tokenizer is LLaMA's, with tokens behind it that are learnt from the text, 49,953 in all as in
Chinese-LLaMA (Cui et al. 2023, arXiv:2304.08177). The new rows of both tables begin as the mean of
the old ones, which the paper leaves open. All else stays as it is. There the first stage trains the
embedding alone, 2.97 % of the parameters; here the head too, since new rows that are alike would
otherwise stay alike, and their tokens one to the model. The rest is as in the second stage.
"""

from lmjax.config import replace
from lmjax.data import Data, Domain, JsonLines
from lmjax.data.tokenizers import MergedVocabulary, SentencePiece, TrainedBPE
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation, Log
from lmjax.launch import run
from lmjax.models import llama
from lmjax.parallel import Mesh
from lmjax.training.optimizers import AdamW
from lmjax.training.schedules import Cosine
from lmjax.training.trainable import Matching

VOCABULARY = 49_953

experiment = Pretrain(
    output="runs/chinese_llama_7b_embeddings",
    steps=3000,
    model=replace(llama("7B"), vocab_size=VOCABULARY, dtype="bfloat16", remat="full"),
    begin_with="models/llama-7b",
    trainable=Matching(patterns=("embedding.*", "head.*")),
    data=Data(
        train=(Domain(name="chinese", source=JsonLines(path="text/chinese/*.jsonl.zst")),),
        tokenizer=MergedVocabulary(
            tokenizer=SentencePiece(path="models/llama-7b/tokenizer.model"),
            learnt=TrainedBPE(vocab_size=20_000, sample_bytes=2_000_000_000),
            vocab_size=VOCABULARY,
        ),
        held_out=1e-4,
        length=512,
        batch_size=1024,
        workers=8,
        tokenize_workers=32,
    ),
    optimizer=AdamW(b1=0.9, b2=0.999, weight_decay=0.01),
    schedule=Cosine(peak=2e-4, warmup=150, final=0.0),
    mesh=Mesh(fsdp=8),
    accumulation=16,
    evaluation=Evaluation(every=500, tokens=1_000_000),
    checkpoint=Checkpoints(every=200),
    log=Log(every=10),
)

if __name__ == "__main__":
    run(experiment)
