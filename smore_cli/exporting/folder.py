"""The folder an export is written to: it is there completely and checked, or not at all."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smore_cli.atomic import atomic_folder, nearest_folder, writing
from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["new_folder", "require_space"]


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


def require_space(folder: Path, needed: int) -> None:
    """Refuses what cannot fit on the disk.

    Args:
        folder: where it is written first, beside its name.
        needed: bytes.

    Raises:
        UsageError: with what it needs and what there is.
    """
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed > free:
        from smore_cli.training.disk import show_bytes  # slow to import, and needed for this line alone

        sizes = f"it needs {show_bytes(needed)}, {show_bytes(free)} are free"
        raise UsageError(f"the export would not fit on the disk of {folder.parent}: {sizes}", "make room there")
