"""Keeping `datasets` from writing progress bars into logs and its own error walls beside ours."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["first_line", "quiet_datasets"]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences the loggers of `datasets` and the hub; progress bars stay only on a terminal. Restores both after."""
    import datasets
    from huggingface_hub.utils import logging as hub

    logging = datasets.logging
    verbosity, hub_verbosity, bars = logging.get_verbosity(), hub.get_verbosity(), datasets.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    hub.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
