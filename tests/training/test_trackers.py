"""Metrics reach a tracker under the names its pages show, and no tracker can end a run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smore_cli.errors import UsageError
from smore_cli.recipe.schema import LogConfig, Recipe
from smore_cli.training.loop import train
from smore_cli.training.trackers import Trackers, flat_config, flat_metrics, require_trackers


def test_tensorboard_gets_the_numbers_of_metrics_jsonl_and_the_recipe(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    made = recipe(
        data={"eval_fraction": 0.05},
        train={"max_steps": 2, "gradient_census": False},
        log={"report_to": ["tensorboard"]},
    )
    train(made, "")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for tag, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate"), ("eval/loss", "eval_loss")):
        logged = [(event.step, event.value) for event in events.Scalars(tag)]
        assert logged == [(line["step"], pytest.approx(line[key])) for line in lines if key in line]
    (settings,) = (tmp_path / "run/tensorboard").glob("*/hparams.yml")
    assert "adapter.method: smore" in settings.read_text()


def test_a_line_is_flat_and_a_recipe_is_flat() -> None:
    line = {"step": 3, "loss": 1.5, "routing": {"0": {"entropy": 0.5, "load": [0.5, 0.5]}}, "note": "x", "done": True}
    assert flat_metrics(line) == {"train/loss": 1.5, "train/routing/0/entropy": 0.5}
    assert flat_metrics({"step": 3, "eval_loss": 2.0, "eval_rows": 4}) == {"eval/loss": 2.0, "eval/rows": 4}
    values = {"a": {"b": 1, "c": [1, 2], "d": None}, "e": "f"}
    assert flat_config(values) == {"a.b": 1, "a.c": "[1, 2]", "a.d": "null", "e": "f"}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed here")
def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(recipe: Callable[..., Recipe]) -> None:
    require_trackers(LogConfig())
    with pytest.raises(UsageError, match=r"log\.report_to names mlflow, which is not installed"):
        train(recipe(log={"report_to": ["mlflow"]}), "")


class Away(GeneralTracker):
    """A service that cannot be reached."""

    name, requires_logging_directory = "away", False

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        raise ConnectionError("no route to host")


def test_a_service_that_fails_is_named_once_and_left_alone() -> None:
    said: list[str] = []
    trackers = Trackers(said.append)
    trackers.trackers = [Away()]
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    assert said == ["warning: away failed and gets no more numbers (metrics.jsonl does): no route to host"]
