"""Checkpoints: complete or not there.

    checkpoint-N/  adapter_config.json adapter_model.safetensors  optimizer.pt scheduler.pt rng_state.pth
                   trainer_state.json data_state.json  complete.json

A checkpoint is written beside its place, flushed to the disk and renamed; `complete.json`, written last, holds the hash
of every other file. One that does not match it is ignored, which is said, and the one before it is used. A write that
fails (a full disk, a folder that may no longer be written) leaves nothing behind and touches no other checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smore_cli.atomic import atomic_folder, write_text, writing
from smore_cli.errors import CheckpointError
from smore_cli.models.adapter_files import load_adapter_state, save_adapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from smore_cli.errors import SmoreError
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.shard import WholeOptimizer
    from smore_cli.training.zero import Zero

__all__ = [
    "TrainerState",
    "checkpoints",
    "damage",
    "load_checkpoint",
    "newest_complete",
    "processes_of",
    "prune",
    "random_state",
    "rescue_checkpoint",
    "save_checkpoint",
    "step_of",
]

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
        best: of the best evaluation so far (`training.best`): its step, its metric and what was measured.
        without_improvement: evaluations in a row that brought none.
        latest: the newest losses.
        window: the steps since the last line of metrics (`training.window`).
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    data_hash: str = ""
    best: dict[str, Any] = field(default_factory=dict)
    without_improvement: int = 0
    latest: dict[str, Any] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run_dir: Path,
    state: TrainerState,
    model: nn.Module,
    optimizer: Optimizer | WholeOptimizer | Zero,
    scheduler: LRScheduler,
    recipe: Recipe,
    random_states: Sequence[dict[str, Any]] = (),
) -> Path:
    """Writes `run_dir/checkpoint-N` atomically and returns its path.

    Args:
        run_dir: the run's folder.
        state: how far it is.
        model: with its adapter whole.
        optimizer: with its state whole.
        scheduler: of the learning rate.
        recipe: what is run.
        random_states: `random_state()` of every process of the run; none: of this one.

    Raises:
        CheckpointError: it could not be written; nothing is left of it, and every other checkpoint is as it was.
    """
    target = run_dir / f"checkpoint-{state.step}"
    with writing(target, CheckpointError):
        if target.exists():  # left incomplete by hand or by a full disk: a complete one would have been resumed from
            shutil.rmtree(target)
        with atomic_folder(target) as folder:
            save_adapter(model, recipe.adapter, folder, base=recipe.model)
            _torch_save(optimizer.state_dict(), folder / "optimizer.pt")
            _torch_save(scheduler.state_dict(), folder / "scheduler.pt")
            random_states = random_states or [random_state()]
            for process, found in enumerate(random_states):
                _torch_save(found, folder / _random_file(process))
            progress = {key: value for key, value in asdict(state).items() if key != "data_hash"}
            write_text(folder / "trainer_state.json", json.dumps(progress, indent=1, sort_keys=True) + "\n")
            data = {"data_hash": state.data_hash, "next_step": state.step, "seed": recipe.seed}
            data |= {"processes": len(random_states)}
            write_text(folder / "data_state.json", json.dumps(data, indent=1, sort_keys=True) + "\n")
            hashes = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
            write_text(folder / MARKER, json.dumps(hashes, indent=1) + "\n")
    return target


def rescue_checkpoint(error: SmoreError, run_dir: Path, save: Callable[[Path], Path]) -> SmoreError:
    """Writes the state somewhere else, because its own folder could not be written and the run is about to end.

    Args:
        error: what went wrong with the folder.
        run_dir: the run's folder.
        save: writes a checkpoint below the folder it is given, and returns its path.

    Returns:
        The error to end with: it says where the state is now, or that it is nowhere.
    """
    elsewhere = Path(tempfile.gettempdir()) / f"smore-rescue-{run_dir.absolute().name}-{os.getpid()}"
    try:
        folder = save(elsewhere)
    except CheckpointError as again:
        message = f"{error.message}; nor could {again.message}: the run is only in its last checkpoint"
        return CheckpointError(message, f"{error.hint}; then go on with --resume")
    message = f"{error.message}; nothing is lost: the state is in {folder}"
    return CheckpointError(message, f"{error.hint}; then go on with --checkpoint {folder}")


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer | WholeOptimizer | Zero,
    scheduler: LRScheduler,
    data_hash: str,
    process: int = 0,
) -> TrainerState:
    """Restores everything a checkpoint holds, the random state of `process` last, and returns how far it was.

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
    if (random_file := folder / _random_file(process)).is_file():  # none where there were fewer processes
        _restore_random_state(torch.load(random_file, weights_only=True))
    return TrainerState(**progress, data_hash=data_hash)


def processes_of(folder: Path) -> int:
    """Returns how many processes a checkpoint was written by."""
    return int(json.loads((folder / "data_state.json").read_text()).get("processes", 1))


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


def step_of(folder: Path) -> int:
    """Returns the step a checkpoint was written after, from its name."""
    match = _STEP.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint", "its name would be checkpoint-N")
    return int(match[1])


def prune(run_dir: Path, limit: int | None, newest: int, best: int | None = None) -> None:
    """Removes the oldest checkpoints beyond `limit`; those of the steps `newest` and `best` stay whatever it is.

    Those of later steps go first: they are damaged, or the run went back to an earlier one.
    """
    if limit is None:
        return
    found = checkpoints(run_dir)
    kept = [folder for folder in found if step_of(folder) in (newest, best)]
    others = sorted((folder for folder in found if folder not in kept), key=lambda folder: step_of(folder) > newest)
    for folder in others[max(0, limit - len(kept)) :]:
        shutil.rmtree(folder)


_STEP = re.compile(r"checkpoint-(\d+)")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _torch_save(value: Any, path: Path) -> None:
    try:
        with path.open("xb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch complains of its own file position and hides the system's reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _random_file(process: int) -> str:
    return f"rng_state_{process}.pth" if process else "rng_state.pth"


def random_state() -> dict[str, Any]:
    """The state of every generator a step may draw from, in types that `weights_only` loading accepts."""
    version, keys, gauss = random.getstate()
    name, np_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, list(keys), gauss),
        "numpy": (str(name), [int(key) for key in np_keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device) for device in _own_gpus()],
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, np_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(np_keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        for device, found in zip(_own_gpus(), state["cuda"], strict=True):
            torch.cuda.set_rng_state(found, device)


def _own_gpus() -> list[int]:
    """Returns all GPUs, or with several processes this one's: looking at another would take memory there."""
    if not torch.cuda.is_available():
        return []
    alone = not torch.distributed.is_initialized()
    return list(range(torch.cuda.device_count())) if alone else [torch.cuda.current_device()]
