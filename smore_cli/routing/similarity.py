"""How alike the updates of two experts are: the cosine of their matrices.

    D_e   what the adapter adds with all weight on expert e        (in a tree: of one level, the others evenly)
    cos(e, f) = <D_e, D_f> / |D_e| |D_f|

All D_e live in the span of the down-projections: with Q an orthonormal basis of it, D_e Q has the same products and is
rank wide, so that no d_out x d_in matrix is made. A tree's activation is taken at its slope in 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smore_cli.merging.mean import STEP, with_gates
from smore_cli.nn.router import Router

__all__ = ["expert_similarity"]


@torch.no_grad()
def expert_similarity(adapter: Any, level: int = 0) -> list[list[float]] | None:
    """Returns the cosines (s, s) of the experts' updates; None where experts have no matrix of their own.

    Args:
        adapter: routed, of a linear map.
        level: tree level, 0 = leaves.
    """
    router: Any = getattr(adapter, "router", None)
    if not hasattr(adapter, "down") or not (isinstance(router, Router) or hasattr(router, "levels")):
        return None
    sizes = (
        [(router.groups, router.num_experts)] if isinstance(router, Router) else [(1, s) for s in router.num_experts]
    )
    down = [rows.double() for rows in (*adapter.down().rows, *adapter.down().exact)]
    basis = torch.linalg.qr(torch.cat(down).t()).Q.t()  # (R, d_in)
    outputs = []
    for expert in range(sizes[level][1]):
        gates = [torch.full(size, 1 / size[1], dtype=torch.float64) for size in sizes]
        gates[level] = torch.zeros(sizes[level], dtype=torch.float64)
        gates[level][:, expert] = 1.0
        outputs.append(_update(with_gates(adapter, gates), basis).flatten())
    D = torch.stack(outputs)  # (s, R d_out)
    norms = D.norm(dim=1, keepdim=True)
    cosines = (D / norms.clamp_min(1e-300)) @ (D / norms.clamp_min(1e-300)).t()
    found: list[list[float]] = cosines.clamp(-1, 1).tolist()
    return found


def _update(fixed: Any, basis: Tensor) -> Tensor:
    """Returns D Q^T (R, d_out) of an adapter whose gates are the same for all tokens."""
    fixed = fixed.double().eval()
    d_out = fixed.up()[0].shape[0]
    x = torch.cat([torch.zeros_like(basis[:1]), STEP * basis])
    given: Tensor = fixed(x, x.new_zeros(len(x), d_out))
    return (given[1:] - given[0]) / STEP
