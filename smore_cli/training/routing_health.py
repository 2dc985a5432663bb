"""How evenly the routers spread their tokens, in a form that averaging over routers does not hide.

Averaging the load of expert 1, 2, ... over many routers looks balanced even where each router has collapsed onto one
expert of its own. So every router's load is sorted first: the average then says how much the busiest expert gets.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from smore_cli.nn.context import ExpertLoad

__all__ = ["routing_summary"]


def routing_summary(loads: Sequence[ExpertLoad]) -> dict[str, dict[str, float | list[float]]]:
    """Summarises the load of one forward pass, by tree level.

    Returns:
        For each level (as text, "0" = leaves): `load`, the mean share of the busiest, second busiest, ... expert of a
        router; and `effective_experts`, the mean over routers of exp(entropy of the load), between 1 and s.
    """
    levels: dict[int, list[Tensor]] = defaultdict(list)
    for each in loads:
        levels[each.level].append(each.load)
    summary: dict[str, dict[str, float | list[float]]] = {}
    for level, rows in sorted(levels.items()):
        share = torch.stack(rows).float()
        share = share / share.sum(-1, keepdim=True).clamp_min(1e-20)  # (routers, s)
        entropy = -torch.xlogy(share, share).sum(-1)
        summary[str(level)] = {
            "load": [round(value, 4) for value in share.sort(descending=True).values.mean(0).tolist()],
            "effective_experts": round(float(entropy.exp().mean()), 3),
        }
    return summary
