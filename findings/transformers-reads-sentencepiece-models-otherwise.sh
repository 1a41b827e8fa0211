#!/usr/bin/env bash
# transformers 5 reads SentencePiece models otherwise than SentencePiece.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, sentencepiece 0.2.3.
#
# LlamaTokenizer loses one leading space, and the model's normaliser: full-width letters are spelt
# in bytes and runs of spaces stay. T5Tokenizer loses byte fallback: a character outside of the
# vocabulary is unknown although its bytes are there, and the text <0x41> becomes a byte. Expected:
# the model's own ids.
#
# Seen:
#   transformers 5.24.0 sentencepiece 0.2.3
#   LlamaTokenizer 'hello': ['▁he', 'l', 'lo'], transformers ['▁he', 'l', 'lo'], decoded 'hello'
#   LlamaTokenizer ' hello': ['▁', '▁he', 'l', 'lo'], transformers ['▁he', 'l', 'lo'], decoded
#       'hello'
#   LlamaTokenizer 'hello': ['▁he', 'l', 'lo'], transformers ['▁he', 'l', 'lo'], decoded 'hello'
#   LlamaTokenizer 'ＡＢＣ': ['▁A', 'B', 'C'], transformers ['▁', '<0xEF>', '<0xBC>', '<0xA1>',
#       '<0xEF>', '<0xBC>', '<0xA2>', '<0xEF>', '<0xBC>', '<0xA3>'], decoded 'ＡＢＣ'
#   LlamaTokenizer 'a  b': ['▁a', '▁b'], transformers ['▁a', '▁', '▁b'], decoded 'a  b'
#   T5Tokenizer 'hello': ['▁', 'he', 'll', 'o'], transformers ['▁', 'he', 'll', 'o'], decoded
#       'hello'
#   T5Tokenizer '龘': ['▁', '<0xE9>', '<0xBE>', '<0x98>'], transformers ['▁', '<unk>'], decoded
#       '<unk>'
#   T5Tokenizer '<0x41>': ['▁<', '0', 'x', '4', '1', '>'], transformers ['▁', '<0x41>'], decoded
#       '<0x41>'
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.3 sentencepiece==0.2.3 protobuf
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import io
import json
import pathlib
import pydoc_data.topics

import sentencepiece
import transformers

print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
LINES = [line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines() if line]


def compare(file, tokenizer_class, texts, **settings):
    """Trains a model, and encodes texts with it by both libraries: are the ids equal?"""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=1500,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    folder = pathlib.Path(f"folder-{len(list(pathlib.Path().iterdir()))}")
    folder.mkdir()
    (folder / file).write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    equal = []
    for text in texts:
        ids = reference.encode(text)
        other = theirs(text, add_special_tokens=False).input_ids
        equal.append(ids == other)
        print(
            f"{tokenizer_class} {text!r}: {reference.encode_as_pieces(text)},"
            f" transformers {theirs.convert_ids_to_tokens(other)}, decoded {theirs.decode(other)!r}"
        )
    return equal


plain = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}
assert compare("tokenizer.model", "LlamaTokenizer", ["hello", " hello"], **plain) == [True, False]
nfkc = {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}
assert compare("tokenizer.model", "LlamaTokenizer", ["hello", "ＡＢＣ", "a  b"], **nfkc) == [
    True,
    False,
    False,
]
t5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
assert compare("spiece.model", "T5Tokenizer", ["hello", "龘", "<0x41>"], **t5) == [
    True,
    False,
    False,
]
EOF
