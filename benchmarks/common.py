"""What the benchmarks share: variants that take turns, counted bytes and operations, one table.

Two runs on a busy machine cannot be compared, so no benchmark compares seconds of one run with those of another: the
variants take turns, every turn gives a ratio to the reference variant of the same turn, and the median of those counts.
Bytes and operations are counted, not timed: they are the same in every run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
import weakref
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]


# Arguments and results.


def arguments(doc: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Returns a parser with what every benchmark can be told."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each variant")
    parser.add_argument("--json", metavar="FILE", help="write the rows here as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the backbone and of what flows in it")
    return parser


def report(title: str, rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Prints rows as a table, one column a key, and writes them to `--json`."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in machine(args.device).items()), highlight=False)
    if args.json:
        found = {"title": title, "command": sys.argv, "machine": machine(args.device), "rows": list(rows)}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def machine(device: str) -> dict[str, str]:
    """Returns what the figures depend on."""
    on_gpu = torch.device(device).type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return {"device": name, "threads": str(torch.get_num_threads()), "torch": torch.__version__}


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# Time.


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Returns the seconds of every variant in every turn.

    Args:
        runs: the variants, each called once before anything counts.
        repeats: turns; every other turn goes through the variants backwards, so that none always follows another.
        device: where they run; a CUDA device is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, repeats):
        for name in list(runs) if turn % 2 else list(reversed(runs)):
            synchronise(device)
            started = time.perf_counter()
            runs[name]()
            synchronise(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, float]:
    """Returns for every variant the median over the turns of its time through the reference's in the same turn."""
    base = seconds[reference]
    return {name: median(a / b for a, b in zip(own, base, strict=True)) for name, own in seconds.items()}


def synchronise(device: str) -> None:
    """Waits for a CUDA device; a CPU is always done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# Bytes and operations.


class Meter(TorchDispatchMode):
    """Counts the operations that run, forward and backward, and the bytes that they make and drop.

    Attributes:
        operations: how many that compute or write something; views and bare allocations are none.
        syncs: how many make the host wait for a CUDA device, because it asks for a value.
        live: bytes alive that were made since this began.
        peak: the most of them that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks at what came out."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in _NOTHING):
            self.operations += 1
        self.syncs += name in _ASKS
        for result in pytree.tree_leaves(out):
            if isinstance(result, Tensor) and not func.is_view:
                self._count(result, own=not _among(result, args, kwargs))
        return out

    def _count(self, tensor: Tensor, *, own: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes() if own else 0
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


_NOTHING = {"_unsafe_view", "detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "alias"}
_NOTHING |= {"new_empty_strided"}
_ASKS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_consecutive"}


def _among(tensor: Tensor, args: Any, kwargs: Any) -> bool:
    """Whether an operation wrote to one of its arguments and gave it back."""
    given = (leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    return any(leaf.untyped_storage()._cdata == tensor.untyped_storage()._cdata for leaf in given)


def saved_bytes(forward: Callable[[], object], given: Iterable[Tensor]) -> int:
    """Returns the bytes that a forward pass keeps for its backward pass, every storage once.

    Args:
        forward: the pass.
        given: tensors that are there anyway (inputs, weights), which are not counted.
    """
    free = {tensor.untyped_storage()._cdata for tensor in given}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in free:
            kept[storage._cdata] = storage  # holds it, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Returns the most bytes that a run has alive at a time, of those it makes itself."""
    if torch.device(device).type != "cuda":
        with Meter() as meter:
            run()
        return meter.peak
    run()  # libraries make their workspaces in the first
    synchronise(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def host_syncs(run: Callable[[], object], device: str) -> int:
    """Returns how often a run makes the host wait for the device; on a CPU, how often it would."""
    if torch.device(device).type != "cuda":
        with Meter() as meter:
            run()
        return meter.syncs
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


def launches(run: Callable[[], object], device: str) -> int:
    """Returns how many kernels a run launches; on a CPU, how many operations it is made of."""
    if torch.device(device).type != "cuda":
        with Meter() as meter:
            run()
        return meter.operations
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        synchronise(device)
    return sum(event.count for event in found.key_averages() if str(event.device_type).endswith("CUDA"))


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    """Returns the context in which adapters are usually trained beside a backbone of that dtype."""
    return torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "float32")


def trainable(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yields the parameters that train."""
    return (p for p in module.parameters() if p.requires_grad)
