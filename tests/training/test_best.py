"""The best checkpoint is kept and found again, and a run that stops early stops there however often it is resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import CheckpointError, UsageError
from smore_cli.recipe.schema import EvalConfig, Recipe
from smore_cli.training.best import drop_former_best, is_best, out_of_patience
from smore_cli.training.checkpoint import TrainerState, prune
from smore_cli.training.loop import train
from smore_cli.training.run import Run

MakeRecipe = Callable[..., Recipe]


def judged(config: EvalConfig, values: list[float]) -> tuple[list[bool], list[int], TrainerState]:
    """Which evaluations were the best so far, and how many without improvement there were after each."""
    state, best, waited = TrainerState(), [], []
    for step, value in enumerate(values, 1):
        state.step = step
        best.append(is_best(config, state, {config.metric_for_best_model: value}))
        waited.append(state.without_improvement)
    return best, waited, state


def test_less_loss_and_more_accuracy_are_better_unless_the_recipe_says_otherwise() -> None:
    values = [0.5, 0.4, 0.6]
    assert judged(EvalConfig(), values)[0] == [True, True, False]
    assert judged(EvalConfig(metric_for_best_model="eval_accuracy"), values)[0] == [True, False, True]
    assert judged(EvalConfig(greater_is_better=True), values)[0] == [True, False, True]
    assert judged(EvalConfig(), [math.nan, 0.5, math.nan])[0] == [False, True, False]


def test_a_gain_below_the_threshold_is_the_best_but_costs_patience() -> None:
    config = EvalConfig(early_stopping_patience=2, early_stopping_threshold=0.1)
    best, waited, state = judged(config, [1.0, 0.95, 0.8, 0.8, 0.79])
    assert best == [True, True, True, False, True]
    assert waited == [0, 1, 0, 1, 2]
    assert out_of_patience(config, state)
    assert not out_of_patience(EvalConfig(), state)
    assert state.best["step"] == 5


@pytest.mark.parametrize(("limit", "kept"), [(1, [3, 9]), (2, [3, 9]), (3, [3, 8, 9]), (None, [1, 3, 8, 9])])
def test_the_limit_never_takes_the_best_nor_the_newest(tmp_path: Path, limit: int | None, kept: list[int]) -> None:
    for step in (1, 3, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, limit, 9, best=3)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize(("limit", "kept"), [(1, [3, 8]), (3, [1, 3, 8]), (4, [1, 3, 8, 9])])
def test_a_later_checkpoint_that_was_passed_over_goes_before_those_of_the_run(
    tmp_path: Path, limit: int, kept: list[int]
) -> None:
    """As where the newest was damaged: it must not push out what is written after going on from the one before."""
    for step in (1, 3, 8, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    prune(tmp_path, limit, 8, best=3)
    assert sorted(int(path.name[11:]) for path in tmp_path.iterdir()) == kept


@pytest.fixture
def stopping(recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Recipe]:
    """A run that takes a falling loss for a turn to the worse: the first evaluation stays the best."""

    def make(name: str, **evaluation: Any) -> Recipe:
        rules = {"steps": 2, "greater_is_better": True, "early_stopping_patience": 2, "load_best_model_at_end": True}
        return recipe(
            data={"eval_fraction": 0.05},
            train={"max_steps": 20, "save_steps": 3, "logging_steps": 4, "gradient_census": False},
            eval=rules | evaluation,
            output_dir=str(tmp_path / name),
        )

    return make


def weights(run: Path) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def evaluations(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_stops_at_the_same_step_with_the_same_adapter_however_it_was_resumed(
    stopping: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    values = train(stopping("whole"), "")
    assert values["result"]["steps"] == 6
    assert values["result"]["adapter_step"] == values["result"]["best"]["step"] == 2
    first = evaluations(whole)[0]
    assert values["result"]["eval_loss"] == values["result"]["best"]["value"] == first
    assert (whole / "latest").read_text() == "checkpoint-6\n"
    assert (whole / "best").read_text() == "checkpoint-2\n"
    assert weights(whole) == weights(whole / "checkpoint-2") != weights(whole / "checkpoint-6")
    assert "the best by eval_loss" in (whole / "README.md").read_text()

    for name, lost in (("midway", ["checkpoint-6"]), ("stopped", [])):
        run = tmp_path / name
        shutil.copytree(whole, run)
        for folder in lost:
            shutil.rmtree(run / folder)
        (run / "best").unlink()
        (run / "run.json").write_text(json.dumps(values | {"finished": False}))
        again = train(stopping(name), "", resume=True)["result"]
        assert {**again, "seconds": 0} == {**values["result"], "seconds": 0}
        assert weights(run) == weights(whole)
        assert [(run / pointer).read_text() for pointer in ("latest", "best")] == ["checkpoint-6\n", "checkpoint-2\n"]
    (run / "run.json").write_text(json.dumps(values | {"finished": False}))
    with pytest.raises(UsageError, match="early_stopping_patience: 2 -> 3"):
        train(stopping("stopped", early_stopping_patience=3), "", resume=True)


def test_a_checkpoint_that_is_only_the_best_goes_when_another_is(recipe: MakeRecipe, tmp_path: Path) -> None:
    """With a loss that falls, every evaluation is the best so far."""
    train(
        recipe(
            data={"eval_fraction": 0.05},
            train={"max_steps": 4, "save_steps": 2, "gradient_census": False},
            eval={"steps": 1},
        ),
        "",
    )
    losses = evaluations(tmp_path / "run")
    assert losses == sorted(losses, reverse=True)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert (tmp_path / "run/best").read_text() == "checkpoint-4\n"


def test_an_evaluation_whose_checkpoint_could_not_be_written_is_not_the_best(
    recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loss that falls; otherwise the run would look for the best where nothing lies."""
    write = Run.write_state

    def fails_at_the_end(self: Run, folder: Path) -> Path:
        if self.state.step == 4:
            raise CheckpointError("the disk is full")
        return write(self, folder)

    monkeypatch.setattr(Run, "write_state", fails_at_the_end)
    values = train(
        recipe(
            data={"eval_fraction": 0.05},
            train={"max_steps": 4, "save_steps": 3, "gradient_census": False},
            eval={"steps": 2, "load_best_model_at_end": True},
        ),
        "",
    )
    first, last = evaluations(tmp_path / "run")
    assert last < first == values["result"]["best"]["value"] == values["result"]["eval_loss"]
    assert values["result"]["best"]["step"] == values["result"]["adapter_step"] == 2
    assert (tmp_path / "run/best").read_text() == "checkpoint-2\n"
    assert weights(tmp_path / "run") == weights(tmp_path / "run/checkpoint-2")


def test_a_former_best_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere")  # `rmtree` refuses links
    drop_former_best(tmp_path, 1, save_steps=2)
    assert (tmp_path / "elsewhere").is_dir()
