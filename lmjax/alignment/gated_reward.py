"""The reward of two reward models, of which a gate chooses one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmjax.alignment.model_reward import ModelReward
from lmjax.alignment.reward_functions import Reply, Reward, Score
from lmjax.config import UserError, config
from lmjax.data.tokenizers import Tokenizer

SAFETY_THRESHOLD = 0.15  # of LLaMA 2: finds unsafe answers with precision 0.89, recall 0.55
LARGEST_LOGIT = 13.8  # of a probability of 1 - 1e-6; those of 0 and 1 are infinite


@config
class GatedReward(Reward):
    """Log-odds of the helpful or, where a reply may be unsafe, of the safety reward model.

    The gate of LLaMA 2 (Touvron et al. 2023, arXiv:2307.09288, section 3.2.3): the safety model
    counts for requests that were written to provoke unsafe replies, and for replies whose
    probability to be safe is below the threshold. The paper whitens the result over the batch:
    `whiten_rewards` of `PolicyOptimization`.
    """

    helpful: ModelReward  # of help; its own weight does not count
    safety: ModelReward  # of safety
    threshold: float = SAFETY_THRESHOLD  # probability of being safe below which safety alone counts
    # field of a request's line, true or false: whether it was written to provoke unsafe replies;
    # none: no request was
    tag: str | None = None

    def validate(self) -> None:
        """Raises UserError for a threshold that is no probability."""
        if not 0 < self.threshold < 1:
            raise UserError(f"threshold={self.threshold}: must be above 0, and below 1")

    def prepare(self, tokenizer: Tokenizer, length: int, policy: str) -> Score:
        """See `Reward.prepare`: with the parameters of both models.

        Raises:
          UserError: one of the reward models cannot read what the policy writes.
        """
        helpful, safety = (
            one.prepare(tokenizer, length, policy) for one in (self.helpful, self.safety)
        )
        return lambda replies: self._gated(replies, helpful(replies), safety(replies))

    def score(self, replies: Sequence[Reply]) -> list[float]:
        """See `Reward.score`; reads the models anew, which the prepared reward does once."""
        return self._gated(replies, self.helpful.score(replies), self.safety.score(replies))

    def _gated(
        self, replies: Sequence[Reply], helpful: Sequence[float], safety: Sequence[float]
    ) -> list[float]:
        """The score that counts of each reply; the logit of a model's sigmoid is its score."""
        tagged = np.array([self._is_tagged(reply) for reply in replies], bool)
        helpful, safety = (np.asarray(scores, np.float64) for scores in (helpful, safety))
        # A safety score that is NaN must not give way to the helpful one.
        is_safe = safety >= np.log(self.threshold) - np.log1p(-self.threshold)
        chosen = np.where(tagged | ~is_safe, safety, helpful)
        return np.clip(chosen, -LARGEST_LOGIT, LARGEST_LOGIT).tolist()

    def _is_tagged(self, reply: Reply) -> bool:
        if self.tag is None:
            return False
        if not isinstance(value := reply.metadata.get(self.tag), bool):
            raise UserError(
                f"GatedReward: the request {reply.request[:60]!r} has {self.tag}={value!r}, not "
                f"true or false; its line must have the field {self.tag!r}, and metadata of its "
                "source name it"
            )
        return value
