"""A small run whose measure the first of its processes lacks.

python -m tests.lmjax.jobs.best_experiment output=runs/best
"""

import jax

from lmjax.config import config
from lmjax.data import Bytes, Data, Domain, TextFiles
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.best import BestCheckpoint
from lmjax.jobs.pretrain import Pretrain
from lmjax.jobs.settings import Checkpoints, Evaluation
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TransformerConfig
from lmjax.training.schedules import Constant


@config
class LaterProcesses(Evaluator):
    """Gives a score in all processes but the first."""

    every: int | None = 2

    def prepare(self, context):
        """See `Evaluator.prepare`."""
        numbers = {"score": 1.0} if jax.process_index() else {"other": 1.0}
        return lambda step, params: ({"split": "held_out/script", **numbers},)


experiment = Pretrain(
    output="runs/best",
    steps=4,
    model=TransformerConfig(
        vocab_size=257,
        hidden=16,
        num_layers=1,
        max_length=16,
        attention=AttentionConfig(num_heads=4, head_dim=4),
        feed_forward=FeedForwardConfig(size=32),
    ),
    data=Data(
        train=(Domain(name="lines", source=TextFiles(path="corpus.txt", split="paragraph")),),
        tokenizer=Bytes(),
        held_out=0.1,
        length=16,
        batch_size=8,
    ),
    schedule=Constant(peak=1e-2, warmup=0),
    evaluation=Evaluation(every=100, prompts=()),
    evaluators=(LaterProcesses(),),
    checkpoint=Checkpoints(
        every=4, best=BestCheckpoint(measure="score", data="script", better="higher")
    ),
)

if __name__ == "__main__":
    run(experiment)
