"""The Transformer that every family is put together from, and how one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.config import UserError, config
from lmjax.models.alternating import check_alternate
from lmjax.models.attention import AttentionConfig, attended_keys
from lmjax.models.batch import Batch
from lmjax.models.embedding import Embedding
from lmjax.models.embedding_noise import with_noise
from lmjax.models.executor import Remat
from lmjax.models.feed_forward import FeedForwardConfig
from lmjax.models.few_rows import MOST_SECOND, count_on_cpu, product_by_outputs
from lmjax.models.heads import Classifier, ClassifierConfig, HeadTransform, HeadTransformConfig
from lmjax.models.initializers import Initializer, Normal
from lmjax.models.label_heads import HeadConfig, build_heads, check_heads, find_head, of_texts
from lmjax.models.linear import Builder, dropout
from lmjax.models.lora import OUTPUT_HEAD, Adapter, LoRA, check_layers
from lmjax.models.norms import LayerNormConfig, NormConfig
from lmjax.models.paged_cache import AnyCache
from lmjax.models.positions import EmbeddingPositions, LearnedPositions
from lmjax.models.products import Products
from lmjax.models.quantization import Quantization, quantize_table
from lmjax.models.residual import Arrangement, PreNorm
from lmjax.models.shrink import shrink_gradient
from lmjax.models.stack import Stack
from lmjax.models.stretches import Stretch, stretches
from lmjax.parallel import Layout
from pallas_kernels.softcap import softcap_scores

VOCABULARY_MULTIPLE = 128
MASKED_LOGIT = -1e30
NO_HEAD = (
    "the model has no head that predicts words: its hidden states are all that it gives, as those"
    " of a sentence encoder. Training with begin_with and model.word_head=true gives it a fresh one"
)


@config
class TransformerConfig:
    """A stack of equal blocks between an embedding and a head."""

    vocab_size: int = 50_257  # tokens; rows of the tables are padded to a multiple of 128
    hidden: int = 768  # width of the residual stream
    num_layers: int = 12  # blocks
    max_length: int | None = 1024  # tokens of the longest text; none: any (relative positions)
    attention: AttentionConfig = AttentionConfig()
    feed_forward: FeedForwardConfig = FeedForwardConfig()
    # of layers 0, 2, 4, ..., where every second layer alone is a mixture of experts (GLaM, Switch);
    # none: all layers have the same
    alternate_feed_forward: FeedForwardConfig | None = None
    norm: NormConfig = LayerNormConfig()
    positions: EmbeddingPositions | None = LearnedPositions()  # added to the embeddings
    token_types: int | None = None  # rows of a table that is added by token type (BERT)
    arrangement: Arrangement = PreNorm()  # how norms, sublayers and residuals are put together
    embedding_size: int | None = None  # width of the token table and the head; none: hidden
    embedding_scale: float = 1.0  # token embeddings are multiplied by it
    embedding_norm: NormConfig | None = None  # of the embeddings, before the first block
    word_head: bool = True  # tokens are predicted; false: hidden states are all that it gives
    tied_head: bool = True  # the head is the token table
    normalized_head: bool = False  # the head's rows have length 1 (NormHead of Baichuan 2)
    head_transform: HeadTransformConfig | None = None  # between the last block and the head
    classifier: ClassifierConfig | None = None  # of whole rows, beside the head
    heads: tuple[HeadConfig, ...] = ()  # further heads by their names, each trained on labels
    head_scale: float = 1.0  # logits are multiplied by it
    logit_softcap: float | None = None  # logits are bent to lie within it (Gemma 2)
    lora: LoRA | None = None
    quantization: Quantization | None = None  # weights in few bits; none: they are float32
    dropout: float = 0.0  # of embeddings and sublayer outputs, in training
    # of the last block's sublayer outputs: from `dropout` in the first block it rises evenly by
    # layer (LIMA: 0.3 over dropout=0.0); none: it is the same everywhere
    top_dropout: float | None = None
    # amplitude of uniform noise on token embeddings in training, over sqrt(length x width) (NEFTune
    # takes 5 to 15)
    embedding_noise: float = 0.0
    initializer: Initializer = Normal()
    # of computation; parameters are float32
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    products: Products = Products()  # how dense layers multiply
    # what is kept for backward, which recomputes the rest: all (none), products and attention
    # (dots), attention, the inputs of blocks (full), those in the host's memory (offload)
    remat: Remat = "none"
    unroll: int = 1  # layers per step of the scan over layers; 0: a plain Python loop

    def validate(self) -> None:
        """Raise UserError for numbers that cannot be meant."""
        for name in ("vocab_size", "hidden", "num_layers", "max_length"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"{name}={size}: must be 1 or more")
        if self.positions is not None and self.max_length is None:
            raise UserError(
                "max_length is none, but the table of positions has a row for each token of the"
                " longest text: give their number, or positions=null"
            )
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise UserError(f"logit_softcap={self.logit_softcap}: must be above 0, or none")
        for name in ("dropout", "top_dropout"):
            if (share := getattr(self, name)) is not None and not 0 <= share < 1:
                raise UserError(f"{name}={share}: must be 0 or more, and below 1")
        if self.embedding_noise < 0:
            raise UserError(f"embedding_noise={self.embedding_noise}: must be 0 or more")
        if self.products.fp8 and self.dtype == "float32":
            raise UserError(
                "products.fp8=true: what is no product has more bits, so set dtype=bfloat16 too"
            )
        if self.products.fp8 and self.feed_forward.reads_rows:
            raise UserError(
                "products.fp8=true: products of experts have no 8 bits; set products.fp8=false"
            )
        check_heads(self.heads)
        if self.alternate_feed_forward is not None:
            check_alternate(self.alternate_feed_forward, self.num_layers)
        if self.feed_forward.reads_rows and self.lora is not None and self.lora.base is not None:
            raise UserError(
                f"lora.base={type(self.lora.base).__name__}: weights of experts are not kept in few"
                " bits; set lora.base=none"
            )
        if self.quantization is not None and self.lora is not None and self.lora.base is not None:
            raise UserError(
                f"lora.base={type(self.lora.base).__name__}: quantization says how weights are kept"
                " already; set lora.base=none"
            )

    @property
    def padded_vocab(self) -> int:
        """Rows of the token table: vocab_size rounded up, so that any mesh can cut it."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer; the pattern of `attention` may end in its middle."""
        pattern = self.attention.windows
        return tuple(pattern[layer % len(pattern)] for layer in range(self.num_layers))

    @property
    def group(self) -> int:
        """Neighbouring layers whose parameters are one entry of the stack of blocks."""
        return 1 if self.alternate_feed_forward is None else 2

    @property
    def stretches(self) -> tuple[Stretch, ...]:
        """The layers, cut into what is scanned; each group stands alone where nothing is."""
        return stretches(self.windows, scanned=self.unroll != 0, group=self.group)

    @property
    def depth(self) -> int:
        """Blocks of all its stacks."""
        return self.num_layers

    def uses(self, path: Sequence[str], length: int, source: int) -> float:
        """Number of tokens multiplied with a weight, for each token of a text in forward.

        Args:
          path: names from the model down to the weight.
          length: of the text, in tokens.
          source: tokens that an encoder reads beside it, where there is one.
        """
        if path[0] == "classifier" or of_texts(self.heads, path):
            return 0.0
        return self.feed_forward.uses(path)

    def pairs(self, length: int, source: int) -> float:
        """Pairs of a query and a key in all layers, for each token of a text; see `uses`."""
        causal = self.attention.causal
        return sum(attended_keys(length, window, causal) for window in self.windows)

    def build(self, layout: Layout, rngs: nnx.Rngs) -> Transformer:
        """The model, its parameters drawn from `rngs` and sharded as `layout` says."""
        return Transformer(self, layout, rngs)


class Transformer(Stack):
    """Embedding, blocks, final norm and head, as the config puts them together."""

    def __init__(self, config: TransformerConfig, layout: Layout, rngs: nnx.Rngs):
        sizes = config.hidden, config.num_layers
        how = config.initializer, config.dtype, layout, rngs, config.products
        builder = Builder(*sizes, *how)
        rows, width = config.padded_vocab, config.embedding_size or config.hidden
        self.embedding = Embedding("vocab", rows, width, "embedding", builder)
        quantize_table(self.embedding, config.quantization)
        # What the training step multiplies the embeddings' gradient by, where it does; that of a
        # tied head stays whole.
        self.embedding_gradient = nnx.data(None)
        self.positions = nnx.data(None)
        if config.positions is not None:
            self.positions = config.positions.build(config.max_length, builder)
        self.token_types = nnx.data(None)
        if config.token_types is not None:
            types = config.token_types
            self.token_types = Embedding(None, types, config.hidden, "embedding", builder)
        self.project_in = self.project_out = nnx.data(None)
        if config.embedding_size is not None:
            outer, inner = ((None, width),), (("embed", config.hidden),)
            self.project_in = builder.linear(outer, inner, bias=False)
            self.project_out = builder.linear(inner, outer, bias=False)
        self.embedding_norm = nnx.data(None)
        if config.embedding_norm is not None:
            self.embedding_norm = config.embedding_norm.build(config.hidden)

        super().__init__(config, builder)
        check_layers(config.lora, self.blocks)
        self.head = nnx.data(None)
        if config.word_head and not config.tied_head:
            self.head = Embedding("vocab", rows, width, "head", builder)
            quantize_table(self.head, config.quantization)
        self.head_transform = self.head_bias = self.classifier = nnx.data(None)
        if config.word_head and config.head_transform is not None:
            self.head_transform = HeadTransform(config.head_transform, config.norm, builder)
            self.head_bias = nnx.Param(
                jnp.zeros(rows, jnp.float32), out_sharding=layout.spec("vocab", shape=(rows,))
            )
        if config.classifier is not None:
            self.classifier = Classifier(config.classifier, builder)
        self.heads = nnx.data(build_heads(config.heads, width, builder))
        if config.lora is not None and config.lora.adapts_head:
            if self.head is None:
                raise UserError(
                    f"lora.layers: {OUTPUT_HEAD!r}: the model has no head of words that is a table"
                    " of its own (tied_head, word_head)"
                )
            self.head.adapter = Adapter(config.lora, self.head.width, self.head.rows, builder)

    def __call__(
        self, batch: Batch, cache: AnyCache | None = None, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "batch seq embed"], AnyCache | None]:
        """Runs the blocks over a batch.

        Args:
          batch: tokens, positions and segments (see `Batch`).
          cache: what came before the batch's tokens; None to look at the batch alone.
          key: for dropout; None drops nothing.

        Returns:
          The hidden states after the final norm, which `head_input`, `logits`, `classes` and
          `outputs` read, and the cache extended by the batch.
        """
        batch = jax.tree.map(jnp.asarray, batch)  # a debugger may hand over numpy
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("embedding"):
            x = dropout(self.embed(batch, embed_key), self.config.dropout, embed_key)
        x, cache = self.run(x, batch, cache, blocks_key)
        return x if self.project_out is None else self.project_out(x), cache

    def embed(
        self, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch seq embed"]:
        """Token embeddings, with noise by `key`, plus whatever positions add to them."""
        config = self.config
        x = self.embedding(batch.tokens)
        x = with_noise(x, batch.segments, config.embedding_noise, key)
        if self.embedding_gradient is not None:
            x = shrink_gradient(x, self.embedding_gradient)
        x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x.astype(config.dtype))
        if self.positions is not None:
            x = x + self.positions(batch)
        if self.token_types is not None:
            types = batch.token_types
            x = x + self.token_types(jnp.zeros_like(batch.tokens) if types is None else types)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x.astype(config.dtype)

    def head_input(
        self, hidden: Float[Array, "batch seq width"]
    ) -> Float[Array, "batch seq width"]:
        """Input of the head's product. UserError for a model without such a head."""
        if not self.config.word_head:
            raise UserError(NO_HEAD)
        hidden = hidden * jnp.asarray(self.config.head_scale, hidden.dtype)
        return hidden if self.head_transform is None else self.head_transform(hidden)

    def classes(self, hidden: Float[Array, "batch seq width"]) -> Float[Array, "batch classes"]:
        """Float32 logits of each row's class, from its first token's hidden state."""
        return self.classifier(hidden)

    def outputs(
        self,
        head: str,
        hidden: Float[Array, "batch seq width"],
        batch: Batch,
        texts: int = 1,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch rows outputs"]:
        """Float32 outputs of the head of this name; see `LabelHead`. UserError if there is none."""
        with jax.named_scope("head"):
            return find_head(self.heads, head)(hidden, batch, texts, key)

    def head_table(self) -> Float[Array, "vocab width"]:
        """The head's rows in the compute dtype, sharded over the vocabulary alone."""
        rows = self.embedding if self.head is None else self.head
        table = rows.gathered("float32")
        if rows.adapter is not None:
            table = table + self.layout.reshard(rows.adapter.delta().T, "vocab", None)
        if self.config.normalized_head:
            square = jnp.sum(jnp.square(table), axis=1, keepdims=True)
            table = table * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return table.astype(self.config.dtype)

    @staticmethod
    def _scores(x: jax.Array, table: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Products of x with all rows of the table in float32."""
        batch, seq = x.shape[:2]
        cut = any((*spec, *jax.typeof(x).sharding.spec))
        if not cut and count_on_cpu(x.shape) <= MOST_SECOND:
            return product_by_outputs(x.reshape(batch * seq, -1), table).reshape(batch, seq, -1)
        return jnp.einsum(
            "bsd,vd->bsv", x, table, preferred_element_type=jnp.float32, out_sharding=spec
        )

    def logits(self, hidden: Float[Array, "batch seq width"]) -> Float[Array, "batch seq vocab"]:
        """Float32 logits of every padded vocabulary row; those of the padding are -1e30."""
        spec = self.layout.spec(
            "batch", "seq", "vocab", shape=(*hidden.shape[:2], self.config.padded_vocab)
        )
        x, rows = self.head_input(hidden), self.embedding if self.head is None else self.head
        normalized = self.config.normalized_head
        # Of a few positions, as in decoding, two products are cheaper than a table made anew.
        beside = None if normalized else rows.adapter
        logits = None if normalized else rows.scores(x)
        if logits is None:
            table = rows.gathered(self.config.dtype) if beside is not None else self.head_table()
            logits = self._scores(x, table, spec)
        if beside is not None:
            logits = logits + beside(x)
        if self.head_bias is not None:
            logits = logits + self.head_bias[...]
        logits, _ = softcap_scores(logits, self.config.logit_softcap)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, 1, self.config.padded_vocab), 2)
        return jnp.where(column < self.config.vocab_size, logits, MASKED_LOGIT)
