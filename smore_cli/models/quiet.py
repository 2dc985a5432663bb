"""Keeping transformers' warnings and progress bars off the terminal while it loads or saves."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet"]


@contextmanager
def quiet(*, progress: bool | None = None) -> Iterator[None]:
    """Lets only errors of transformers, the hub and bitsandbytes through; restores their settings afterwards.

    What would have been a warning and matters (weights that are missing, a package that is not there) is checked by the
    caller and raised as one line.

    Args:
        progress: whether to show progress bars; default: only on a terminal.
    """
    import torch
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as hf

    if not torch.cuda.is_available():  # saving a model imports DeepSpeed, where it is there, and that says what it took
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    bitsandbytes = logging.getLogger("bitsandbytes")
    verbosity, hub_verbosity, bars = hf.get_verbosity(), hub.get_verbosity(), hf.is_progress_bar_enabled()
    level = bitsandbytes.level
    hf.set_verbosity(logging.ERROR)
    hub.set_verbosity(logging.ERROR)
    bitsandbytes.setLevel(logging.ERROR)
    _set_bars(sys.stderr.isatty() if progress is None else progress)
    try:
        yield
    finally:
        hf.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        bitsandbytes.setLevel(level)
        _set_bars(bars)


def _set_bars(shown: bool) -> None:
    """Switches the progress bars of transformers (and, with them, the hub's)."""
    from transformers.utils import logging as hf

    if shown:
        hf.enable_progress_bar()
    else:
        hf.disable_progress_bar()
