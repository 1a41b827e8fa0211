"""A small reward model.

python -m tests.lmjax.jobs.reward_experiment output=runs/reward_model
"""

from lmjax.jobs.settings import Checkpoints
from lmjax.launch import run
from lmjax.models import AttentionConfig, FeedForwardConfig, TextHeadConfig, TransformerConfig
from lmjax.training.schedules import Constant
from tests.lmjax.jobs.reward_model import ToyRewardModel

experiment = ToyRewardModel(
    output="runs/reward_model",
    steps=20,
    model=TransformerConfig(
        vocab_size=16,
        hidden=16,
        num_layers=1,
        attention=AttentionConfig(num_heads=2, head_dim=8),
        feed_forward=FeedForwardConfig(size=32),
        max_length=16,
        heads=(TextHeadConfig(name="reward", outputs=1),),
    ),
    schedule=Constant(peak=1e-2, warmup=2),
    checkpoint=Checkpoints(every=6),
)

if __name__ == "__main__":
    run(experiment)
