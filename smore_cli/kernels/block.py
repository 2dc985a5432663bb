"""Softmax, picks, gates and core of a flat method as one C call a direction: see `block.c`."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from smore_cli.kernels.compiled import library
from smore_cli.kernels.readable import plain
from smore_cli.nn.entropy import EntropyHybrid
from smore_cli.nn.routed_block import Kept, route
from smore_cli.nn.selection import All, TopK, TopP

if TYPE_CHECKING:
    from smore_cli.nn.routed_block import Form, Kernel
    from smore_cli.nn.selection import Selector

__all__ = ["ALL", "BY_MASS", "GIVEN", "BlockKernel", "Picks", "find", "picks_of"]

MOST_EXPERTS = 64
"""`EXPERTS` of block.c. More go by PyTorch, whose sort does not grow with their square."""


class _Block(ctypes.Structure):
    """`Block` of block.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "stride")),
        *((name, ctypes.c_int32) for name in ("s", "r", "fan", "renormalise")),
        *((name, ctypes.c_int32) for name in ("picks", "least", "crossing", "hybrid")),
        *((name, ctypes.c_float) for name in ("mass", "q", "eps", "largest", "threshold")),
        *((name, ctypes.c_void_p) for name in ("latent", "p", "g", "picked")),
    ]


class Picks(NamedTuple):
    """Which experts are picked.

    Attributes:
        picks: k of the most probable, or one of the constants below.
        least: by mass, at least so many.
        crossing: by mass, whether with the one that crosses it.
        hybrid: whether all are where the entropy is high.
        mass: that the picked make up.
        q: order of the entropy, Tsallis's.
        eps: added to every probability in it.
        largest: it is divided by.
        threshold: above which it is high.
    """

    picks: int
    least: int = 0
    crossing: bool = False
    hybrid: bool = False
    mass: float = 0.0
    q: float = 0.0
    eps: float = 0.0
    largest: float = 1.0
    threshold: float = 0.0


ALL, GIVEN, BY_MASS = Picks(0), Picks(-1), -2
"""Every expert; those that PyTorch has picked; `Picks.picks` of those that make up a mass."""


def find(latent: Tensor, form: Form) -> Kernel | None:
    """Returns the kernel for latents, or None where PyTorch must do it: another device or dtype, too many experts.

    On a CPU it is `block.c`, on a GPU that of `block_triton.py`, if Triton is there and gives what PyTorch gives.

    Args:
        latent: (N, rows + s).
        form: what is computed of them.
    """
    if latent.dtype != torch.float32 or not len(latent) or not plain(latent) or form.experts > MOST_EXPERTS:
        return None
    if latent.device.type == "cpu":
        return _compiled()
    return _triton(latent.device) if latent.device.type == "cuda" else None


@functools.cache
def _compiled() -> BlockKernel | None:
    compiled = library("block")
    return None if compiled is None else BlockKernel(compiled)


@functools.cache
def _triton(device: torch.device) -> Kernel | None:
    try:
        from smore_cli.kernels.block_triton import TritonBlock
    except ImportError:
        return None
    kernel = TritonBlock()
    return kernel if kernel.works(device) else None


class BlockKernel:
    """In float32; N tokens."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._forward, self._backward = compiled.smore_block_forward, compiled.smore_block_backward
        self._forward.argtypes = [ctypes.POINTER(_Block), ctypes.c_void_p]
        self._backward.argtypes = [ctypes.POINTER(_Block), *[ctypes.c_void_p] * 4]

    def forward(self, latent: Tensor, form: Form) -> tuple[Tensor, Kept]:
        """Does what `routed_block.forward` does."""
        latent = latent if latent.stride(1) == 1 else latent.contiguous()
        n, s, picks = len(latent), form.experts, picks_of(form.select, form.experts)
        if picks is None:
            p, picked = route(latent, form)
            p, picked = p.contiguous(), None if picked is None else picked.contiguous()
            picks = ALL if picked is None else GIVEN
        else:
            p = latent.new_empty(n, s)
            picked = None if picks == ALL else torch.empty(n, s, dtype=torch.bool)
        g = None if picked is None else torch.empty_like(p)
        kept = Kept(latent, p, g, picked, None)
        mixed = latent.new_empty(n, s * form.rank)
        self._forward(_block(kept, form, picks), mixed.data_ptr())
        return mixed, kept

    def backward(self, kept: Kept, form: Form, dy: Tensor | None, dp: Tensor | None, dg: Tensor | None) -> Tensor:
        """Does what `routed_block.backward` does."""
        given = [None if each is None else each.contiguous() for each in (dy, dp, dg)]
        out = torch.empty(kept.latent.shape)
        block = _block(kept, form, ALL if kept.picked is None else GIVEN)
        self._backward(block, *(None if each is None else each.data_ptr() for each in given), out.data_ptr())
        return out


@functools.lru_cache(maxsize=64)
def picks_of(select: Selector, s: int) -> Picks | None:
    """Returns what a kernel is told of a selection of s experts, or None where it cannot make it."""
    if isinstance(select, All):
        return ALL
    if isinstance(select, TopK):
        return Picks(select.k)
    if isinstance(select, TopP):
        return Picks(BY_MASS, select.min_k, select.crossing, mass=select.p)
    if not isinstance(select, EntropyHybrid):
        return None
    sparse, entropy = picks_of(select.sparse, s), select.entropy
    if sparse is None or s == 1 or not select.may_be_unsure(s):
        return sparse
    if entropy.kind != "tsallis":
        return None
    largest = entropy.largest(s) if entropy.normalised else 1.0
    return sparse._replace(hybrid=True, q=entropy.q, eps=entropy.eps, largest=largest, threshold=select.threshold)


def _block(kept: Kept, form: Form, picks: Picks) -> _Block:
    latent = kept.latent
    return _Block(
        len(latent), latent.stride(0), form.experts, form.rank, form.fan, form.select.renormalise, *picks,
        *(None if each is None else each.data_ptr() for each in (latent, kept.p, kept.g, kept.picked)),
    )  # fmt: skip
