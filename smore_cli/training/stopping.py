"""SIGINT and SIGTERM ask a run to stop after the step it is in; nothing is lost.

A signal that reaches one of several processes stops all of them after the same step.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smore_cli.training.parallel import ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from smore_cli.training.parallel import Processes

__all__ = ["Stop", "stop_signals"]


@dataclass
class Stop:
    """Set by a signal; looked at between steps.

    Attributes:
        processes: those that stop together.
        signal_name: what came, to this process or, once `wanted` has told, to any.
    """

    processes: Processes = ALONE
    signal_name: str | None = None

    def wanted(self) -> bool:
        """Whether a signal has come to any process; all of them ask at the same time."""
        number = self.processes.most(signal.Signals[self.signal_name] if self.signal_name else 0)
        if number:
            self.signal_name = signal.Signals(number).name
        return number > 0


@contextmanager
def stop_signals(processes: Processes = ALONE) -> Iterator[Stop]:
    """Turns SIGINT and SIGTERM into a request to stop after the current step; a second one stops at once."""
    stop = Stop(processes)
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
