#!/usr/bin/env bash
# A tokenizer of transformers 5 whose vocabulary is not in the folder encodes every text as nothing.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3.
#
# Where the file has another name than the class looks for, or was not copied, from_pretrained gives
# a tokenizer of its special tokens alone, without a word: three for LLaMA, one for GPT-2 and Qwen2,
# whose ids of any text are an empty list. Expected: an error that names the file.
#
# Seen:
#   transformers 5.24.0
#   LlamaTokenizer of a folder without a vocabulary: 3 tokens, 'hello world' is []
#   GPT2Tokenizer of a folder without a vocabulary: 1 tokens, 'hello world' is []
#   Qwen2Tokenizer of a folder without a vocabulary: 1 tokens, 'hello world' is []
#   BertTokenizer of a folder without a vocabulary: 5 tokens, 'hello world' is [1, 1]
#   T5Tokenizer of a folder without a vocabulary: 104 tokens, 'hello world' is [3, 2, 3, 2]
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import json
import pathlib

import transformers

print("transformers", transformers.__version__)
lengths = {}
for name in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "BertTokenizer", "T5Tokenizer"):
    folder = pathlib.Path(name)
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello world", add_special_tokens=False).input_ids
    lengths[name] = len(ids)
    print(
        f"{name} of a folder without a vocabulary: {len(tokenizer)} tokens, 'hello world' is {ids}"
    )
assert [lengths[name] for name in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")] == [
    0,
    0,
    0,
]
EOF
