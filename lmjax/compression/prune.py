"""The command that makes weights of a model zero, or the model itself smaller."""

from __future__ import annotations

from typing import ClassVar

from lmjax.compression.command import Compression, Rows
from lmjax.compression.methods import Tell
from lmjax.compression.pruner import Pruner, PruningMethod
from lmjax.compression.shrinking import Shrinker
from lmjax.compression.sparsity import Sparsity
from lmjax.config import UserError, config
from lmjax.models import TransformerConfig
from lmjax.scaling.flops import count_parameters
from lmjax.training.zeros import share_of_zeros


@config
class Prune(Compression):
    """A model with zeros among its weights, or with fewer parts, in a run folder of its own.

    Weights are float32 in either case: zeros make no folder smaller and no product faster here.
    With fewer layers, heads, columns or experts it is an ordinary smaller model. Training with
    begin_with=FOLDER goes on from both; with keep_zeros=true zeros stay zero.
    """

    example: ClassVar[str] = "prune runs/quickstart runs/quickstart-sparse method=magnitude"

    # magnitude; wanda (arXiv:2306.11695); sparsegpt (arXiv:2301.00774); none: no zeros are made.
    # All but magnitude read the calibration text
    method: PruningMethod | None = None
    sparsity: float | None = None  # share of weights that become zero; none: 0.5, or the pattern's
    pattern: str | None = None  # as 2:4, where two of each four inputs of an output stay; none: any
    matrices: tuple[str, ...] = ("*",)  # layers that get zeros, by last names or dotted paths
    # how many layers stay, of the decoder where there is an encoder too; none: all
    layers: int | None = None
    encoder_layers: int | None = None  # how many layers of an encoder stay beside it; none: all
    heads: int | None = None  # how many heads of queries stay in each layer; none: all
    width: int | None = None  # columns that stay of each feed-forward layer, or expert; none: all
    experts: int | None = None  # how many experts stay in each layer that has some; none: all

    def validate(self) -> None:
        """Raises UserError for settings that cannot be meant."""
        super().validate()
        Sparsity.of(self.sparsity, self.pattern)
        if self.method is None and (self.sparsity is not None or self.pattern is not None):
            raise UserError(
                "sparsity and pattern are of zeros: give method=magnitude, wanda or sparsegpt too"
            )

    @property
    def numbers(self) -> tuple[int | None, ...]:
        """Numbers of the parts that stay, in the order of `Shrinker`."""
        return self.layers, self.heads, self.width, self.experts, self.encoder_layers

    def check_asked(self) -> None:
        """See `Compression.check_asked`."""
        if self.method is None and not any(number is not None for number in self.numbers):
            raise UserError(
                "What is pruned? Give method=magnitude, wanda or sparsegpt for zeros, or how many"
                " layers=, encoder_layers=, heads=, columns (width=) or experts= stay"
            )

    def change(
        self, params: dict, model: TransformerConfig, rows: Rows | None, tell: Tell
    ) -> tuple[dict, TransformerConfig]:
        """See `Compression.change`."""
        before = count_parameters(model).total
        if any(number is not None for number in self.numbers):
            layers, heads, width, experts, encoder_layers = self.numbers
            shrink = Shrinker(layers, heads, width, rows, experts, encoder_layers, tell)
            params, model = shrink(model, params)
            tell(f"{count_parameters(model).total:,} of {before:,} parameters stay")
        if self.method is not None:
            sparsity = Sparsity.of(self.sparsity, self.pattern)
            prune = Pruner(self.method, sparsity, rows, self.matrices, self.damping, tell)
            params = prune(model, params)
            tell(f"{share_of_zeros(params):.1%} of the weights of dense layers are zero")
        return params, model
