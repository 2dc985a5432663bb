"""Tensors written to safetensors as they come, in files of a few gigabytes: one file's worth is in memory at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

__all__ = ["write_shards"]

SHARD_BYTES = 4_000_000_000
_METADATA = {"format": "pt"}


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes a model's tensors as transformers reads them, with an index where there is more than one file.

    Args:
        tensors: by name, each made when it is asked for.
        folder: where to.
        shard_bytes: what a file holds at most, unless one tensor alone is larger.

    Returns:
        Bytes of all tensors.
    """
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / _part(len(files)), metadata=_METADATA)
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        each = tensor.numel() * tensor.element_size()
        if held and size + each > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.detach().cpu().contiguous()
        size, total = size + each, total + each
    flush()
    _name(files, folder, total)
    return total


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _name(files: list[list[str]], folder: Path, total: int) -> None:
    """Gives the parts the names they are known by: how many there are is known only now."""
    if len(files) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(number)).rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
