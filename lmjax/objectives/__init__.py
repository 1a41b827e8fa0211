"""What a model is trained to do: documents to batches on the host, batches to losses on devices."""

from lmjax.objectives.causal_lm import CausalLM as CausalLM
from lmjax.objectives.objective import Objective as Objective
from lmjax.objectives.objective import Sums as Sums
