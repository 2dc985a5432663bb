"""Softmax, prior and the grid of rank-one experts as one C call a direction: see `grid.c`."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from smore_cli.kernels.compiled import library
from smore_cli.kernels.readable import together

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.nn.routed_grid import Form, Given, Kernel

__all__ = ["CompiledGrid", "find"]

MOST_EXPERTS = 256
"""`PAIRS` of grid.c."""


class _Grid(ctypes.Structure):
    """`Grid` of grid.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "stride", "length")),
        *((name, ctypes.c_int32) for name in ("r1", "r2")),
        *((name, ctypes.c_float) for name in ("token_scale", "prior_scale", "sharpness")),
        *((name, ctypes.c_void_p) for name in ("latent", "omega", "nu", "prior", "document")),
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
    if not together((latent, *given)) or latent.stride(1) != 1:
        return None
    if not all(each.is_contiguous() and not each.requires_grad for each in given):
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
        self._forward.argtypes = [ctypes.POINTER(_Grid), *[ctypes.c_void_p] * 3]
        self._backward.argtypes = [ctypes.POINTER(_Grid), *[ctypes.c_void_p] * 5]

    def forward(self, given: Given, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        """See `routed_grid.Kernel`."""
        n, width = given.latent.shape
        k = width - form.down
        y, p, g = (given.latent.new_empty(n, each) for each in (k // form.down, k, k))
        self._forward(_grid(given, form), y.data_ptr(), p.data_ptr(), g.data_ptr())
        return y, p, g

    def backward(
        self, given: Given, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `routed_grid.Kernel`."""
        slopes = [None if each is None else each.contiguous() for each in (dy, dp, dg)]
        out, of_logits = torch.empty(given.latent.shape), torch.empty(2)
        found = [None if each is None else each.data_ptr() for each in slopes]
        self._backward(_grid(given, form), *found, out.data_ptr(), of_logits.data_ptr())
        return out, of_logits[:1], of_logits[1:]


def _grid(given: Given, form: Form) -> _Grid:
    n, width = given.latent.shape
    sequences, documents = form.prior or (None, None)
    return _Grid(
        n, given.latent.stride(0), n if sequences is None else n // len(sequences),
        form.down, width // form.down - 1, form.token_scale, form.prior_scale, form.sharpness,
        *(None if each is None else each.data_ptr() for each in (*given, sequences, documents)),
    )  # fmt: skip
