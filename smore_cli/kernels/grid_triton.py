"""Softmax, prior and the grid as one launch forward, and one and a sum back, on a GPU: the equations of `grid.c`.

A program takes T tokens; I and J are the next powers of two of r1 and r2, and what is beyond is masked. It adds its own
tokens' share of the slopes of omega and nu in an order that never changes, and a sum over programs does the rest.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from smore_cli.kernels.block_triton import on
from smore_cli.nn.routed_grid import Form, Given, Prior, grid, prior_gates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TritonGrid"]

ELEMENTS = 2048
"""Numbers of (T, I, J) that a program holds at a time."""


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(z, real):
    """Of z (T, I, J) over all pairs that are real, (I, J)."""
    z = tl.where(real[None], z, float("-inf"))
    p = tl.exp(z - tl.max(tl.max(z, 2), 1)[:, None, None])
    return p / tl.sum(tl.sum(p, 2), 1)[:, None, None]


@triton.jit
def _mix(
    latent, stride, mixed, p_out, g_out, omega, nu, prior, document, length, n, r1, r2, c, c_prior, kappa,
    PRIOR: tl.constexpr, DOCUMENTS: tl.constexpr, T: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    i, j = tl.arange(0, I), tl.arange(0, J)
    real = (i[:, None] < r1) & (j[None] < r2)  # (I, J)
    pair = (i[:, None] * r2 + j[None])[None]
    inside = (t < n)[:, None, None] & real[None]  # (T, I, J)
    p = _softmax(tl.load(latent + (t * stride + r1)[:, None, None] + pair, mask=inside, other=0.0), real)
    at = (t * r1 * r2)[:, None, None] + pair
    tl.store(p_out + at, p, mask=inside)
    lam, gam = _sigmoid(kappa * tl.load(omega)), _sigmoid(kappa * tl.load(nu))
    g = c * gam * lam * p
    if PRIOR:
        which = t // length
        if DOCUMENTS:
            which = tl.maximum(tl.load(document + t, mask=t < n, other=0), 0)
        g += (
            c_prior
            * gam
            * (1.0 - lam)
            * tl.load(prior + (which * r1 * r2)[:, None, None] + pair, mask=inside, other=0.0)
        )
    tl.store(g_out + at, g, mask=inside)
    h = tl.load(latent + t[:, None] * stride + i[None], mask=(t < n)[:, None] & (i < r1)[None], other=0.0)  # (T, I)
    y = tl.sum(tl.where(inside, g, 0.0) * h[:, :, None], 1)
    tl.store(mixed + t[:, None] * r2 + j[None], y, mask=(t < n)[:, None] & (j < r2)[None])


@triton.jit
def _slopes(
    latent, stride, dy_in, dp_in, dg_in, dlatent, partial,
    omega, nu, prior, document, length, n, r1, r2, c, c_prior, kappa,
    PRIOR: tl.constexpr, DOCUMENTS: tl.constexpr, DY: tl.constexpr, DP: tl.constexpr, DG: tl.constexpr,
    T: tl.constexpr, I: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    i, j = tl.arange(0, I), tl.arange(0, J)
    pair = (i[:, None] * r2 + j[None])[None]
    real = (i[:, None] < r1) & (j[None] < r2)
    inside = (t < n)[:, None, None] & real[None]
    at, row = (t * r1 * r2)[:, None, None] + pair, t * (r1 + r1 * r2)
    p = _softmax(tl.load(latent + (t * stride + r1)[:, None, None] + pair, mask=inside, other=0.0), real)
    lam, gam = _sigmoid(kappa * tl.load(omega)), _sigmoid(kappa * tl.load(nu))
    a, b = c * gam * lam, c_prior * gam * (1.0 - lam)
    s = tl.zeros((T, I, J), tl.float32)
    if PRIOR:
        which = t // length
        if DOCUMENTS:
            which = tl.maximum(tl.load(document + t, mask=t < n, other=0), 0)
        s = tl.load(prior + (which * r1 * r2)[:, None, None] + pair, mask=inside, other=0.0)
    dg = tl.load(dg_in + at, mask=inside, other=0.0) if DG else tl.zeros((T, I, J), tl.float32)
    dh = tl.zeros((T, I), tl.float32)
    own = (t < n)[:, None] & (i < r1)[None]
    if DY:
        h = tl.load(latent + t[:, None] * stride + i[None], mask=own, other=0.0)
        dy = tl.load(dy_in + t[:, None] * r2 + j[None], mask=(t < n)[:, None] & (j < r2)[None], other=0.0)
        dg += h[:, :, None] * dy[:, None, :]
        dh = tl.sum((a * p + b * s) * dy[:, None, :], 2)
    tl.store(dlatent + row[:, None] + i[None], dh, mask=own)
    da, db = c * tl.sum(tl.sum(tl.sum(dg * p, 2), 1), 0), c_prior * tl.sum(tl.sum(tl.sum(dg * s, 2), 1), 0)
    tl.store(partial + tl.program_id(0) * 2, kappa * lam * (1.0 - lam) * gam * (da - db))
    tl.store(partial + tl.program_id(0) * 2 + 1, kappa * gam * (1.0 - gam) * (lam * da + (1.0 - lam) * db))
    dp = a * dg
    if DP:
        dp += tl.load(dp_in + at, mask=inside, other=0.0)
    dz = p * (dp - tl.sum(tl.sum(p * dp, 2), 1)[:, None, None])
    tl.store(dlatent + (row + r1)[:, None, None] + pair, dz, mask=inside)


class TritonGrid:
    """In float32; N tokens."""

    def forward(self, given: Given, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        """See `routed_grid.Kernel`."""
        n, width = given.latent.shape
        k = width - form.down
        y, p, g = (given.latent.new_empty(n, each) for each in (k // form.down, k, k))
        programs, sizes, numbers = _launch(given, form)
        with on(given.latent.device):
            _mix[(programs,)](given.latent, given.latent.stride(0), y, p, g, *numbers, **sizes)
        return y, p, g

    def backward(
        self, given: Given, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `routed_grid.Kernel`."""
        latent, slopes = given.latent, [None if each is None else each.contiguous() for each in (dy, dp, dg)]
        programs, sizes, numbers = _launch(given, form)
        out, partial = latent.new_empty(latent.shape), latent.new_empty(programs, 2)
        used = dict(zip(("DY", "DP", "DG"), [each is not None for each in slopes], strict=True))
        with on(latent.device):
            _slopes[(programs,)](
                latent, latent.stride(0), *(latent if each is None else each for each in slopes), out, partial,
                *numbers, **sizes, **used,
            )  # fmt: skip
        d_omega, d_nu = partial.sum(0).split(1)
        return out, d_omega, d_nu

    def works(self, device: torch.device) -> bool:
        """Whether this Triton and this device give what PyTorch gives: tried once, on few numbers."""
        generator = torch.Generator().manual_seed(0)
        latent, dy, s = (torch.randn(*shape, generator=generator).to(device) for shape in ((6, 12), (6, 3), (2, 9)))
        inputs = [latent, *torch.full((2,), 0.1, device=device).split(1)]
        form = Form(3, 2.0, 3.0, 4.0, Prior(s, None))
        try:
            found = [self.forward(Given(*inputs), form)[0], *self.backward(Given(*inputs), form, dy, None, None)]
        except Exception:  # whatever a compiler may raise
            return False
        with torch.enable_grad():
            latent, omega, nu = leaves = [each.clone().requires_grad_() for each in inputs]
            expected = grid(latent[:, :3], prior_gates(latent[:, None, 3:].softmax(-1), omega, nu, form))
            exact = [expected, *torch.autograd.grad(expected, leaves, dy)]
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, exact, strict=True))


def _launch(given: Given, form: Form) -> tuple[int, dict[str, int], tuple[Any, ...]]:
    """Returns how many programs there are, what each of them takes, and what both kernels are told."""
    n, width = given.latent.shape
    r1, r2 = form.down, width // form.down - 1
    I, J = triton.next_power_of_2(r1), triton.next_power_of_2(r2)
    T = max(1, min(64, ELEMENTS // (I * J)))
    s, documents = form.prior or (None, None)
    sizes = {"PRIOR": s is not None, "DOCUMENTS": documents is not None, "T": T, "I": I, "J": J}
    tensors = (given.latent if each is None else each for each in (s, documents))
    length = n if s is None else max(1, n // len(s))
    scales = form.token_scale, form.prior_scale, form.sharpness
    return triton.cdiv(n, T), sizes, (given.omega, given.nu, *tensors, length, n, r1, r2, *scales)
