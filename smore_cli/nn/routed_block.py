"""Softmax, selection, gates and the core as one node of the autograd graph, for experts that share nothing or their A.

    p = softmax(z)      g = p m [ / sum p m ]      y_e = g_e h_e            m: which experts are picked

    dh_e = g_e dy_e     dg_e += <h_e, dy_e>        dp += m (dg - <g, dg>) / sum p m,  or m dg       dz = softmax'(dp)

In a block every expert has its own latent h_e (r), in a fan all have the same h, whose gradient is the sum of theirs.

Plain autograd computes the same in three times as many operations, each of them short. Experts lead, (s, N), where
PyTorch does it: a softmax over few numbers that lie side by side is several times slower. Where a kernel is known
(`smore_cli.kernels`), it makes both passes; what is kept is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

    from smore_cli.nn.selection import Selector

__all__ = ["Form", "Kept", "Kernel", "find_kernel", "no_kernel", "route", "routed_block"]

aten = torch.ops.aten


class Form(NamedTuple):
    """What is computed.

    Attributes:
        experts: s.
        rank: r, of each.
        fan: whether all experts have the same latent.
        select: says which experts are picked; None, where it is all of them.
    """

    experts: int
    rank: int
    fan: bool
    select: Selector


class Kept(NamedTuple):
    """What the backward pass needs; no tensors but the first two where every expert is picked.

    Attributes:
        latent: (N, rows + s).
        p: (N, s) probabilities.
        g: (N, s) gates.
        picked: (N, s) bool.
        total: (N,) mass of the picked experts, where the gates are renormalised and this is known.
    """

    latent: Tensor
    p: Tensor
    g: Tensor | None
    picked: Tensor | None
    total: Tensor | None


class Kernel(Protocol):
    """A compiled form of both passes."""

    def forward(self, latent: Tensor, form: Form) -> tuple[Tensor, Kept]:
        """As the function of this name."""
        ...

    def backward(self, kept: Kept, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None) -> Tensor:
        """As the function of this name."""
        ...


def no_kernel(latent: Tensor, form: Form) -> Kernel | None:
    """Finds none."""
    return None


find_kernel: Callable[[Tensor, Form], Kernel | None] = no_kernel
"""Finds the kernel for latents and a form; set by `smore_cli.kernels.use`."""


def routed_block(
    latent: Tensor, rows: int, select: Selector, *, fan: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the mixed latent (N, s r), and probabilities (N, s), gates (N, s) and what was picked (N, s) bool.

    Args:
        latent: (N, rows + s) what the experts' down-projections gave, then the router's logits.
        rows: s r, or r of a fan.
        select: says which experts are picked; None, where it is all of them.
        fan: whether all experts have the same down-projection.
    """
    s = latent.shape[1] - rows
    form = Form(s, rows if fan else rows // s, fan, select)
    if torch.is_grad_enabled():
        mixed, p, g, picked = _RoutedBlock.apply(latent, form)
    else:
        mixed, (_, p, g, picked, _) = _forward(find_kernel(latent, form), latent, form)
    return mixed, p, p if g is None else g, picked


class _RoutedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        kernel = find_kernel(latent, form)
        mixed, kept = _forward(kernel, latent, form)
        if kept.picked is not None:
            ctx.mark_non_differentiable(kept.picked)
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.form, ctx.kernel = form, kernel
        return mixed, kept.p, kept.g, kept.picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        dy, dp, dg, _ = grads
        make = backward if ctx.kernel is None else ctx.kernel.backward
        return make(Kept(*ctx.saved_tensors), ctx.form, dy, dp, dg), None


def _forward(kernel: Kernel | None, latent: Tensor, form: Form) -> tuple[Tensor, Kept]:
    return forward(latent, form) if kernel is None else kernel.forward(latent, form)


def forward(latent: Tensor, form: Form) -> tuple[Tensor, Kept]:
    """Returns the mixed latent (N, s r), and what the backward pass needs."""
    p, picked = route(latent, form)
    g = total = None
    if picked is not None:
        gates = p.t() * picked.t()  # (s, N)
        if form.select.renormalise:
            total = gates.sum(0)
            gates.div_(total)
        g = gates.t()
    weights = p if g is None else g
    return (_by_expert(latent, form) * weights[:, :, None]).flatten(1), Kept(latent, p, g, picked, total)


def route(latent: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Returns probabilities and what is picked, (N, s) each, experts leading in memory."""
    p = torch.softmax(latent[:, -form.experts :].t(), 0).t()
    picked = form.select.mask(p[:, None])
    return p, None if picked is None else picked[:, 0]


def backward(kept: Kept, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None) -> Tensor:
    """Returns the gradient of the latent, (N, rows + s), from those of the mixed latent, probabilities and gates."""
    latent, p, g, picked, total = kept
    s, out = form.experts, torch.empty_like(latent)
    dh, dz = out[:, :-s], out[:, -s:]
    dp, dg = (None if each is None else each.t() for each in (dp, dg))  # (s, N)
    if dy is None:
        dh.zero_()
    else:
        h, dy = _by_expert(latent, form), dy.view(len(dy), s, form.rank)
        weights = (p if g is None else g)[:, :, None]
        if form.fan:
            torch.sum(dy * weights, 1, out=dh)
        else:
            torch.mul(dy, weights, out=dh.view(len(dy), s, form.rank))
        of_gates = (dy * h).sum(-1).t()
        dg = of_gates if dg is None else dg + of_gates
    if dg is not None and picked is not None and g is not None:
        if total is not None:
            dg = (dg - (g.t() * dg).sum(0)).div_(total)
        dg = dg * picked.t()
    if dg is not None:
        dp = dg if dp is None else dp + dg
    if dp is None:
        dz.zero_()
    else:
        dz.copy_(aten._softmax_backward_data(dp, p.t(), 0, p.dtype).t())
    return out


def _by_expert(latent: Tensor, form: Form) -> Tensor:
    """Returns the latents of every expert, (N, s, r), or (N, 1, r) of a fan, in place."""
    h = latent[:, : latent.shape[1] - form.experts]
    return h[:, None] if form.fan else h.view(len(h), form.experts, form.rank)
