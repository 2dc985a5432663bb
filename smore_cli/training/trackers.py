"""Metrics to TensorBoard, Weights & Biases or MLflow, through accelerate's trackers; nothing is imported unless asked.

    train/loss train/aux_loss ...      the numbers of a training line of metrics.jsonl, nested ones as routing/0/...
    eval/loss eval/accuracy ...        those of an evaluation
    config                             the resolved recipe, flat: train.learning_rate

The run folder keeps what the services call the run (`trackers.json`), so that a resumed run goes on where it was.
metrics.jsonl has everything whatever a service does: one that fails is named once and left alone.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text
from smore_cli.errors import SmoreError, UsageError
from smore_cli.training.progress import is_evaluation

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate.tracking import GeneralTracker

    from smore_cli.recipe.schema import LogConfig, Recipe

__all__ = ["Trackers", "flat_config", "flat_metrics", "require_trackers"]

IDS = "trackers.json"


def require_trackers(log: LogConfig) -> None:
    """Refuses a tracker whose package is not there.

    Raises:
        UsageError: with the command that installs it.
    """
    for name in log.report_to:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"log.report_to names {name}, which is not installed", f"pip install {name}")


class Trackers:
    """The trackers of a run; none until they are opened, on the main process only.

    Attributes:
        trackers: those that work.
        say: told when one fails.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.trackers: list[GeneralTracker] = []
        self.say = say

    def open(self, recipe: Recipe, run_dir: Path) -> None:
        """Opens the recipe's trackers, or goes on with those of the run in `run_dir`, and gives them the recipe.

        Raises:
            SmoreError: a service refuses, as for want of a login.
        """
        if not recipe.log.report_to:
            return
        path = run_dir / IDS
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        for name in dict.fromkeys(recipe.log.report_to):
            try:
                tracker = _open(name, recipe, run_dir, known.get(name))
                tracker.start()
                self.trackers.append(tracker)
                if name not in known:  # MLflow refuses to change what it was told, and TensorBoard would list it twice
                    tracker.store_init_configuration(flat_config(recipe.model_dump(mode="json")))
                known[name] = _id(name, tracker)
            except Exception as error:  # whatever a service's client raises
                self.close()
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise SmoreError(
                    f"log.report_to: {name} cannot be used: {reason}",
                    f"set it up, or take {name} out of log.report_to; then go on with --resume",
                ) from error
        write_text(path, json.dumps(known, indent=1) + "\n")

    def log(self, values: dict[str, Any]) -> None:
        """Passes a line of metrics.jsonl on."""
        self._each(lambda tracker: tracker.log(flat_metrics(values), step=values["step"]))

    def close(self) -> None:
        """Ends the run at every service, whatever became of it here."""
        self._each(lambda tracker: tracker.finish())
        self.trackers = []

    def _each(self, call: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # a service that is away must not end a training
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self.say(f"warning: {tracker.name} failed and gets no more numbers (metrics.jsonl does): {reason}")
                self.trackers.remove(tracker)


def _open(name: str, recipe: Recipe, run_dir: Path, known: str | None) -> GeneralTracker:
    from accelerate import tracking

    log, title = recipe.log, recipe.log.run_name or run_dir.absolute().name
    tracker: GeneralTracker
    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=run_dir)
    elif name == "wandb":
        again = {"id": known, "resume": "allow"} if known else {}
        tracker = tracking.WandBTracker(log.project, name=title, dir=str(run_dir), **again)
    else:
        tracker = tracking.MLflowTracker(log.project, run_name=title, run_id=known)
    return tracker


def _id(name: str, tracker: GeneralTracker) -> str:
    """What the service calls the run."""
    if name == "wandb":
        return str(tracker.tracker.id)
    return str(tracker.tracker.info.run_id) if name == "mlflow" else name


def flat_metrics(values: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line of metrics.jsonl under the names trackers show; lists are left out."""
    kind = "eval" if is_evaluation(values) else "train"
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value

    for key, value in values.items():
        if key != "step":
            add(f"{kind}/{key.removeprefix('eval_')}", value)
    return found


def flat_config(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a recipe's values under dotted names, in types that every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flat_config(value, f"{name}.")
        else:
            found[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return found
