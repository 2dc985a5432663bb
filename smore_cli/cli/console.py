"""The two consoles: results go to `out` (stdout), everything else to `err` (stderr). Both honour NO_COLOR."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console

__all__ = ["err", "out"]

_WIDTH_WITHOUT_TERMINAL = 200  # rich would wrap tables and lines at 80 columns in a file or a pipe


def _console(stream: TextIO, *, stderr: bool) -> Console:
    measured = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if measured else _WIDTH_WITHOUT_TERMINAL, highlight=False)


out = _console(sys.stdout, stderr=False)
err = _console(sys.stderr, stderr=True)
