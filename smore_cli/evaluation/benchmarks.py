"""Which benchmarks there are, and what a name means.

a task of ours       a YAML file in `tasks/`, in lm-eval's format, with questions in the plain form (`questions`)
a group              several of them
NAME:letters         a multiple-choice task asked with its choices as A, B, C, ... and scored by the letter
NAME:text            the same scored by the choices' own text
a file               a user's own questions (`own_file`)
any other name       lm-evaluation-harness's own task or group, from the hub (`foreign`)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from smore_cli.errors import DataError, UsageError
from smore_cli.evaluation.foreign import load_foreign, near_names
from smore_cli.evaluation.own_file import is_own_file, read_own_file
from smore_cli.evaluation.questions import read_answers, read_choices, read_shots
from smore_cli.evaluation.wording import as_letters, as_text

__all__ = ["Task", "available_benchmarks", "read_tasks"]

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Task:
    """One task, ready to run.

    Attributes:
        config: lm-eval's task config, as in its YAML file; of a task of lm-eval itself only its name.
        questions: `{id, question, choices, label, family}` each; family is None where the task has none. Where an
            answer is generated, `answer` stands for choices and label.
        shots: solved examples of the same form, for a task that shows some.
        origin: the file or hub dataset of the questions, for people.
        theirs: the task object of a task of lm-eval itself.
    """

    config: dict[str, Any]
    questions: list[dict[str, Any]]
    shots: list[dict[str, Any]] | None = None
    origin: str = ""
    theirs: Any = None

    @property
    def name(self) -> str:
        """The task's name."""
        return str(self.config["task"])


def available_benchmarks() -> list[str]:
    """Returns the names of all tasks and groups that come with this package, sorted."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def read_tasks(benchmark: str, data_dir: Path | None = None) -> list[Task]:
    """Returns the tasks of a benchmark with their questions: those of a group, or the task itself.

    Args:
        benchmark: name of a task or a group, or a file, perhaps with `:letters` or `:text`; or lm-eval's name of one.
        data_dir: folder with the questions as files; None: each task's own source.

    Raises:
        UsageError: there is no such benchmark (the message suggests the nearest name), or it takes no data folder.
        DataError: questions are missing, out of reach or malformed; the message says what was wanted where.
    """
    wording = next((each for each in ("letters", "text") if benchmark.endswith(f":{each}")), "")
    name = benchmark.removesuffix(f":{wording}")
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"there is no folder {data_dir}", "--data-dir names a folder of question files")
    if is_own_file(name):
        config, questions = read_own_file(name)
        return [Task(_worded(config, wording), questions, None, name)]
    if name not in available_benchmarks():
        return _foreign(benchmark, data_dir)
    config = _config(name)
    members = config["task"] if "group" in config else [name]
    return [_read_task(_worded(_config(member), wording), data_dir) for member in members]


def _read_task(config: dict[str, Any], data_dir: Path | None) -> Task:
    if config["output_type"] == "generate_until":
        found = read_answers(config, data_dir)
        return Task(config, found.rows, read_shots(config, data_dir), found.origin)
    found = read_choices(config, data_dir)
    return Task(config, found.rows, None, found.origin)


def _foreign(name: str, data_dir: Path | None) -> list[Task]:
    """Returns the tasks of lm-eval itself that a name means.

    Raises:
        UsageError: there is no such benchmark, or it takes no data folder.
    """
    known = available_benchmarks()
    if (near := difflib.get_close_matches(name, known, n=1, cutoff=0.8)) and data_dir is not None:
        raise UsageError(f"unknown benchmark '{name}'", f"did you mean '{near[0]}'?")
    tasks = load_foreign(name)
    if tasks is None:
        near = near_names(name, known)
        others = f"there are: {', '.join(known)}, a file of your own, and lm-eval's task names"
        raise UsageError(f"unknown benchmark '{name}'", f"did you mean '{near[0]}'?" if near else others)
    if data_dir is not None:
        raise UsageError(f"benchmark '{name}' is lm-eval's and brings its own questions", "leave out --data-dir")
    return [Task({"task": each}, [], None, "lm-eval", theirs) for each, theirs in tasks.items()]


def _worded(config: dict[str, Any], wording: str) -> dict[str, Any]:
    """Returns a task's config in another wording.

    Raises:
        UsageError: its answers are generated.
    """
    if not wording:
        return config
    if config["output_type"] != "multiple_choice":
        raise UsageError(f"benchmark '{config['task']}' has no choices to ask as :{wording}", "leave it out")
    return as_letters(config) if wording == "letters" else as_text(config)


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    return config
