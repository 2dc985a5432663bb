"""The best checkpoint, and stopping when it stays the best.

    gain = value - best value                       times -1 where less is better; a first value gains everything
    best          gain > 0                          a checkpoint is written
    improvement   gain > early_stopping_threshold   patience starts anew

The run folder has two small text files that name a checkpoint folder each: `latest`, the newest, and `best`. What has
been seen is part of the trainer's state, so that a resumed run stops where an undisturbed one does.
"""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_bytes, write_text
from smore_cli.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from smore_cli.training.checkpoint import damage

if TYPE_CHECKING:
    from pathlib import Path

    from smore_cli.recipe.schema import EvalConfig
    from smore_cli.training.checkpoint import TrainerState

__all__ = ["drop_former_best", "is_best", "out_of_patience", "point", "take_best"]


def is_best(config: EvalConfig, state: TrainerState, values: dict[str, Any]) -> bool:
    """Judges an evaluation, notes in the state what it means, and returns whether it is the best so far.

    Args:
        config: by which metric, and what an improvement is.
        state: of the run; its `best` and `without_improvement` are brought up to date.
        values: the newest numbers of training and evaluation.
    """
    metric = config.metric_for_best_model
    more = metric.endswith("accuracy") if config.greater_is_better is None else config.greater_is_better
    value = float(values[metric])
    comparable = (state.best.get("metric"), state.best.get("greater_is_better")) == (metric, more)
    gain = (value - state.best["value"]) * (1 if more else -1) if comparable else math.inf
    if not math.isfinite(value):
        gain = -math.inf
    state.without_improvement = 0 if gain > config.early_stopping_threshold else state.without_improvement + 1
    if gain <= 0:
        return False
    measured = {key: values[key] for key in ("eval_loss", "eval_accuracy", "benchmarks") if key in values}
    state.best = {
        "step": state.step,
        "metric": metric,
        "greater_is_better": more,
        "value": value,
        "measured": measured,
    }
    return True


def out_of_patience(config: EvalConfig, state: TrainerState) -> bool:
    """Whether as many evaluations in a row as `early_stopping_patience` brought no improvement."""
    patience = config.early_stopping_patience
    return patience is not None and state.without_improvement >= patience


def point(run_dir: Path, state: TrainerState) -> None:
    """Makes the files `latest` and `best` name the checkpoints of the state's step and of its best evaluation."""
    for name, step in (("latest", state.step), ("best", state.best.get("step"))):
        if (run_dir / f"checkpoint-{step}").is_dir():
            write_text(run_dir / name, f"checkpoint-{step}\n")


def drop_former_best(run_dir: Path, step: int | None, save_steps: int) -> None:
    """Removes the checkpoint of `step`, which was the best, unless it was due at that step anyway."""
    folder = run_dir / f"checkpoint-{step}"
    if step is not None and step % save_steps and folder.is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # what a network disk holds on to is in the way, and no reason to end


def take_best(run_dir: Path, state: TrainerState) -> str | None:
    """Makes the best checkpoint's adapter the run's; returns what is wrong with the checkpoint where it cannot."""
    folder = run_dir / f"checkpoint-{state.best['step']}"
    if problem := damage(folder):
        return problem
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        write_bytes(run_dir / name, (folder / name).read_bytes())
    return None
