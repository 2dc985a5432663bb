"""SIGINT and SIGTERM ask a run to stop after the step it is in; nothing is lost."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["Stop", "stop_signals"]


@dataclass
class Stop:
    """Set by a signal; looked at between steps."""

    signal_name: str | None = None


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a request to stop after the current step; a second one stops at once."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def request(number: int, _: FrameType | None) -> None:
        stop.signal_name = signal.Signals(number).name
        for other in numbers:
            signal.signal(other, before[other])

    for number in numbers:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number in numbers:
            signal.signal(number, before[number])
