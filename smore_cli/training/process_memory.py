"""What this process holds in memory now."""

from __future__ import annotations

import importlib
import resource
import sys
from pathlib import Path

__all__ = ["resident", "resident_with_libraries"]


def resident() -> int:
    """Returns the bytes of this process that lie in memory now."""
    status = Path("/proc/self/status")
    if sys.platform == "linux" and status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_with_libraries() -> int:
    """Returns the same once everything is imported that a first step imports."""
    importlib.import_module("torch._dynamo")  # torch's optimisers import it at their first call, some 140 MiB
    return resident()
