"""Softmax, prior and the grid of rank-one experts as one C call a direction: see `grid.c`."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.kernels.compiled import library
from smore_cli.kernels.readable import plain, pointer
from smore_cli.nn.routed_grid import Kept

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.routed_grid import Form, Kernel

__all__ = ["CompiledGrid", "find"]

MOST_EXPERTS = 256
"""`PAIRS` of grid.c."""


class _Grid(ctypes.Structure):
    """`Grid` of grid.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "stride", "length")),
        *((name, ctypes.c_int32) for name in ("r1", "r2")),
        *((name, ctypes.c_float) for name in ("token_scale", "prior_scale", "sharpness")),
        *((name, ctypes.c_void_p) for name in ("latent", "p", "omega", "nu", "prior", "document")),
    ]


def find(latent: Tensor, form: Form) -> Kernel | None:
    """Returns the kernel for latents, or None where PyTorch must do it.

    That is: another dtype, too many experts, a prior that wants a gradient. On a CPU it is `grid.c`, on a GPU that of
    `grid_triton.py`, if Triton is there and gives what PyTorch gives.

    Args:
        latent: (N, r1 + K).
        form: what is computed.
    """
    if latent.dtype != torch.float32 or not len(latent) or latent.shape[1] - form.down > MOST_EXPERTS:
        return None
    given = [each for each in form.prior or () if each is not None]
    if not all(map(plain, (latent, *given))) or latent.stride(1) != 1:
        return None
    if not all(each.is_contiguous() and not each.requires_grad and each.device == latent.device for each in given):
        return None
    if latent.device.type == "cpu":
        return _compiled()
    return _triton(latent.device) if latent.device.type == "cuda" else None


@functools.cache
def _compiled() -> CompiledGrid | None:
    compiled = library("grid")
    return None if compiled is None else CompiledGrid(compiled)


@functools.cache
def _triton(device: torch.device) -> Kernel | None:
    try:
        from smore_cli.kernels.grid_triton import TritonGrid
    except ImportError:
        return None
    kernel = TritonGrid()
    return kernel if kernel.works(device) else None


class CompiledGrid:
    """In float32; N tokens."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._forward, self._backward = compiled.smore_grid_forward, compiled.smore_grid_backward

    def forward(self, latent: Tensor, omega: Tensor, nu: Tensor, form: Form) -> tuple[Tensor, Tensor, Kept]:
        """See `routed_grid.Kernel`."""
        n, k = len(latent), latent.shape[1] - form.down
        p, g, mixed = (latent.new_empty(n, width) for width in (k, k, k // form.down))
        kept = Kept(latent, p, omega, nu)
        self._forward(_grid(kept, form), pointer(g), pointer(mixed))
        return mixed, g, kept

    def backward(
        self, kept: Kept, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `routed_grid.Kernel`."""
        given = [None if each is None else each.contiguous() for each in (dy, dp, dg)]
        out, slopes = torch.empty(kept.latent.shape), torch.empty(2)
        found = [None if each is None else pointer(each) for each in given]
        self._backward(_grid(kept, form), *found, pointer(out), pointer(slopes))
        return out, slopes[:1], slopes[1:]


def _grid(kept: Kept, form: Form) -> Any:
    (n, k), down = kept.p.shape, form.down
    sequences, documents = form.prior or (None, None)
    length = n if sequences is None else n // len(sequences)
    return ctypes.byref(
        _Grid(
            n, kept.latent.stride(0), length, down, k // down, form.token_scale, form.prior_scale, form.sharpness,
            *(None if each is None else each.data_ptr() for each in (*kept, sequences, documents)),
        )
    )  # fmt: skip
