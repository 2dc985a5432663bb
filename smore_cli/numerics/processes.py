"""A step shared by two processes against the same step in one: on the CPU, over gloo, with the tiny Llama.

What is checked is the arithmetic of sharing, which knows nothing of the backbone or of the device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smore_cli.numerics.checks import Outcome, judge, reference
from smore_cli.numerics.measure import Measured
from smore_cli.numerics.subjects import METHODS, TINY, TOLERANCE, subjects, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COUNT", "check_processes"]

COUNT = 2
NAME = f"{COUNT} processes"
SECONDS = 300
WORKER = ("-m", "smore_cli.numerics.worker")


def check_processes(worker: Sequence[str] = WORKER) -> list[Outcome]:
    """Returns one outcome a method; where processes cannot be started here, that is the outcome.

    Args:
        worker: what Python runs as each process.
    """
    with tempfile.TemporaryDirectory(prefix="smore-numerics-") as folder:
        problem = _run(worker, Path(folder))
        if problem is not None:
            note = f"processes cannot work together here: {problem}"
            return [Outcome(TINY, method, NAME, None, TOLERANCE, note) for method in METHODS]
        found = torch.load(Path(folder) / "found.pt", weights_only=True)
    device = torch.device("cpu")
    return [
        judge(subject, NAME, Measured(**found[subject.name]), reference(subject))
        for subject in subjects(tiny_llama(device), device)
    ]


def _run(worker: Sequence[str], folder: Path) -> str | None:
    """Runs the processes to their end; returns what went wrong, in a line."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[str]] = []
    try:
        for rank in range(COUNT):
            command = [sys.executable, *worker, str(rank), str(COUNT), str(folder)]
            processes.append(
                subprocess.Popen(command, env=hidden, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    except (OSError, subprocess.TimeoutExpired) as error:
        return " ".join(str(error).split())
    finally:
        for process in processes:
            process.kill()
            process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    if not failed:
        return None
    said = errors[failed[0]].strip().splitlines() or [f"exit code {processes[failed[0]].returncode}"]
    return f"process {failed[0]}: {said[-1]}"
