"""Modules trained whole beside an adapter, and adapters on the output embedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from smore_cli.errors import AdapterError
from smore_cli.methods import MethodConfig
from smore_cli.methods.lora import LoRAConfig
from smore_cli.methods.mixlora import MixLoRAConfig
from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import adapted_modules, attach, detach, set_active
from smore_cli.nn.full_copy import FullCopy, shares_weight
from tests.contract.models import Case, logits, loss_of, token_ids
from tests.contract.models import batch as some_batch

SAVED = ["embed_tokens", "lm_head", "model.norm"]
IDS = token_ids(2, 7)


def bare(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    return Case(architecture, LoRAConfig()).bare(dtype)


def configs() -> list[MethodConfig]:
    small: dict[str, Any] = {"rank": [2, 2], "router_dim": 4, "key_dim": 4, "modules_to_save": SAVED}
    return [
        LoRAConfig(rank=2, modules_to_save=SAVED),
        SMoREConfig(**small),
        MixLoRAConfig(rank=2, modules_to_save=SAVED),
    ]


@pytest.mark.parametrize("config", configs(), ids=lambda config: config.method)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_copy_starts_as_its_module_is_trained_and_leaves_it_untouched(
    config: MethodConfig, dtype: torch.dtype
) -> None:
    model = bare(dtype=dtype)
    plain, before = copy.deepcopy(model.state_dict()), logits(model, IDS)
    targets = attach(model, config)
    copies = {path: m.adapter("default") for path, m in adapted_modules(model).items() if path not in targets}
    assert list(copies) == ["model.embed_tokens", "model.norm", "lm_head"]
    assert all(isinstance(each, FullCopy) for each in copies.values())
    assert torch.equal(logits(model, IDS), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    sizes = {id(p): p.numel() for each in copies.values() for p in each.parameters()}
    assert sum(sizes.values()) == 64 * 32 + 32 + 64 * 32
    assert sizes.keys() <= {id(p) for p in trained}

    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    loss_of(model.train(), some_batch(4)).backward()
    assert all(p.grad is not None and p.grad.any() for each in copies.values() for p in each.parameters())
    optimizer.step()
    after = logits(model.eval(), IDS)
    assert after.dtype == before.dtype and not torch.allclose(after, before, atol=1e-2)
    set_active(model, None)
    assert torch.equal(logits(model, IDS), before)
    assert not any(p.requires_grad for p in model.parameters())
    set_active(model, "default")
    assert torch.equal(logits(model, IDS), after)
    again = copy.deepcopy(model)
    detach(model)
    assert torch.equal(logits(again, IDS), after)
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert model.state_dict().keys() == plain.keys()


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    model = bare(dtype=torch.bfloat16)
    attach(model, LoRAConfig(rank=2, modules_to_save=["model.norm"]))
    weight = adapted_modules(model)["model.norm"].adapter("default").get_parameter("copy.weight")
    with torch.no_grad():
        for _ in range(100):
            weight += 1e-4  # bfloat16 has nothing between 1 and 1.0078
    assert torch.allclose(weight, torch.full_like(weight, 1.01), atol=1e-5)


def test_tied_modules_are_trained_apart_and_each_is_known_to_share() -> None:
    model = bare("qwen2")
    assert shares_weight(model, "lm_head") == ["model.embed_tokens"]
    before = logits(model, IDS)
    attach(model, LoRAConfig(rank=2, modules_to_save=["embed_tokens"]))
    assert shares_weight(model, "model.embed_tokens") == ["lm_head"]
    copied = adapted_modules(model)["model.embed_tokens"].adapter("default")
    with torch.no_grad():
        copied.get_parameter("copy.weight")[3:].mul_(1.5)
    assert not torch.allclose(logits(model, IDS), before, atol=1e-3)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # the frozen one, which the head still uses
    assert shares_weight(bare(), "lm_head") == []


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"modules_to_save": ["embed"]}, "'embed' matches no module", "embed_tokens, gate_proj"),
        ({"modules_to_save": ["mlp"]}, "is made of other modules", "down_proj, gate_proj, up_proj"),
        ({"modules_to_save": ["act_fn"]}, "has no weights to train", "drop it"),
        ({"modules_to_save": ["q_proj"]}, "is also one of target_modules", "drop one"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear map", "modules_to_save"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_and_the_model_left_alone(
    settings: dict[str, Any], message: str, hint: str
) -> None:
    model = bare()
    with pytest.raises(AdapterError, match=message) as caught:
        attach(model, LoRAConfig(rank=2, **settings))
    assert hint in caught.value.hint
    assert adapted_modules(model) == {}


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_output_embedding_is_adapted_where_it_is_named(architecture: str) -> None:
    model = bare(architecture)
    assert attach(model, LoRAConfig(rank=2, target_modules=["q_proj", "lm_head"]))[-1] == "lm_head"
    loss_of(model.train(), some_batch(4)).backward()
    assert adapted_modules(model)["lm_head"].adapter("default").get_parameter("lora_B").grad.any()  # type: ignore[union-attr]
    with pytest.raises(AdapterError, match="is the output embedding, which no routed method adapts"):
        attach(bare(architecture), SMoREConfig(target_modules=["lm_head"]))
