"""Atomic writes, with real processes that are really killed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from smore_cli.atomic import atomic_files, atomic_folder, remove_stale, write_bytes, write_text, writing
from smore_cli.errors import SmoreError


def _leave_behind(script: str, folder: Path) -> None:
    """Runs `script` in a process that kills itself with SIGKILL in the middle of a write."""
    code = "import os, signal, sys\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n" + textwrap.dedent(script)
    process = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert process.returncode == -signal.SIGKILL


_KILLED_IN_FOLDER = """
    from smore_cli.atomic import atomic_folder
    with atomic_folder(folder / "out") as temporary:
        (temporary / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)
"""
_KILLED_IN_FILE = """
    import smore_cli.atomic as atomic
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    atomic.write_text(folder / "file", "new")
"""


def test_write_replaces_the_content_and_makes_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    write_text(path, "héllo")
    write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()  # a folder cannot be replaced by a file, so the rename itself fails
    with pytest.raises(OSError, match="file"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.is_dir()


def test_a_killed_write_keeps_the_old_file_and_the_next_write_cleans_up(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    _leave_behind(_KILLED_IN_FILE, tmp_path)
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_text(tmp_path / "other", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other"]


def test_folder_appears_whole_with_its_subfolders(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "out"
    with atomic_folder(target) as temporary:
        assert temporary.parent == target.parent
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_folder_vanishes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
        raise ValueError("inside")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_folder_write_is_not_seen_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    _leave_behind(_KILLED_IN_FOLDER, tmp_path)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="out already exists"), atomic_folder(tmp_path / "out"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_the_slower_of_two_writers_is_told_and_the_faster_one_wins(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out") as slow:
        (slow / "who").write_text("slow")
        with atomic_folder(tmp_path / "out") as fast:
            (fast / "who").write_text("fast")
    assert (tmp_path / "out" / "who").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_modes_follow_the_umask_even_when_a_library_wrote_private_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "private").touch(mode=0o600)
            (temporary / "sub").mkdir(mode=0o700)
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {"file": 0o640, "out": 0o750, "private": 0o640, "sub": 0o750}


def test_only_temporaries_of_dead_local_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    mine = tmp_path / f".a.tmp-{os.getpid()}-{host}-0123abcd"
    elsewhere = tmp_path / f".a.tmp-{dead.pid}-another{host}-0123abcd"
    stale = tmp_path / f".a.tmp-{dead.pid}-{host}-0123abcd"
    users = tmp_path / ".a.tmp-notes"
    for path in (mine, elsewhere, stale, users):
        path.touch()
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, elsewhere, users])


def test_a_full_disk_is_known_by_the_words_of_a_library_in_rust(tmp_path: Path) -> None:
    """`tokenizers` raises a plain Exception; the system's own device for full disks makes it."""
    from tokenizers import Tokenizer, models

    words = r"out could not be written: No space left on device"
    with pytest.raises(SmoreError, match=words) as stopped, writing(tmp_path / "out"):
        Tokenizer(models.BPE()).save("/dev/full")
    assert stopped.value.hint is not None and stopped.value.hint.startswith("make room")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "out"):
        1 / 0  # noqa: B018


def test_files_come_all_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with atomic_files(folder) as made:
        (made / "a").write_text("first")
    (folder / "mine").write_text("stays")
    with pytest.raises(OSError, match="full"), atomic_files(folder) as made:
        (made / "a").write_text("half")
        raise OSError("the disk is full")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "first", "mine": "stays"}
    with atomic_files(folder) as made:
        (made / "below").mkdir()
        (made / "below" / "b").write_text("second")
        (made / "a").write_text("third")
    assert sorted(path.name for path in folder.iterdir()) == ["a", "below", "mine"]
    assert (folder / "below" / "b").read_text() == "second" and (folder / "a").read_text() == "third"
