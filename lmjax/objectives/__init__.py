"""Objectives: text to examples on the host, examples to losses on devices."""

from lmjax.objectives.blank_infilling import BlankInfilling as BlankInfilling
from lmjax.objectives.blanks import Blanks as Blanks
from lmjax.objectives.blanks import DocumentBlank as DocumentBlank
from lmjax.objectives.blanks import SentenceBlanks as SentenceBlanks
from lmjax.objectives.blanks import TokenBlanks as TokenBlanks
from lmjax.objectives.causal_lm import CausalLM as CausalLM
from lmjax.objectives.example import Example as Example
from lmjax.objectives.example import TokenTargets as TokenTargets
from lmjax.objectives.glm import glm_130b_objective as glm_130b_objective
from lmjax.objectives.glm import glm_objective as glm_objective
from lmjax.objectives.labels import Classification as Classification
from lmjax.objectives.labels import LabelTargets as LabelTargets
from lmjax.objectives.labels import MultiLabelClassification as MultiLabelClassification
from lmjax.objectives.labels import Regression as Regression
from lmjax.objectives.labels import SpanExtraction as SpanExtraction
from lmjax.objectives.labels import SpanTargets as SpanTargets
from lmjax.objectives.lexicon import TokenTable as TokenTable
from lmjax.objectives.masked_lm import MaskedLM as MaskedLM
from lmjax.objectives.mixed import Mixed as Mixed
from lmjax.objectives.objective import Objective as Objective
from lmjax.objectives.objective import TextObjective as TextObjective
from lmjax.objectives.permutation_lm import PermutationLM as PermutationLM
from lmjax.objectives.prediction import Sums as Sums
from lmjax.objectives.prefix_lm import PrefixLM as PrefixLM
from lmjax.objectives.span_corruption import SpanCorruption as SpanCorruption
from lmjax.objectives.weighted_sum import WeightedSum as WeightedSum
