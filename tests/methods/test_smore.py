"""S'MoRE's settings: what is refused, how many parameters there are, and the released code's names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from smore_cli.errors import AdapterError
from smore_cli.methods import Site, config_from_dict
from smore_cli.methods.smore import SMoREConfig, from_original

SMALL: dict[str, Any] = {"router_dim": 3, "key_dim": 5}
SHAPES: list[dict[str, Any]] = [
    {"rank": [3], "num_experts": [4], "fanout": [2]},
    {"rank": [2, 3], "num_experts": [4, 3], "fanout": [2, 2]},
    {"rank": [1, 2, 2], "num_experts": [3, 4, 3], "fanout": [2, 1, 2]},
    {"rank": [2] * 4, "num_experts": [3] * 4, "fanout": [1] * 4},
    {"rank": [2, 2], "num_experts": [3, 3], "fanout": [2, 1], "shared_pool": True},
    {"rank": [2] * 3, "num_experts": [3] * 3, "fanout": [1] * 3, "shared_pool": True},
]
KINDS: list[dict[str, Any]] = [
    {"gate": "dense"},
    {"gate": "switch"},
    {"gate": "noisy_topk"},
    {"activation": "prelu"},
    {"activation": "prelu", "router_activation": "prelu", "gate": "noisy_topk"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameter_formula_counts_the_parameters(shape: dict[str, Any], kind: dict[str, Any]) -> None:
    config, site = SMoREConfig(**SMALL, **shape, **kind), Site("site", 11, 7)
    assert config.num_parameters(site) == sum(p.numel() for p in config.build(site).parameters())


@pytest.mark.parametrize(
    ("experts", "rank", "billions"),
    [([4, 4], 64, 0.957), ([4, 4], 32, 0.480), ([2, 2], 64, 0.480), ([8], 64, 0.950), ([4], 1, 0.026)],
)
def test_the_papers_parameter_counts_for_llama_3_8b(experts: list[int], rank: int, billions: float) -> None:
    fanout = [max(1, s // 2) for s in experts]
    config = SMoREConfig(num_experts=experts, rank=[rank] * len(experts), fanout=fanout, router_dim=24, key_dim=32)
    ffn = [Site("gate_proj", 4096, 14336), Site("up_proj", 4096, 14336), Site("down_proj", 14336, 4096)]
    assert round(32 * sum(config.num_parameters(site) for site in ffn) / 1e9, 3) == billions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": [4]}, "num_experts: has 1 entries, rank has 2"),
        ({"fanout": [2, 2, 2]}, "fanout: has 3 entries"),
        ({"alpha": [1.0]}, "alpha: has 1 entries"),
        ({"fanout": [5, 2]}, "5 children cannot be picked from the 4 experts of pool 0"),
        ({"gate": "noisy_topk", "fanout": [2, 4]}, "noisy_topk must leave an expert out, but picks all 4 of pool 1"),
        ({"shared_pool": True, "rank": [4, 8]}, "rank and num_experts must be equal"),
        ({"shared_pool": True, "num_experts": [4, 8]}, "rank and num_experts must be equal"),
        ({"rank": []}, "at least 1 item"),
        ({"rank": [0, 8]}, "greater than or equal to 1"),
        ({"gate": "topk"}, "'dense', 'switch' or 'noisy_topk'"),
        ({"ranks": [8, 8]}, "Extra inputs are not permitted"),
        ({"rank": 8}, "valid list"),
        ({"aux_loss_coefficient": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_tree_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SMoREConfig(**fields)


def test_a_dense_gate_takes_all_experts_whatever_the_fanout() -> None:
    assert SMoREConfig(gate="dense", fanout=[9, 1]).children == [4, 4]
    assert SMoREConfig(gate="switch", fanout=[3, 1]).children == [3, 1]


def test_settings_survive_the_trip_through_a_dictionary() -> None:
    config = SMoREConfig(rank=[2, 4], alpha=[1.5, 3], gate="noisy_topk", shared_pool=False, target_modules=["up_proj"])
    assert config_from_dict(config.model_dump()) == config


# The released code's names.


def original_names(tree: torch.nn.Module, prefix: str, adapter: str) -> dict[str, torch.Tensor]:
    """The state of a tree under the names that the released code would save."""
    names = {"P": "moe_W_final", "p": "moe_W_final_bias", "router.down": "moe_downproj_x"}
    listed = {"A": "moe_A", "a": "moe_A_bias", "B": "moe_B", "b": "moe_B_bias", "W": "moe_W", "w": "moe_W_bias"}
    state = {}
    for name, tensor in tree.state_dict().items():
        head, _, rest = name.partition(".")
        if head in listed:
            index = int(rest) + (head in "Ww")
            state[f"{prefix}{listed[head]}{adapter}.{index}"] = tensor
        elif head in names:
            state[f"{prefix}{names[head]}{adapter}"] = tensor
        elif name.startswith("router.down."):
            state[f"{prefix}moe_downproj_x{adapter}.{name.removeprefix('router.down.')}"] = tensor
        else:
            level, _, inner = name.removeprefix("router.levels.").partition(".")
            inner = "weight_noise.weight" if inner == "noise" else inner
            state[f"{prefix}moe_gate{adapter}.{level}.{inner}"] = tensor
    return state


@pytest.mark.parametrize("adapter", [".default", ""])  # the live module's names, and PEFT's on disk
@pytest.mark.parametrize("path", ["", "model.layers.3.mlp.up_proj."])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapters_of_the_released_code_load(shape: dict[str, Any], path: str, adapter: str) -> None:
    config = SMoREConfig(**SMALL, **shape, gate="noisy_topk")
    trained, fresh = (config.build(Site("site", 11, 7)) for _ in range(2))
    renamed = from_original(original_names(trained, f"base_model.model.{path}", adapter))
    fresh.load_state_dict({name.removeprefix(path): tensor for name, tensor in renamed.items()})
    assert all(name.startswith(path) for name in renamed)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())


@pytest.mark.parametrize("name", ["lora_A.weight", "moe_C.default.0", "model.layers.0.mlp.weight", "moe_gate.0.x"])
def test_a_name_that_the_released_code_never_wrote_is_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="is not a tensor of the released S'MoRE layout"):
        from_original({name: torch.zeros(1)})
