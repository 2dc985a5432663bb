"""Gates changed by hand after the router has decided, to see what an expert is worth.

    ablate   g_e = 0                       the other gates stay as they are: nothing is renormalised
    force    g_e = sum_n g_n, others 0     a decision's whole gate mass on one expert, whatever the router said

An `AdapterContext` carries the change (`edit`), and every router applies it, whatever its method. In a tree a child
that is forced takes the place of the first child, unless it was picked already, so that what is below it is routed as
below itself; a child that is ablated keeps its place and what is below it, with the weight 0. Meant for passes without
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smore_cli.nn.router import Routing
    from smore_cli.nn.tree_router import Picks

__all__ = ["EditKind", "GateEdit"]

EditKind = Literal["ablate", "force"]


@dataclass(frozen=True)
class GateEdit:
    """What is done to the gates of some routers.

    Attributes:
        kind: ablate or force.
        experts: the experts of one level; one, if it is forced.
        routers: which routers.
        level: tree level, 0 = leaves.
    """

    kind: EditKind
    experts: tuple[int, ...]
    routers: frozenset[nn.Module]
    level: int = 0

    def routing(self, router: nn.Module, routing: Routing) -> Routing:
        """Returns the routing of a flat router, edited if it is one of those."""
        if router not in self.routers:
            return routing
        gates = routing.gates  # (N, G, s)
        named = self._named(torch.arange(gates.shape[-1], device=gates.device))
        if self.kind == "ablate":
            return replace(routing, gates=gates.masked_fill(named, 0))
        gates = torch.where(named, gates.sum(-1, keepdim=True), 0)
        return replace(routing, gates=gates, picked=named.expand_as(gates))

    def picks(self, router: nn.Module, level: int, picks: Picks) -> Picks:
        """Returns the picks of a tree's level, edited if it is one of those."""
        if router not in self.routers or level != self.level:
            return picks
        chosen, alpha = picks.chosen, picks.alpha  # (f, ..., N)
        if self.kind == "ablate":
            return replace(picks, alpha=alpha.masked_fill(self._named(chosen), 0))
        taken = self._named(chosen).any(0)
        first = torch.where(taken, chosen[0], self.experts[0])
        chosen = torch.cat([first[None], chosen[1:]])
        alpha = torch.where(self._named(chosen), alpha.sum(0, keepdim=True), 0)
        return replace(picks, choice=picks.choice._replace(chosen=chosen), alpha=alpha)

    def _named(self, ids: Tensor) -> Tensor:
        """Returns which of the ids are those of the experts."""
        return torch.isin(ids, torch.tensor(self.experts, device=ids.device))
