"""Picked experts alone: for many or large experts of which a token has few.

    y_t += scale * sum_{e in top-k(t)} g_te B_e A_e x_t

A stacked bank sends every token through all s experts, R = s r rows, and masks what was not picked: two products of
full speed. Here the tokens are sorted by expert, and each expert has two products over its own tokens, looked up in x
and added into y in place. That saves (s - k) r of R rows a token and costs two passes over k rows of x and y:

    pays where   R (1 - k / s) > ROWS_A_PICK * k

On a GPU a bank stays stacked: which tokens an expert has is not known to the host, which would have to wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from smore_cli.nn.wide import without_autocast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["add_grouped", "grouping_pays"]

ROWS_A_PICK = 160
"""Rows of stacked experts that take as long as what a pick costs: on two cores, at 576 and at 2048, the grouped form
was slower with 96 rows saved a pick (1.44, 1.30 of the stacked time) and no slower with 192 (1.04, 0.84)."""


def grouping_pays(num_experts: int, rank: int, picks: int) -> bool:
    """Returns whether s experts of a rank, of which a token has k, are better not stacked on a CPU."""
    return num_experts * rank * (1 - picks / num_experts) > ROWS_A_PICK * picks


def add_grouped(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, ids: Tensor, *, num_experts: int, scale: float
) -> Tensor:
    """Returns y + scale * sum_j gates_j B_e A_e x, e = ids_j, computed in place of y.

    Args:
        y: (N, d_out), which nobody else has seen.
        x: (N, d_in).
        A: (s r, d_in) expert by expert.
        B: (d_out, s r).
        gates: (N, k).
        ids: (N, k) int64, different experts in a row.
        num_experts: s.
        scale: on what is added.
    """
    out: Tensor = _Grouped.apply(y, x.to(y.dtype), A, B, gates, ids, num_experts, scale)
    return out


class _Grouped(torch.autograd.Function):
    """Keeps x, the gates, which token each pick is of, and the picked experts' latents, (N k, r)."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, ids: Tensor, num_experts: int, scale: float
    ) -> Tensor:
        flat = ids.flatten()
        order = flat.argsort(stable=True)  # (N k) picks, expert by expert
        ends = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
        token, weight = order // ids.shape[1], gates.flatten()[order, None].to(x.dtype)
        r = len(A) // num_experts
        latent = x.new_empty(len(order), r)
        with without_autocast(x.device):
            for own, rows in _segments(ends, r):
                tokens = token[own]
                torch.mm(x[tokens], A[rows].to(x.dtype).t(), out=latent[own])
                up = torch.mm(latent[own] * weight[own], B[:, rows].to(x.dtype).t())
                y.index_add_(0, tokens, up, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, A, B, gates, order, latent)
        ctx.ends, ctx.scale = ends, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gates, order, latent = ctx.saved_tensors
        token, weight = order // gates.shape[1], gates.flatten()[order, None].to(x.dtype)
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        dA, dB, dweight = torch.zeros_like(A), torch.zeros_like(B), torch.empty_like(weight)
        with without_autocast(dy.device):
            for own, rows in _segments(ctx.ends, latent.shape[1]):
                tokens, h = token[own], latent[own]
                out = dy[tokens]
                dmixed = torch.mm(out, B[:, rows].to(x.dtype)).mul_(ctx.scale)
                dB[:, rows] = torch.mm(out.t(), (h * weight[own]).mul_(ctx.scale)).to(B.dtype)
                torch.sum(dmixed * h, 1, keepdim=True, out=dweight[own])
                dh = dmixed.mul_(weight[own])
                dA[rows] = torch.mm(dh.t(), x[tokens]).to(A.dtype)
                if dx is not None:
                    dx.index_add_(0, tokens, torch.mm(dh, A[rows].to(x.dtype)))
        dgates = torch.empty(gates.numel(), dtype=gates.dtype, device=gates.device)
        dgates[order] = dweight[:, 0].to(gates.dtype)
        return dy, dx, dA, dB, dgates.view(gates.shape), None, None, None


def _segments(ends: list[int], rank: int) -> Iterator[tuple[slice, slice]]:
    """Yields, of each expert that was picked, its picks in order and its rows of A."""
    start = 0
    for e, end in enumerate(ends):
        if end > start:
            yield slice(start, end), slice(e * rank, (e + 1) * rank)
        start = end
