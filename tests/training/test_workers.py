"""Batches made ahead in other processes are the same batches, and those processes end with the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smore_cli.errors import SmoreError
from smore_cli.recipe import load_recipe
from smore_cli.recipe.schema import Recipe
from smore_cli.training.loop import train
from smore_cli.training.setup import Setup, prepare

MakeRecipe = Callable[..., Path]
LORA = {"method": "lora", "target_modules": ["q_proj"], "rank": 2, "dropout": 0.1}
TRAIN = {"max_steps": 6, "per_device_batch_size": 2, "global_batch_size": 4, "dataloader_num_workers": 2}


@pytest.fixture
def setup(recipe: Callable[..., Recipe]) -> Setup:
    loaded = recipe(adapter=LORA, data={"objective": "choice_ranking"}, train={**TRAIN, "max_steps": 40})
    return prepare(loaded, lambda _: None)


def test_a_run_with_workers_is_the_run_without_bit_for_bit(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    found = []
    for workers in (0, 2):
        path = make_recipe(
            adapter=LORA, train={**TRAIN, "dataloader_num_workers": workers}, output_dir=str(tmp_path / str(workers))
        )
        train(load_recipe(path), path.read_text())
        found.append((tmp_path / str(workers) / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_come_out_in_order_and_as_they_were_made_from_any_step(setup: Setup, dtype: torch.dtype) -> None:
    batches = replace(setup.batches, mask_dtype=dtype)
    before = torch.get_rng_state()
    made = batches.from_step(35)
    for step, found in zip(range(35, 40), made, strict=True):
        for here, there in zip(batches.step(step), found, strict=True):
            for name in (field.name for field in fields(here)):
                a, b = getattr(here, name), getattr(there, name)
                assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws the same numbers


def test_what_ends_the_run_does_not_end_its_workers_before_it_is_saved(setup: Setup) -> None:
    steps = setup.batches.from_step(0)
    next(steps), next(steps)  # one of each worker, which both are at work then
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(int(worker.pid or 0), number)
    for _ in range(10):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0


def test_a_worker_that_dies_is_an_error_of_one_line_and_not_a_hang(setup: Setup) -> None:
    steps = setup.batches.from_step(0)
    next(steps)
    for worker in multiprocessing.active_children():
        os.kill(int(worker.pid or 0), signal.SIGKILL)
    with pytest.raises(SmoreError, match="a process that makes batches died") as caught:
        for _ in range(40):
            next(steps)
    assert "\n" not in caught.value.message and "dataloader_num_workers" in caught.value.hint


def test_no_worker_outlives_a_run_that_is_killed(setup: Setup, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    if (run := os.fork()) == 0:
        steps: Any = setup.batches.from_step(0)
        next(steps)
        (tmp_path / "writing").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        (tmp_path / "writing").rename(pids)
        time.sleep(60)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not pids.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))


def alive(pid: int) -> bool:
    try:  # a dead process that nobody has waited for is still listed, as a zombie
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
