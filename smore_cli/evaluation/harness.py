"""Running benchmarks through lm-evaluation-harness: its tasks, prompts and metrics, our questions and our scoring."""

from __future__ import annotations

import logging
import random
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import datasets
from lm_eval import evaluator
from lm_eval.api import task as lm_eval_task
from lm_eval.tasks import TaskManager

from smore_cli.data.quiet import quiet_datasets
from smore_cli.errors import ModelError
from smore_cli.evaluation.benchmarks import Task, read_tasks
from smore_cli.evaluation.results import Sample, TaskResult
from smore_cli.evaluation.scoring import PrefixSharingLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Template", "evaluate", "score"]

Template = Literal["plain", "chat"]


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
) -> list[TaskResult]:
    """Scores a model, as it is loaded (an active adapter counts), on tasks.

    lm-eval's `evaluate` is called and not its `simple_evaluate`, which also reseeds every random generator of the
    process and starts subprocesses to describe the machine (several seconds).

    Args:
        model: a causal language model of transformers; its train or eval mode is the same afterwards.
        tokenizer: its tokenizer.
        tasks: at least one, each once.
        limit: the first so many questions of each task; None: all.
        batch_size: questions a forward pass; None: 8 on a CPU, 32 elsewhere.
        template: chat wraps every question with the tokenizer's chat template.
        on_progress: called with the number of choices scored and the number in all.

    Returns:
        One result a task, in order.

    Raises:
        ModelError: `template` is chat and the tokenizer has no chat template.
        DataError: a choice cannot be scored.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template", "evaluate with the plain template")
    size = batch_size or (8 if model.device.type == "cpu" else 32)  # on a CPU, larger batches are no faster
    was_training = model.training
    try:
        with _apart():
            found = evaluator.evaluate(
                PrefixSharingLM(model, tokenizer, batch_size=size, on_progress=on_progress),
                {"tasks": {task.name: _build(task, template) for task in tasks}},
                limit=limit,
                bootstrap_iters=0,  # standard errors are computed from the samples, in closed form
                apply_chat_template=template == "chat",
            )
    finally:
        model.train(was_training)
    return [TaskResult(task.name, [_sample(entry) for entry in found["samples"][task.name]]) for task in tasks]


def _build(task: Task, template: Template) -> Any:
    """Returns lm-eval's task object on our questions.

    In a chat the user's turn is the bare question, as the chat template's training rows have it.
    """
    questions = datasets.DatasetDict(test=datasets.Dataset.from_list(task.questions))
    # lm-eval hands the task's metadata to the function that makes its data set.
    config = task.config | {"custom_dataset": lambda **_: questions}
    if template == "chat":
        config["doc_to_text"] = "question"
    return TaskManager(include_defaults=False).load([config])["tasks"][task.name]


def _sample(entry: dict[str, Any]) -> Sample:
    """Returns one question's result from lm-eval's log of it."""
    question = entry["doc"]
    return Sample(
        id=question["id"],
        family=question["family"],
        label=question["label"],
        loglikelihoods=[loglikelihood for loglikelihood, _ in entry["filtered_resps"]],
        acc=bool(entry["acc"]),
        acc_norm=bool(entry["acc_norm"]),
    )


@contextmanager
def _apart() -> Iterator[None]:
    """Silences the log lines and progress bars of lm-eval and datasets, and leaves the process as it was."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval_task.tqdm
    level, state = logger.level, random.getstate()  # lm-eval draws a name for every task, even one that has its own
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = partial(bar, disable=True)  # lm-eval has no switch for the bar over building prompts
    try:
        with quiet_datasets():
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        lm_eval_task.tqdm = bar
