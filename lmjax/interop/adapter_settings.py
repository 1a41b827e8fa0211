"""adapter_config.json, in which PEFT says how adapters are applied: read, and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.config import UserError
from lmjax.files import errors_told
from lmjax.models import LoRA

CONFIG = "adapter_config.json"
# Settings that change what is computed, or trained beside adapters, and the values that do not.
PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "layer_replication": ([],),
    "alora_invocation_tokens": ([],),
    "monteclora_config": ({},),
    "kasa_config": ({},),
    "velora_config": ({},),
    "arrow_config": ({},),
}
# Ways to begin that change the weights beside the adapters.
CHANGING = re.compile("pissa|olora|corda|loftq|lora_ga")


def read_adapter_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. UserError where it is damaged, or is not of plain LoRA."""
    path = folder / CONFIG
    with errors_told("cannot read the adapters"):
        try:
            settings = json.loads(path.read_text("utf-8"))
        except ValueError:
            settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged: it should hold an object")
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"{path}: peft_type={json.dumps(kind)} is not supported, only LORA")
    for name, plain in PLAIN.items():
        if (value := settings.get(name)) is not None and value not in plain:
            raise UserError(
                f"{path}: {name}={json.dumps(value)} is not supported, only {json.dumps(plain[0])}"
            )
    if CHANGING.match(start := str(settings.get("init_lora_weights"))):
        raise UserError(
            f"{path}: init_lora_weights={json.dumps(start)} changes the model's own weights too;"
            " PEFT converts such adapters to plain ones (path_initial_model_for_weight_conversion)"
        )
    return settings


def is_rank_stabilised(settings: dict[str, Any]) -> bool:
    """Returns whether they scale by the root of the rank."""
    return bool(settings.get("use_rslora"))


def alpha_of(settings: dict[str, Any], module: str) -> float:
    """Alpha of a layer, whose name is matched as in PEFT."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(alpha)
    return float(settings.get("lora_alpha", 8))  # which is PEFT's own default


def settings_of(
    lora: LoRA, ranks: Sequence[tuple[str, int]], modules: Sequence[str], transposed: bool
) -> dict[str, Any]:
    """An adapter_config.json, less what it says of the model.

    Args:
      lora: ours.
      ranks: of each of their layers with adapters, after its path in a block.
      modules: all dense layers of theirs.
      transposed: some of their weights are (in, out), as those of Conv1D.
    """

    def alpha(rank: int) -> int | float:
        exact = lora.scale * (math.sqrt(rank) if lora.rank_stabilised else rank)
        return round(exact) if math.isclose(exact, round(exact), rel_tol=1e-12) else exact

    def short(module: str) -> str:
        """Last name, as is usual, where no other layer has it."""
        last = module.rpartition(".")[2]
        alike = {other for other in modules if other.rpartition(".")[2] == last}
        return last if len(alike) == 1 else module

    all_ranks = [rank for _, rank in ranks]
    usual = lora.rank if lora.rank in all_ranks else max(all_ranks)
    targets = {short(module): rank for module, rank in ranks}
    unusual = {module: rank for module, rank in targets.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha(usual),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "rank_pattern": unusual,
        "alpha_pattern": {module: alpha(rank) for module, rank in unusual.items()},
        "target_modules": sorted(targets),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "inference_mode": True,
    }
