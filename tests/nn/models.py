"""A tiny Llama with adapters that do something, for tests of what happens around the maths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from smore_cli.methods.smore import SMoREConfig
from smore_cli.nn import adapted_modules, attach
from tests.nn.trees import randomise_

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from smore_cli.methods import MethodConfig


def llama(folder: Path, **options: Any) -> nn.Module:
    """Returns the bare model, frozen, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).requires_grad_(False).eval()  # type: ignore[no-any-return]


def small_smore(**fields: Any) -> SMoREConfig:
    return SMoREConfig(**{"router_dim": 4, "key_dim": 4, "rank": [2, 2], **fields})


def add_random(model: nn.Module, config: MethodConfig, name: str = "default", seed: int = 0) -> nn.Module:
    """Attaches an adapter whose every parameter is random."""
    attach(model, config, name=name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for adapter in (module.adapters[name] for module in adapted_modules(model).values() if name in module.adapters):
            randomise_(adapter)
            for parameter in adapter.parameters():
                parameter.mul_(0.5)
    return model


def token_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 512, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits  # type: ignore[no-any-return]


def adapter_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all adapter parameters by name, cleared afterwards."""
    named = {name: p for name, p in model.named_parameters() if ".adapters." in name and p.grad is not None}
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    for parameter in named.values():
        parameter.grad = None
    return gradients
