"""What this process holds in memory now, and what its allocator keeps of what was freed."""

from __future__ import annotations

import ctypes
import importlib
import resource
import sys
import warnings
from pathlib import Path

from smore_cli.models.quiet import quiet

__all__ = ["give_back_large_blocks", "resident", "resident_with_libraries"]

LARGE = 1 << 20
"""Bytes of a block that glibc maps by itself where `give_back_large_blocks` was called."""
KEPT = 64 << 20
"""Bytes that glibc keeps at the top of its heap: twice its largest threshold for blocks of their own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def resident() -> int:
    """Returns the bytes of this process that lie in memory now."""
    status = Path("/proc/self/status")
    if sys.platform == "linux" and status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_with_libraries(*, quantised: bool = False) -> int:
    """Returns the same once everything is imported that a first step imports."""
    importlib.import_module("torch._dynamo")  # torch's optimisers import it at their first call, some 140 MiB
    if quantised:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it has given up
            importlib.import_module("bitsandbytes")
            importlib.import_module("torch._inductor.compile_fx")  # imported by its first kernel, some 50 MiB
    return resident()


def give_back_large_blocks() -> None:
    """Lets glibc return a large block to the system when it is freed.

    Of a quantised backbone on a CPU every map makes its dense weight anew at every use. In the heap, where glibc puts
    blocks of that size after a while, what is kept of a pass comes to lie between them: 300 MiB of holes in a step of
    the bundled model, of 1,390 in all.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)
