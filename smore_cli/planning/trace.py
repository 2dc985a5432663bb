"""Counting memory without having it: the real code runs on tensors that have shapes and no contents.

Every operation, forward and backward, passes through `Tracker`, which sees each storage come and go; so the sum of what
is alive, its peak and what a layer leaves behind for the backward pass are counted, not estimated, for any method and
any backbone. Small integer tensors (token ids, masks, positions) do keep their contents, because models ask them
questions ("is anything padded?") on which the shapes depend.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["Segment", "Tracker"]

_KNOWN_NUMBERS = 1 << 24
"""Integer tensors up to this size keep their contents."""


@dataclass
class Segment:
    """A stretch of a pass, between two calls of `Tracker.mark`; all in bytes.

    Attributes:
        label: what runs in it.
        start: alive when it began.
        peak: most alive within it.
        end: alive when it ended.
    """

    label: tuple[str, int]
    start: int
    peak: int
    end: int

    @property
    def change(self) -> int:
        """What it leaves alive, or frees where negative."""
        return self.end - self.start

    @property
    def rise(self) -> int:
        """How far it rises above where it began."""
        return self.peak - self.start


class Tracker(TorchDispatchMode):
    """Sums the storages that operations make and drop.

    Args:
        fake: the mode that the shape-only tensors belong to.
        given: tensors that are there before and after, which are not counted.

    Attributes:
        live: bytes alive.
        segments: finished and current stretches, in order.
    """

    def __init__(self, fake: FakeTensorMode, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.fake = fake
        self.live = 0
        self.segments = [Segment(("start", 0), 0, 0, 0)]
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self._known: dict[int, Tensor] = {}

    def mark(self, name: str, index: int = 0) -> None:
        """Begins a new segment."""
        self.segments[-1].end = self.live
        self.segments.append(Segment((name, index), self.live, self.live, self.live))

    def know(self, value: Tensor) -> Tensor:
        """Returns a shape-only tensor whose contents are remembered, counted as alive."""
        with self.fake:
            shape_only = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        self._count(shape_only)
        self._remember(shape_only, value)
        return shape_only

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation on shapes, and on contents where all of its inputs have some."""
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = self._on_contents(func, given, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and known is not None:
            return known
        if func is torch.ops.aten.nonzero.default and known is not None:
            return self.know(known)
        out = func(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        for result in results:
            self._count(result)
        if known is not None:
            values = [leaf for leaf in pytree.tree_leaves(known) if isinstance(leaf, Tensor)]
            for result, value in zip(results, values, strict=True):
                self._remember(result, value)
        elif func._schema.is_mutable:  # what was known of a tensor that is written to is known no more
            for tensor in given:
                self._known.pop(id(tensor), None)
        return out

    def _on_contents(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Returns what the operation gives on remembered contents, or None where something is not remembered."""
        if given:
            if any(id(tensor) not in self._known for tensor in given):
                return None
        elif func not in _MAKERS or kwargs.get("dtype") not in _WHOLE:
            return None
        swapped = pytree.tree_map(
            lambda leaf: self._known[id(leaf)] if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        with _disable_current_modes():
            return func(*swapped[0], **{**swapped[1], **({"device": "cpu"} if "device" in swapped[1] else {})})

    def _remember(self, tensor: Tensor, value: Tensor) -> None:
        if value.dtype not in _WHOLE or value.numel() > _KNOWN_NUMBERS:
            self._known.pop(id(tensor), None)
            return
        if id(tensor) not in self._known:
            weakref.finalize(tensor, self._known.pop, id(tensor), None)
        self._known[id(tensor)] = value

    def _count(self, tensor: Tensor) -> None:
        """Notes a storage that is new, and when it goes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self.live += size
        current = self.segments[-1]
        current.peak = max(current.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


_WHOLE = (torch.bool, torch.int32, torch.int64)
_MAKERS = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)
