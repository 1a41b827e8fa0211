"""Choices of what fine-tuning trains: all, the last blocks, biases, some by name, adapters.

What is not trained has neither gradients nor optimizer state, and no weight decay.
"""

from __future__ import annotations

import abc

from flax import traverse_util

from lmjax.config import UserError, config
from lmjax.models import TransformerConfig, abstract, quantized_weights
from lmjax.models.lora import fits
from lmjax.parallel import Layout
from lmjax.training.trained_part import TrainedPart

# Parameters after the blocks: what the last blocks give, these read.
LABELS = ("classifier", "heads")  # on labels; fresh ones learn nothing unless they are trained
AFTER_BLOCKS = ("final_norm", "project_out", "head", "head_transform", "head_bias", *LABELS)


@config
class Trainable(abc.ABC):
    """Base of the choices of what is trained."""

    @abc.abstractmethod
    def trains(self, path: str) -> bool:
        """Returns whether a parameter is trained, such as blocks.attention.query.weight."""

    @property
    def last_blocks(self) -> int | None:
        """Number of layers, the last ones, that are trained of a stacked parameter; None: all."""
        return None

    def part(self, model: TransformerConfig) -> TrainedPart:
        """The division of the model's parameters."""
        last = self.last_blocks
        first = 0 if last is None else (model.num_layers - last) // model.group
        return TrainedPart(self.trains, first)

    def share(self, path: str, layers: int) -> float:
        """Part of a parameter that is trained, 0 to 1, where the model has so many blocks."""
        if not self.trains(path):
            return 0.0
        last = self.last_blocks if path.startswith("blocks.") else None
        return 1.0 if last is None else last / layers

    def check(self, model: TransformerConfig, layout: Layout) -> None:
        """Raises UserError where nothing of the model, or something it has not, would be trained.

        A mesh must be set.
        """
        paths = parameter_paths(model, layout)
        if not any(map(self.trains, paths)):
            raise UserError(
                f"trainable={type(self).__name__} trains no parameter of the model, which has"
                f" {', '.join(paths)}"
            )


def parameter_paths(model: TransformerConfig, layout: Layout) -> list[str]:
    """The dotted paths of a model's parameters."""
    return list(traverse_util.flatten_dict(abstract(model, layout)[1], sep="."))


def check_base(trainable: Trainable, model: TransformerConfig, layout: Layout) -> None:
    """Raises UserError where weights would be trained that are kept in few bits.

    See `LoRA.base` and `TransformerConfig.quantization`.
    """
    forms = {".".join(path): form for path, form in quantized_weights(model).items()}
    paths = parameter_paths(model, layout)
    kept = [p for p in paths if p.rpartition(".")[0] in forms and trainable.trains(p)]
    if not kept:
        return
    weight = kept[0].rpartition(".")[0]
    setting, instead = "model.quantization", "or set model.quantization.aware=true"
    if model.quantization is None:
        setting, instead = "model.lora.base", "or set model.lora.base=none"
    raise UserError(
        f"trainable={type(trainable).__name__} trains {weight}, which {setting}="
        f"{type(forms[weight].code).__name__} keeps in few bits, as what is not trained: train the"
        f" adapters (trainable=Adapters), {instead}"
    )


@config
class AllParameters(Trainable):
    """Train every parameter."""

    def trains(self, path: str) -> bool:
        """See `Trainable.trains`."""
        return True


@config
class LastBlocks(Trainable):
    """Train the last blocks and what follows them: final norm, untied head, heads on labels.

    Parameters of blocks are stacked over layers: gradients, updates and the optimizer's state are
    those of the last layers alone, and backward ends at the first of them. While a step runs, both
    parts of a stack are copies. Of an encoder and a decoder, the blocks are the decoder's.
    """

    count: int = 1  # blocks that are trained

    def validate(self) -> None:
        """Raises UserError for no block."""
        if self.count < 1:
            raise UserError(f"trainable.count={self.count}: must be 1 or more")

    def trains(self, path: str) -> bool:
        """See `Trainable.trains`."""
        return path.partition(".")[0] in ("blocks", *AFTER_BLOCKS)

    @property
    def last_blocks(self) -> int | None:
        """See `Trainable.last_blocks`."""
        return self.count

    def check(self, model: TransformerConfig, layout: Layout) -> None:
        """Raises UserError for more blocks than there are."""
        if self.count > model.num_layers:
            raise UserError(
                f"trainable.count={self.count}: the model has {model.num_layers} blocks"
            )
        if self.count % model.group:
            raise UserError(
                f"trainable.count={self.count}: dense and sparse blocks, which take turns, are"
                " trained in pairs; give an even number"
            )


@config
class Biases(Trainable):
    """Train the biases, norms' too, and heads on labels (BitFit; Zaken et al. 2021, 2106.10199)."""

    def trains(self, path: str) -> bool:
        """See `Trainable.trains`."""
        is_bias = path.rpartition(".")[2] in ("bias", "head_bias")
        return is_bias or path.partition(".")[0] in LABELS


@config
class Matching(Trainable):
    """Train the parameters whose paths, or their ends, match a pattern."""

    # such as feed_forward.*, bias, blocks.attention.query.weight; * is anything
    patterns: tuple[str, ...]

    def trains(self, path: str) -> bool:
        """See `Trainable.trains`."""
        return any(fits(path, pattern) for pattern in self.patterns)

    def check(self, model: TransformerConfig, layout: Layout) -> None:
        """Raises UserError for no pattern, or one that no parameter matches."""
        paths = parameter_paths(model, layout)
        unfit = [p for p in self.patterns if not any(fits(path, p) for path in paths)]
        if unfit or not self.patterns:
            given = ", ".join(map(repr, unfit)) or "nothing"
            raise UserError(
                f"trainable.patterns: {given} matches no parameter of the model, which has"
                f" {', '.join(paths)}"
            )


@config
class Adapters(Trainable):
    """Train the adapters, which `model.lora` puts beside dense layers, and `model.heads`."""

    def trains(self, path: str) -> bool:
        """See `Trainable.trains`."""
        first, *others = path.split(".")
        return first == "heads" or "adapter" in others

    def check(self, model: TransformerConfig, layout: Layout) -> None:
        """Raises UserError for a model without adapters."""
        if model.lora is None:
            raise UserError(
                "trainable=Adapters: the model has none; model.lora=LoRA puts adapters beside its"
                " dense layers"
            )
