"""Softmax, selection, gates and the block core as one node of the autograd graph.

    p = softmax(z)      g = p m [ / sum p m ]      y_e = g_e h_e            m: which experts are picked

    dh_e = g_e dy_e     dg_e += <h_e, dy_e>        dp += m (dg - <g, dg>) / sum p m,  or m dg       dz = softmax'(dp)

Plain autograd computes the same in three times as many operations, each of them short. Experts lead, (s, N): a softmax
over few numbers that lie side by side is several times slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from smore_cli.nn.selection import Selector

__all__ = ["routed_block"]

aten = torch.ops.aten


def routed_block(latent: Tensor, rows: int, select: Selector) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the mixed latent (N, s r), and probabilities (N, 1, s), gates (N, 1, s) and what was picked (N, 1, s).

    Args:
        latent: (N, s r + s) what the experts' down-projections gave, then the router's logits.
        rows: s r.
        select: says which experts are picked; None, where it is all of them.
    """
    mixed, p, g, picked = _RoutedBlock.apply(latent, rows, select)
    probabilities = p.t()[:, None]
    return mixed, probabilities, probabilities if g is None else g.t()[:, None], picked


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, rows: int, select: Selector
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        h, p = _by_expert(latent[:, :rows], latent.shape[1] - rows), torch.softmax(latent[:, rows:].t(), 0)
        picked = select.mask(p.t()[:, None])
        m = total = g = None
        if picked is not None:
            m = picked[:, 0].t()  # (s, N)
            g = p * m
            if select.renormalise:
                total = g.sum(0)
                g.div_(total)
            ctx.mark_non_differentiable(picked)
        gates = p if g is None else g
        ctx.save_for_backward(latent, p, g, m, total)
        ctx.set_materialize_grads(False)
        ctx.rows = rows
        return (h * gates.t()[:, :, None]).flatten(1), p, g, picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        dy, dp, dg, _ = grads
        latent, p, g, m, total = ctx.saved_tensors
        rows, s = ctx.rows, len(p)
        out = torch.empty_like(latent)
        if dy is None:
            out[:, :rows].zero_()
        else:
            dy = _by_expert(dy, s)
            gates = p if g is None else g
            torch.mul(dy, gates.t()[:, :, None], out=_by_expert(out[:, :rows], s))
            of_gates = (dy * _by_expert(latent[:, :rows], s)).sum(-1).t()
            dg = of_gates if dg is None else dg + of_gates
        if dg is not None and m is not None:
            if total is not None:
                dg = (dg - (g * dg).sum(0)).div_(total)
            dg = dg * m
        if dg is not None:
            dp = dg if dp is None else dp + dg
        if dp is None:
            out[:, rows:].zero_()
        else:
            out[:, rows:] = aten._softmax_backward_data(dp, p, 0, p.dtype).t()
        return out, None, None


def _by_expert(latent: Tensor, s: int) -> Tensor:
    """Returns (N, s r) as (N, s, r), in place."""
    return latent.view(len(latent), s, -1)
