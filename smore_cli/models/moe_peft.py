"""What the methods of MoE-PEFT (and its forks) have in common on disk: settings, and experts stored one by one.

    METHOD.layers.3.mlp.up_proj.moe_gate.weight             (s, d_in)
    METHOD.layers.3.mlp.up_proj.experts.5.lora_A.weight     (r, d_in), lora_B.weight (d_out, r)

Layer 3 is `model.layers.3` of the transformers model, and `self_attn` or `mlp` stand between it and the linear map.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["expert_settings", "stack", "stacked_experts"]

_EXPERT = re.compile(
    r"\w+\.layers\.(?P<layer>\d+)\.(?P<map>(?:self_attn|mlp)\.\w+)\."
    r"(?:(?P<gate>moe_gate)|experts\.(?P<expert>\d+)\.lora_(?P<half>[AB]))\.weight"
)


def expert_settings(values: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings that all methods share, as they are named here.

    Args:
        values: MoE-PEFT's adapter_config.json.
        own: settings of the experts where these differ from those of LoRA elsewhere.

    Raises:
        AdapterError: the experts are not LoRA.
    """

    def read(key: str) -> Any:
        return own[key] if own and key in own else values[key]

    def asked(key: str) -> bool:
        return bool((own or {}).get(key, values.get(key)))

    if asked("use_dora"):
        raise AdapterError("use_dora: experts that are DoRA are not read", "MoE-PEFT does not save their magnitudes")
    rank, alpha = read("r"), float(read("lora_alpha"))
    if asked("use_rslora"):
        alpha *= math.sqrt(rank)  # it scales by alpha / sqrt(r), the experts here by alpha / r
    settings = {
        "num_experts": values["num_experts"],
        "rank": rank,
        "alpha": alpha,
        "dropout": float(read("lora_dropout")),
    }
    if values.get("router_loss") is False:
        settings["aux_loss_coefficient"] = 0.0
    elif (coefficient := values.get("router_aux_loss_coef")) is not None:  # in its recipes, not in its own adapters
        settings["aux_loss_coefficient"] = float(coefficient)
    return settings


def stacked_experts(state_dict: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """Returns the tensors of a method that puts experts and a gate beside each linear map, as a `Bank` names them.

    Args:
        state_dict: names as at the top of this file.
        method: how they begin.

    Raises:
        AdapterError: a name is not of this layout, or an expert lacks a half.
    """
    gates: dict[str, Tensor] = {}
    halves: dict[tuple[str, str], dict[int, Tensor]] = defaultdict(dict)
    for name, tensor in state_dict.items():
        match = _EXPERT.fullmatch(name)
        if match is None or not name.startswith(f"{method}."):
            example = f"{method}.layers.0.mlp.up_proj.experts.0.lora_A.weight"
            raise AdapterError(f"'{name}' is not a tensor of MoE-PEFT's {method} layout", f"expected such as {example}")
        path = f"model.layers.{match['layer']}.{match['map']}"
        if match["gate"]:
            gates[f"{path}.router.weight"] = tensor
        else:
            halves[path, match["half"]][int(match["expert"])] = tensor
    stacked = {f"{path}.{half}": stack(experts, half, path) for (path, half), experts in halves.items()}
    return gates | stacked


def stack(experts: Mapping[int, Tensor], half: str, where: str) -> Tensor:
    """Returns the A of experts, (r, d_in) each, as (s r, d_in), or their B, (d_out, r) each, as (d_out, s r).

    Args:
        experts: by their numbers.
        half: `A` or `B`.
        where: whose they are, for messages.

    Raises:
        AdapterError: a number is left out, or the experts are not alike.
    """
    if gap := sorted(set(range(max(experts) + 1)) - set(experts)):
        raise AdapterError(f"{where}: lora_{half} of expert {gap[0]} is missing")
    ordered = [experts[number] for number in sorted(experts)]
    for number, tensor in enumerate(ordered):
        if tensor.dim() != 2 or tensor.shape != ordered[0].shape:
            shapes = f"{tuple(tensor.shape)}, of expert 0 {tuple(ordered[0].shape)}"
            raise AdapterError(f"{where}: lora_{half} of expert {number} is {shapes}")
    return torch.cat(ordered, dim=0 if half == "A" else 1)
