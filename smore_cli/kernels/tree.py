"""The core of an S'MoRE tree as one C call a direction, where that is the same function: see `tree.c`.

The core is some 200 operations on a few numbers a token: PyTorch spends its time on making, filling and freeing
tensors that the next operation reads once. The kernel takes a few tokens at a time through all of it. On a GPU that is
`tree_triton.py`.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from smore_cli.kernels.compiled import library
from smore_cli.kernels.readable import together
from smore_cli.kernels.tree_shape import shape_of
from smore_cli.nn.context import current_context
from smore_cli.nn.threads import all_threads
from smore_cli.nn.tree_router import Choice, Picks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.kernels.tree_shape import Shape
    from smore_cli.nn.tree import Tree
    from smore_cli.nn.tree_recompute import Gradients, Kernel
    from smore_cli.nn.tree_router import LevelRouter

__all__ = ["TreeKernel", "find", "unwritten_picks"]

MOST_LEVELS = 8
MOST_NODES, MOST_EXPERTS = 64, 16
"""Larger trees go by PyTorch: the kernel works out every expert's place of every node."""
TOKENS_A_THREAD = 256
"""Fewer are not worth a second thread: to wake one takes a quarter of a millisecond, 300 tokens' time forward."""
ACTIVATIONS = ("identity", "tanh", "relu")

_Integers, _Pointers = ctypes.c_int32 * MOST_LEVELS, ctypes.c_void_p * MOST_LEVELS


class _Shape(ctypes.Structure):
    """`Shape` of tree.c."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("levels", "width", "latent", "act", "router_act", "dense")),
        *((name, _Integers) for name in "srfm"),
        ("d", ctypes.c_int32 * (MOST_LEVELS + 1)),
        *((name, _Integers) for name in ("pool", "at", "by_pool")),
        ("down_at", ctypes.c_int32),
        ("scale", ctypes.c_float * MOST_LEVELS),
    ]


class _Picks(ctypes.Structure):
    """`Picks` of tree.c."""

    _fields_ = [(name, _Pointers) for name in ("chosen", "alpha", "logits", "probabilities")]


_to_shape, _to_picks, _address, _long = ctypes.POINTER(_Shape), ctypes.POINTER(_Picks), ctypes.c_void_p, ctypes.c_int64
_FORWARD: list[Any] = [_to_shape, _address, _address, _long, _long, _address, _to_picks, ctypes.c_int]
_BACKWARD: list[Any] = [*_FORWARD[:-1], _to_picks, _address, _address, ctypes.c_int]
"""What the two functions of tree.c are given."""


def find(tree: Tree, latent: Tensor, parameters: Sequence[Tensor]) -> Kernel | None:
    """Returns the kernel for a tree's core, or None where PyTorch must do it: another device, dtype or form of tree.

    On a CPU it is `tree.c`, on a GPU `tree_triton.py`, if Triton is there and gives what PyTorch gives.

    Args:
        tree: any.
        latent: (N, R) what it would be given.
        parameters: of the names `Tree.core_names`, what it would compute with.
    """
    device = latent.device
    if latent.dtype != torch.float32 or not len(latent) or not together((latent, *parameters)):
        return None
    context = current_context()
    if context is not None and context.edit is not None:
        return None
    known = _KERNELS.setdefault(tree, {})
    if device not in known:
        known[device] = _MAKERS[device.type](tree, device) if device.type in _MAKERS and _has_form(tree) else None
    return known[device]


_KERNELS: WeakKeyDictionary[Tree, dict[torch.device, Kernel | None]] = WeakKeyDictionary()
_TRITON: dict[tuple[Shape, torch.device], Kernel | None] = {}
"""Compiled and tried once a shape: a model's trees have few."""


def _compiled(tree: Tree, _: torch.device) -> Kernel | None:
    compiled = library("tree")
    return None if compiled is None else TreeKernel(tree, compiled)


def _triton(tree: Tree, device: torch.device) -> Kernel | None:
    shape = shape_of(tree)
    if shape is None:
        return None
    try:
        from smore_cli.kernels.tree_triton import TritonTree
    except ImportError:
        return None
    if (shape, device) not in _TRITON:
        kernel = TritonTree(shape)
        _TRITON[shape, device] = kernel if kernel.works(tree, device) else None
    return _TRITON[shape, device]


_MAKERS = {"cpu": _compiled, "cuda": _triton}


def _has_form(tree: Tree) -> bool:
    """Whether tree.c has this form of tree."""
    router = tree.router
    return (
        router.gate in ("switch", "dense")
        and router.score == "dot"
        and tree.activation_position == "all"
        and tree.activation in ACTIVATIONS
        and router.activation in ACTIVATIONS
        and len(tree.num_experts) <= MOST_LEVELS
        and max(tree.num_experts) <= MOST_EXPERTS
        and math.prod(router.fanout) <= MOST_NODES
        and tree.core_names == names(tree)
    )


class TreeKernel:
    """The core of one tree, in float32; N tokens."""

    def __init__(self, tree: Tree, compiled: ctypes.CDLL) -> None:
        self._fanout, self._experts, self._shape = tree.router.fanout, tree.num_experts, _shape(tree)
        self._forward, self._backward = compiled.smore_tree_forward, compiled.smore_tree_backward
        self._forward.argtypes, self._backward.argtypes = _FORWARD, _BACKWARD
        self._width = tree.widths[-1]
        compiled.smore_tree_size.restype = ctypes.c_int64
        self._size = int(compiled.smore_tree_size(ctypes.byref(self._shape)))

    def forward(
        self, latent: Tensor, parameters: Sequence[Tensor], *, heard: bool = True
    ) -> tuple[Tensor, list[Picks]]:
        """Returns x_L, (N, d_L), and the picks, as `Tree.core` does, from latents (N, R).

        Args:
            latent: (N, R).
            parameters: of the names `Tree.core_names`.
            heard: whether anybody wants the picks; otherwise there are none.

        Raises:
            MemoryError: a thread's workspace does not fit, some hundred KiB.
        """
        n, shape = len(latent), self._shape
        latent = latent.detach() if latent.stride(1) == 1 else latent.detach().contiguous()
        state = latent.new_empty(n, self._width)
        picks = unwritten_picks(latent, self._fanout, self._experts) if heard else []
        found = _Picks()
        for l, each in enumerate(picks):
            found.chosen[l], found.alpha[l] = each.chosen.data_ptr(), each.alpha.data_ptr()
            found.logits[l], found.probabilities[l] = each.logits.data_ptr(), each.probabilities.data_ptr()
        parameters = _dense(parameters)
        failed = self._forward(
            shape, _addresses(parameters), latent.data_ptr(), latent.stride(0), n, state.data_ptr(),
            found if heard else None, _threads(n),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the kernel of a tree's core")
        return state, picks

    def backward(
        self, latent: Tensor, parameters: Sequence[Tensor], chosen: Sequence[Tensor], gradients: Gradients
    ) -> list[Tensor]:
        """Returns the gradients of the latent and of the parameters.

        Args:
            latent: (N, R) as in the forward pass.
            parameters: as in the forward pass.
            chosen: what was picked, of every level.
            gradients: of what `forward` returned.

        Raises:
            MemoryError: as in the forward pass.
        """
        n, shape = len(latent), self._shape
        latent = latent if latent.stride(1) == 1 else latent.contiguous()
        d_state = gradients.state
        d_state = latent.new_zeros(n, shape.d[shape.levels]) if d_state is None else d_state.contiguous()
        picked, slopes, alive = _Picks(), _Picks(), list[Tensor]()
        for l, (ids, given) in enumerate(zip(chosen, gradients.picks, strict=True)):
            picked.chosen[l] = ids.data_ptr()
            for name in ("alpha", "logits", "probabilities"):
                if (grad := given.get(name)) is not None:
                    alive.append(grad.contiguous())
                    getattr(slopes, name)[l] = alive[-1].data_ptr()
        threads = _threads(n)
        dense, found = _dense(parameters), latent.new_zeros(threads, self._size)
        d_latent = latent.new_empty(n, shape.latent)
        failed = self._backward(
            shape, _addresses(dense), latent.data_ptr(), latent.stride(0), n, d_state.data_ptr(), picked, slopes,
            d_latent.data_ptr(), found.data_ptr(), threads,
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the kernel of a tree's core")
        sizes = [parameter.numel() for parameter in parameters]
        each = found[0, : sum(sizes)].clone().split(sizes)  # a copy, so that the other threads' rows are freed
        grads = [grad.view(p.shape).to(p.dtype) for grad, p in zip(each, parameters, strict=True)]
        return [d_latent, *grads]


def unwritten_picks(latent: Tensor, fanout: Sequence[int], experts: Sequence[int]) -> list[Picks]:
    """Returns room for what the router of a tree picks, leaves first: each tensor (f or s, *fanouts above, N).

    Args:
        latent: (N, R), on whose device it is.
        fanout: f of every level.
        experts: s of every level.
    """
    n, picks = len(latent), list[Picks]()
    for l, (f, s) in enumerate(zip(fanout, experts, strict=True)):
        path = fanout[l + 1 :]
        chosen = torch.empty(f, *path, n, dtype=torch.int64, device=latent.device)
        alpha, logits, probabilities = (latent.new_empty(each, *path, n) for each in (f, s, s))
        picks.append(Picks(Choice(chosen), alpha, logits, probabilities))
    return picks


def _dense(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Returns them as the kernel reads them: float32, row by row."""
    float32 = torch.float32
    return [p if p.dtype is float32 and p.is_contiguous() else p.float().contiguous() for p in parameters]


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def names(tree: Tree) -> list[str]:
    """The parameters of a tree's core in the order of `point` in tree.c."""
    pools, levels = range(len(tree.B)), range(len(tree.num_experts))
    own = ("keys", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
    return [
        *(f"B.{l}" for l in pools),
        *(f"b.{l}" for l in pools),
        *(f"W.{l}" for l in levels[:-1]),
        *(f"w.{l}" for l in levels[:-1]),
        "router.down.bias",
        *(f"router.levels.{l}.{name}" for l in levels for name in own),
    ]


def _shape(tree: Tree) -> _Shape:
    router, levels = tree.router, len(tree.num_experts)
    shape = _Shape()
    shape.levels, shape.width = levels, router.down.out_features
    shape.act, shape.router_act = ACTIVATIONS.index(tree.activation), ACTIVATIONS.index(router.activation)
    shape.dense = router.gate == "dense"
    at, starts = 0, list[int]()
    for a in tree.a:
        starts.append(at)
        at += a.numel()
    shape.down_at, shape.latent = at, at + router.down.out_features
    for l in range(levels):
        pool = 0 if tree.shared_pool else l
        shape.s[l], shape.r[l], shape.f[l] = tree.num_experts[l], tree.rank[l], router.fanout[l]
        shape.m[l] = cast("LevelRouter", router.levels[l]).keys.shape[1]
        shape.pool[l], shape.at[l], shape.scale[l] = pool, starts[pool], tree.level_scale[l]
        single = router.gate_weights == "released" and router.fanout[l] == 1  # has its raw probability
        shape.by_pool[l] = shape.dense or single or router.gate_weights == "pool"
    for l, width in enumerate(tree.widths):
        shape.d[l] = width
    return shape


def _threads(tokens: int) -> int:
    return max(1, min(all_threads(), tokens // TOKENS_A_THREAD))
