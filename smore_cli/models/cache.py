"""The user's cache folder, and things in it that are made once however many processes ask at the same time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["built_once", "cache_folder"]


def cache_folder() -> Path:
    """Returns `$SMORE_CACHE`, else `smore` in `$XDG_CACHE_HOME` or `~/.cache`; it need not exist."""
    if own := os.environ.get("SMORE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "smore"
    return Path.home() / ".cache" / "smore"


def built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Returns `folder`, filled by `build` if it is not there.

    Processes that ask while another one builds wait for it. The lock is freed by the system when its holder dies, and
    the folder appears whole or not at all, so a killed build is simply done again.

    Args:
        folder: the result, a name of its own for each content.
        build: fills the empty folder that it is given.
    """
    from filelock import FileLock

    from smore_cli.atomic import atomic_folder

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        # On a network disk whose locks do not work two may build; the first rename wins and both results are equal.
        if not folder.is_dir():
            with suppress(FileExistsError), atomic_folder(folder) as temporary:
                build(temporary)
    return folder
