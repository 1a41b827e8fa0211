"""A small policy that learns by the rewards of its replies.

python -m tests.lmjax.jobs.policy_experiment output=runs/policy begin_with=runs/base
"""

from lmjax.alignment import AdaptiveKL, ClippedPolicy
from lmjax.alignment.reward_functions import Reward
from lmjax.config import config
from lmjax.data import Data, Domain
from lmjax.data.chat.requests import Requests
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.launch import run
from lmjax.training.schedules import Constant


@config
class DigitShare(Reward):
    """Share of digits in a reply."""

    def score(self, replies):
        """See `Reward.score`."""
        return [sum(map(str.isdigit, r.text)) / max(1, len(r.text)) for r in replies]


experiment = PolicyOptimization(
    output="runs/policy",
    begin_with="runs/base",
    steps=3,
    data=Data(
        train=(Domain(name="asks", source=Requests(path="asks.jsonl")),),
        held_out=0.2,
        length=32,
        batch_size=4,
        rows="groups",
    ),
    rewards=(DigitShare(),),
    reward_kl=AdaptiveKL(beta=0.1),
    objective=ClippedPolicy(),
    samples=4,
    reply_length=6,
    allow_cut_off=True,
    updates=2,
    schedule=Constant(peak=3e-2, warmup=0),
    evaluate_every=100,
    evaluate_requests=4,
)

if __name__ == "__main__":
    run(experiment)
