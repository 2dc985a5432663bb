"""The outcome of an evaluation as documents, where they are kept, and the journal that lies beside them meanwhile."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smore_cli import __version__
from smore_cli.atomic import write_text
from smore_cli.errors import SmoreError
from smore_cli.evaluation.journal import NO_JOURNAL, Journal
from smore_cli.evaluation.report import document

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smore_cli.evaluation.results import TaskResult
    from smore_cli.evaluation.subjects import Subject

__all__ = ["Evaluation", "label_of", "open_journal", "together", "write_evaluations"]


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
        """Returns everything as JSON values; `samples` adds every question.

        Nothing in it depends on when and how fast it was measured, so that equal evaluations are equal files.
        """
        return {
            "benchmark": self.benchmark,
            "backbone": self.subject.backbone,
            "run": None if self.subject.run is None else str(self.subject.run),
            "method": self.subject.method,
            "template": self.subject.template,
            "limit": self.limit,
            "tasks": document(self.results, self.base, samples=samples),
            "versions": {"smore": __version__, "lm_eval": version("lm_eval")},
        }

    def rounded_seconds(self) -> dict[str, float]:
        """Returns the wall-clock time of each part, to the millisecond."""
        return {part: round(seconds, 3) for part, seconds in self.seconds.items()}

    @property
    def place(self) -> Path | None:
        """The file in the run that keeps the document; None: the subject keeps none."""
        if self.subject.run is None or not self.subject.keeps_results:
            return None
        return result_file(self.subject.run, self.benchmark)


def label_of(benchmarks: Sequence[str]) -> str:
    """Returns one name for benchmarks together, that a file can have: a file's is its stem."""
    return "+".join(Path(name).name.partition(".")[0] if "/" in name or "." in name else name for name in benchmarks)


def result_file(run: Path, benchmark: str) -> Path:
    """Returns where a run keeps the result of a benchmark."""
    return run / "eval" / f"{benchmark}.json"


def write_evaluations(evaluations: Sequence[Evaluation], copy: Path | None = None) -> list[Path]:
    """Writes each document with every question into its run, as eval/NAME.json, and all of them to `copy`.

    Each file is written completely or not at all.

    Returns:
        The files written.

    Raises:
        SmoreError: a file cannot be written.
    """
    whole = [evaluation.document(samples=True) for evaluation in evaluations]
    places = [(evaluation.place, one) for evaluation, one in zip(evaluations, whole, strict=True)]
    if copy is not None:
        places.insert(0, (copy, together(whole)))
    written = [(path, values) for path, values in places if path is not None]
    for path, values in written:
        try:
            write_text(path, json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise SmoreError(f"cannot write {path}: {error.strerror}", "--out names another file") from error
    return [path for path, _ in written]


def together(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one document of several: itself where there is one."""
    return documents[0] if len(documents) == 1 else {"evaluations": documents}


def open_journal(subjects: Sequence[Subject], benchmark: str, copy: Path | None) -> Journal:
    """Returns the journal of an evaluation, beside the first file that its results go to; where none is, no journal."""
    places = [result_file(each.run, benchmark) for each in subjects if each.run is not None and each.keeps_results]
    place = next(iter([*places, *([] if copy is None else [copy])]), None)
    return NO_JOURNAL if place is None else Journal(place.with_name(f"{place.name}.partial"))
