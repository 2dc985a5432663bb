"""Flat routers: which experts a token goes to, and with which weights.

    logits        z = R x                          float32, whatever the backbone's dtype
    probabilities p = softmax(z)                   over the s experts of each group
    gates         g = select(p)                    what is applied; 0 where an expert is not picked

A router may have G groups of experts, each with a distribution of its own (MoDE has one a rank); most have one. Every
tensor below is laid out (N, G, s), as `RoutingTrace` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smore_cli.nn.balance import masked_sum
from smore_cli.nn.context import AuxLoss, ExpertLoad, RoutingRecord, RoutingTrace, current_context
from smore_cli.nn.selection import All
from smore_cli.nn.wide import without_autocast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.nn.context import AdapterContext
    from smore_cli.nn.selection import Selector

__all__ = ["Router", "RouterInit", "RouterLoss", "Routing", "report", "softmax"]

FEW = 16
"""Experts below which a softmax is faster over a leading axis."""

RouterInit = Literal["kaiming", "normal", "zero"]


@dataclass(frozen=True)
class Routing:
    """The routing of N tokens by one router.

    Attributes:
        logits: (N, G, s).
        probabilities: (N, G, s) the distribution over all experts of a group.
        gates: (N, G, s) the weights applied, 0 where an expert was not picked.
        picked: (N, G, s) bool; None: every expert is.
        latent: (N, R_a) what the down-projection gave, for losses on the experts' outputs; None: not known.
        owner: the adapter that routes.
        smooth_load: (N, G, s) how likely each expert was to be picked, of a noisy router; None: not noisy.
    """

    logits: Tensor
    probabilities: Tensor
    gates: Tensor
    picked: Tensor | None = None
    latent: Tensor | None = None
    owner: nn.Module | None = None
    smooth_load: Tensor | None = None


class RouterLoss(AuxLoss, Protocol):
    """An auxiliary loss that knows which sums over tokens it needs."""

    def sums(self, routing: Routing, context: AdapterContext) -> Tensor:
        """Returns (k, c) sums over the real tokens of one forward pass, differentiable; they add up over passes."""
        ...


class Router(nn.Module):
    """A linear router in float32.

    Attributes:
        weight: (G s, d) one row an expert, group by group.
        select: turns probabilities into gates.
    """

    def __init__(
        self,
        features: int,
        num_experts: int,
        *,
        groups: int = 1,
        select: Selector | None = None,
        init: RouterInit = "kaiming",
    ) -> None:
        super().__init__()
        self.groups, self.num_experts, self.init = groups, num_experts, init
        self.select = All() if select is None else select
        self.weight = nn.Parameter(torch.empty(groups * num_experts, features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """`kaiming`: as `nn.Linear`, uniform within 1/sqrt(d); `normal`: deviation 0.02; `zero`: uniform routing."""
        if self.init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        elif self.init == "normal":
            nn.init.normal_(self.weight, std=0.02)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, features: Tensor) -> Routing:
        """Routes (N, d) features; everything is computed in float32 or wider."""
        with without_autocast(features.device):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return self.route(F.linear(features, self.rows()))

    def rows(self) -> Tensor:
        """Returns all that is applied to the features, (R, d): an adapter may do it beside its own, in float32."""
        return self.weight

    def route(self, logits: Tensor) -> Routing:
        """Routes by what `rows` gave for the features, (N, R), float32 or wider; see `AdapterContext.edit`."""
        routing, context = self.decide(logits), current_context()
        return routing if context is None or context.edit is None else context.edit.routing(self, routing)

    def decide(self, logits: Tensor) -> Routing:
        """Returns what the router itself makes of the logits (N, R)."""
        logits = logits.unflatten(1, (self.groups, self.num_experts))
        probabilities = softmax(logits)
        gates, picked = self.select(probabilities)
        return Routing(logits, probabilities, gates, picked)


def softmax(logits: Tensor) -> Tensor:
    """Returns the softmax of (N, G, s) over experts; of few, which is slow where they lie side by side, laid out first.

    At N = 1024 on a CPU: 8 experts 166 and 26 microseconds, 32 experts 55 and 86.
    """
    if logits.shape[-1] >= FEW:
        return logits.softmax(-1)
    return logits.movedim(-1, 0).softmax(0).movedim(0, -1)


def report(
    routing: Routing,
    owner: nn.Module,
    losses: Sequence[RouterLoss] = (),
    level: int = 0,
    *,
    pooled: bool = False,
    chosen: Tensor | None = None,
) -> None:
    """Tells the current context, if there is one, what its losses, its load statistics and its observer want to know.

    Args:
        routing: of all tokens of this forward pass.
        owner: the adapter that routes.
        losses: the auxiliary losses of the router.
        level: tree level, 0 where there is no tree.
        pooled: whether all G rows of a token choose among the same s experts, as the parents on a tree's level do.
        chosen: (N, G, f) in a tree, which expert each child is.
    """
    context = current_context()
    if context is None:
        return
    if context.observe is not None:
        with torch.no_grad():  # saved tensors would differ from those of a checkpoint's recomputation
            seen = routing.probabilities.detach(), routing.gates.detach()
            context.observe(RoutingTrace(owner, level, *seen, chosen))
    if not context.aux:
        return
    with torch.autocast(routing.gates.device.type, enabled=False):  # a half-precision sum cannot count to 2049
        for loss in losses:
            context.records.append(RoutingRecord(owner, level, loss.sums(routing, context), loss))
        if not context.recomputing:
            context.loads.append(_load(routing, owner, level, context, pooled))


@torch.no_grad()
def _load(routing: Routing, owner: nn.Module, level: int, context: AdapterContext, pooled: bool) -> ExpertLoad:
    """Counts how busy the experts were."""
    used = routing.gates.abs() if routing.picked is None else routing.picked.to(routing.gates.dtype)
    n, groups, s = used.shape
    weights, tokens = context.weights(used)
    dense = routing.picked is None
    if pooled or groups == 1:
        decisions = tokens if groups == 1 else tokens * groups
        return ExpertLoad(owner, level, masked_sum(used, weights), decisions, dense)
    load = masked_sum(used.reshape(n, 1, groups * s), weights).view(groups, s)
    return ExpertLoad(owner, level, load, tokens, dense)
