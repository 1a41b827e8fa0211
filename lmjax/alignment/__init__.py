"""Alignment: preferences, rewards, advantages and policy losses, as functions of arrays."""

from lmjax.alignment.advantages import generalized_advantages as generalized_advantages
from lmjax.alignment.advantages import group_relative as group_relative
from lmjax.alignment.advantages import leave_one_out as leave_one_out
from lmjax.alignment.advantages import reinforce_plus_plus as reinforce_plus_plus
from lmjax.alignment.advantages import whiten as whiten
from lmjax.alignment.kl import AdaptiveKL as AdaptiveKL
from lmjax.alignment.kl import FallingKL as FallingKL
from lmjax.alignment.kl import FixedKL as FixedKL
from lmjax.alignment.kl import KLControl as KLControl
from lmjax.alignment.kl import k1 as k1
from lmjax.alignment.kl import k2 as k2
from lmjax.alignment.kl import k3 as k3
from lmjax.alignment.labelled_answers import LabelledAnswers as LabelledAnswers
from lmjax.alignment.log_probabilities import log_probabilities as log_probabilities
from lmjax.alignment.log_probabilities import (
    log_probabilities_and_entropy as log_probabilities_and_entropy,
)
from lmjax.alignment.log_probabilities import sum_segments as sum_segments
from lmjax.alignment.masks import masked_mean as masked_mean
from lmjax.alignment.masks import spread as spread
from lmjax.alignment.policy_losses import AnswerMean as AnswerMean
from lmjax.alignment.policy_losses import FixedLengthMean as FixedLengthMean
from lmjax.alignment.policy_losses import TokenAverage as TokenAverage
from lmjax.alignment.policy_losses import TokenMean as TokenMean
from lmjax.alignment.policy_losses import clipped_policy_losses as clipped_policy_losses
from lmjax.alignment.policy_losses import clipped_value_sums as clipped_value_sums
from lmjax.alignment.policy_objective import ClippedPolicy as ClippedPolicy
from lmjax.alignment.policy_objective import SampledTargets as SampledTargets
from lmjax.alignment.preference_objective import PairTargets as PairTargets
from lmjax.alignment.preference_objective import PreferencePairs as PreferencePairs
from lmjax.alignment.preference_objective import score as score
from lmjax.alignment.preferences import DPO as DPO
from lmjax.alignment.preferences import IPO as IPO
from lmjax.alignment.preferences import KTO as KTO
from lmjax.alignment.preferences import ORPO as ORPO
from lmjax.alignment.preferences import Answers as Answers
from lmjax.alignment.preferences import HingeDPO as HingeDPO
from lmjax.alignment.preferences import PreferenceLoss as PreferenceLoss
from lmjax.alignment.preferences import SimPO as SimPO
from lmjax.alignment.preferences import kto_divergence as kto_divergence
from lmjax.alignment.ranking import ranking_loss as ranking_loss
from lmjax.alignment.rewards import token_rewards as token_rewards
