"""Nothing is lost: an interrupted run saves, and the same recipe gives the same bytes (kills are in test_crash.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRecipe = Callable[..., Path]
STEPS, SAVE = 60, 4
NOISY_SMORE = {
    "method": "smore",
    "target_modules": "all-linear",
    "rank": [2, 2],
    "num_experts": [4, 4],
    "fanout": [2, 2],
    "gate": "noisy_topk",  # draws random numbers in every step
    "router_dim": 4,
    "key_dim": 4,
}
TRAIN = {"max_steps": STEPS, "save_steps": SAVE, "per_device_batch_size": 4, "global_batch_size": 8}


def start(recipe: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "smore_cli", "train", str(recipe), "--output-dir", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ.copy())


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Returns once a metrics line of at least `step` is on the disk, or the process has ended."""
    while process.poll() is None:
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.01)


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter's bytes and every number that is not a time."""
    times = ("seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in times} for line in lines]
    return (run / "adapter_model.safetensors").read_bytes(), metrics


@pytest.fixture
def recipe_path(make_recipe: MakeRecipe) -> Path:
    return make_recipe(adapter=NOISY_SMORE, train=TRAIN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_130(recipe_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "stopped"
    process = start(recipe_path, run)
    wait_for_step(process, run, 6)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    step = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (run / f"checkpoint-{step}" / "complete.json").exists()
    assert "--resume" in output
    assert not json.loads((run / "run.json").read_text())["finished"]


def test_the_same_recipe_gives_the_same_bytes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = make_recipe(adapter=NOISY_SMORE)
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        finish(start(path, run))
    assert outcome(runs[0]) == outcome(runs[1])
    assert (runs[0] / "adapter_config.json").read_bytes() == (runs[1] / "adapter_config.json").read_bytes()
