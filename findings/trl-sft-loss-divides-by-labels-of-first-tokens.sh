#!/usr/bin/env bash
# TRL's SFT on whole texts: the loss is divided by the first token of each row too, which nothing
# predicts, so it is too small, and depends on how many rows hold the text.
#
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0, datasets 5.2.0. Python 3.11.
#
# The trainer counts the labels before they are shifted. With a mask (assistant_only_loss, or
# completions) the first token has no label, and the loss is right. Expected: the mean over the
# tokens that are predicted, which the model itself gives for each row.
#
# Seen, for two rows of 5 and 9 tokens:
#   trl 1.16.0, transformers 5.24.0
#   mean over 12 predicted tokens 3.4520
#   loss of the trainer           2.9588
#   their ratio                   0.8571 = 12/14
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet \
    trl==1.16.0 transformers==5.24.0 torch==2.13.0 datasets==5.2.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error HF_DATASETS_DISABLE_PROGRESS_BARS=1
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import contextlib
import importlib.metadata
import io

import datasets
import tokenizers
import torch
import transformers
import trl

versions = (f"{name} {importlib.metadata.version(name)}" for name in ("trl", "transformers"))
print(*versions, sep=", ")
torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
)
model = transformers.GPT2LMHeadModel(config)
rows = [[5, 9, 3, 7, 11], [4, 8, 15, 16, 23, 2, 6, 10, 1]]
total = count = 0
for row in rows:
    tokens = torch.tensor([row])
    with torch.no_grad():
        total += model(tokens, labels=tokens).loss.item() * (len(row) - 1)
    count += len(row) - 1

words = {str(number): number for number in range(32)}
own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
names = {"eos_token": "0", "pad_token": "31"}
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names)
trainer = trl.SFTTrainer(
    model=model,
    args=trl.SFTConfig(
        output_dir="out", per_device_train_batch_size=2, max_steps=1, learning_rate=0.0,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True,
    ),
    train_dataset=datasets.Dataset.from_list([{"input_ids": row} for row in rows]),
    processing_class=tokenizer,
)
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
loss = trainer.state.log_history[0]["loss"]
print(f"mean over {count} predicted tokens {total / count:.4f}")
print(f"loss of the trainer           {loss:.4f}")
ratio = loss / (total / count)
print(f"their ratio                   {ratio:.4f} = {count}/{count + len(rows)}")
assert abs(ratio - count / (count + len(rows))) < 1e-4
EOF
