"""One evaluation from beginning to end: load a run or a backbone once, score it, and score its backbone beside it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from smore_cli import __version__
from smore_cli.atomic import write_text
from smore_cli.errors import SmoreError
from smore_cli.evaluation.harness import Template, score
from smore_cli.evaluation.report import document
from smore_cli.models.load import default_device, load_backbone
from smore_cli.models.runs import open_run
from smore_cli.nn import set_active
from smore_cli.recipe.schema import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from smore_cli.evaluation.benchmarks import Task
    from smore_cli.evaluation.results import TaskResult
    from smore_cli.recipe.schema import DataConfig

__all__ = ["Evaluation", "Subject", "load_subject", "measure", "training_template"]


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: the backbone, with the run's adapter active if there is a run.
        tokenizer: its tokenizer.
        backbone: the backbone's name, as the recipe has it.
        run: the folder of the run or adapter; None: a bare backbone.
        method: the adapter's method; None: a bare backbone.
        template: how the run's training wrote its questions.
        seconds: how long loading took.
        keeps_results: whether `run` is a run, where results belong, and not an adapter from elsewhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backbone: str
    run: Path | None = None
    method: str | None = None
    template: Template = "plain"
    seconds: float = 0.0
    keeps_results: bool = False


@dataclass(frozen=True)
class Evaluation:
    """The outcome of `measure`.

    Attributes:
        subject: what was evaluated.
        benchmark: the benchmark's name.
        limit: the first so many questions of each task; None: all.
        results: one a task.
        base: the backbone's own results, in the same order; None: not asked for.
        seconds: wall-clock time of each part, loading first.
    """

    subject: Subject
    benchmark: str
    limit: int | None
    results: list[TaskResult]
    base: list[TaskResult] | None
    seconds: dict[str, float]

    def document(self, *, samples: bool) -> dict[str, Any]:
        """Returns everything as JSON values; `samples` adds every question."""
        return {
            "benchmark": self.benchmark,
            "backbone": self.subject.backbone,
            "run": None if self.subject.run is None else str(self.subject.run),
            "method": self.subject.method,
            "template": self.subject.template,
            "limit": self.limit,
            "tasks": document(self.results, self.base, samples=samples),
            "seconds": {part: round(seconds, 3) for part, seconds in self.seconds.items()},
            "versions": {"smore": __version__, "lm_eval": version("lm_eval")},
        }

    def write(self, copy: Path | None = None) -> list[Path]:
        """Writes the document with every question into the run, as eval/NAME.json, and to `copy`.

        Each file is written completely or not at all.

        Returns:
            The files written.

        Raises:
            SmoreError: a file cannot be written.
        """
        paths = [] if copy is None else [copy]
        if self.subject.run is not None and self.subject.keeps_results:
            paths.append(self.subject.run / "eval" / f"{self.benchmark}.json")
        text = json.dumps(self.document(samples=True), indent=1) + "\n"
        for path in paths:
            try:
                write_text(path, text)
            except OSError as error:
                raise SmoreError(f"cannot write {path}: {error.strerror}", "--out names another file") from error
        return paths


def load_subject(run: Path | None, model: str | None, *, full_precision: bool = False) -> Subject:
    """Loads a backbone by itself, or a run: its backbone with its adapter.

    Args:
        run: a run's folder; None: the newest. Not read where `model` is given.
        model: a backbone, as a recipe names it.
        full_precision: load the weights of a run's backbone unquantised, though it was trained on quantised ones.

    Raises:
        AdapterError: there is no such run, or it is incomplete.
        ModelError: the backbone cannot be loaded.
    """
    started = time.perf_counter()
    if model is not None:
        backbone = load_backbone(ModelConfig(name_or_path=model))
        return Subject(backbone.model, backbone.tokenizer, model, seconds=time.perf_counter() - started)
    opened = open_run(run)
    adapted, tokenizer = opened.load(default_device(), full_precision=full_precision)
    return Subject(
        adapted,
        tokenizer,
        backbone=opened.model.name_or_path,
        run=opened.folder,
        method=opened.adapter.method,
        template="plain" if opened.recipe is None else training_template(opened.recipe.data),
        seconds=time.perf_counter() - started,
        keeps_results=opened.recipe is not None and not full_precision,  # a run's own are of its own weights
    )


def training_template(data: DataConfig) -> Template:
    """Returns how training wrote questions: in chats if the recipe says so, or if it had nothing but conversations."""
    only_chats = data.template == "auto" and all(source.format == "chat" for source in data.train)
    return "chat" if data.template == "chat" or only_chats else "plain"


def measure(
    subject: Subject,
    benchmark: str,
    tasks: Sequence[Task],
    *,
    with_base: bool,
    limit: int | None,
    batch_size: int | None,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> Evaluation:
    """Scores a subject on tasks, and with `with_base` its backbone too: the same model with the adapter switched off.

    Args:
        subject: what to score; its adapter is off afterwards where the backbone was scored.
        benchmark: what the tasks are together.
        tasks: the tasks.
        with_base: whether the backbone is wanted beside a run (a bare backbone has none beside it).
        limit: the first so many questions of each task; None: all.
        batch_size: questions a forward pass; None: by device.
        progress: given a label, a context that yields what to call with (done, total).
    """
    seconds = {"load": subject.seconds}

    def timed(label: str) -> list[TaskResult]:
        started = time.perf_counter()
        with progress(label) as on_progress:
            results = score(
                subject.model,
                subject.tokenizer,
                tasks,
                limit=limit,
                batch_size=batch_size,
                template=subject.template,
                on_progress=on_progress,
            )
        seconds[label] = time.perf_counter() - started
        return results

    if subject.run is None:
        return Evaluation(subject, benchmark, limit, timed("backbone"), None, seconds)
    results, base = timed("run"), None
    if with_base:
        set_active(subject.model, None)
        base = timed("backbone")
    return Evaluation(subject, benchmark, limit, results, base, seconds)
