"""`smore train --num-processes N`: starts the processes of one machine, and is their parent until the last has ended.

Not accelerate's launcher, which starts several processes on a CPU only through MPI, and not torchrun's, which replaces
every exit code by 1, prints a page about it, and kills 30 seconds after a signal, in the middle of the last step or of
its checkpoint. The environment it gives is theirs, so the processes cannot tell the difference.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from smore_cli.errors import SmoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["launch"]

GRACE_SECONDS = 20.0
"""How long the others may go on when one process has failed; they notice at their next exchange."""
POLL_SECONDS = 0.1
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def launch(arguments: Sequence[str], count: int) -> None:
    """Runs `smore ARGUMENTS` in `count` processes that find each other.

    SIGINT and SIGTERM are passed on to each, once for every time they come.

    Args:
        arguments: of the command line, after `smore`.
        count: how many processes, at least two.

    Raises:
        UsageError: there are fewer GPUs than processes.
        SmoreError: a process was killed, so that it could not say why.
        SystemExit: with the exit code of the run, where it is not 0; the processes have said why.
    """
    _require_devices(count)
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        port = _free_port()
        for rank in range(count):
            command = [sys.executable, "-m", "smore_cli", *arguments]
            # In a session of its own, so that Ctrl-C reaches it once: through `forward`, not from the terminal as well.
            processes.append(subprocess.Popen(command, env=_environment(rank, count, port), start_new_session=True))
        _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits until all have ended, and ends the rest where one has failed; see `launch` for what it raises."""
    failed: list[int] = []  # ranks, in the order in which they failed
    until, ended_here = float("inf"), set[int]()
    running = True
    while running:
        running = any(process.poll() is None for process in processes)
        failed += [rank for rank, process in enumerate(processes) if process.poll() and rank not in failed]
        if failed and until == float("inf"):
            until = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > until:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    ended_here.add(rank)
                    process.kill()  # checkpoints are renamed when complete, so none is damaged
        time.sleep(POLL_SECONDS)
    codes = {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
    if killed := [rank for rank, code in codes.items() if code < 0 and rank not in ended_here]:
        name = signal.Signals(-codes[killed[0]]).name
        raise SmoreError(
            f"process {killed[0]} of {len(processes)} was killed by {name}; the run has ended",
            "SIGKILL often means that the machine ran out of memory; go on from the newest checkpoint with --resume",
        )
    if code := next((codes[rank] for rank in failed if codes[rank] > 0), 0):
        sys.exit(code)


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    values = os.environ | {name: str(value) for name, value in ours.items()}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # As many threads in all as there are cores: otherwise every process takes all of them.
    values.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return values


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _require_devices(count: int) -> None:
    import torch

    if 0 < (found := torch.cuda.device_count()) < count:
        raise UsageError(
            f"--num-processes {count}: there are {found} GPUs, and each process needs one", f"use {found} at most"
        )
