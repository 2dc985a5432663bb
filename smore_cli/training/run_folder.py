"""What a run leaves behind, beside its adapter and checkpoints.

    recipe.yaml     the recipe as it was given          metrics.jsonl   one line of numbers every few steps
    resolved.yaml   the same with every default         README.md       the model card, from measured numbers
    run.json        versions, seeds, hashes, hardware, parameter counts, times, memory, results

All of it is plain text; nothing here is needed to load the adapter.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import sys
import tempfile
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from smore_cli import __version__
from smore_cli.atomic import nearest_folder, remove_stale, write_text
from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "MetricsLog",
    "environment",
    "peak_memory",
    "read_run_json",
    "require_new",
    "require_writable",
    "write_run_json",
]

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors")


def require_new(run_dir: Path) -> None:
    """Refuses a folder that already holds a run or anything else.

    Raises:
        UsageError: there is something; the hint says how to go on.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"output_dir {run_dir} is a file", "choose another with --output-dir")
    if (run_dir / "run.json").exists():
        raise UsageError(f"{run_dir} already holds a run", "continue it with --resume, or choose another --output-dir")
    if run_dir.exists():
        remove_stale(run_dir)  # of a start that was killed before it had written anything
    if run_dir.exists() and any(run_dir.iterdir()):
        raise UsageError(f"output_dir {run_dir} is not empty", "choose another with --output-dir")
    require_writable(run_dir)


def require_writable(run_dir: Path) -> None:
    """Refuses a folder in which no file can be made, by making one and removing it again.

    Permissions alone do not say it: they mean little to root, on a read-only disk or on a network's.

    Raises:
        UsageError: with what the system says.
    """
    parent = nearest_folder(run_dir)
    if not parent.is_dir():
        raise UsageError(f"output_dir {run_dir} cannot be made: {parent} is a file", "choose another with --output-dir")
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"smore")
    except OSError as error:
        raise UsageError(
            f"output_dir {run_dir} cannot be written: {error.strerror} in {parent}", "choose another with --output-dir"
        ) from error


def read_run_json(run_dir: Path) -> dict[str, Any]:
    """Returns what a run wrote into its run.json."""
    values: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return values


def write_run_json(run_dir: Path, values: dict[str, Any]) -> None:
    """Replaces run.json atomically."""
    write_text(run_dir / "run.json", json.dumps(values, indent=1, sort_keys=True) + "\n")


class MetricsLog:
    """metrics.jsonl: one JSON object a line, on the disk as soon as it is written.

    Attributes:
        path: the file.
        pending: lines that could not be written yet, because the disk is full; they are written with the next.
    """

    def __init__(self, path: Path, resume_from: int | None = None) -> None:
        """Opens the file; when resuming, drops the lines of steps that will be run again."""
        self.path = path
        self.pending: list[str] = []
        lines = path.read_text().splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError):  # the last line of a killed process may be cut in two
                continue
            if resume_from is not None and step <= resume_from:
                kept.append(line + "\n")
        write_text(path, "".join(kept))

    def add(self, values: dict[str, Any]) -> str | None:
        """Appends a line; returns what the system says where it could not, in which case the line is kept for later."""
        self.pending.append(json.dumps(values) + "\n")
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab", buffering=0) as file:
                data = "".join(self.pending).encode()
                while data:  # a disk that is nearly full takes a part of it before it says no
                    data = data[file.write(data) :]
        except OSError as error:
            if self.path.exists() and self.path.stat().st_size > size:
                os.truncate(self.path, size)
            return error.strerror
        self.pending = []
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Returns versions and hardware."""
    return {
        "smore": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "command": sys.argv[1:],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Returns the peak memory of this process in bytes: resident, and on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
