"""The parts of language models, and the families put together from them."""

from lmjax.models.attention import AttentionConfig as AttentionConfig
from lmjax.models.batch import Batch as Batch
from lmjax.models.batch import plain_batch as plain_batch
from lmjax.models.feed_forward import FeedForwardConfig as FeedForwardConfig
from lmjax.models.feed_forward import GatedFeedForwardConfig as GatedFeedForwardConfig
from lmjax.models.gpt import gpt1 as gpt1
from lmjax.models.gpt import gpt2 as gpt2
from lmjax.models.gpt import gpt3 as gpt3
from lmjax.models.initializers import Normal as Normal
from lmjax.models.llama import llama as llama
from lmjax.models.llama import llama2 as llama2
from lmjax.models.norms import LayerNormConfig as LayerNormConfig
from lmjax.models.norms import RMSNormConfig as RMSNormConfig
from lmjax.models.positions import LearnedPositions as LearnedPositions
from lmjax.models.positions import Rotary as Rotary
from lmjax.models.residual import PostNorm as PostNorm
from lmjax.models.residual import PreNorm as PreNorm
from lmjax.models.transformer import Cache as Cache
from lmjax.models.transformer import Transformer as Transformer
from lmjax.models.transformer import TransformerConfig as TransformerConfig
from lmjax.models.transformer import abstract as abstract
from lmjax.models.transformer import draw_parameters as draw_parameters
from lmjax.models.transformer import initialize as initialize
from lmjax.models.transformer import make_cache as make_cache
