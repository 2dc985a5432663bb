"""One of several processes that share a step: `python -m smore_cli.numerics.worker RANK COUNT FOLDER`.

The first writes what the step came to into FOLDER. They find each other through a file there, and talk over gloo.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from smore_cli.numerics.checks import SPLIT, whole_step
from smore_cli.numerics.measure import measure
from smore_cli.numerics.subjects import subjects, tiny_llama
from smore_cli.training.parallel import Processes

__all__ = ["main"]


def main(rank: int, count: int, folder: Path) -> None:
    """Runs this process's share of the step with each method; the passes are dealt out as in training."""
    meet = (folder / "meet").absolute().as_uri()
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count, timeout=timedelta(minutes=5))
    processes, device, found = Processes(rank, count), torch.device("cpu"), {}
    for subject in subjects(tiny_llama(device), device):
        rows = iter(subject.rows)
        passes = [whole_step([next(rows) for _ in range(size)]) for size in SPLIT]
        found[subject.name] = asdict(measure(subject, passes[rank::count], processes))
    if processes.main:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
