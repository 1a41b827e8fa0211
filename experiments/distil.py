"""A small student of the quickstart's model: half of its width, half of its layers.

python -m experiments.quickstart && python -m experiments.distil
python -m experiments.distil distillation.teacher=runs/x model.vocab_size=50257
2 CPU cores, three minutes, no download. The student learns the text and, by half of its loss, what
the teacher predicts of it, with the teacher's tokenizer. Expect 2.16 bits per byte on held-out
documentation and 1.93 on code; the same model without a teacher has 2.23 and 2.00, the teacher 2.08
and 1.85. Other divergences and temperatures: distillation.divergence=SkewedKL
distillation.temperature=2
"""

from lmjax.data import Data, Domain, EmbeddedCorpus
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Distillation, Evaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, Normal, TransformerConfig
from lmjax.training.optimizers import Muon
from lmjax.training.schedules import Cosine

experiment = Pretrain(
    output="runs/distil",
    steps=700,
    model=TransformerConfig(
        vocab_size=2048,
        hidden=64,
        num_layers=2,
        max_length=256,
        attention=AttentionConfig(num_heads=2, head_dim=32),
        feed_forward=FeedForwardConfig(size=256),
        initializer=Normal(std=0.02, scale_residual=True),
        unroll=2,
    ),
    distillation=Distillation(teacher="runs/quickstart"),
    data=Data(
        train=(
            Domain(name="documentation", source=EmbeddedCorpus(domain="documentation"), weight=2),
            Domain(name="code", source=EmbeddedCorpus(domain="code"), weight=3),
        ),
        length=256,
        batch_size=8,
    ),
    optimizer=Muon(),
    schedule=Cosine(peak=1e-2, warmup=50, final=0.05),
    evaluation=Evaluation(every=175, prompts=("The with statement ",)),
    checkpoint=Checkpoints(every=175),
)

if __name__ == "__main__":
    run(experiment)
