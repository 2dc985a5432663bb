"""Tasks of lm-evaluation-harness itself, by their own names: prompts, data sets and metrics are as it has them."""

from __future__ import annotations

import difflib
import functools
from typing import Any

from smore_cli.data.quiet import first_line, quiet_datasets
from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation.quiet import quiet_lm_eval

__all__ = ["load_foreign", "near_names"]


def load_foreign(name: str) -> dict[str, Any] | None:
    """Returns the tasks of lm-eval that a name means, one or a group's, as objects by name; None: it has none.

    Raises:
        DataError: a task's data set is out of reach.
        UsageError: a task runs code that a model wrote, looks at pictures, or needs packages that are not here.
    """
    with quiet_lm_eval(), quiet_datasets():
        manager = _manager()
        if name not in manager.task_index:
            return None
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except ImportError as error:
            raise UsageError(f"lm-eval's benchmark '{name}' needs a package: {first_line(error)}") from error
        except Exception as error:  # each kind of data set, and each task's own code, fails in its own way
            problem = f"lm-eval's benchmark '{name}' cannot be loaded: {first_line(error)}"
            hint = "it is read from the hub: connect, or put its data set into the cache first"
            raise DataError(problem, hint) from error
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UsageError(
                f"lm-eval's benchmark '{name}' runs generated code or is not of text", "use lm-eval itself"
            )
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def near_names(name: str, known: list[str]) -> list[str]:
    """Returns the nearest of our names and lm-eval's to a name that is neither."""
    theirs = _manager().all_tasks
    return difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, theirs, n=1)


@functools.cache
def _manager() -> Any:
    """Returns lm-eval's index of its 14,000 tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
