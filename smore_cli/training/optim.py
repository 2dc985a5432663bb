"""Optimisers, and which parameter learns how fast.

adamw_torch_fused   AdamW in float32                         the default
adamw_bnb_8bit      AdamW, its two moments in 8 bits         bitsandbytes; tensors below 4096 numbers stay in 32
paged_adamw_*       AdamW, its moments in paged memory       bitsandbytes; on a CPU there is nothing to page
adafactor           factored second moment, no first         transformers', at the recipe's learning rate:
                    neither scaled by a parameter's size nor decaying by itself; an update's RMS is at most 1

              learning rate                            weight decay
routers       router_learning_rate                     none: it would pull every router towards uniform choice
up (B)        loraplus_lr_ratio x learning_rate        matrices
the rest      learning_rate                            matrices, not biases, slopes, magnitudes and norms
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smore_cli.errors import AdapterError, UsageError
from smore_cli.models.quiet import quiet
from smore_cli.nn.adapted import Adapter
from smore_cli.nn.router import Router
from smore_cli.nn.threads import one_thread
from smore_cli.nn.tree_router import TreeRouter
from smore_cli.training.shard import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from smore_cli.recipe.schema import TrainConfig

__all__ = ["build_optimizer", "parameter_groups", "require_optimizer", "take_step"]

ROUTERS = (Router, TreeRouter)


def require_optimizer(train: TrainConfig, device: torch.device, say: Callable[[str], None]) -> None:
    """Takes a step on a small tensor, so that an optimiser that cannot run here ends the run before any work.

    Args:
        train: names the optimiser.
        device: where the parameters will be.
        say: told that nothing is paged on a CPU.

    Raises:
        UsageError: it cannot run on this machine.
    """
    weight = nn.Parameter(torch.ones(64, 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        _make([{"params": [weight], "lr": 1e-3, "weight_decay": 0.0}], train).step()
    except Exception as error:  # whatever a missing library, kernel or driver raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"train.optim {train.optim} does not run on {device.type} here: {reason}",
            "set train.optim: adamw_torch_fused",
        ) from error
    if device.type == "cpu" and train.optim.startswith("paged_"):
        say(f"train.optim {train.optim}: nothing is paged on a CPU; the numbers are those of the optimiser unpaged")


def build_optimizer(model: nn.Module, train: TrainConfig) -> Optimizer:
    """Returns the recipe's optimiser over the trainable parameters of a model.

    Args:
        model: with its adapters attached.
        train: the optimiser, its rates and its weight decay.

    Raises:
        AdapterError: LoRA+ is asked for and the method has no up-projection.
    """
    return _make(parameter_groups(model, train), train)


def take_step(optimizer: Optimizer, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Takes a step on gradients of norm `limit` at most, frees them, and returns what their norm was, a scalar."""
    with one_thread(*parameters):
        norm = clip(parameters, limit)
        optimizer.step()
        optimizer.zero_grad()
    return norm


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Returns the trainable parameters by learning rate and weight decay; the first group has `learning_rate`.

    Raises:
        AdapterError: LoRA+ is asked for and the method has no up-projection.
    """
    routers, ups, biases = _roles(model)
    if train.loraplus_lr_ratio is not None and not ups:
        raise AdapterError("this method names no up-projection", "remove train.loraplus_lr_ratio")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(train.learning_rate, train.weight_decay): []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        rate, decay = train.learning_rate, train.weight_decay
        if parameter in routers:
            rate, decay = train.router_learning_rate or rate, 0.0
        elif parameter in ups:
            rate *= train.loraplus_lr_ratio or 1.0
        if parameter.dim() < 2 or parameter in biases:
            decay = 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items() if found]


def _roles(model: nn.Module) -> tuple[set[nn.Parameter], set[nn.Parameter], set[nn.Parameter]]:
    """Returns the parameters of routers, the up-projections, and the biases that have two dimensions."""
    routers: set[nn.Parameter] = set()
    ups: set[nn.Parameter] = set()
    biases: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, ROUTERS):
            routers.update(module.parameters())
        elif isinstance(module, Adapter):
            for name, parameter in module.named_parameters():
                first = name.partition(".")[0]
                if first in module.up_projections:
                    ups.add(parameter)
                if first in module.stacked_biases:
                    biases.add(parameter)
    return routers, ups, biases


def _make(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    adam: dict[str, Any] = {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optim == "adamw_torch_fused":
        return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True, **adam)
    if train.optim == "adafactor":
        from transformers import Adafactor

        return Adafactor(groups, lr=train.learning_rate, scale_parameter=False, relative_step=False)
    with quiet():
        from bitsandbytes.optim import adamw

    # Said once by `require_optimizer`, in the recipe's words.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    kinds = {
        "adamw_bnb_8bit": adamw.AdamW8bit,
        "paged_adamw_32bit": adamw.PagedAdamW32bit,
        "paged_adamw_8bit": adamw.PagedAdamW8bit,
    }
    optimizer: Optimizer = kinds[train.optim](groups, lr=train.learning_rate, **adam)
    return optimizer
