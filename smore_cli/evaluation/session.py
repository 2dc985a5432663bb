"""Scoring subjects one after the other on one model, and their backbone beside them."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from smore_cli.evaluation.harness import score
from smore_cli.evaluation.journal import NO_JOURNAL, Journal
from smore_cli.evaluation.outcome import Evaluation
from smore_cli.nn import adapted_modules, set_active

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from smore_cli.evaluation.benchmarks import Task
    from smore_cli.evaluation.results import TaskResult
    from smore_cli.evaluation.subjects import Subject

__all__ = ["measure"]


def measure(
    subjects: Sequence[Subject],
    benchmark: str,
    tasks: Sequence[Task],
    *,
    with_base: bool,
    limit: int | None,
    batch_size: int | None,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
    journal: Journal = NO_JOURNAL,
) -> list[Evaluation]:
    """Scores subjects on tasks, and with `with_base` their backbone too: the same model with all adapters off.

    Args:
        subjects: what to score, on one model; the first one's adapter is active afterwards.
        benchmark: what the tasks are together.
        tasks: the tasks.
        with_base: whether the backbone is wanted beside runs (a bare backbone has none beside it).
        limit: the first so many questions of each task; None: all.
        batch_size: questions a forward pass; None: by their length and the device.
        progress: given a label, a context that yields what to call with (done, total).
        journal: where answers are kept, and taken from, as they come.

    Returns:
        One evaluation a subject.
    """

    def timed(subject: Subject, label: str) -> tuple[list[TaskResult], float]:
        started = time.perf_counter()
        if adapted_modules(subject.model):
            set_active(subject.model, subject.adapter)
        with progress(label) as on_progress:
            results = score(
                subject.model,
                subject.tokenizer,
                tasks,
                limit=limit,
                batch_size=batch_size,
                template=subject.template,
                on_progress=on_progress,
                journal=journal.answers_of(subject.identity()),
            )
        return results, time.perf_counter() - started

    found: list[Evaluation] = []
    bare: dict[str, tuple[list[TaskResult], float]] = {}  # by template: chats are other questions
    for subject in subjects:
        alone = subject.run is None
        label = "backbone" if alone else "run" if len(subjects) == 1 else str(subject.run)
        results, seconds = timed(subject, label)
        parts = {"load": subject.seconds, label: seconds}
        found.append(Evaluation(subject, benchmark, limit, results, None, parts))
    for number, evaluation in enumerate(found):
        template = evaluation.subject.template
        if not with_base or evaluation.subject.run is None:
            continue
        fresh = template not in bare
        if fresh:
            bare[template] = timed(replace(evaluation.subject, adapter=None), "backbone")
        base, seconds = bare[template]
        parts = evaluation.seconds | ({"backbone": seconds} if fresh else {})
        found[number] = replace(evaluation, base=base, seconds=parts)
    if adapted_modules(subjects[0].model):
        set_active(subjects[0].model, subjects[0].adapter)
    return found
