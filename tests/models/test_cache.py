"""The cache folder, and building into it from several real processes at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smore_cli.models.cache import built_once, cache_folder

# Builds a folder slowly, leaving one line in a log for each time that the build really ran.
_BUILDER = """
import os, sys, time
from pathlib import Path
from smore_cli.models.cache import built_once
root = Path(sys.argv[1])
def build(folder):
    with open(root / "log", "a") as log:
        log.write("built\\n")
    (folder / "half").write_text("x")
    print("building", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "whole").write_text("x")
print(sorted(p.name for p in built_once(root / "cache" / "thing", build).iterdir()), flush=True)
"""


def _start(root: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BUILDER, str(root), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_cache_folder_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SMORE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "shared" / "smore"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "smore"


def test_several_processes_build_once_and_all_see_it_whole(tmp_path: Path) -> None:
    processes = [_start(tmp_path, 0.5) for _ in range(4)]
    outputs = [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    assert outputs == ["['half', 'whole']"] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_killed_build_is_done_again(tmp_path: Path) -> None:
    killed = _start(tmp_path, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "building\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (tmp_path / "cache" / "thing").exists()
    folder = built_once(tmp_path / "cache" / "thing", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert sorted(path.name for path in folder.parent.iterdir()) == [".thing.lock", "thing"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        built_once(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists()
