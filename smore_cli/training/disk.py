"""What a run will write, so that a disk that is too small is found before the first step.

    checkpoint = adapter + optimiser state        kept at once = checkpoints that save_total_limit leaves, + 1 new
    run        = checkpoint x kept at once + adapter + 1 MiB for all that is text

The new checkpoint is complete before an old one is removed, which is why it is counted. With `eval.steps` the best
evaluation so far has a checkpoint too, whatever the limit.
"""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

from smore_cli.atomic import nearest_folder
from smore_cli.errors import UsageError
from smore_cli.training.shard import whole_numel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from smore_cli.recipe.schema import Recipe, TrainConfig

__all__ = ["checkpoint_bytes", "checkpoints_kept", "require_space", "run_bytes", "show_bytes"]

TEXT = 1 << 20
STATE_BYTES = {
    "adamw_torch_fused": 8,  # two moments in float32
    "paged_adamw_32bit": 8,
    "adamw_bnb_8bit": 2,  # two moments in one byte each
    "paged_adamw_8bit": 2,
    "adafactor": 0,  # a row and a column of each matrix
}
"""Bytes of optimiser state for each trainable number; small tensors and headers are left out, so this is no more."""


def checkpoint_bytes(model: nn.Module, train: TrainConfig) -> int:
    """Returns the least a checkpoint takes: every trainable tensor, and the optimiser's state of it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = STATE_BYTES[train.optim]
    return sum(whole_numel(p) * (p.element_size() + state) for p in parameters)


def checkpoints_kept(recipe: Recipe, total_steps: int) -> int:
    """Returns how many checkpoints lie in the run folder at the same time, at most."""
    save, limit = recipe.train.save_steps, recipe.train.save_total_limit
    due = (total_steps - 1) // save
    best = 0  # steps that may have a checkpoint only because they are the best so far
    if every := recipe.eval.steps:
        best = -(-total_steps // every) - (total_steps - 1) // math.lcm(save, every)
    if limit is None:
        return due + min(best, 2)  # the best, and the next one that is about to take its place
    return min(due + best, max(limit, 2 if best else 1) + 1)


def run_bytes(model: nn.Module, recipe: Recipe, total_steps: int) -> int:
    """Returns the least a whole run takes on the disk."""
    adapter = sum(whole_numel(p) * p.element_size() for p in model.parameters() if p.requires_grad)
    return checkpoint_bytes(model, recipe.train) * checkpoints_kept(recipe, total_steps) + adapter + TEXT


def require_space(run_dir: Path, model: nn.Module, recipe: Recipe, total_steps: int) -> None:
    """Refuses a run that cannot fit on the disk.

    What the folder holds already is counted as free: a run that goes on writes the rest of the same.

    Raises:
        UsageError: with what it needs, what there is, and what to set.
    """
    needed, each = run_bytes(model, recipe, total_steps), checkpoint_bytes(model, recipe.train)
    held = sum(file.stat().st_size for file in run_dir.rglob("*") if file.is_file()) if run_dir.is_dir() else 0
    free = shutil.disk_usage(nearest_folder(run_dir)).free
    if needed <= free + held:
        return
    kept = checkpoints_kept(recipe, total_steps)
    hint = "make room, or choose another disk with --output-dir"
    if kept > 1:
        hint += ", or keep fewer checkpoints with --set train.save_total_limit=2"
    raise UsageError(
        f"the run would not fit on the disk of {run_dir}: it needs {show_bytes(needed)} "
        f"({kept:,} checkpoints of {show_bytes(each)} and the adapter), {show_bytes(free)} are free",
        hint,
    )


def show_bytes(size: int) -> str:
    """Returns a size for people: `1.2 GiB`."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
