"""What each of two processes does for tests/training/test_parallel.py; started once, as torchrun would start it.

`python -m tests.training.two_processes FOLDER` runs the recipes in FOLDER, into FOLDER/NAME, and writes what only the
processes know to FOLDER/found-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from smore_cli.errors import Interrupted, SmoreError
from smore_cli.recipe import load_recipe
from smore_cli.training.loop import train
from smore_cli.training.parallel import Processes
from smore_cli.training.setup import prepare
from smore_cli.training.step import accumulate_gradients
from smore_cli.training.together import one_voice


def run(folder: Path, recipe: str, name: str, processes: Processes, **options: bool) -> str | None:
    """Trains into FOLDER/NAME and returns how it was stopped, where it was."""
    path = folder / f"{recipe}.yaml"
    try:
        loaded = load_recipe(path, [f"output_dir={folder / name}"])
        train(loaded, path.read_text(), processes=processes, **options)
    except SmoreError as error:
        return f"{type(error).__name__}: {error.message}"
    return None


def signal_after_step(folder: Path, step: int) -> None:
    """Sends this process a SIGTERM once a line of that step is in the metrics."""

    def watch() -> None:
        path = folder / "metrics.jsonl"
        while not (path.exists() and f'"step": {step},' in path.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def stop_and_resume(folder: Path, recipe: str, name: str, processes: Processes) -> str | None:
    """Runs, gets a signal in the second process alone after two steps, and goes on."""
    if processes.rank == 1:
        signal_after_step(folder / name, 2)
    stopped = run(folder, recipe, name, processes)
    assert stopped is not None and stopped.startswith(Interrupted.__name__), stopped
    assert run(folder, recipe, name, processes, resume=True) is None
    return stopped


def replicas(folder: Path, processes: Processes) -> dict[str, Any]:
    """A few steps by hand: does every process hold the same adapter after them, and noise of its own?"""
    setup = prepare(load_recipe(folder / "noisy.yaml"), lambda _: None, processes)
    noise = processes.gather_objects(torch.rand(4).tolist())
    for step in range(2):
        accumulate_gradients(
            setup.model, setup.batches.step(step), setup.objective,
            device=setup.device, backward=torch.Tensor.backward, processes=processes,
        )  # fmt: skip
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    trained = [p.detach().flatten() for p in setup.model.parameters() if p.requires_grad]
    found = processes.gather_objects(torch.cat(trained))
    return {
        "same_adapter": bool(torch.equal(found[0], found[1])),
        "same_noise": noise[0] == noise[1],
        "seen": processes.gather_objects(
            [[batch.input_ids.tolist() for batch in setup.batches.step(s)] for s in (0, 2)]
        ),
    }


def exchanges(processes: Processes) -> dict[str, Any]:
    """The primitives, with values that differ by rank."""
    linear = torch.nn.Linear(3, 2)
    frozen = torch.nn.Parameter(torch.ones(1))
    linear.weight.grad = torch.full((2, 3), 1.0 + processes.rank)
    linear.bias.grad = torch.ones(2) if processes.rank else None
    processes.sum_gradients([*linear.parameters(), frozen])
    caught = None
    try:
        processes.on_main(lambda: int("x") if processes.rank else _fail())
    except SmoreError as error:
        caught = [type(error).__name__, error.message, error.hint]
    return {
        "weight": linear.weight.grad.flatten().tolist(),
        "bias": [] if linear.bias.grad is None else linear.bias.grad.tolist(),
        "untouched": frozen.grad is None,
        "sums": processes.sums([processes.rank, 2**40 + processes.rank]),
        "most": processes.most(processes.rank),
        "from_main": processes.on_main(lambda: {"rank": processes.rank}),
        "first": processes.main_first(lambda: processes.rank),
        "caught": caught,
    }


def _fail() -> int:
    raise Interrupted("stopped", "go on")


def main(folder: Path) -> None:
    """Runs everything."""
    with one_voice() as processes:
        found: dict[str, Any] = {"exchanges": exchanges(processes), "replicas": replicas(folder, processes)}
        found["plain"] = run(folder, "plain", "plain-2", processes)
        found["uneven"] = run(folder, "uneven", "uneven-2", processes)
        found["default_batch"] = run(folder, "default", "default-2", processes)
        found["streamed"] = run(folder, "streamed", "streamed-2", processes)
        found["whole"] = run(folder, "noisy", "noisy-2", processes)
        found["stopped"] = stop_and_resume(folder, "noisy", "noisy-stopped-2", processes)
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        found["sharded"] = run(folder, "plain", "sharded-2", processes)
        found["sharded_stopped"] = stop_and_resume(folder, "plain", "sharded-stopped-2", processes)
        found["sharded_4bit"] = run(folder, "quantised", "quantised-2", processes)
        (folder / f"found-{processes.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
