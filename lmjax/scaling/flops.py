"""Parameters and FLOPs of a model, from its config alone.

This is the one place that says what "model FLOPs" means here. Counted are matrix products, two
FLOPs for each multiply-add:

- every dense weight of the blocks once a token, and the head for the true vocabulary (not the rows
  that pad it);
- in attention the scores and the sums of values. Causal attention counts as *half the square*, a
  window w of a length-S sequence as the band S w - w^2 / 2 of it. Sequences are taken as one
  document of full length, so packed short documents get credit for a little more than they cost;
- backward as twice forward. What rematerialisation computes again is not counted: it is work, but
  not the model's.

Norms, activations, softmax, rotary positions, embedding look-ups and the optimizer are left out, a
percent or two. MFU is these FLOPs a second over the devices' peak. Published numbers that count
the full square (PaLM's, for one) come out higher; at S = 2048 and hidden = 4096 by some 4 percent.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence

import jax

from lmjax.models import EncoderDecoderConfig, TransformerConfig, XLNetConfig, abstract
from lmjax.parallel import Mesh, training_layout


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; rows that pad the vocabulary are left out.

    Attributes:
      total: all of them; a tied head counts once.
      embeddings: those that are looked up by token or position; a tied head is among them.
      products: those that every token is multiplied with; the head is among them, tied or not.
      source_products: those that every token is multiplied with that an encoder reads.
      query_products: those of `products` that a second stream of queries is multiplied with too.
    """

    total: int
    embeddings: int
    products: int
    source_products: int = 0
    query_products: int = 0


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of a model's parameters.

    Attributes:
      path: names from the model down to it.
      shape: without rows that pad the vocabulary; of a block's, the first axis is the layers.
      role: what a token does with it: "product", and is multiplied with it; "source", where it is
        an encoder's token; "embedding", looked up in it; "other", such as a bias or a norm's scale.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    role: str

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@functools.cache
def parameters(config: TransformerConfig) -> tuple[Parameter, ...]:
    """A model's parameters, by tracing it on the mesh that is set, if any; allocates nothing."""
    unset = jax.sharding.get_abstract_mesh().empty
    mesh = jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1))
    with mesh if unset else contextlib.nullcontext():
        _, shapes = abstract(config, training_layout())
    found = []
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        shape = leaf.shape
        if names[0] in ("embedding", "head", "head_bias"):
            shape = (config.vocab_size, *shape[1:])
        found.append(Parameter(names, shape, _role(names)))
    return tuple(found)


def _role(names: Sequence[str]) -> str:
    # The one looks at one token of a row, the other at distances, once for all rows.
    if names[0] == "classifier" or names[-2:] == ("position", "weight"):
        return "other"
    if names[-1] == "weight" and is_of_source(names):
        return "source"
    if names[-1] == "weight" or names[0] == "head":
        return "product"
    return "embedding" if names[-1] == "table" else "other"


@functools.cache
def count_parameters(config: TransformerConfig) -> ParameterCount:
    """Counts a model's parameters; see `parameters`."""
    sizes = dict.fromkeys(("product", "source", "embedding", "other"), 0)
    query_products = 0
    for parameter in parameters(config):
        sizes[parameter.role] += parameter.size
        if parameter.role == "product" and is_of_queries(parameter.path):
            query_products += parameter.size
    total = sum(sizes.values())
    if config.tied_head:
        sizes["product"] += config.vocab_size * (config.embedding_size or config.hidden)
    counted = sizes["embedding"], sizes["product"], sizes["source"], query_products
    return ParameterCount(total, *counted)


def is_of_queries(names: Sequence[str]) -> bool:
    """Returns whether a second stream of queries, where there is one, is multiplied with it too."""
    return names[0] == "blocks" and names[-2] not in ("key", "value")


def is_of_source(names: Sequence[str]) -> bool:
    """Returns whether the parameter at this path is multiplied with what an encoder reads."""
    read_by_decoder = "cross_attention" in names and names[-2] in ("key", "value")
    return names[0] == "encoder" or read_by_decoder


def attended_keys(length: int, window: int | None, causal: bool) -> float:
    """Keys that a query sees, on average over a sequence, by the convention of this module.

    Args:
      length: of the sequence, in tokens.
      window: band of the attention (see `pallas_kernels.attention.Mask`); None: no band.
      causal: whether later keys are hidden.
    """
    band = length if window is None else min(window, length)
    one_side = band - band * band / (2 * length)
    return one_side if causal else 2 * one_side


def forward_flops_per_token(
    config: TransformerConfig, length: int, source_length: int | None = None
) -> float:
    """Model FLOPs of one token in a forward pass over sequences of `length` tokens.

    Args:
      config: the model. Of an encoder and a decoder the tokens are the decoder's, and each bears
        its part of what the encoder does for the row. XLNet is counted with both streams.
      length: of a sequence, in tokens.
      source_length: tokens that an encoder reads for each sequence; None: as many.
    """
    count, attention = count_parameters(config), config.attention
    keys = sum(attended_keys(length, window, attention.causal) for window in config.windows)
    width = 2 * 2 * attention.num_heads * attention.head_dim  # of a pair: its score, its value
    flops = 2 * count.products + width * keys
    if isinstance(config, EncoderDecoderConfig):
        source = length if source_length is None else source_length
        row = source * (2 * count.source_products + config.encoder_layers * width * source)
        flops += config.num_layers * width * source + row / length
    if isinstance(config, XLNetConfig):
        distances = width / 2 * 2 * length  # of each query, before and behind it
        stream = config.num_layers * (width * length + 2 * distances)
        flops += 2 * count.query_products + stream
    return flops


def training_flops_per_token(
    config: TransformerConfig, length: int, source_length: int | None = None
) -> float:
    """Model FLOPs of one token in training: forward, and backward for twice as much."""
    return 3 * forward_flops_per_token(config, length, source_length)


def cache_bytes_per_token(config: TransformerConfig) -> int:
    """Bytes of the key-value cache that one token of one row takes, in the compute dtype."""
    numbers = 2 * config.num_layers * config.attention.kv_heads * config.attention.head_dim
    return numbers * jax.numpy.dtype(config.dtype).itemsize
