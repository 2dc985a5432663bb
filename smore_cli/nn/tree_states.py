"""From the leaves of a tree to its root, level by level, for the nodes that were picked alone.

A node is one child of one parent: an expert n with a latent h_n and, above the leaves, a child state x. Its summand

    e_n + W x + w  =  B_n h_n + W x + (b_n + w)

is made for all nodes of a level by plain matrix products: a node's own latent is put in its expert's place of an
otherwise empty row, [0 .. h_n .. 0], so that [B_1 .. B_s] multiplies it whichever expert it is. Nothing is gathered for
each node but its bias, and no gradient is scattered.

    all                x' = sum alpha act(B_n h_n + W x + b_n + w)                       one row a node
    child_v2, child    x' = sum alpha (B_n h_n + b_n [+ w]) + W sum [alpha] act(x) [+ f w]    linear: one row a parent

Layout: (children, f_{l+1}, ..., f_{L-1}, N, features); a leading axis is summed by adding contiguous blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smore_cli.nn.tree_router import one_hot_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from smore_cli.nn.tree_router import Picks

__all__ = ["gated_sum", "leaf_sum", "node_sum"]

aten = torch.ops.aten


def node_sum(
    latent: Tensor,
    picks: Picks,
    B: Tensor,
    bias: Tensor,
    children: Tensor | None,
    W: Tensor | None,
    act: str,
    slope: Tensor | None,
) -> Tensor:
    """Returns sum_children alpha act(B_n h_n + W x + bias_n), (f_{l+1}, .., N, d): position `all`.

    Args:
        latent: (N, s, r).
        picks: of this level.
        B: (s, d, r).
        bias: (s, d), with w in it.
        children: (f_l, f_{l+1}, .., N, d_l) states of the children; None for leaves.
        W: (d, d_l); None for leaves.
        act: name of the activation.
        slope: of a `prelu`.
    """
    alpha = picks.alpha.to(latent.dtype)
    out: Tensor = _NodeSum.apply(latent, alpha, B, bias, children, W, slope, picks.chosen, act)
    return out


class _NodeSum(torch.autograd.Function):
    """Keeps the activations, the rows of latents and its inputs; written by hand for its sums in place."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        alpha: Tensor,
        B: Tensor,
        bias: Tensor,
        children: Tensor | None,
        W: Tensor | None,
        slope: Tensor | None,
        chosen: Tensor,
        act: str,
    ) -> Tensor:
        n, s, r = latent.shape
        stacked = B.transpose(1, 2).reshape(s * r, -1)  # (s r, d)
        place = one_hot_rows(chosen, s, latent.dtype)  # (nodes, s)
        rows = (place.view(-1, n, s, 1) * latent).view(-1, s * r)  # (nodes, s r)
        z = bias.index_select(0, chosen.flatten()).addmm_(rows, stacked)  # (nodes, d)
        if children is not None and W is not None:
            z.addmm_(children.flatten(0, -2), W.t())
        out = _activate(z, act, slope)
        ctx.save_for_backward(
            place, rows, z if act == "prelu" else None, out, latent, alpha, stacked, children, W, slope
        )
        ctx.act = act
        return (out.view(*alpha.shape, -1) * alpha.unsqueeze(-1)).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        place, rows, z, out, latent, alpha, stacked, children, W, slope = ctx.saved_tensors
        n, s, r = latent.shape
        d_alpha = (out.view(*alpha.shape, -1) * grad).sum(-1)
        dz = (grad * alpha.unsqueeze(-1)).view(out.shape)  # (nodes, d)
        dz, d_slope = _activation_gradient(dz, z, out, ctx.act, slope)
        d_rows = (dz @ stacked.t()).view(-1, n, s, r)
        d_latent = d_rows.mul_(place.view(-1, n, s, 1)).sum(0)
        d_B = (dz.t() @ rows).view(-1, s, r).transpose(0, 1)
        d_bias = place.t() @ dz
        d_children = d_W = None
        if children is not None:
            d_children = (dz @ W).view(children.shape)
            d_W = dz.t() @ children.flatten(0, -2)
        return d_latent, d_alpha, d_B, d_bias, d_children, d_W, d_slope, None, None


def _activate(z: Tensor, act: str, slope: Tensor | None) -> Tensor:
    """Returns act(z), in place but for a `prelu`, whose gradient needs z."""
    if act == "tanh":
        return z.tanh_()
    if act == "relu":
        return z.relu_()
    return F.prelu(z, slope) if slope is not None else z


def _activation_gradient(
    grad: Tensor, z: Tensor | None, out: Tensor, act: str, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of z and of the slope."""
    if act == "tanh":
        return aten.tanh_backward(grad, out), None
    if act == "relu":
        return aten.threshold_backward(grad, out, 0), None
    if z is None or slope is None:
        return grad, None
    below = z.clamp_max(0)
    return torch.where(z > 0, grad, grad * slope), (grad * below).sum().view(slope.shape)


def leaf_sum(latent: Tensor, picks: Picks, B: Tensor, bias: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns sum_children alpha act(B_n h_n + bias_n), (f_1, .., N, d): each leaf activated once for all its parents.

    Args:
        latent: (N, s, r).
        picks: of this level.
        B: (s, d, r).
        bias: (s, d).
        act: the activation.
    """
    out = act(torch.baddbmm(bias[:, None], latent.transpose(0, 1), B.transpose(1, 2)))  # (s, N, d)
    gates = picks.spread(picks.alpha).to(out.dtype)  # (s, f_1, .., N)
    parents = gates.flatten(1, -2).permute(2, 1, 0)  # (N, F, s)
    state = parents @ out.transpose(0, 1)  # (N, F, d)
    return state.transpose(0, 1).contiguous().view(*gates.shape[1:], -1)


def gated_sum(
    latent: Tensor, picks: Picks, B: Tensor, bias: Tensor, carried: Tensor | None, W: Tensor | None
) -> Tensor:
    """Returns sum_children alpha (B_n h_n + bias_n) + W carried, (f_{l+1}, .., N, d): positions `child`, `child_v2`.

    Args:
        latent: (N, s, r).
        picks: of this level.
        B: (s, d, r).
        bias: (s, d).
        carried: (f_{l+1}, .., N, d_l) sum over the children's activated states; None for leaves.
        W: (d, d_l); None for leaves.
    """
    n, s, r = latent.shape
    gates = picks.spread(picks.alpha).to(latent.dtype)  # (s, f_{l+1}, .., N)
    place = gates.view(s, -1).t().contiguous()  # (F N, s)
    rows = (place.view(-1, n, s, 1) * latent).view(-1, s * r)
    state = torch.addmm(place @ bias, rows, B.transpose(1, 2).reshape(s * r, -1))  # (F N, d)
    if carried is not None and W is not None:
        state = torch.addmm(state, carried.flatten(0, -2), W.t())
    return state.view(*gates.shape[1:], -1)
