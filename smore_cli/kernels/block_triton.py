"""Softmax, picks, gates and core of a flat method as one launch a direction on a GPU: the equations of `block.c`.

A program takes T tokens; S and R are the next powers of two of experts and rank, and what is beyond is masked.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from smore_cli.nn import routed_block
from smore_cli.nn.routed_block import Form, Kept, route
from smore_cli.nn.selection import All, TopK

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TritonBlock", "on"]

ELEMENTS = 2048
"""Numbers of (T, S, R) that a program holds at a time."""


@triton.jit
def _mix(
    latent, stride, p_out, g_out, picked_out, mixed, n, s, r, picks,
    ALL: tl.constexpr, GIVEN: tl.constexpr, RENORMALISE: tl.constexpr, FAN: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    e, i = tl.arange(0, S), tl.arange(0, R)
    width = r if FAN else s * r
    here = (t[:, None] < n) & (e[None] < s)  # (T, S)
    at = t[:, None] * s + e[None]
    if GIVEN:
        p = tl.load(p_out + at, mask=here, other=0.0)
        picked = tl.load(picked_out + at, mask=here, other=0) != 0
    else:
        z = tl.load(latent + t[:, None] * stride + width + e[None], mask=here, other=0.0)
        z = tl.where(e[None] < s, z, float("-inf"))
        p = tl.exp(z - tl.max(z, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        tl.store(p_out + at, p, mask=here)
    g = p
    if not ALL:
        if not GIVEN:  # of equal ones the first goes first
            before = tl.zeros((T, S), tl.int32)
            for o in range(s):
                other = tl.sum(tl.where(e[None] == o, p, 0.0), 1)[:, None]
                before += ((other > p) | ((other == p) & (o < e[None]))).to(tl.int32)
            picked = (before < picks) & (e[None] < s)
            tl.store(picked_out + at, picked.to(tl.uint8), mask=here)
        g = tl.where(picked, p, 0.0)
        if RENORMALISE:
            g = g / tl.where(t < n, tl.sum(g, 1), 1.0)[:, None]
        tl.store(g_out + at, g, mask=here)
    inside = here[:, :, None] & (i[None, None] < r)  # (T, S, R)
    step = 0 if FAN else r
    h = tl.load(latent + (t[:, None] * stride + e[None] * step)[:, :, None] + i[None, None], mask=inside, other=0.0)
    tl.store(mixed + (at * r)[:, :, None] + i[None, None], g[:, :, None] * h, mask=inside)


@triton.jit
def _slopes(
    latent, stride, p_in, g_in, picked_in, dy_in, dp_in, dg_in, dlatent, n, s, r,
    ALL: tl.constexpr, RENORMALISE: tl.constexpr, FAN: tl.constexpr,
    DY: tl.constexpr, DP: tl.constexpr, DG: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    e, i = tl.arange(0, S), tl.arange(0, R)
    width = r if FAN else s * r
    here = (t[:, None] < n) & (e[None] < s)
    at, row = t[:, None] * s + e[None], t[:, None] * (width + s)
    p = tl.load(p_in + at, mask=here, other=0.0)
    g = p if ALL else tl.load(g_in + at, mask=here, other=0.0)
    dg = tl.load(dg_in + at, mask=here, other=0.0) if DG else tl.zeros((T, S), tl.float32)
    inside = here[:, :, None] & (i[None, None] < r)
    step = 0 if FAN else r
    if DY:
        h = tl.load(latent + (t[:, None] * stride + e[None] * step)[:, :, None] + i[None, None], mask=inside, other=0.0)
        dy = tl.load(dy_in + (at * r)[:, :, None] + i[None, None], mask=inside, other=0.0)
        dg += tl.sum(dy * h, 2)
        dh = g[:, :, None] * dy
    else:
        dh = tl.zeros((T, S, R), tl.float32)
    if FAN:
        tl.store(dlatent + row + i[None], tl.sum(dh, 1), mask=(t[:, None] < n) & (i[None] < r))
    else:
        tl.store(dlatent + (row + e[None] * r)[:, :, None] + i[None, None], dh, mask=inside)
    if not ALL:  # dp = m (dg - <g, dg>) / sum p m
        picked = tl.load(picked_in + at, mask=here, other=0) != 0
        if RENORMALISE:
            total = tl.where(t < n, tl.sum(tl.where(picked, p, 0.0), 1), 1.0)[:, None]
            dg = (dg - tl.sum(g * dg, 1)[:, None]) / total
        dg = tl.where(picked, dg, 0.0)
    if DP:
        dg += tl.load(dp_in + at, mask=here, other=0.0)
    tl.store(dlatent + row + width + e[None], p * (dg - tl.sum(p * dg, 1)[:, None]), mask=here)


class TritonBlock:
    """In float32; N tokens."""

    def forward(self, latent: Tensor, form: Form) -> tuple[Tensor, Kept]:
        """Does what `routed_block.forward` does."""
        latent = latent if latent.stride(1) == 1 else latent.contiguous()
        n, select = len(latent), form.select
        known = isinstance(select, (All, TopK))
        if known:
            p = latent.new_empty(n, form.experts)
            picked = torch.empty_like(p, dtype=torch.bool) if isinstance(select, TopK) else None
        else:
            p, picked = route(latent, form)
            p, picked = p.contiguous(), None if picked is None else picked.contiguous()
        g = None if picked is None else torch.empty_like(p)
        mixed = latent.new_empty(n, form.experts * form.rank)
        grid, sizes = _blocks(n, form)
        with on(latent.device):
            _mix[grid](
                latent, latent.stride(0), p, p if g is None else g, _bytes(p if picked is None else picked), mixed,
                n, form.experts, form.rank, select.k if isinstance(select, TopK) else 0,
                ALL=picked is None, GIVEN=not known, RENORMALISE=select.renormalise, FAN=form.fan, **sizes,
            )  # fmt: skip
        return mixed, Kept(latent, p, g, picked, None)

    def backward(self, kept: Kept, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None) -> Tensor:
        """Does what `routed_block.backward` does."""
        latent, p, g, picked, _ = kept
        given = [None if each is None else each.contiguous() for each in (dy, dp, dg)]
        out = torch.empty(latent.shape, device=latent.device)
        grid, sizes = _blocks(len(latent), form)
        has = dict(zip(("DY", "DP", "DG"), [each is not None for each in given], strict=True))
        with on(latent.device):
            _slopes[grid](
                latent, latent.stride(0), p, p if g is None else g, _bytes(p if picked is None else picked),
                *(p if each is None else each for each in given), out, len(latent), form.experts, form.rank,
                ALL=picked is None, RENORMALISE=form.select.renormalise, FAN=form.fan, **has, **sizes,
            )  # fmt: skip
        return out

    def works(self, device: torch.device) -> bool:
        """Whether this Triton and this device give what PyTorch gives: tried once, on few numbers."""
        generator = torch.Generator().manual_seed(0)
        latent, dy, dp = (torch.randn(5, width, generator=generator).to(device) for width in (12, 9, 3))
        form = Form(3, 3, fan=False, select=TopK(2))
        try:
            mixed, kept = self.forward(latent, form)
            found = [mixed, self.backward(kept, form, dy, dp, None)]
        except Exception:  # whatever a compiler may raise
            return False
        expected, kept = routed_block.forward(latent, form)
        exact = [expected, routed_block.backward(kept, form, dy, dp, None)]
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, exact, strict=True))


def _blocks(n: int, form: Form) -> tuple[tuple[int], dict[str, int]]:
    """Returns how many programs there are, and what each of them takes."""
    S, R = triton.next_power_of_2(form.experts), triton.next_power_of_2(form.rank)
    T = max(1, min(64, ELEMENTS // (S * R)))
    return (triton.cdiv(n, T),), {"T": T, "S": S, "R": R}


def on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, Triton launches on the device: a model may lie on several, of which one is the current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
