"""Checkpoints: complete or not there.

    checkpoint-N/  adapter_config.json adapter_model.safetensors  optimizer.pt scheduler.pt rng_state.pth
                   trainer_state.json data_state.json  complete.json

A checkpoint is written beside its place, flushed to the disk and renamed; `complete.json`, written last, holds the hash
of every other file. One that does not match it is ignored, which is said, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smore_cli.atomic import atomic_folder, write_text
from smore_cli.errors import CheckpointError
from smore_cli.models.adapter_files import load_adapter_state, save_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from smore_cli.recipe.schema import Recipe

__all__ = ["TrainerState", "checkpoints", "load_checkpoint", "newest_complete", "prune", "save_checkpoint"]

MARKER = "complete.json"


@dataclass
class TrainerState:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        tokens: real tokens seen.
        supervised_tokens: tokens learned from.
        seconds: time spent in steps, over all parts of an interrupted run.
        data_hash: hash of the tokenised training rows; with `step` and the seed it fixes all data to come.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    data_hash: str = ""


def save_checkpoint(
    run_dir: Path, state: TrainerState, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, recipe: Recipe
) -> Path:
    """Writes `run_dir/checkpoint-N` atomically and returns its path."""
    target = run_dir / f"checkpoint-{state.step}"
    if target.exists():  # left incomplete by hand or by a full disk: a complete one would have been resumed from
        shutil.rmtree(target)
    with atomic_folder(target) as folder:
        save_adapter(model, recipe.adapter, folder, base=recipe.model)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")
        torch.save(_random_state(), folder / "rng_state.pth")
        progress = {key: value for key, value in asdict(state).items() if key != "data_hash"}
        write_text(folder / "trainer_state.json", json.dumps(progress, indent=1, sort_keys=True) + "\n")
        data = {"data_hash": state.data_hash, "next_step": state.step, "seed": recipe.seed}
        write_text(folder / "data_state.json", json.dumps(data, indent=1, sort_keys=True) + "\n")
        hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        write_text(folder / MARKER, json.dumps(hashes, indent=1) + "\n")
    return target


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, data_hash: str
) -> TrainerState:
    """Restores everything a checkpoint holds, the random state last, and returns how far it was.

    Raises:
        CheckpointError: the training data is not what the checkpoint was trained on.
    """
    data = json.loads((folder / "data_state.json").read_text())
    if data["data_hash"] != data_hash:
        raise CheckpointError(
            f"{folder}: the training rows are not those this run was started with",
            "restore the data files, tokenizer and data settings, or start a new run with --output-dir",
        )
    progress = json.loads((folder / "trainer_state.json").read_text())
    load_adapter_state(model, folder)
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu"))
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
    _restore_random_state(torch.load(folder / "rng_state.pth", weights_only=True))
    return TrainerState(**progress, data_hash=data_hash)


def checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first, complete or not."""
    found = [(int(match[1]), path) for path in run_dir.glob("checkpoint-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Returns the newest complete checkpoint of a run, saying which ones were passed over and why."""
    for folder in checkpoints(run_dir):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"ignoring {folder.name}: {problem}")
    return None


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None where it is complete."""
    marker = folder / MARKER
    if not marker.is_file():
        return f"it is not complete (no {MARKER})"
    try:
        hashes: dict[str, str] = json.loads(marker.read_text())
    except json.JSONDecodeError:
        return f"{MARKER} is damaged"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} is damaged"
    return None


def prune(run_dir: Path, limit: int | None) -> None:
    """Removes the oldest checkpoints beyond `limit`."""
    for folder in checkpoints(run_dir)[limit:] if limit else []:
        shutil.rmtree(folder)


_STEP = re.compile(r"checkpoint-(\d+)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _random_state() -> dict[str, Any]:
    """The state of every generator a step may draw from, in types that `weights_only` loading accepts."""
    version, keys, gauss = random.getstate()
    name, np_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, list(keys), gauss),
        "numpy": (str(name), [int(key) for key in np_keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, np_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(np_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
