"""Hand-made routing: models whose adapters only have names, and traces with known numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from smore_cli.nn import AdaptedModule, Adapter
from smore_cli.nn.context import RoutingTrace
from smore_cli.routing import RouterStatistics

if TYPE_CHECKING:
    from torch import Tensor


class Bare(Adapter):
    """An adapter that does nothing: traces need an owner."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


def owners(*names: str) -> tuple[nn.Module, list[nn.Module]]:
    """Returns a model with an adapted linear map of each name, and their adapters."""
    model = nn.Module()
    for name in names:
        linear = AdaptedModule(nn.Linear(2, 2))
        linear.adapters["default"] = Bare()
        linear.active = "default"
        model.add_module(name, linear)
    return model, [getattr(model, name).adapters["default"] for name in names]


def picks(
    owner: nn.Module, ids: list[list[list[int]]], *, experts: int, level: int = 0, weight: float = 0.5
) -> RoutingTrace:
    """A trace in which each parent (token, parent, child) takes the experts `ids`, all with the same weight."""
    gates = weight * nn.functional.one_hot(torch.tensor(ids), experts).sum(2).float()
    probabilities = torch.full_like(gates, 1 / experts)
    return RoutingTrace(owner, level, probabilities, gates)


def random_trace(owner: nn.Module, tokens: int, *, parents: int = 2, experts: int = 4, fanout: int = 2) -> RoutingTrace:
    logits = torch.randn(tokens, parents, experts, generator=torch.Generator().manual_seed(0))
    values, ids = logits.topk(fanout, -1)
    gates = torch.zeros_like(logits).scatter(-1, ids, values.softmax(-1))
    return RoutingTrace(owner, 0, logits.softmax(-1), gates)


def router(
    load: list[float], *, picked: int = 2, module: str = "model.layers.0.self_attn.q_proj", level: int = 0
) -> RouterStatistics:
    """Statistics with the load given and the gate weights shared out alike."""
    return RouterStatistics(module, level, 100, picked, load, [part / picked for part in load], 0.5)
