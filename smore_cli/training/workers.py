"""Batches made ahead of their steps, in processes of their own.

    worker 0    step n      step n + 2   ...        each makes whole steps, in turn; what it makes follows from the
    worker 1    step n + 1  step n + 3   ...        number of the step alone, so the run is the same with any number

Batches come back by value through a pipe, not in shared memory: containers give that 64 MB, and it takes a file
descriptor for every tensor, of which a step of many forward passes has more than a process may open.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from smore_cli.data.batch import Batch
from smore_cli.errors import SmoreError

if TYPE_CHECKING:
    from torch import Tensor

    from smore_cli.data.stream import Reached
    from smore_cli.training.batches import Batches

__all__ = ["Made", "made_ahead"]

_PR_SET_PDEATHSIG = 1


class Made(NamedTuple):
    """A step's forward passes, and how far a stream is after it."""

    batches: list[Batch]
    reached: Reached | None


def made_ahead(batches: Batches, start: int, num_workers: int) -> Iterator[Made]:
    """Yields what the steps from `start` to the end need, made by workers.

    Args:
        batches: what makes them.
        start: the first step.
        num_workers: how many processes, each two steps ahead.

    Raises:
        SmoreError: what went wrong in a worker, as it would have here; or a worker died.
    """
    # Threads of this process that hold a lock while it forks would be a danger; workers neither compute with torch's
    # threads nor touch the GPU. A fresh process would import everything again, for seconds.
    context = "fork" if sys.platform == "linux" else None
    loader = DataLoader(
        _Steps(batches),
        sampler=range(start, batches.plan.total_steps),
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=_Settle(os.getpid()),
        generator=torch.Generator(),  # or it would draw from the run's own
        multiprocessing_context=context,
    )
    with _default_child_signal(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 and later, about threads and fork
        made = iter(loader)
    try:
        for item in _without_dead(made):
            if isinstance(item, Exception):
                raise item
            packed, reached = item
            yield Made([_unpacked(tensors) for tensors in packed], reached)
    finally:
        del made  # its end stops the workers


class _Steps(Dataset[Any]):
    """Step numbers to what the steps need; errors come back as values, since torch would wrap them in tracebacks."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Any:
        try:
            made = self.batches.made(step)
        except SmoreError as error:
            return error
        return [_packed(batch) for batch in made.batches], made.reached


class _Settle:
    """Sets up a worker.

    Args:
        parent: the process that it works for.
    """

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __call__(self, worker: int) -> None:
        """Runs in the worker before anything else."""
        # Ctrl-C and a scheduler's SIGTERM reach every process at once: the run still wants its batches to save itself.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if sys.platform == "linux":  # elsewhere torch looks every five seconds whether the parent lives
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self.parent:
                os._exit(1)
        steps: Any = torch.utils.data.get_worker_info().dataset  # type: ignore[union-attr]
        steps.batches.restart()


def _as_it_is(item: Any) -> Any:
    return item


@contextmanager
def _default_child_signal() -> Iterator[None]:
    """Keeps torch from raising an error in the middle of a step when a worker dies; `next` finds out in good order."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _without_dead(items: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            item = next(items, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            problem = f"a process that makes batches died: {str(error).splitlines()[0]}"
            raise SmoreError(problem, "is memory short? Try a lower train.dataloader_num_workers") from error
        if item is None:
            return
        yield item


def _packed(batch: Batch) -> dict[str, Any]:
    """Returns a batch as arrays, which are sent by value."""
    return {f.name: _array(getattr(batch, f.name)) for f in fields(batch)}


def _array(tensor: Tensor | None) -> Any:
    """Returns an array and whether its bits are bfloat16, which NumPy does not know."""
    if tensor is None:
        return None
    brain = tensor.dtype == torch.bfloat16
    return (tensor.view(torch.int16) if brain else tensor).numpy(), brain


def _unpacked(arrays: dict[str, Any]) -> Batch:
    tensors: dict[str, Any] = {name: value and _tensor(*value) for name, value in arrays.items()}
    return Batch(**tensors)


def _tensor(array: Any, brain: bool) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if brain else tensor
