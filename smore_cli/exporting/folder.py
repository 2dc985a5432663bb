"""The folder an export is written to: it is there completely, checked and with its hashes, or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smore_cli.atomic import atomic_folder, nearest_folder, writing
from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["MANIFEST", "new_folder", "require_space", "write_manifest"]

MANIFEST = "manifest.json"
_CHUNK = 1 << 22


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `out` when the block ends, and vanishes when it fails.

    Raises:
        UsageError: `out` exists.
        SmoreError: the disk is full or cannot be written.
    """
    if out.exists():
        raise UsageError(f"{out} already exists", "name a new folder; an export replaces nothing")
    try:
        with writing(out), atomic_folder(out) as folder:
            yield folder
    except FileExistsError as error:
        raise UsageError(f"{out} already exists", "it appeared while the export was running") from error


def require_space(out: Path, needed: int) -> None:
    """Refuses what cannot fit on the disk.

    Args:
        out: where it will be.
        needed: bytes.

    Raises:
        UsageError: with what it needs and what there is.
    """
    free = shutil.disk_usage(nearest_folder(out)).free
    if needed > free:
        from smore_cli.training.disk import show_bytes  # slow to import, and needed for this line alone

        problem = f"{out} would not fit on its disk: it needs {show_bytes(needed)}, {show_bytes(free)} are free"
        raise UsageError(problem, "make room, or name a folder on another disk")


def write_manifest(folder: Path) -> None:
    """Writes manifest.json: size and SHA-256 of every file in the folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    values = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps({"files": values}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
