"""What a run says when memory runs out: what was live, which batch, what would fit, how to go on.

An allocation that fails raises, on a GPU always, on a CPU where a limit is set or nothing may be promised twice. (A
Linux that promises more than it has ends the process instead, and nothing can be said: `smore plan` says it before.)
"""

from __future__ import annotations

import gc
import resource
import shlex
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from smore_cli.data.batch import Batch
from smore_cli.errors import SmoreError
from smore_cli.planning.planner import Planner
from smore_cli.planning.smaller import what_would_fit
from smore_cli.training.checkpoint import newest_complete
from smore_cli.training.process_memory import resident

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smore_cli.planning.memory import MemoryPlan
    from smore_cli.planning.smaller import Fitting
    from smore_cli.training.run import Run

__all__ = ["is_out_of_memory", "out_of_memory_explained"]

_SAID = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


@contextmanager
def out_of_memory_explained(run: Run) -> Iterator[None]:
    """Turns running out of memory into a report and one line.

    Raises:
        SmoreError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        limit = _limit(run.setup.device)
        where = _Where.of(error, run)
        traceback.clear_frames(error.__traceback__)  # the pass that failed lives on in its frames
    else:
        return
    run.setup.optimizer.zero_grad()
    gc.collect()
    if run.setup.device.type == "cuda":
        torch.cuda.empty_cache()
    raise _report(run, limit, where)


@dataclass(frozen=True)
class _Where:
    """What was running: a line for the user, and whether it was an evaluation."""

    line: str
    evaluating: bool

    @classmethod
    def of(cls, error: BaseException, run: Run) -> _Where:
        """Reads it off the frames the exception went through: the batch is a local variable of one of them."""
        names, batch, passes = set(), None, []
        for frame, _ in traceback.walk_tb(error.__traceback__):
            names.add(frame.f_code.co_name)
            if isinstance(found := frame.f_locals.get("batch"), Batch):
                batch = found
            if isinstance(several := frame.f_locals.get("batches"), list):
                passes = several
        evaluating = "held_out_loss" in names
        what = "the evaluation" if evaluating else "the gradient census" if "census" in names else "training"
        line = f"out of memory in {what}, step {run.state.step + 1}"
        if batch is None:
            return cls(line, evaluating)
        lines, width = batch.input_ids.shape
        real = int(batch.token_mask.sum())
        line += f"{_number(batch, passes)}: {lines} rows x {width} tokens ({real:,} of them real)"
        return cls(f"{line}, {len(batch.sources):,} supervised{_longest(batch, run, names)}", evaluating)


def _number(batch: Batch, passes: list[Any]) -> str:
    """Returns which pass of its step a batch is."""
    for number, other in enumerate(passes, 1):
        same = isinstance(other, Batch) and other.input_ids.shape == batch.input_ids.shape
        if same and torch.equal(other.input_ids.to(batch.input_ids.device), batch.input_ids):
            return f", pass {number} of {len(passes)}"
    return ""


def _longest(batch: Batch, run: Run, names: set[str]) -> str:
    """Returns which row of the training data made a training batch so long."""
    setup, tokens = run.setup, int(batch.token_mask.sum())
    if "accumulate_gradients" not in names or setup.batches.rows is not setup.train_rows:
        return ""
    for packs in setup.plan.passes(run.state.step):
        rows = [row for pack in packs for row in pack]
        lengths = {row: setup.train_rows[row].length for row in rows}
        if sum(lengths.values()) == tokens:
            longest = max(lengths, key=lambda row: lengths[row])
            return f"; the longest is training row {longest + 1:,}, {lengths[longest]:,} tokens"
    return ""


def _limit(device: torch.device) -> int:
    """Returns the bytes this process could have, read at the moment of the failure."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    rooms = []
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        rooms.append(allowed - pages * resource.getpagesize())
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        rooms.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return resident() + max(min(rooms, default=0), 0)


def _report(run: Run, limit: int, where: _Where) -> SmoreError:
    """Says everything that is known, and returns the error that ends the run."""
    say = run.reporter.say
    try:
        planner = Planner.of_setup(run.setup)
        plan, fitting = planner.memory(), what_would_fit(planner, limit, evaluating=where.evaluating)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        say("there is too little memory left to work out what would fit; `smore plan` does, with other --set values")
        fitting = []
    else:
        for line in _live(plan, limit):
            say(line)
        for line in _would_fit(fitting):
            say(line)
    return SmoreError(where.line, _how_to_go_on(run, fitting))


def _live(plan: MemoryPlan, limit: int) -> Iterator[str]:
    highest = max(plan.phases, key=lambda name: plan.phases[name])
    yield f"needed, by prediction: {_gib(plan.peak)}, of which {_gib(limit)} were to be had; in {highest}:"
    for part, size in plan.components.items():
        yield f"  {part:<36} {_gib(size):>12}"


def _would_fit(fitting: list[Fitting]) -> Iterator[str]:
    yield (
        "what would fit, by the same prediction:" if fitting else "no smaller batch, length or 4-bit backbone would fit"
    )
    for change in fitting:
        note = "" if change.same_run else "   (a new run)"
        yield f"  {change.flags}   peak {_gib(change.peak)}{note}"


def _how_to_go_on(run: Run, fitting: list[Fitting]) -> str:
    """Returns the command that goes on with the first change that an interrupted run may take."""
    words = [word for word in run.environment["command"] if word != "--debug"]
    words = words if words[:1] == ["train"] else ["train", "RECIPE"]
    change = next((change.flags for change in fitting if change.same_run), "")
    if not (run.run_dir / "run.json").exists():
        return f"start again with smaller settings: smore {shlex.join(words)} {change}".rstrip()
    words = words if {"--resume", "--checkpoint"} & set(words) else [*words, "--resume"]
    folder = newest_complete(run.run_dir, lambda _: None)
    start = f"from {folder.name}" if folder else "from the first step, as there is no checkpoint yet"
    return f"go on {start}: smore {shlex.join(words)} {change}".rstrip()


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
