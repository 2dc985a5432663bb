"""The folder an export is written to: it is there completely and checked, or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from smore_cli.atomic import atomic_folder, writing
from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["new_folder"]


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
