"""C is compiled once into the cache; whatever goes wrong with it, PyTorch goes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from smore_cli.kernels import compiled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_compiler = pytest.mark.skipif(compiled.library("tree") is None, reason="no C compiler on this machine")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no memory of what was compiled."""
    monkeypatch.setenv("SMORE_CACHE", str(tmp_path / "cache"))
    compiled.library.cache_clear()
    yield tmp_path / "cache"
    compiled.library.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_it_is_compiled_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = tmp_path / "calls"
    monkeypatch.setenv("CC", script(tmp_path / "mycc", f'echo x >> {counted}\nexec cc "$@"'))
    assert compiled.library("tree") is not None
    compiled.library.cache_clear()  # as another process
    assert compiled.library("tree") is not None
    assert counted.read_text().split() == ["x"]
    assert [path.name for path in (cache / "kernels").glob("tree-*/*")] == ["kernel.so"]


@needs_compiler
def test_a_compiler_without_openmp_gives_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'for each in "$@"; do [ "$each" = -fopenmp ] && exit 1; done\nexec cc "$@"'
    monkeypatch.setenv("CC", script(tmp_path / "mycc", text))
    assert compiled.library("tree") is not None


@needs_compiler
def test_another_processor_has_a_library_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.library("tree") is not None
    compiled.library.cache_clear()
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    assert compiled.library("tree") is not None
    assert len(list((cache / "kernels").glob("tree-*"))) == 2


def test_a_compiler_that_fails_is_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", script(tmp_path / "mycc", "exit 1"))
    assert compiled.library("tree") is None
    assert not list((cache / "kernels").glob("tree-*"))


def test_without_a_compiler_there_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiled.library("tree") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    assert compiled.library("tree") is None


def test_a_cache_that_is_a_file_is_no_error(cache: Path) -> None:
    cache.write_text("")
    assert compiled.library("tree") is None
