#!/usr/bin/env bash
# Documents packed in a row by position_ids see each other in transformers 5 unless use_cache=False
# and no attention_mask is given.
#
# Versions: transformers 5.24.0, torch 2.13.0.
#
# Positions that start anew keep LLaMA's and Qwen2's documents apart in eager and sdpa attention,
# but only without a cache, whose default is True in training too, and only without attention_mask,
# which is often passed as ones. OPT mixes them in every case. Nothing is said. Expected: apart
# always, or never without flash attention.
#
# Seen:
#   transformers 5.24.0 torch 2.13.0+cpu
#   llama, eager, use_cache=False: second document differs by 4.5e-06
#   llama, eager, default: second document differs by 8.2e+00
#   llama, eager, use_cache=False and a mask of ones: second document differs by 8.2e+00
#   llama, sdpa, use_cache=False: second document differs by 6.7e-06
#   llama, sdpa, default: second document differs by 8.2e+00
#   llama, sdpa, use_cache=False and a mask of ones: second document differs by 8.2e+00
#   qwen2, eager, use_cache=False: second document differs by 2.8e-06
#   qwen2, eager, default: second document differs by 6.5e+00
#   qwen2, eager, use_cache=False and a mask of ones: second document differs by 6.5e+00
#   qwen2, sdpa, use_cache=False: second document differs by 2.6e-06
#   qwen2, sdpa, default: second document differs by 6.5e+00
#   qwen2, sdpa, use_cache=False and a mask of ones: second document differs by 6.5e+00
#   opt, eager, use_cache=False: second document differs by 4.1e+00
#   opt, eager, default: second document differs by 4.1e+00
#   opt, eager, use_cache=False and a mask of ones: second document differs by 4.1e+00
#   opt, sdpa, use_cache=False: second document differs by 4.1e+00
#   opt, sdpa, default: second document differs by 4.1e+00
#   opt, sdpa, use_cache=False and a mask of ones: second document differs by 4.1e+00
#
# It fails if this is no longer so.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$work"
"$work/venv/bin/python" -I - <<'EOF'
import torch
import transformers

print("transformers", transformers.__version__, "torch", torch.__version__)
LENGTHS = 5, 7
tokens = torch.randint(0, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
models = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 4},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
}
apart = {}
for family, rest in models.items():
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **sizes, **rest)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model.train()  # without dropout
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            alone = model(tokens[:, LENGTHS[0] :], use_cache=False).logits
            for name, call in {
                "use_cache=False": {"use_cache": False},
                "default": {},
                "use_cache=False and a mask of ones": {
                    "use_cache": False,
                    "attention_mask": torch.ones_like(tokens),
                },
            }.items():
                packed = model(tokens, position_ids=places, **call).logits[:, LENGTHS[0] :]
                error = float((packed - alone).abs().max())
                apart[family, attention, name] = error < 1e-4
                print(f"{family}, {attention}, {name}: second document differs by {error:.1e}")
wanted = {(f, a, "use_cache=False") for f in ("llama", "qwen2") for a in ("eager", "sdpa")}
assert {case for case, equal in apart.items() if equal} == wanted
EOF
