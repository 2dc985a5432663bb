"""Benchmarks while training, with the code of `smore eval`: the same questions, prompts and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from smore_cli.errors import UsageError
from smore_cli.evaluation.benchmarks import Task, read_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from smore_cli.recipe.schema import EvalConfig
    from smore_cli.training.setup import Setup

__all__ = ["benchmark_scores", "benchmark_tasks"]


def benchmark_tasks(config: EvalConfig, *, sharded: bool) -> list[Task]:
    """Returns the tasks of `eval.benchmarks`, each once, read before anything else costs time.

    Raises:
        UsageError: there is no such benchmark, its questions are not there, or no process has the whole model.
    """
    if config.benchmarks and sharded:
        raise UsageError(
            "eval.benchmarks: the model is sharded, and no process could answer a question by itself",
            "leave it out, and use smore eval afterwards",
        )
    folder = None if config.benchmark_data_dir is None else Path(config.benchmark_data_dir)
    tasks = [task for name in config.benchmarks for task in read_tasks(name, folder)]
    return list({task.name: task for task in tasks}.values())


def benchmark_scores(setup: Setup) -> dict[str, Any]:
    """Returns `{"benchmarks": {task: {metric: value}}}`; empty where the recipe names none.

    The main process answers and the others wait; the model is in training mode again afterwards, and no random
    generator has moved.
    """
    if not setup.tasks:
        return {}
    from smore_cli.evaluation.harness import score  # lm-eval takes seconds to import
    from smore_cli.evaluation.subjects import training_template

    def scored() -> dict[str, Any]:
        results = score(
            cast("PreTrainedModel", setup.model),
            setup.tokenizer,
            setup.tasks,
            limit=setup.recipe.eval.benchmark_limit,
            template=training_template(setup.recipe.data),
        )
        return {
            result.task: {metric: round(result.value(metric), 6) for metric in result.metrics} | result.others
            for result in results
        }

    return {"benchmarks": setup.processes.on_main(scored)}
