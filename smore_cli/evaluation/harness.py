"""Running benchmarks through lm-evaluation-harness: its tasks, prompts and metrics, our questions and our scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import datasets
from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from smore_cli.data.quiet import quiet_datasets
from smore_cli.errors import ModelError
from smore_cli.evaluation.benchmarks import Task, read_tasks
from smore_cli.evaluation.journal import NO_JOURNAL, Journal
from smore_cli.evaluation.quiet import quiet_lm_eval
from smore_cli.evaluation.results import Sample, TaskResult
from smore_cli.evaluation.scoring import PrefixSharingLM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Template", "evaluate", "score"]

Template = Literal["plain", "chat"]

FEWSHOT_SEED = 1234
"""lm-eval's own seed of the choice of solved examples."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[str],
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    template: Template = "plain",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[TaskResult]:
    """Reads the questions of benchmarks and scores a model on them: `read_tasks`, then `score`.

    Returns:
        One result a task, in the order of `benchmarks`, groups expanded, each task once.
    """
    tasks = {task.name: task for benchmark in benchmarks for task in read_tasks(benchmark, data_dir)}
    return score(
        model,
        tokenizer,
        list(tasks.values()),
        limit=limit,
        batch_size=batch_size,
        template=template,
        on_progress=on_progress,
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    template: Template = "plain",
    on_progress: Callable[[int, int], None] | None = None,
    journal: Journal = NO_JOURNAL,
) -> list[TaskResult]:
    """Scores a model, as it is loaded (an active adapter counts), on tasks.

    lm-eval's `evaluate` is called and not its `simple_evaluate`, which also reseeds every random generator of the
    process and starts subprocesses to describe the machine (several seconds).

    Args:
        model: a causal language model of transformers; its train or eval mode is the same afterwards.
        tokenizer: its tokenizer.
        tasks: at least one, each once.
        limit: the first so many questions of each task; None: all.
        batch_size: questions a forward pass; None: as many as their length and the device allow.
        template: chat wraps every question with the tokenizer's chat template.
        on_progress: called with the number of choices (or answers) done and the number in all.
        journal: where answers are kept, and taken from, as they come.

    Returns:
        One result a task, in order.

    Raises:
        ModelError: `template` is chat and the tokenizer has no chat template.
        DataError: a choice cannot be scored.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template", "evaluate with the plain template")
    was_training = model.training
    try:
        with quiet_lm_eval(), quiet_datasets():
            built = {task.name: _build(task, template) for task in tasks}
            found = evaluator.evaluate(
                PrefixSharingLM(model, tokenizer, batch_size=batch_size, on_progress=on_progress, journal=journal),
                {"tasks": built},
                limit=limit,
                bootstrap_iters=0,  # standard errors are computed from the samples, in closed form
                apply_chat_template=template == "chat",
            )
    finally:
        model.train(was_training)
    return [_result(task, built[task.name], found["samples"][task.name], found["results"][task.name]) for task in tasks]


def _build(task: Task, template: Template) -> Any:
    """Returns lm-eval's task object on our questions.

    In a chat the user's turn is the bare question, as the chat template's training rows have it, unless the prompt
    lists choices or is half of a sentence.
    """
    if task.theirs is not None:
        return task.theirs
    parts = {"test": task.questions} | ({"train": task.shots} if task.shots else {})
    questions = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    # lm-eval hands the task's metadata to the function that makes its data set.
    config = task.config | {"custom_dataset": lambda **_: questions}
    if template == "chat" and config.get("doc_to_choice") == "choices":
        config["doc_to_text"] = "question"
    built = TaskManager(include_defaults=False).load([config])["tasks"][task.name]
    built.set_fewshot_seed(FEWSHOT_SEED)
    return built


def _result(task: Task, built: Any, entries: list[dict[str, Any]], values: dict[str, Any]) -> TaskResult:
    """Returns a task's result from lm-eval's log of its questions and the numbers it made of them.

    Args:
        task: the task.
        built: lm-eval's object.
        entries: one a question and filter, questions in order, filter by filter.
        values: "metric,filter" -> number.
    """
    by_question: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        by_question.setdefault(entry["doc_id"], []).append(entry)
    means = [name for name in _metrics(entries) if _is_mean(built, name)]
    samples = [_sample(task, number, found, means) for number, found in by_question.items()]
    others = {_short(name): float(values[name]) for name in _metrics(entries) if name not in means}
    return TaskResult(task.name, samples, others)


def _metrics(entries: list[dict[str, Any]]) -> list[str]:
    """Returns lm-eval's names of a task's metrics, "metric,filter", in order."""
    return list(dict.fromkeys(f"{name},{entry['filter']}" for entry in entries for name in entry["metrics"]))


def _is_mean(built: Any, name: str) -> bool:
    return getattr(built.aggregation().get(name.partition(",")[0]), "__name__", "mean") == "mean"


def _short(name: str) -> str:
    """Returns a metric's name without the filter where there is none: acc for acc,none."""
    return name.removesuffix(",none")


def _sample(task: Task, number: int, entries: list[dict[str, Any]], means: list[str]) -> Sample:
    """Returns one question's result from lm-eval's log of it, one entry a filter."""
    question, first = entries[0]["doc"], entries[0]
    choices = all(isinstance(response, tuple | list) and len(response) == 2 for response in first["filtered_resps"])
    return Sample(
        id=str(question["id"]) if task.theirs is None else str(number + 1),
        family=question["family"] if task.theirs is None else None,
        label=question["label"] if "choices" in question and task.theirs is None else _plain(first["target"]),
        loglikelihoods=[value for value, _ in first["filtered_resps"]] if choices else None,
        metrics={
            _short(f"{name},{entry['filter']}"): float(entry[name])
            for entry in entries
            for name in entry["metrics"]
            if f"{name},{entry['filter']}" in means
        },
        response=str(first["resps"][0][0]) if not choices else None,
    )


def _plain(target: Any) -> int | str:
    return int(target) if isinstance(target, int) else str(target)
