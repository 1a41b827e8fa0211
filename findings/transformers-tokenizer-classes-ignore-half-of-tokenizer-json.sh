#!/usr/bin/env bash
# Some tokenizer classes of transformers 5 take the vocabulary of a tokenizer.json and ignore the
# rest.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3.
#
# Normaliser and pre-tokenizer of the file are replaced by the class's own for GPT2, GPTNeoX, Qwen2
# and LLaMA, also where the folder names no class and model_type is gpt2 or opt. Words that the
# file's own rules know get lost without a word. Expected: that tokenizer.json is the tokenizer, as
# its name and its fields say.
#
# Seen:
#   transformers 5.24.0 tokenizers 0.23.3
#   tokenizer.json, read by tokenizers: 'The QUICK brown fox' is [28, 48, 49, 44], ['the', 'quick',
#       'brown', 'fox']
#   tokenizer_class PreTrainedTokenizerFast: [28, 48, 49, 44], ['the', 'quick', 'brown', 'fox']
#   tokenizer_class GPT2TokenizerFast: [27, 49, 44], ['he', 'brown', 'fox']
#   tokenizer_class GPTNeoXTokenizerFast: [27, 49, 44], ['he', 'brown', 'fox']
#   tokenizer_class Qwen2Tokenizer: [27, 49, 44], ['he', 'brown', 'fox']
#   tokenizer_class LlamaTokenizerFast: [27, 49, 44], ['he', 'brown', 'fox']
#   no class, model_type llama: [28, 48, 49, 44]
#   no class, model_type gpt2: [27, 49, 44]
#   no class, model_type opt: [27, 49, 44]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import json
import pathlib

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
whole = tokenizers.Tokenizer(models.BPE())
whole.normalizer = normalizers.Lowercase()
whole.pre_tokenizer = pre_tokenizers.Whitespace()
whole.train_from_iterator(
    ["the quick brown fox jumps over the lazy dog"] * 20,
    trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False),
)
text = "The QUICK brown fox"
expected = whole.encode(text).ids
print(f"tokenizer.json, read by tokenizers: {text!r} is {expected}, {whole.encode(text).tokens}")


def read(name, settings):
    """The tokenizer of a folder with that tokenizer.json and one more file."""
    folder = pathlib.Path(f"folder-{len(list(pathlib.Path().iterdir()))}")
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    (folder / name).write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)


obeyed = {}
CLASSES = (
    "PreTrainedTokenizerFast",
    "GPT2TokenizerFast",
    "GPTNeoXTokenizerFast",
    "Qwen2Tokenizer",
    "LlamaTokenizerFast",
)
for name in CLASSES:
    found = read("tokenizer_config.json", {"tokenizer_class": name})
    ids = found(text, add_special_tokens=False).input_ids
    obeyed[name] = ids == expected
    print(f"tokenizer_class {name}: {ids}, {found.convert_ids_to_tokens(ids)}")
for name in ("llama", "gpt2", "opt"):
    found = read("config.json", {"model_type": name})
    ids = found(text, add_special_tokens=False).input_ids
    obeyed[name] = ids == expected
    print(f"no class, model_type {name}: {ids}")
assert [name for name, right in obeyed.items() if right] == ["PreTrainedTokenizerFast", "llama"]
EOF
