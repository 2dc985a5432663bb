"""Several processes that train one adapter: what they tell each other, and how an error on one of them ends them all.

    gradient of a step      = sum over processes of the gradients of their passes    all-reduced once, in buckets
    counts, routing sums    = sums over processes, known before the first backward pass

Losses are shares of the whole step, so sums are exact and nothing is ever averaged or multiplied by the number of
processes. Gradients are reduced here rather than by a wrapper around the model: adapters are small, and a wrapper wants
every process to run equally many passes, through the same parameters, and divides by the number of processes.
"""

from __future__ import annotations

import math
import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from smore_cli.errors import RecipeError, SmoreError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

__all__ = ["ALONE", "Ended", "Processes", "join", "outer_processes"]

T = TypeVar("T")

BUCKET_BYTES = 32 * 2**20
"""Gradients are sent in pieces of about this size: large enough to be fast, small enough to need no memory."""
TIMEOUT = timedelta(hours=2)
"""Longest wait in one exchange. A process that has died is noticed at once; this is for one that hangs."""
POLL_SECONDS = 0.1


class Ended(Exception):
    """Another process has ended the run, and has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Processes:
    """The processes of a run. With one of them nothing is sent, and every sum is what it was.

    Attributes:
        rank: number of this process.
        count: how many there are.
        store: keys and values that all of them see; None where there is one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        self.rank, self.count, self.store = rank, count, store
        self._calls = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Returns a few numbers of every process, in the order of their ranks; whole numbers stay exact."""
        if self.count == 1:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine)
        return [each.tolist() for each in found]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Returns each number summed over the processes."""
        return [math.fsum(each) for each in zip(*self.gather(values), strict=True)]

    def most(self, value: int) -> int:
        """Returns the largest of the processes' numbers."""
        return int(max(each[0] for each in self.gather([value])))

    def gather_objects(self, value: T) -> list[T]:
        """Returns an object of every process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_main(self, value: T) -> T:
        """Returns the main process's object."""
        if self.count == 1:
            return value
        holder = [value if self.main else None]
        dist.broadcast_object_list(holder, src=0)
        return cast("T", holder[0])

    def sum_tensors(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Returns tensors summed over the processes, which all have the same shapes; none is changed."""
        if self.count == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return [piece.view(tensor.shape).to(tensor.dtype) for piece, tensor in zip(pieces, tensors, strict=True)]

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces each gradient by its sum over the processes; one that no process has stays None."""
        if self.count == 1:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        has = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        reached = [parameter for parameter, some in zip(trained, has.tolist(), strict=True) if some]
        for parameter in reached:
            if parameter.grad is None:  # no token of this process went to the expert
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([cast("Tensor", parameter.grad) for parameter in reached]):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, piece in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.copy_(piece.view_as(gradient))

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Replaces tensors by those of the main process."""
        if self.count > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process alone; the others wait for it, however long it takes.

        Returns:
            Its result, in every process.

        Raises:
            SmoreError: what it raises, in every process, so that all go on or end alike.
        """
        if self.count == 1:
            return work()
        result, failure = None, None
        if self.main:
            try:
                result = work()
            except SmoreError as error:
                failure = error
        self._pass_main()
        result, kind, told = self.from_main(
            (result, type(failure), [getattr(failure, "message", ""), getattr(failure, "hint", "")])
        )
        if self.main and failure is not None:
            raise failure
        if issubclass(kind, SmoreError):
            raise _again(kind, *told)
        return cast("T", result)

    def main_first(self, work: Callable[[], T]) -> T:
        """Runs `work` in the main process, then in the others, which find in the cache what it has left there."""
        if self.count == 1:
            return work()
        if not self.main:
            self._pass_main()
            return work()
        result = work()
        self._pass_main()
        return result

    def _pass_main(self) -> None:
        """The main process says that it has come this far; the others wait until it says so.

        Unlike a barrier this has no time limit: tokenising a large data set takes what it takes.
        """
        store, key = cast("Store", self.store), f"smore/passed/{self._calls}"
        self._calls += 1
        if self.main:
            store.set(key, "1")
            return
        while not store.check([key]):
            if (code := self.ended()) is not None:
                raise Ended(code)
            time.sleep(POLL_SECONDS)

    def ended(self) -> int | None:
        """Returns the exit code with which some process has ended the run, or None."""
        store = cast("Store", self.store)
        return int(store.get(_END).decode().partition(":")[2]) if store.check([_END]) else None

    def end(self, exit_code: int) -> int:
        """Ends the run for all processes, unless one of them has done so before.

        Returns:
            The rank of the process that was first, and that is to say why.
        """
        wanted = f"{self.rank}:{exit_code}"
        found = cast("Store", self.store).compare_set(_END, "", wanted)
        return int(found.decode().partition(":")[0])

    def heard(self) -> None:
        """Says that this process knows of the end."""
        cast("Store", self.store).add(_HEARD, 1)

    def all_heard(self) -> bool:
        """Whether all others have said so."""
        return cast("Store", self.store).add(_HEARD, 0) >= self.count - 1


ALONE = Processes()
"""The only process of its run."""

_END, _HEARD = "smore/end", "smore/heard"


def outer_processes() -> int:
    """Returns how many processes torchrun, accelerate or `--num-processes` has started; 1: this is the only one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> Processes:
    """Joins the processes that a launcher has started, or returns `ALONE`.

    Raises:
        UsageError: the launcher asks for what cannot be done.
    """
    count = outer_processes()
    if count == 1:
        return ALONE
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {' and '.join(missing)} not set", "start it with torchrun or accelerate launch"
        )
    if not dist.is_initialized():
        from accelerate import PartialState

        from smore_cli.training.zero_settings import plain_accelerate

        with plain_accelerate():
            # Numbers that Python waits for go over gloo, so that they never wait for the work queued on a GPU.
            if torch.cuda.is_available():
                PartialState(backend="cuda:nccl,cpu:gloo", timeout=TIMEOUT)
            else:
                PartialState(cpu=True, timeout=TIMEOUT)
    return Processes(dist.get_rank(), dist.get_world_size(), dist.distributed_c10d._get_default_store())


def _again(kind: type[SmoreError], message: str, hint: str) -> SmoreError:
    """Returns the main process's error in another one, which does not tell it."""
    return RecipeError([message], hint) if issubclass(kind, RecipeError) else kind(message, hint)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Groups tensors of one dtype and device to pieces of about `BUCKET_BYTES`, the same in every process."""
    found: list[list[Tensor]] = []
    room: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        key = tensor.dtype, tensor.device
        bucket, size = room.get(key, ([], BUCKET_BYTES))
        if size >= BUCKET_BYTES:
            bucket, size = [], 0
            found.append(bucket)
        bucket.append(tensor)
        room[key] = bucket, size + tensor.numel() * tensor.element_size()
    return found
