"""Which benchmarks there are, and where their questions come from.

A task is a YAML file in `tasks/`, in lm-eval's format. Its questions are read as a recipe's `multiple_choice` sources
are: from the package itself, the hub, or a file in the user's data folder.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smore_cli.data.formats import MultipleChoice, read_examples
from smore_cli.data.sources import read_source
from smore_cli.errors import DataError, UsageError
from smore_cli.recipe.schema import Source

__all__ = ["Task", "available_benchmarks", "read_tasks"]

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Task:
    """One task, ready to run.

    Attributes:
        config: lm-eval's task config, as in its YAML file.
        questions: `{id, question, choices, label, family}` each; family is None where the task has none.
    """

    config: dict[str, Any]
    questions: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.config["task"])


def available_benchmarks() -> list[str]:
    """Returns the names of all tasks and groups, sorted."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def read_tasks(benchmark: str, data_dir: Path | None = None) -> list[Task]:
    """Returns the tasks of a benchmark with their questions: those of a group, or the task itself.

    Args:
        benchmark: name of a task or a group.
        data_dir: folder with the questions as files; None: each task's own source.

    Raises:
        UsageError: there is no such benchmark (the message suggests the nearest name), or it takes no data folder.
        DataError: questions are missing, out of reach or malformed; the message says what was wanted where.
    """
    known = available_benchmarks()
    if benchmark not in known:
        near = difflib.get_close_matches(benchmark, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}"
        raise UsageError(f"unknown benchmark '{benchmark}'", hint)
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"there is no folder {data_dir}", "--data-dir names a folder of question files")
    config = _config(benchmark)
    return [_read_task(_config(name), data_dir) for name in (config["task"] if "group" in config else [benchmark])]


def _read_task(config: dict[str, Any], data_dir: Path | None) -> Task:
    places = config["metadata"]
    source = Source(format="multiple_choice", **places["source"])
    if data_dir is not None:
        source = _local_source(config, data_dir)
    rows = read_source(source)
    questions = [
        {
            "id": str(row.get("id", number)),
            "question": example.question,
            "choices": list(example.choices),
            "label": example.label,
            "family": str(row[places["family"]]) if "family" in places else None,
        }
        for number, (row, example) in enumerate(zip(rows, read_examples(rows, source.format), strict=True), 1)
        if isinstance(example, MultipleChoice)
    ]
    return Task(config, questions)


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def _local_source(config: dict[str, Any], data_dir: Path) -> Source:
    """Returns the task's file in the user's data folder."""
    name, places = config["task"], config["metadata"]
    if "local_file" not in places:
        raise UsageError(f"benchmark '{name}' brings its own questions", "leave out --data-dir")
    path = data_dir / places["local_file"]
    if not path.is_file():
        hub = f"{places['source']['path']} ({places['source']['name']})"
        raise DataError(
            f"benchmark '{name}' wants the file {path.name}, which is not in {data_dir}",
            f"one {{id, question, choices, label}} a line; without --data-dir it is {hub} from the hub",
        )
    return Source(path=str(path), format="multiple_choice")
