"""Files and folders that are there completely or not at all.

Everything is written to a temporary sibling, flushed to the disk and renamed over its real name, so that a crash, a
full disk or a SIGKILL at any moment leaves the old state or the new one. A temporary's name holds the process that owns
it, `.NAME.tmp-PID-HOST-RANDOM`, so what a killed process left behind is known for what it is and removed by the next
write.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from smore_cli.errors import SmoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["atomic_files", "atomic_folder", "nearest_folder", "remove_stale", "write_bytes", "write_text", "writing"]

_TEMPORARY = re.compile(r"^\..+\.tmp-(?P<pid>\d+)-(?P<host>.+)-[0-9a-f]{8}$")


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` as UTF-8 to `path`, replacing what is there; parents are made."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, replacing what is there; parents are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    temporary = _temporary_sibling(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends, and vanishes when it fails.

    Files come out with the modes of the user's umask, whatever the library that wrote them chose (safetensors and
    transformers write 0600 in places, which breaks folders shared by a group).

    Args:
        path: must not exist, unless as an empty folder; its parents are made.

    Raises:
        FileExistsError: `path` is there already, before the block or when it ends (another process was faster).
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} already exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    temporary = _temporary_sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        _finish(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not path.exists():
                raise
            raise FileExistsError(f"{path} already exists") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder whose files move into `folder` when the block ends, and vanish when it fails.

    They take the places of files of the same names, one after the other; what else `folder` holds stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_stale(folder)
    temporary = _temporary_sibling(folder / "files")
    temporary.mkdir()
    try:
        yield temporary
        _finish(temporary)
        for path in sorted(file for file in temporary.rglob("*") if not file.is_dir()):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(folder)


@contextmanager
def writing(path: str | Path, error: type[SmoreError] = SmoreError) -> Iterator[None]:
    """Turns what the system says about a failed write into one line and what to do.

    Args:
        path: what is being written, for the line.
        error: what to raise.

    Raises:
        SmoreError: the disk is full, the folder is read-only, the device fails, ...
    """
    try:
        yield
    except Exception as error_found:
        failure = _os_error(error_found)
        if failure is None:
            raise
        free = shutil.disk_usage(nearest_folder(path)).free
        reason = failure.strerror or str(failure) or type(failure).__name__
        hint = {
            errno.ENOSPC: f"make room ({free / 2**20:,.0f} MiB are free)",
            errno.EDQUOT: "make room: the quota is used up",
            errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
        }.get(failure.errno or 0, "see that the folder can be written")
        raise error(f"{path} could not be written: {reason}", hint) from error_found


def _os_error(found: Exception) -> OSError | None:
    """Returns what the system said; libraries in Rust (tokenizers, safetensors) say it in an error of their own."""
    if isinstance(found, OSError):
        return found
    number = re.search(r"\(os error (\d+)\)", str(found))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def nearest_folder(path: str | Path) -> Path:
    """Returns `path`, or the nearest of its parents that exists."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return path


def remove_stale(folder: Path) -> None:
    """Removes temporaries in `folder` whose process, on this machine, is dead."""
    with os.scandir(folder) as entries:
        stale = [Path(entry.path) for entry in entries if _is_stale(entry.name)]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another process may be removing it too
        else:
            path.unlink(missing_ok=True)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{socket.gethostname()}-{secrets.token_hex(4)}")


def _is_stale(name: str) -> bool:
    """Whether `name` is a temporary of a dead process; on a shared disk, other machines' processes cannot be judged."""
    match = _TEMPORARY.match(name)
    if match is None or match["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, but another user's
        return False
    return False


def _finish(folder: Path) -> None:
    """Gives every file and folder below `folder` the umask's mode and flushes it to the disk."""
    mode = folder.stat().st_mode & 0o777  # fresh from mkdir: 0777 less the umask, without touching the process's umask
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                file.chmod(mode & 0o666)
                _sync(file)
        if Path(parent) != folder:
            Path(parent).chmod(mode)
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
