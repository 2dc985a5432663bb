"""Killed fifty times, half of them in the writing of a checkpoint, runs end bit for bit where undisturbed ones do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeRecipe = Callable[..., Path]
KILLS = 25  # of each of the two
NOISY_SMORE = {
    "method": "smore",
    "target_modules": ["q_proj"],
    "rank": [2, 2],
    "num_experts": [4, 4],
    "fanout": [2, 2],
    "gate": "noisy_topk",  # draws random numbers in every pass
    "router_dim": 4,
    "key_dim": 4,
}
LORA = {"method": "lora", "target_modules": ["q_proj", "v_proj"], "rank": 2, "dropout": 0.2}
SHORT = {
    "max_steps": 14,
    "save_steps": 2,
    "save_total_limit": 2,
    "per_device_batch_size": 2,
    "global_batch_size": 4,
    "logging_steps": 3,
    "gradient_census": False,
    "dataloader_num_workers": 1,
}


@pytest.mark.parametrize("kind", ["packed and mixed", "streamed"])
def test_however_often_it_is_killed_it_ends_where_an_undisturbed_run_ends(
    make_recipe: MakeRecipe, questions: Path, tmp_path: Path, project: Path, kind: str
) -> None:
    lines = questions.read_text().splitlines(keepends=True)
    sources: list[dict[str, Any]] = []
    for name, weight, part in (("few", 3.0, lines[:20]), ("many", 1.0, lines[20:90])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(part))
        sources.append({"path": str(path), "format": "multiple_choice", "weight": weight})
    packed = kind == "packed and mixed"
    data = {"packing": True} if packed else {"streaming": True, "shuffle_buffer": 16}
    recipe = make_recipe(
        adapter=NOISY_SMORE if packed else LORA,
        data={"train": sources, "max_length": 64, **data},
        train=SHORT,
    )
    seed = int.from_bytes(os.urandom(4), "big")
    command = [sys.executable, "-m", "tests.training.crash", str(recipe), str(tmp_path), str(KILLS), str(seed)]
    process = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900, check=False)
    assert process.returncode == 0, f"seed {seed}\n{process.stderr}"
    counts = json.loads(process.stdout.splitlines()[-1])
    print(counts)  # shown with -s, or where it fails
    assert counts["inside"] + counts["anywhere"] >= KILLS
    assert min(counts["inside"], counts["anywhere"]) >= KILLS // 3, counts
    assert counts["resumed"] >= KILLS // 2, counts
