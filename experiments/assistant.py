"""From nothing to an assistant: pretraining, instructions, comparisons, a reward model, PPO.

python -m experiments.assistant
2 CPU cores, nine minutes, no download: the three steps of InstructGPT (Ouyang et al.
2022) after a pretrained model, on a GPT of a million parameters. Text, questions and answers are
those of this Python's standard library; those of some modules are held out in every step.

  pretrained   the quickstart's model
  sft          learns to answer questions about functions, both ways, from their docstrings
  comparisons  four replies of it to each of some 1,300 questions, ranked by a rule: the one that
               shares more words with the documentation's own answer is better (F1, `SharedWords`)
  reward       learns the ranking, without seeing the answers
  policy       PPO raises that reward, at a price for its divergence from sft
  compared     replies of the three models to held-out questions, judged by the rule, which PPO has
               never seen, and by the reward model, which it was trained on

The report runs/assistant/report.html has all curves, win rates with their intervals, and replies
side by side. It is a toy, and shows that the steps do what they should: so small a model knows no
facts, and what PPO teaches it is to write what such answers look like.
"""

from experiments import instruct, quickstart
from lmjax.alignment.kl import AdaptiveKL
from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_functions import SharedWords
from lmjax.alignment.reward_ranking import RewardRanking
from lmjax.config import replace
from lmjax.data import Data, Domain
from lmjax.data.chat.comparisons import Comparisons
from lmjax.data.chat.embedded_instructions import EmbeddedRequests
from lmjax.jobs.best_of_n import BestOfN
from lmjax.jobs.chain import Chain
from lmjax.jobs.policy_optimization import PolicyOptimization
from lmjax.jobs.reward_model import RewardModel
from lmjax.jobs.settings import ChatEvaluation, Checkpoints
from lmjax.jobs.side_by_side import SideBySide
from lmjax.launch import run
from lmjax.training.schedules import Constant, Cosine

HELD_OUT = 0.05  # share of the modules
QUESTION, REPLY = 96, 48  # most tokens
asked = Data(
    train=(Domain(name="questions", source=EmbeddedRequests()),),
    held_out=HELD_OUT,
    length=QUESTION,
    batch_size=32,
    rows="groups",
)

experiment = Chain(
    output="runs/assistant",
    about="A toy, which shows that the steps do what they should. It is no assistant: a model of a "
    "million parameters knows no facts, and its replies look like documentation without being "
    "right. Its win rates are by a rule that counts shared words, not by people, and say nothing "
    "of larger models.",
    jobs=(
        replace(quickstart.experiment, output="{output}/pretrained"),
        replace(
            instruct.experiment,
            output="{output}/sft",
            begin_with="{output}/pretrained",
            data=replace(instruct.experiment.data, held_out=HELD_OUT),
        ),
        BestOfN(
            output="{output}/comparisons",
            policy="{output}/sft",
            requests=EmbeddedRequests(every=11, held_out=HELD_OUT),
            rewards=(SharedWords(),),
            samples=4,
            request_length=QUESTION,
            reply_length=REPLY,
            batch_size=64,
        ),
        RewardModel(
            output="{output}/reward",
            begin_with="{output}/sft",
            epochs=2,
            objective=RewardRanking(answers=4),
            data=Data(
                train=(
                    Domain(
                        name="comparisons",
                        source=Comparisons(path="{output}/comparisons/replies/*.jsonl"),
                    ),
                ),
                held_out=0.15,
                length=QUESTION + REPLY,
                batch_size=16,
                rows="groups",
            ),
            schedule=Cosine(peak=3e-4, warmup=10, final=0.05),
            evaluation=ChatEvaluation(every=50, tokens=50_000),
            checkpoint=Checkpoints(every=50),
        ),
        PolicyOptimization(
            output="{output}/policy",
            begin_with="{output}/sft",
            steps=60,
            data=asked,
            rewards=(ModelReward(folder="{output}/reward"),),
            advantage="gae",
            reward_kl=AdaptiveKL(beta=0.05, target=6.0, horizon=1000),
            samples=2,
            reply_length=REPLY,
            value_warmup=5,
            epochs=2,
            updates=2,
            schedule=Constant(peak=1e-4, warmup=0),
            evaluate_every=20,
            evaluate_requests=128,
            checkpoint=Checkpoints(every=20),
        ),
        SideBySide(
            output="{output}/compared",
            models=("{output}/pretrained", "{output}/sft", "{output}/policy"),
            data=asked,
            judges=(SharedWords(), ModelReward(folder="{output}/reward")),
            requests=256,
            reply_length=REPLY,
        ),
    ),
)

if __name__ == "__main__":
    run(experiment)
