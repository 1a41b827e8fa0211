"""The tokenizer classes that public folders name: what each program does with its vocabulary.

A class decides what tokenizer.json does not say or what there is none for: how a text is cut, which
tokens stand around it, and what special tokens are called where the folder leaves their names out.
"""

import pathlib
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lmjax.config import UserError
from lmjax.data.tokenizers.base import SEPARATOR
from lmjax.data.tokenizers.folder_settings import folder_settings, read_json

# Names of transformers' own that say nothing.
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "SentencePieceBackend")


class Program(NamedTuple):
    """Defaults of a class.

    Attributes:
      roles: names of special tokens by role.
      before: roles that are put before a text.
      behind: roles that are put behind it.
    """

    roles: Mapping[str, str] = MappingProxyType({})
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


_GPT2 = Program({role: SEPARATOR for role in ("bos", "eos", "unk")})
_BERT = Program(
    {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"},
    ("cls",),
    ("sep",),
)
_ROBERTA_ROLES = {
    **{"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>"},
    **{"unk": "<unk>", "pad": "<pad>", "mask": "<mask>"},
}
_ROBERTA = Program(_ROBERTA_ROLES, ("cls",), ("sep",))
_LLAMA = Program({"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, ("bos",))
_QWEN2 = Program({"eos": SEPARATOR, "unk": SEPARATOR, "pad": SEPARATOR})

# With a vocab.txt and BERT's program, or with a tokenizer.json whose BertNormalizer follows the
# folder's do_lower_case, strip_accents and tokenize_chinese_chars.
BERT = (
    *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
    *("SqueezeBertTokenizer", "ConvBertTokenizer", "LxmertTokenizer", "LayoutLMTokenizer"),
    *("RetriBertTokenizer", "RealmTokenizer", "GLMBertTokenizer"),
    *("DPRContextEncoderTokenizer", "DPRQuestionEncoderTokenizer", "DPRReaderTokenizer"),
)
# The same but for names and ends of their own.
LIKE_BERT = ("FunnelTokenizer", "MPNetTokenizer", "SplinterTokenizer", "LayoutLMv2Tokenizer")
GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer", "GLMGPT2Tokenizer")
ROBERTA = (
    *("RobertaTokenizer", "BartTokenizer", "LongformerTokenizer", "LEDTokenizer"),
    *("MvpTokenizer", "GLMRobertaTokenizer"),
)
FIRST_SPACE = ("LlamaTokenizer", "CodeLlamaTokenizer")  # obey add_prefix_space
LLAMA = (
    *(*FIRST_SPACE, "BaichuanTokenizer", "SkyworkTokenizer"),
    *("InternLMTokenizer", "InternLM2Tokenizer", "InternLM3Tokenizer"),
)
WORDS = ("XLNetTokenizer", "AlbertTokenizer")  # change a text before their model sees it
PROGRAMS: dict[str, Program] = {
    **dict.fromkeys(BERT, _BERT),
    **dict.fromkeys(GPT2, _GPT2),
    **dict.fromkeys(ROBERTA, _ROBERTA),
    **dict.fromkeys(LLAMA, _LLAMA),
    "DebertaTokenizer": Program(
        {**_BERT.roles, "bos": "[CLS]", "eos": "[SEP]"}, ("cls",), ("sep",)
    ),
    "BlenderbotTokenizer": Program(_ROBERTA_ROLES, (), ("eos",)),
    "GPTNeoXTokenizer": Program({**_GPT2.roles, "pad": "<|padding|>"}),
    "Qwen2Tokenizer": _QWEN2,
    "Qwen3_5Tokenizer": _QWEN2,
    "OpenAIGPTTokenizer": Program({"unk": "<unk>"}),
    "GemmaTokenizer": Program(
        {"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}, ("bos",)
    ),
    "T5Tokenizer": Program({"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, (), ("eos",)),
    "AlbertTokenizer": Program(
        {
            **{"bos": "[CLS]", "eos": "[SEP]", "cls": "[CLS]", "sep": "[SEP]"},
            **{"unk": "<unk>", "pad": "<pad>", "mask": "[MASK]"},
        },
        ("cls",),
        ("sep",),
    ),
    "XLNetTokenizer": Program(
        {**_ROBERTA_ROLES, "sep": "<sep>", "cls": "<cls>"}, (), ("sep", "cls")
    ),
}
# What a folder that names no class is read as, by config.json's model_type.
CLASSES = {
    **dict.fromkeys(
        ("gpt2", "gpt_neo", "gptj", "opt", "phi", "codegen", "starcoder2"), "GPT2Tokenizer"
    ),
    **dict.fromkeys(("gpt_neox", "mpt", "mamba", "rwkv", "olmo"), "GPTNeoXTokenizer"),
    **dict.fromkeys(
        ("roberta", "bart", "longformer", "roberta-prelayernorm", "ibert"), "RobertaTokenizer"
    ),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_text"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(
        ("bert", "electra", "megatron-bert", "nezha", "squeezebert", "convbert", "mobilebert"),
        "BertTokenizer",
    ),
    **dict.fromkeys(("distilbert", "nomic_bert", "layoutlm", "lxmert"), "BertTokenizer"),
    **dict.fromkeys(("t5", "mt5", "switch_transformers"), "T5Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **{"xlnet": "XLNetTokenizer", "albert": "AlbertTokenizer", "deberta": "DebertaTokenizer"},
    **{"openai-gpt": "OpenAIGPTTokenizer", "blenderbot": "BlenderbotTokenizer"},
    **{"whisper": "WhisperTokenizer", "clip": "CLIPTokenizer", "ctrl": "CTRLTokenizer"},
    **{"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"},
    **{"deberta-v2": "DebertaV2Tokenizer", "pegasus": "PegasusTokenizer", "xlm": "XLMTokenizer"},
    **{"mbart": "MBartTokenizer", "big_bird": "BigBirdTokenizer", "marian": "MarianTokenizer"},
    **{"mpnet": "MPNetTokenizer", "funnel": "FunnelTokenizer", "roformer": "RoFormerTokenizer"},
    **{"chatglm": "ChatGLMTokenizer", "xglm": "XGLMTokenizer", "plbart": "PLBartTokenizer"},
    **{"m2m_100": "M2M100Tokenizer", "barthez": "BarthezTokenizer"},
    **{"fnet": "FNetTokenizer", "rembert": "RemBertTokenizer", "cpm": "CpmTokenizer"},
    **{"gpt-sw3": "GPTSw3Tokenizer", "reformer": "ReformerTokenizer", "udop": "UdopTokenizer"},
    **{"mbart50": "MBart50Tokenizer", "bert-generation": "BertGenerationTokenizer"},
    **dict.fromkeys(("nllb", "nllb-moe"), "NllbTokenizer"),
    **dict.fromkeys(("bigbird_pegasus", "pegasus_x"), "PegasusTokenizer"),
    **dict.fromkeys(("xlm-roberta-xl", "xmod", "layoutxlm"), "XLMRobertaTokenizer"),
    **dict.fromkeys(("speech_to_text", "speech_to_text_2"), "Speech2TextTokenizer"),
}
HEAD = re.compile(r"(For[A-Z]|LMHead|Model$|EncoderModel$|DoubleHeads).*")  # of an architecture


def tokenizer_class(folder: pathlib.Path) -> str | None:
    """The class that a folder's vocabulary is for, without "Fast"; None where nothing says it.

    As in transformers tokenizer_config.json says it, else config.json by name, else its model_type,
    or where that is missing its architectures.
    """
    config = read_json(folder / "config.json")
    named = folder_settings(folder).get("tokenizer_class") or config.get("tokenizer_class")
    return named.removesuffix("Fast") if named else CLASSES.get(_model_type(config))


def _model_type(config: dict[str, Any]) -> str | None:
    """Model type of a config.json: one of `CLASSES`, another, or None."""
    if (said := config.get("model_type")) or not (named := config.get("architectures")):
        return said
    plain = str.maketrans("", "", "_-")
    bare = HEAD.sub("", named[0]).lower()
    return next((kind for kind in CLASSES if kind.translate(plain) == bare), named[0])


def known_class(path: pathlib.Path, known: Collection[str], default: str) -> str:
    """The class that the folder of a vocabulary names, `default` where it says nothing.

    Raises:
      UserError: one whose program is not among the known.
    """
    kind = tokenizer_class(path.parent)
    config = read_json(path.parent / "config.json")
    model = _model_type(config)
    if kind in known:
        return kind
    if kind is None and model is None:
        return default
    told = "model_type" if config.get("model_type") else "architectures"
    what = f"the class {kind}" if kind else f"a model of {told} {model!r}"
    raise UserError(
        f"{path}: how {what} cuts a text stands in its program, not in this file; known are"
        f" {', '.join(known)}. A tokenizer.json says it: transformers writes one from this folder"
        " with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
