"""Adapter folders as other programs write them, of random tensors, for `tiny_llama` (2 layers, widths 32 and 64)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WIDTHS = {"up_proj": (32, 64), "gate_proj": (32, 64), "down_proj": (64, 32), "q_proj": (32, 32), "v_proj": (32, 16)}
FFN = ("gate_proj", "up_proj", "down_proj")


class Random:
    """Random tensors, each another."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator) / shape[-1] ** 0.5


def write(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor], *, pickled: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    if pickled:  # MoE-PEFT saves the parameters themselves
        torch.save({name: torch.nn.Parameter(t) for name, t in tensors.items()}, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def moe_peft_values(base: Path, kind: str, targets: tuple[str, ...], **more: Any) -> dict[str, Any]:
    common = {"bias": "none", "peft_type": kind, "r": 3, "lora_alpha": 6, "lora_dropout": 0.05}
    return {
        **common,
        "target_modules": list(targets),
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "num_experts": 4,
        **more,
    }


def plugin_tensors(method: str, targets: tuple[str, ...], *, s: int = 4, r: int = 3) -> dict[str, Tensor]:
    """MoLA's and DynMoLE's: a gate and experts beside every map."""
    random, tensors = Random(), {}
    for layer in range(2):
        for name in targets:
            (d_in, d_out), part = WIDTHS[name], "mlp" if name in FFN else "self_attn"
            prefix = f"{method}.layers.{layer}.{part}.{name}"
            tensors[f"{prefix}.moe_gate.weight"] = random(s, d_in) * 3
            for expert in range(s):
                tensors[f"{prefix}.experts.{expert}.lora_A.weight"] = random(r, d_in)
                tensors[f"{prefix}.experts.{expert}.lora_B.weight"] = random(d_out, r)
    return tensors


def mixlora_tensors(*, legacy: bool = False, s: int = 4, r: int = 3) -> dict[str, Tensor]:
    """Experts on the feed-forward maps, LoRA on q_proj; `legacy`: the names of the first released weights."""
    random, tensors, old = Random(), {}, {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    for layer in range(2):
        layers = f"mixlora.layers.{layer}"
        tensors[f"{layers}.self_attn.q_proj.lora_A.weight"] = random(r, 32)
        tensors[f"{layers}.self_attn.q_proj.lora_B.weight"] = random(32, r)
        tensors[f"{layers}.gate.weight" if legacy else f"{layers}.mlp.moe_gate.weight"] = random(s, 32) * 3
        for name in FFN:
            d_in, d_out = WIDTHS[name]
            for expert in range(s):
                new = f"{layers}.mlp.{name}.experts.{expert}"
                prefix = f"{layers}.experts.{expert}.{old[name]}" if legacy else new
                tensors[f"{prefix}.lora_A.weight"] = random(r, d_in)
                tensors[f"{prefix}.lora_B.weight"] = random(d_out, r)
    return tensors


def smore_values(base: Path, **more: Any) -> dict[str, Any]:
    """As the released code's PEFT writes its config, with what it leaves at its defaults."""
    return {
        "peft_type": "HIER_MOE",
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "revision": None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": list(FFN),
        "exclude_modules": ["mlp\\..*"],
        "moe_arch": "smore",
        "num_experts": [3, 4],
        "num_active": [2, 2],
        "expert_dims": [2, 3],
        "lora_alpha": None,
        "lora_scaling": None,
        "gate_dims": [5, 5],
        "gate_act_fn": "relu",
        "gate_type": "switch",
        "gate_arch": "mlp",
        "layer_forward_mode": "subgraph",
        "balance_loss_weight": 0.01,
        "expert_act_fn": "tanh",
        "init_method": "w_final_zero",
        "is_shared_expert_pool": False,
        "activation_position": "all",
        "dim_downproj_x": 6,
        "moe_dropout": 0.0,
        "modules_to_save": None,
        "init_moe_weights": True,
        "layers_to_transform": None,
        "bias": "none",
        **more,
    }


def smore_module(random: Random, d_in: int, d_out: int, values: dict[str, Any]) -> dict[str, Tensor]:
    """One module's tensors, named without the module."""
    s, r, m, down = values["num_experts"], values["expert_dims"], values["gate_dims"], values["dim_downproj_x"]
    shared, levels = values["is_shared_expert_pool"], range(len(values["num_experts"]))
    d = [0] + [s[0] * r[0] if shared else sum(s[j] * r[j] for j in range(l + 1)) for l in levels]
    tensors = {"moe_W_final": random(d_out, d[-1]), "moe_W_final_bias": random(d_out)}
    tensors |= {"moe_downproj_x.weight": random(down, d_in), "moe_downproj_x.bias": random(down)}
    for l in levels:
        pool = {
            "A": (s[l], r[l], d_in),
            "A_bias": (s[l], r[l]),
            "B": (s[l], d[l + 1], r[l]),
            "B_bias": (s[l], d[l + 1]),
        }
        for name, shape in pool.items():
            copied = tensors.get(f"moe_{name}.0") if shared else None
            tensors[f"moe_{name}.{l}"] = random(*shape) if copied is None else copied.clone()
        if l:
            tensors |= {f"moe_W.{l}": random(d[l + 1], d[l]), f"moe_W_bias.{l}": random(d[l + 1])}
        width, gate = down + sum(m[l + 1 :]), f"moe_gate.{l}"
        tensors |= {f"{gate}.mlp.0.weight": random(m[l], width), f"{gate}.mlp.0.bias": random(m[l])}
        tensors |= {f"{gate}.mlp.2.weight": random(m[l], m[l]), f"{gate}.mlp.2.bias": random(m[l])}
        tensors[f"{gate}.keys"] = random(s[l], m[l]) * 3
        if values["gate_type"] == "noisy_topk":
            tensors[f"{gate}.weight_noise.weight"] = random(s[l], width)
        if values["expert_act_fn"].startswith("prelu"):
            tensors[f"moe_expert_act_param.{l}"] = random(1).abs()
        if values["gate_act_fn"].startswith("prelu"):
            tensors[f"{gate}.mlp.1.weight"] = random(1).abs()
    return tensors


def smore_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    random, tensors = Random(), {}
    for layer in range(2):
        for name in FFN:
            module = smore_module(random, *WIDTHS[name], values)
            prefix = f"base_model.model.model.layers.{layer}.mlp.{name}"
            tensors |= {f"{prefix}.{key}": tensor for key, tensor in module.items()}
    return tensors


def trex_values(base: Path, **more: Any) -> dict[str, Any]:
    """PEFT 0.4's LoRA config, as T-REX's fork of it writes it."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "modules_to_save": ["router", "omg", "binary_main_gate_weight"],
        "peft_type": "LORA",
        "r": 6,
        "revision": None,
        "target_modules": ["up_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        **more,
    }


def trex_tensors(r1: int = 2, r2: int = 3) -> dict[str, Tensor]:
    random, tensors = Random(), {}
    for layer in range(2):
        for name in ("up_proj", "q_proj"):
            (d_in, d_out), part = WIDTHS[name], "mlp" if name in FFN else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{part}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random(r1, d_in)
            tensors[f"{prefix}.lora_B.weight"] = random(d_out, r2)
            tensors[f"{prefix}.router.weight"] = random(r1 * r2, d_in)
            tensors[f"{prefix}.omg.weight"] = random(1, 1) * 0.01
            tensors[f"{prefix}.binary_main_gate_weight.weight"] = random(1, 1) * 0.01
    return tensors
