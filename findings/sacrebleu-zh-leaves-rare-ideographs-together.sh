#!/usr/bin/env bash
# sacrebleu's tokenizer "zh" parts common ideographs and leaves those from U+20000 on in one word.
#
# Versions: sacrebleu 2.6.0.
#
# Its ranges are written '\u20000' to '\u2a6d6', which Python reads as two characters each, so that
# they mean U+2001 to U+2A6D: quotes, arrows and signs of mathematics are taken for Chinese, and the
# ideographs of the extensions B to H (names, Cantonese) for letters. Expected: each alone, as the
# comment in the source says.
#
# Seen:
#   sacrebleu 2.6.0
#   天地玄黃 is ['天', '地', '玄', '黃']
#   𠮷𠮟𡃁 is ['𠮷𠮟𡃁']
#   a→b is ['a', '→', 'b']
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sacrebleu==2.6.0
cd "$work"
"$work/venv/bin/python" -I - <<'PYTHON'
import sacrebleu
from sacrebleu.metrics import BLEU

print("sacrebleu", sacrebleu.__version__)
cut = BLEU(tokenize="zh").tokenizer
found = {text: cut(text).split() for text in ("天地玄黃", "𠮷𠮟𡃁", "a→b")}
for text, words in found.items():
    print(text, "is", words)
assert list(map(len, found.values())) == [4, 1, 3]
PYTHON
