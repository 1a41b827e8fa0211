"""Checks that a model fits an objective."""

from lmjax.config import UserError
from lmjax.models.encoder_decoder import EncoderDecoderConfig
from lmjax.models.transformer import TransformerConfig
from lmjax.objectives.objective import Objective, TextObjective


def require_causal(objective: Objective, model: TransformerConfig) -> None:
    """Raises UserError for a model that sees what it is to predict, or that has an encoder."""
    name = type(objective).__name__
    if isinstance(model, EncoderDecoderConfig):
        raise UserError(
            f"{name} gives nothing to the encoder that this model has beside its decoder; such a "
            "model is trained with objective=SpanCorruption, and fine-tuned with "
            "objective=SequenceToSequence"
        )
    if not model.attention.causal:
        raise UserError(
            f"{name} needs a model whose tokens do not see those behind them, but "
            "model.attention.causal=False: such an encoder is trained with objective=MaskedLM"
        )


def require_encoder(objective: Objective, model: TransformerConfig) -> None:
    """Raises UserError for a model whose tokens do not see all of their text."""
    if isinstance(model, EncoderDecoderConfig) or model.attention.causal:
        raise UserError(
            f"{type(objective).__name__} needs an encoder, whose tokens see all of their text: "
            "model.attention.causal=False, as in model=bert. A causal model is trained with "
            "CausalLM, PrefixLM or BlankInfilling, one with an encoder and a decoder with "
            "SpanCorruption"
        )


def require_one_stack(objective: Objective, model: TransformerConfig) -> None:
    """Raises UserError for a model with an encoder beside its decoder."""
    if isinstance(model, EncoderDecoderConfig):
        raise UserError(
            f"{type(objective).__name__} gives nothing to the encoder that this model has beside"
            " its decoder; take an encoder, such as model=bert, or a causal model"
        )


def require_linear_head(objective: TextObjective, model: TransformerConfig) -> None:
    """Raises UserError for label smoothing of a model whose logits are bent."""
    if objective.regularisers().label_smoothing and model.logit_softcap is not None:
        raise UserError(
            f"{type(objective).__name__}: label_smoothing takes the mean of logits that are a"
            f" product, and model.logit_softcap={model.logit_softcap} bends them: set one of both"
            " to 0 or none"
        )


def require_encoder_decoder(objective: Objective, model: TransformerConfig) -> None:
    """Raises UserError for a model without an encoder beside its decoder."""
    if not isinstance(model, EncoderDecoderConfig):
        raise UserError(
            f"{type(objective).__name__} needs a model with an encoder and a decoder, as model=t5; "
            "this one is a single stack of blocks"
        )
