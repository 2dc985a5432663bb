from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation import evaluate
from smore_cli.models.runs import open_run
from smore_cli.recipe.schema import EvalConfig, Recipe
from smore_cli.training.benchmark_scores import benchmark_tasks
from smore_cli.training.loop import train

ROWS = [
    {"question": f"Which number comes after {i}?", "choices": ["ice", f"{i + 1}", "fire"], "label": i % 3}
    for i in range(8)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "piqa_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_scores_while_training_are_those_of_an_evaluation_and_change_no_step(
    recipe: Callable[..., Recipe], data: Path
) -> None:
    def trained(name: str, **evaluation: Any) -> Path:
        steps = {"max_steps": 4, "gradient_census": False}
        train(recipe(train=steps, eval=evaluation, output_dir=str(data / name)), "")
        return data / name

    asked = {"steps": 2, "benchmarks": ["piqa"], "benchmark_data_dir": str(data), "benchmark_limit": 6}
    run, plain = trained("asked", **asked), trained("plain")
    assert (run / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["benchmarks"]) for line in lines if "benchmarks" in line]
    assert [step for step, _ in found] == [2, 4]
    (result,) = evaluate(*open_run(run).load(), ["piqa"], data_dir=data, limit=6)
    assert found[-1][1] == {"piqa": {"acc": round(result.acc, 6), "acc_norm": round(result.acc_norm, 6)}}
    assert json.loads((run / "run.json").read_text())["result"]["benchmarks"] == found[-1][1]


def test_a_benchmark_that_cannot_be_read_is_refused_before_training(recipe: Callable[..., Recipe], data: Path) -> None:
    with pytest.raises(DataError, match="boolq_test"):
        train(recipe(eval={"benchmarks": ["boolq"], "benchmark_data_dir": str(data)}), "")
    assert not (data / "run" / "metrics.jsonl").exists()


def test_a_sharded_model_takes_no_benchmarks(data: Path) -> None:
    config = EvalConfig(benchmarks=["piqa"], benchmark_data_dir=str(data))
    assert [task.name for task in benchmark_tasks(config, sharded=False)] == ["piqa"]
    with pytest.raises(UsageError, match="sharded"):
        benchmark_tasks(config, sharded=True)
