"""The whole way from text to report in seconds, to try a change or a new part.

python -m experiments.debug
Any CPU, about 20 seconds, most of them compilation. It learns next to nothing.
"""

from lmjax.data import Data, Domain, EmbeddedCorpus
from lmjax.data.tokenizers import Bytes
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.training.schedules import Cosine

experiment = Pretrain(
    output="runs/debug",
    steps=20,
    model=TransformerConfig(
        vocab_size=257,
        hidden=64,
        num_layers=2,
        max_length=128,
        attention=AttentionConfig(num_heads=4, head_dim=16),
        feed_forward=FeedForwardConfig(size=256),
    ),
    data=Data(
        train=(Domain(name="documentation", source=EmbeddedCorpus(domain="documentation")),),
        tokenizer=Bytes(),
        length=128,
        batch_size=8,
    ),
    schedule=Cosine(peak=3e-3, warmup=5),
    evaluation=Evaluation(every=10, tokens=20_000, prompts=("The ",)),
    checkpoint=Checkpoints(every=10),
)

if __name__ == "__main__":
    run(experiment)
