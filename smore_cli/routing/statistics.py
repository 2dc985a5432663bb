"""What is known of one router after some tokens, and what follows from it.

A routing decision is one parent node choosing its children for one token: a tree of fanout [2, 2] makes one decision a
token at its root and two a token at its leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DEAD_BELOW", "LevelSummary", "RouterStatistics", "summarise"]

DEAD_BELOW = 0.01
"""An expert is dead if it is used less than this share of what each would be, were all used alike."""


@dataclass(frozen=True)
class RouterStatistics:
    """One router, on one level of its tree, over every real token it saw.

    Attributes:
        module: path of the adapted linear map.
        level: tree level, 0 = leaves.
        decisions: how many routing decisions were counted.
        picked: experts a decision takes (the fanout); all of them for a dense gate.
        load: of each expert, the share of decisions that took it; sums to `picked`.
        share: of each expert, its mean gate weight over all decisions, 0 counted where it was not taken.
        entropy: of the router's distribution over all experts, mean over decisions, as a share of log(experts).
        paths: of the leaves of a tree, how often each path from the root to a leaf is taken: the share of all paths
            taken, summing to 1, the most frequent first; None: no tree, or another level of it.
        taken: share of the decisions that took 0, 1, ..., s experts.
        together: (s, s) share of the decisions that took both experts; None: all are always taken.
        token_share: of a router with a prior (T-REX), the part of its gate weight that the token decides.
    """

    module: str
    level: int
    decisions: int
    picked: int
    load: list[float]
    share: list[float]
    entropy: float
    paths: dict[tuple[int, ...], float] | None = None
    taken: list[float] = field(default_factory=list)
    together: list[list[float]] | None = None
    token_share: float | None = None

    @property
    def mean_gate(self) -> list[float]:
        """Of each expert, its mean gate weight where it was taken; 0 where it never was."""
        return [share / load if load else 0.0 for load, share in zip(self.load, self.share, strict=True)]

    @property
    def soft(self) -> float | None:
        """Share of the decisions that took all experts, of a router that does not always take as many; else None."""
        return self.taken[-1] if sum(share > 0 for share in self.taken) > 1 else None

    @property
    def num_experts(self) -> int:
        """How many experts there are to choose from."""
        return len(self.load)

    @property
    def selects(self) -> bool:
        """Whether experts are left out at all."""
        return self.picked < self.num_experts

    @property
    def usage(self) -> list[float]:
        """How the work is divided among the experts, summing to 1: by load, or by gate weight where all are taken."""
        values = self.load if self.selects else self.share
        return [value / sum(values) for value in values]

    @property
    def effective_experts(self) -> float:
        """exp(entropy of `usage`): how many experts, used alike, would be as diverse; from `picked` or 1 to all."""
        return math.exp(-sum(part * math.log(part) for part in self.usage if part > 0))

    @property
    def balance(self) -> float:
        """Where `effective_experts` lies between the worst that can be (0: the same experts always) and all (1)."""
        least = self.picked if self.selects else 1
        return 1.0 if self.num_experts == least else (self.effective_experts - least) / (self.num_experts - least)

    @property
    def dead(self) -> list[int]:
        """The experts that are hardly ever used, see `DEAD_BELOW`."""
        return [expert for expert, part in enumerate(self.usage) if part * self.num_experts < DEAD_BELOW]

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "module": self.module,
            "level": self.level,
            "experts": self.num_experts,
            "picked": self.picked,
            "decisions": self.decisions,
            "load": self.load,
            "share": self.share,
            "mean_gate": self.mean_gate,
            "active_experts": sum(count * share for count, share in enumerate(self.taken)),
            "soft": self.soft,
            "together": self.together,
            **({} if self.token_share is None else {"token_share": self.token_share}),
            "entropy": self.entropy,
            "effective_experts": self.effective_experts,
            "balance": self.balance,
            "dead": self.dead,
            **({} if self.paths is None else {"paths": [{"path": p, "share": s} for p, s in self.paths.items()]}),
        }


@dataclass(frozen=True)
class LevelSummary:
    """All routers of one level together.

    Attributes:
        level: tree level, 0 = leaves.
        routers: how many there are.
        experts: all their experts together.
        effective_experts: mean over routers.
        entropy: mean over routers.
        dead: the dead experts of each router that has any.
        least_balanced: the router with the lowest `balance`.
        most_balanced: the router with the highest.
    """

    level: int
    routers: int
    experts: int
    effective_experts: float
    entropy: float
    dead: dict[str, list[int]]
    least_balanced: RouterStatistics
    most_balanced: RouterStatistics

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values, the two routers by their module."""
        return {
            **vars(self),
            "least_balanced": self.least_balanced.module,
            "most_balanced": self.most_balanced.module,
        }


def summarise(routers: Sequence[RouterStatistics]) -> list[LevelSummary]:
    """Returns one summary a level, root first."""
    return [_summarise_level([r for r in routers if r.level == level]) for level in levels_of(routers)]


def levels_of(routers: Sequence[RouterStatistics]) -> list[int]:
    """Returns the tree levels, root first."""
    return sorted({router.level for router in routers}, reverse=True)


def _summarise_level(routers: Sequence[RouterStatistics]) -> LevelSummary:
    return LevelSummary(
        level=routers[0].level,
        routers=len(routers),
        experts=sum(router.num_experts for router in routers),
        effective_experts=math.fsum(router.effective_experts for router in routers) / len(routers),
        entropy=math.fsum(router.entropy for router in routers) / len(routers),
        dead={router.module: router.dead for router in routers if router.dead},
        least_balanced=min(routers, key=lambda router: router.balance),
        most_balanced=max(routers, key=lambda router: router.balance),
    )
