"""Layers that a merge has solved, kept beside its output until that is there, so that a killed merge goes on.

    .OUT.work-KEY/layer-N.safetensors        KEY: a hash of adapter, backbone, text and settings

A file is there whole or not at all. What another merge into the same OUT left behind is removed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from smore_cli.atomic import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

__all__ = ["Work", "fingerprint", "key_of"]

_BETWEEN = "|"
SAMPLED = 64
"""Numbers of a tensor that a fingerprint has, about."""


def key_of(adapter: Path, *parts: Any) -> str:
    """Returns a hash of an adapter's files and of JSON values."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of some numbers of every tensor: another backbone of the same name has another one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)]
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Work:
    """The solved layers of one merge.

    Attributes:
        folder: where they are; made when the first is written.
    """

    folder: Path

    @staticmethod
    def open(out: Path, key: str) -> Work:
        """Returns the work on `out` under a key; what has another key is removed."""
        folder = out.with_name(f".{out.name}.work-{key}")
        for other in out.parent.glob(f".{out.name}.work-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        return Work(folder)

    def read(self, layer: int) -> dict[str, dict[str, Tensor]] | None:
        """Returns the tensors of a layer's maps by path, or None where it is still to be solved."""
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
        except SafetensorError:
            return None
        maps: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            path, _, what = name.partition(_BETWEEN)
            maps.setdefault(path, {})[what] = tensor
        return maps

    def write(self, layer: int, maps: dict[str, dict[str, Tensor]]) -> None:
        """Keeps the tensors of a layer's maps."""
        tensors = {f"{path}{_BETWEEN}{what}": t for path, kept in maps.items() for what, t in kept.items()}
        write_bytes(self._file(layer), save(tensors))

    def remove(self) -> None:
        """Forgets everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"
