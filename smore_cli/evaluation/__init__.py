"""Benchmarks: tasks as YAML data, scored through lm-evaluation-harness with the loaded model object.

Importing this package is fast; `evaluate` brings lm-eval, torch and transformers when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smore_cli.evaluation.benchmarks import available_benchmarks
from smore_cli.evaluation.results import Sample, TaskResult

if TYPE_CHECKING:
    from smore_cli.evaluation.harness import evaluate

__all__ = ["Sample", "TaskResult", "available_benchmarks", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from smore_cli.evaluation.harness import evaluate

        return evaluate
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
