"""A reward model's job on toy preferences: a job of another kind needs nothing of pretraining."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.config import config
from lmjax.console import Table
from lmjax.evaluation.evaluator import Evaluator
from lmjax.jobs.training_job import TrainingJob
from lmjax.models import plain_batch
from lmjax.objectives import Example, Objective, Sums
from lmjax.training.feed import Feed
from lmjax.training.placement import to_devices


def preferences(seed, pairs, length):
    """Pairs of texts, of which the one with more of token 7 is preferred."""
    generator = np.random.default_rng(seed)
    texts = generator.integers(8, 16, (2, pairs, length), np.int32)
    texts[0][generator.random((pairs, length)) < 0.5] = 7
    return Example(tuple(map(plain_batch, texts)), np.ones(pairs, np.float32))


@config
class PairwiseRanking(Objective):
    """-log sigmoid(reward of the preferred text - reward of the other) (Ouyang et al. 2022)."""

    def loss(self, model, example, key, frozen=None):
        """Sums over pairs, with the number of those ranked rightly."""
        hidden = [model(batch, key=key)[0] for batch in example.inputs]
        outputs = [model.outputs("reward", *pair) for pair in zip(hidden, example.inputs)]
        rewards = [numbers[:, 0, 0] for numbers in outputs]
        weights, difference = example.targets, rewards[0] - rewards[1]
        loss = jnp.sum(weights * jax.nn.softplus(-difference))
        return Sums(loss, jnp.sum(weights), {"accuracy": jnp.sum(weights * (difference > 0))})


@config
class PairAccuracy(Evaluator):
    """Share of held-out pairs that are ranked rightly."""

    def prepare(self, context):
        learner = context.learner
        pairs = to_devices(preferences(1 << 20, 64, 16), learner.layout, 16)

        def evaluate(step, params):
            sums = learner.compiled_evaluate(params, pairs)
            loss, accuracy = (float(x / sums.weight) for x in (sums.loss, sums.extra["accuracy"]))
            table = Table("Pair accuracy", ("set", "model"), (("pairs", accuracy),))
            return {"split": "held_out/pairs", "loss": loss, "accuracy": accuracy}, table

        return evaluate


class Preferences(Feed):
    """New pairs every step."""

    @contextmanager
    def examples(self, done):
        """Those of the steps from `done` on."""
        yield (preferences(step, 8, 16) for step in range(done, 1 << 20))


@config
class ToyRewardModel(TrainingJob):
    """Train a model to rank texts as people do."""

    objective: Objective = PairwiseRanking()  # what it is trained to do
    evaluators: tuple[Evaluator, ...] = (PairAccuracy(every=10),)  # on held-out pairs

    def example_shapes(self):
        return preferences(0, 8, 16)

    def prepare(self, folder, log, saved):
        return Preferences()
