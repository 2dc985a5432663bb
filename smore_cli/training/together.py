"""One run, one voice: an error in any of its processes is told once, and ends all of them with the same exit code.

Mistakes that every process finds (a recipe, a data file) are told by the main process. What one process alone finds is
told by it, with its number. The first to fail leaves its exit code in the store that all processes see; those that are
then cut off in the middle of an exchange look there, and go quietly.
"""

from __future__ import annotations

import atexit
import contextlib
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from smore_cli.errors import SmoreError
from smore_cli.training.parallel import ALONE, Ended, Processes, join

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["one_voice"]

PRECEDENCE_SECONDS = 3.0
"""How long a process waits for the main one to find the same mistake."""
FAREWELL_SECONDS = 3.0
"""How long at most the process that holds the store stays, so that the others can read that the run has ended."""


@contextmanager
def one_voice() -> Iterator[Processes]:
    """Joins the processes of the run for the time of a `with` block.

    Raises:
        SystemExit: in the processes that have nothing to say.
    """
    processes = join()
    if processes.count == 1:
        yield ALONE
        return
    try:
        yield processes
        dist.barrier()  # the main process holds the store, and must not leave before all have read what they need
    except BaseException as error:
        told = _tell(processes, error)
        if told is None:
            raise SystemExit(_exit_code(processes, error)) from error
        raise told from error
    else:
        dist.destroy_process_group()


def _tell(processes: Processes, error: BaseException) -> BaseException | None:
    """Ends the run for all, and returns what this process has to say, or None."""
    if isinstance(error, Ended):
        processes.heard()
        return None
    try:
        if not processes.main and not isinstance(error, KeyboardInterrupt):
            until = time.monotonic() + PRECEDENCE_SECONDS
            while processes.ended() is None and time.monotonic() < until:
                time.sleep(0.1)
        first = processes.end(_own_exit_code(error)) == processes.rank
    except (RuntimeError, dist.DistError):  # the main process, which holds the store, is gone
        return _explained(processes, error)
    if not first:
        processes.heard()
        return None
    if processes.main:
        atexit.register(
            _say_farewell, processes
        )  # when the error has been told: a launcher may end this process meanwhile
    return _explained(processes, error)


def _explained(processes: Processes, error: BaseException) -> BaseException:
    if _is_lost_contact(error):
        return SmoreError(
            f"process {processes.rank} of {processes.count} lost contact with another, which has died or cannot be "
            "reached; the run has ended",
            "look for what killed it (memory?), then go on from the newest checkpoint with --resume",
        )
    if isinstance(error, SmoreError) and not processes.main:
        error.message = f"process {processes.rank}: {error.message}"
    return error


def _own_exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def _exit_code(processes: Processes, error: BaseException) -> int:
    if isinstance(error, Ended):
        return error.exit_code
    with contextlib.suppress(RuntimeError, dist.DistError):
        return processes.ended() or _own_exit_code(error)
    return _own_exit_code(error)


def _is_lost_contact(error: BaseException) -> bool:
    """Whether an exchange between processes has failed, as far as the libraries tell."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("gloo/", "Gloo", "NCCL"))


def _say_farewell(processes: Processes) -> None:
    """Cuts off processes that wait in an exchange, and leaves them time to read why the run has ended."""
    if not torch.cuda.is_available():  # gloo; with NCCL it may wait for the others, which the launcher ends
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
    until = time.monotonic() + FAREWELL_SECONDS
    while not processes.all_heard() and time.monotonic() < until:
        time.sleep(0.1)
