"""C beside the package, compiled on the machine that runs it.

A kernel is a C file that knows nothing of Python or PyTorch; it is compiled once for this source, compiler and
processor, into the user's cache, and called through ctypes. Without a compiler nothing is lost but speed: everything
that has a kernel has the same equations in PyTorch, which the kernel is tested against.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from smore_cli.models.cache import built_once, cache_folder

__all__ = ["library"]

FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""No -ffast-math: a NaN must come out as one, and sums keep their order. gnu11, unlike c11, has fused multiply-adds."""
OPENMP = ((*FLAGS, "-fopenmp"), FLAGS)
"""With threads if the compiler knows them, else without."""


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """Returns the compiled C file `name` of this package, or None: no compiler, or one that fails."""
    compiler = _compiler()
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.c")
    texts = [each.read_text(encoding="utf-8") for each in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, *compiler, *FLAGS, _processor()]).encode())

    def build(folder: Path) -> None:
        for flags in OPENMP:
            command = [*compiler, *flags, str(source), "-o", str(folder / "kernel.so")]
            if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0:
                return
        raise OSError(f"{compiler[0]} cannot compile {source.name}")

    with suppress(OSError, subprocess.TimeoutExpired):  # no room, no right to write, a compiler without what it needs
        folder = built_once(cache_folder() / "kernels" / f"{name}-{key.hexdigest()[:20]}", build)
        return ctypes.CDLL(str(folder / "kernel.so"))
    return None


def _compiler() -> list[str] | None:
    """Returns the user's $CC, else the system's C compiler, with its path."""
    for each in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(each)
        if words and (found := shutil.which(words[0])) is not None:
            return [found, *words[1:]]
    return None


def _processor() -> str:
    """Returns what tells one kind of processor from another: a cache folder may be shared by several machines."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"
