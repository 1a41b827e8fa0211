"""Chat formats that are known by name: general ones, and those of the models of all families.

The families of `lmjax.models` hold the formats of their models; see
`lmjax.models.family.ChatStyle`.
"""

from __future__ import annotations

from lmjax.config import UserError, fields, preset
from lmjax.data.chat.messages import ChatFormat
from lmjax.data.chat.templates import PLAIN, ChatTemplate, name_template
from lmjax.data.tokenizers import Tokenizer
from lmjax.models import TransformerConfig
from lmjax.models.family import ChatStyle, ModelFamily, families

# A prompt, and what follows it.
BARE = ChatTemplate(system=("{content}",), joined=True)
# Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca
ALPACA_TASK = "Below is an instruction that describes a task"
ALPACA_WANTED = "Write a response that appropriately completes the request."
ALPACA = ChatTemplate(
    user=(f"{ALPACA_TASK}. {ALPACA_WANTED}\n\n### Instruction:\n{{content}}\n\n### Response:",),
    user_with_context=(
        f"{ALPACA_TASK}, paired with an input that provides further context. {ALPACA_WANTED}"
        "\n\n### Instruction:\n{content}\n\n### Input:\n{context}\n\n### Response:",
    ),
    joined=True,
)
# Version 1.1: Chiang et al. 2023, github.com/lm-sys/FastChat
VICUNA = ChatTemplate(
    special=("<s>", "</s>"),
    start=("<s>",),
    system=("{content} ",),
    user=("USER: {content} ",),
    assistant=("ASSISTANT:", " {content}", "</s>"),
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
    ),
    joined=True,
)
# Version 3.5: Wang et al. 2023, github.com/imoneoi/openchat
OPENCHAT = ChatTemplate(
    special=("<s>", "<|end_of_turn|>"),
    start=("<s>",),
    system=("{content}", "<|end_of_turn|>"),
    user=("GPT4 Correct User: {content}", "<|end_of_turn|>"),
    assistant=("GPT4 Correct Assistant:", " {content}", "<|end_of_turn|>"),
    joined=True,
    stop=("<|end_of_turn|>",),
)


def templates() -> dict[str, ChatTemplate]:
    """The chat formats that are known by name: general ones, and those of the registered families.

    Raises:
      UserError: a family's format is none, or two formats have one name.
    """
    found = {
        "plain": PLAIN,
        "bare": BARE,
        "alpaca": ALPACA,
        "vicuna": VICUNA,
        "openchat": OPENCHAT,
    }
    for family in families():
        for style in family.chat:
            made = _template(family, style)
            if found.setdefault(style.name, made) != made:
                raise UserError(
                    f"the chat format {style.name!r} of the family {family.name} differs from"
                    " another one of that name; give it a name of its own"
                )
    for name, template in found.items():
        name_template(template, name)
    return found


def _template(family: ModelFamily, style: ChatStyle) -> ChatTemplate:
    try:
        return ChatTemplate(**style.template)
    except (TypeError, UserError) as error:
        raise UserError(
            f"the chat format {style.name!r} of the family {family.name}: {error}; its fields are"
            f" those of ChatTemplate: {', '.join(fields(ChatTemplate))}"
        ) from None


@preset
def chat_template(name: str) -> ChatTemplate:
    """A published chat format, by name; a format itself is given back as it is.

    plain is ours, for models trained on text alone, and so is bare, a prompt and what follows it.
    alpaca and vicuna (v1.1) are those of LLaMA's first offspring, openchat that of OpenChat 3.5,
    chatml the first Qwen's, falcon that of Falcon-7B and 40B, mistral that of Mistral-7B-Instruct
    v0.1 and v0.2, baichuan that of Baichuan-13B; the rest bear their models' names. In bare, alpaca
    and chatglm2 the end of the text alone ends a reply: of earlier ones no end is learnt.

    Raises:
      UserError: an unknown name.
    """
    if isinstance(name, ChatFormat):
        return name
    known = templates()
    if name not in known:
        raise UserError(f"there is no chat template {name!r}, only {', '.join(known)}")
    return known[name]


def fitting_template(
    model_type: str, tokenizer: Tokenizer, config: TransformerConfig | None = None
) -> str:
    """The name of the chat format that a public model was trained with.

    That is the first one of its families all of whose special tokens the tokenizer has.

    Args:
      model_type: of its config.json.
      tokenizer: the model's.
      config: the model's; None: any of the families' models.

    Raises:
      UserError: there is none, or the families' models were trained in many formats.
    """
    known, likely = templates(), ""
    styles = [style for f in families() if f.model_type == model_type for style in f.chat]
    for style in styles:
        if style.when is not None and config is not None and not style.when(config):
            continue
        if {*known[style.name].special, *style.tokens} <= tokenizer.special.keys():
            if not style.of:
                return style.name
            likely = f" ({style.name} if it is {style.of})"
    raise UserError(
        f"no chat format is known for a {model_type} model with this tokenizer; give the name of"
        f" one{likely}: {', '.join(known)}"
    )
