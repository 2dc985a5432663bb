"""How evenly each router spreads its tokens, and whether one has collapsed onto a few experts.

Everything is measured router by router: pooled over many routers, the load looks balanced even where each of them has
collapsed onto experts of its own. Loads are summed over all steps between two lines of metrics, so that a single batch
of one kind raises no alarm.

    effective = exp(entropy of the load)        as many experts, used alike, would be as diverse; from k or 1 to s

A router that picks k of s experts has collapsed when effective <= k + 0.1 (s - k), one that mixes all of them when the
effective number of experts by gate mass is below 1.1. Where k varies from token to token, its mean counts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.nn import adapted_modules
from smore_cli.training.parallel import ALONE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from smore_cli.nn.context import ExpertLoad
    from smore_cli.training.parallel import Processes

__all__ = ["RouterHealth", "RoutingWatch", "collapse_line", "routing_summary"]

COLLAPSED_SPARSE = 0.1
"""Share of the way from k effective experts to all s, below which a router that picks has collapsed."""
COLLAPSED_DENSE = 1.1
"""Effective experts by gate mass, below which a router that mixes all experts has collapsed."""

LASTING = 0.1
"""Share of the routers that must have collapsed for a run to be stopped."""


@dataclass(frozen=True)
class RouterHealth:
    """One router over a stretch of training.

    Attributes:
        module: path of the adapted module, with the number of its group of experts where it has several.
        level: tree level, 0 = leaves.
        share: of each expert in the picks, or for a dense router in the gate mass; sums to 1.
        picked: experts a decision takes, on average.
        dense: whether every expert takes part in every decision.
    """

    module: str
    level: int
    share: list[float]
    picked: float
    dense: bool

    @property
    def effective_experts(self) -> float:
        """exp(entropy of the share), between `least` and the number of experts."""
        return _effective(self.share)

    @property
    def least(self) -> float:
        """The smallest effective number there can be: of a router that always takes the same experts."""
        if self.dense:
            return 1.0
        whole = min(int(self.picked), len(self.share))
        return _effective([1.0] * whole + [self.picked - whole])

    @property
    def collapsed(self) -> bool:
        """Whether it sends nearly everything to the same experts."""
        s = len(self.share)
        if self.dense:
            return s > 1 and self.effective_experts < COLLAPSED_DENSE
        room = s - self.least
        return room > 1e-6 * s and self.effective_experts <= self.least + COLLAPSED_SPARSE * room

    def __str__(self) -> str:
        """Names it, with its effective number of experts."""
        level = f" level {self.level}" if self.level else ""
        return f"{self.module}{level} ({self.effective_experts:.2f} of {len(self.share)} effective)"


class RoutingWatch:
    """Adds up the loads between two lines of metrics.

    Attributes:
        collapsed: how many routers had collapsed at the last line.
        lasting: whether these are more than a tenth of all, and no fewer than at the line before. A router often starts
            collapsed and is spread by its balance loss, so that a number that falls is no reason to stop.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = adapted_modules(model)
        self._paths = {adapter: path for path, module in modules.items() for adapter in module.adapters.values()}
        self._loads: dict[tuple[nn.Module, int], ExpertLoad] = {}
        self.collapsed = self._told = 0
        self.lasting = False
        self._first = True

    def add(self, loads: Sequence[ExpertLoad]) -> None:
        """Adds the loads of a step; nothing waits for the device."""
        for each in loads:
            key = each.owner, each.level
            if (so_far := self._loads.get(key)) is not None:
                each = replace(each, load=so_far.load + each.load, decisions=so_far.decisions + each.decisions)
            self._loads[key] = each

    def routers(self, processes: Processes = ALONE) -> list[RouterHealth]:
        """Returns every router that made decisions since the last call, in any process, and starts anew."""
        found = []
        summed = processes.sum_tensors([part for each in self._loads.values() for part in (each.load, each.decisions)])
        pairs = zip(summed[::2], summed[1::2], strict=True)
        for ((owner, level), each), (counted, decisions) in zip(self._loads.items(), pairs, strict=True):
            each = replace(each, load=counted, decisions=decisions)
            groups = each.load if each.load.dim() == 2 else each.load[None]
            for number, load in enumerate(groups):
                path = self._paths[owner] + (f" group {number}" if len(groups) > 1 else "")
                found += _router(path, level, load, each)
        self._loads = {}
        return found

    def news(self, routers: Sequence[RouterHealth]) -> str | None:
        """Returns a line about collapsed routers where it is news: more than were told of by a tenth, and not fewer.

        Never at the first line, where routers are as they were initialised.
        """
        before, self.collapsed = self.collapsed, sum(router.collapsed for router in routers)
        self.lasting = self.collapsed > LASTING * len(routers) and self.collapsed >= before > 0
        first, self._first = self._first, False
        if first or self.collapsed < before or self.collapsed <= 1.1 * self._told:
            self._told = self._told if self.collapsed else 0
            return None
        self._told = self.collapsed
        return collapse_line(routers)


def _router(path: str, level: int, load: Tensor, of: ExpertLoad) -> list[RouterHealth]:
    total, decisions = float(load.sum()), float(of.decisions)
    if not total > 0:  # no real token came by
        return []
    share = (load.double() / total).tolist()
    return [RouterHealth(path, level, share, float(len(share)) if of.dense else total / decisions, of.dense)]


def _effective(share: Sequence[float]) -> float:
    total = math.fsum(share)
    return math.exp(-math.fsum(part / total * math.log(part / total) for part in share if part > 0))


def routing_summary(routers: Sequence[RouterHealth]) -> dict[str, dict[str, Any]]:
    """Summarises routers, by tree level.

    Returns:
        For each level (as text, "0" = leaves): `load`, the mean share of the busiest, second busiest, ... expert of a
        router; `effective_experts`, the mean over routers; `worst`, the router with the least of them relative to what
        it could have; and `collapsed`, how many routers have.
    """
    levels: dict[int, list[RouterHealth]] = defaultdict(list)
    for router in routers:
        levels[router.level].append(router)
    summary: dict[str, dict[str, Any]] = {}
    for level, found in sorted(levels.items()):
        most = max(len(router.share) for router in found)  # layers may have different numbers of experts
        ordered = [sorted(router.share, reverse=True) + [0.0] * (most - len(router.share)) for router in found]
        worst = min(found, key=_balance)
        summary[str(level)] = {
            "load": [round(value, 4) for value in torch.tensor(ordered).mean(0).tolist()],
            "effective_experts": round(math.fsum(router.effective_experts for router in found) / len(found), 3),
            "worst": {"effective_experts": round(worst.effective_experts, 3), "module": worst.module},
            "collapsed": sum(router.collapsed for router in found),
        }
    return summary


def collapse_line(routers: Sequence[RouterHealth]) -> str:
    """Returns how many routers have collapsed, and the worst of them."""
    collapsed = sorted((router for router in routers if router.collapsed), key=_balance)
    more = f" and {len(collapsed) - 3} more" if len(collapsed) > 3 else ""
    named = ", ".join(map(str, collapsed[:3]))
    return f"{len(collapsed)} of {len(routers)} routers send nearly everything to the same experts: {named}{more}"


def _balance(router: RouterHealth) -> float:
    """0 where the same experts do everything, 1 where all are used alike."""
    room = len(router.share) - router.least
    return (router.effective_experts - router.least) / room if room > 1e-6 * len(router.share) else 1.0
