"""A merged model as an ordinary folder: space looked at first, shards, tokenizer, card, and a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from smore_cli import __version__
from smore_cli.atomic import nearest_folder, write_text
from smore_cli.errors import UsageError
from smore_cli.models.quiet import quiet
from smore_cli.models.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MANIFEST", "reopen", "require_room", "write_manifest", "write_model"]

MANIFEST = "manifest.json"
TEXT = 64 << 20
"""Bytes set aside for tokenizer, card and file system."""


def require_room(folder: Path, needed: int) -> None:
    """Refuses what would not fit on the disk.

    Args:
        folder: that will be made.
        needed: bytes of what will be there, at its most; some for texts and the file system are added.

    Raises:
        UsageError: with what it needs and what there is.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed + TEXT > free:
        sizes = f"it needs {(needed + TEXT) / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise UsageError(
            f"this would not fit on the disk of {folder.parent}: {sizes}", "make room, or name another disk"
        )


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype, shard_size: str
) -> None:
    """Writes weights, configs, tokenizer and chat template; the model is converted to `dtype` in place."""
    model.to(dtype)  # type: ignore[arg-type]
    model.config.dtype = dtype
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard_size)
        save_tokenizer(tokenizer, folder)


def reopen(folder: Path, device: torch.device) -> PreTrainedModel:
    """Loads the folder as anyone would, with nothing of ours."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", device_map={"": device}
        )
    return model


def write_manifest(folder: Path) -> None:
    """Writes the sha256 and size of every file beside it, and which tensors each holds."""
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"sha256": _hash(file), "bytes": file.stat().st_size}
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                files[file.name]["tensors"] = sorted(opened.keys())
    values = {"smore_version": __version__, "files": files}
    write_text(folder / MANIFEST, json.dumps(values, indent=1, sort_keys=True) + "\n")


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
