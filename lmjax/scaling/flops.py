"""Parameters and FLOPs of a model, from its config alone.

This is the one place that says what "model FLOPs" means here. Counted are matrix products, two
FLOPs for each multiply-add:

- every dense weight of the blocks once a token, weights of experts for the share of the experts
  that a token uses (dropped tokens included), and the head for the true vocabulary (not the rows
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
from collections.abc import Callable

import jax

from lmjax.config import replace
from lmjax.models import TransformerConfig, abstract
from lmjax.models.attention import attended_keys as attended_keys
from lmjax.parallel import Mesh, training_layout

# (path of a parameter, blocks of the model) -> part of it that is trained, 0 to 1.
Share = Callable[[str, int], float]


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; rows that pad the vocabulary are left out.

    Attributes:
      total: all of them; a tied head counts once.
      embeddings: those that are looked up by token or position; a tied head is among them.
      products: those that tokens are multiplied with; the head is among them, tied or not.
      active: those that one token uses, of experts as many as it has, embeddings and all else
        whole, as reports of mixtures of experts count.
    """

    total: int
    embeddings: int
    products: int
    active: int


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of a model's parameters.

    Attributes:
      path: names from the model down to it.
      shape: without rows that pad the vocabulary; of a block's, the first axis is the layers.
      role: what a token does with it: "product", and is multiplied with it; "embedding", looked up
        in it; "other", such as a bias or a norm's scale.
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
    """A model's parameters, by tracing it on the mesh that is set, if any; allocates nothing.

    Weights that are kept in few bits count as the numbers that they are made into.
    """
    if config.lora is not None:
        config = replace(config, lora=replace(config.lora, base=None))
    config = replace(config, quantization=None)
    unset = jax.sharding.get_abstract_mesh().empty
    mesh = jax.sharding.use_abstract_mesh(Mesh(fsdp=1).abstract(1))
    with mesh if unset else contextlib.nullcontext():
        _, shapes = abstract(config, training_layout())
    found = []
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
        shape = leaf.shape
        if "adapter" in names and names[0] == "head":
            shape = (shape[0], min(shape[1], config.vocab_size))
        elif names[0] in ("embedding", "head", "head_bias"):
            shape = (config.vocab_size, *shape[1:])
        found.append(Parameter(names, shape, _role(config, names)))
    return tuple(found)


def _role(config: TransformerConfig, names: tuple[str, ...]) -> str:
    if names[-1] == "weight" or names[0] == "head":
        return "product" if config.uses(names, 1, 1) else "other"
    return "embedding" if names[-1] == "table" else "other"


def count_trained(config: TransformerConfig, share: Share) -> int:
    """Number of a model's parameters that are trained."""
    found = parameters(config)
    return round(sum(p.size * share(".".join(p.path), config.num_layers) for p in found))


@functools.cache
def count_parameters(config: TransformerConfig) -> ParameterCount:
    """Counts a model's parameters; see `parameters`."""
    sizes, active = dict.fromkeys(("product", "embedding", "other"), 0), 0.0
    for parameter in parameters(config):
        sizes[parameter.role] += parameter.size
        active += parameter.size * config.feed_forward.uses(parameter.path)
    total, products = sum(sizes.values()), sizes["product"] + _tied_head(config)
    return ParameterCount(total, sizes["embedding"], products, round(active))


def _tied_head(config: TransformerConfig) -> int:
    """Numbers of a head of words that is the token table."""
    if not (config.tied_head and config.word_head):
        return 0
    return config.vocab_size * (config.embedding_size or config.hidden)


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
    attention, source = config.attention, length if source_length is None else source_length
    weights = [parameter for parameter in parameters(config) if parameter.role == "product"]
    products = sum(weight.size * config.uses(weight.path, length, source) for weight in weights)
    width = 2 * 2 * attention.num_heads * attention.head_dim  # of a pair: its score, its value
    return 2 * (products + _tied_head(config)) + width * config.pairs(length, source)


def training_flops_per_token(
    config: TransformerConfig,
    length: int,
    source_length: int | None = None,
    share: Share | None = None,
) -> float:
    """Model FLOPs of one token in training: forward, and backward for twice as much.

    Args:
      config: see `forward_flops_per_token`, as for the lengths.
      length: of a sequence, in tokens.
      source_length: tokens that an encoder reads for each sequence; None: as many.
      share: part of each parameter that is trained, 0 to 1; None: all. What is not trained has no
        gradient of its own, a third of what a weight costs; of blocks before the first trained one
        backward is left out altogether, but for attention's scores and sums.
    """
    whole = 3 * forward_flops_per_token(config, length, source_length)
    if share is None:
        return whole
    source, layers = length if source_length is None else source_length, config.num_layers
    without = _tied_head(config) * (1 - share("embedding.table", layers))
    for weight in parameters(config):
        if weight.role == "product":
            uses = config.uses(weight.path, length, source)
            trained = share(".".join(weight.path), layers)
            saved = 2 if 0 < trained < 1 else 1
            without += weight.size * uses * saved * (1 - trained)
    return whole - 2 * without


def cache_bytes_per_token(config: TransformerConfig) -> int:
    """Bytes of the key-value cache that one token of one row takes, in the compute dtype."""
    numbers = 2 * config.num_layers * config.attention.kv_heads * config.attention.head_dim
    return numbers * jax.numpy.dtype(config.dtype).itemsize
