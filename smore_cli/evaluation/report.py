"""An evaluation for people and for programs: a table, and a JSON document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smore_cli.evaluation.results import TaskResult, describe, describe_difference, describe_sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LEGEND", "Line", "comparison", "document", "lines", "table"]

LEGEND = (
    "Share of questions answered right by the likeliest choice; acc_norm: likeliest per character. ± is one\n"
    "standard error, brackets are 95 % intervals (of a share: Wilson; of a paired difference: Bonett-Price)."
)


@dataclass(frozen=True)
class Line:
    """One line of a report: a task, or a family of one, with the backbone's result beside it where there is one."""

    name: str
    is_family: bool
    ours: TaskResult
    base: TaskResult | None

    @property
    def shown(self) -> list[str]:
        """The metrics of its rows in a table: all of a task's, the main one of a family's."""
        return self.ours.metrics[:1] if self.is_family else self.ours.metrics

    def title(self, metric: str) -> str:
        """Returns the first cell of a metric's row: the name, or the metric beneath it."""
        if self.is_family:
            return f"  {self.name}"
        return self.name if metric == (self.ours.metrics or list(self.ours.others))[0] else f"  {metric}"


def lines(results: Sequence[TaskResult], base: Sequence[TaskResult] | None) -> Iterator[Line]:
    """Yields every task, followed by its families if it has several.

    Args:
        results: one a task.
        base: the backbone's results on the same questions, in the same order; None: they are not compared.
    """
    for i, ours in enumerate(results):
        theirs = base[i] if base else None
        yield Line(ours.task, False, ours, theirs)
        families = ours.families()
        if len(families) > 1:
            beside = theirs.families() if theirs else [None] * len(families)
            yield from (Line(family.task, True, family, b) for family, b in zip(families, beside, strict=True))


def document(
    results: Sequence[TaskResult], base: Sequence[TaskResult] | None, *, samples: bool
) -> list[dict[str, Any]]:
    """Returns the results as JSON values, one object a task; `samples` adds every question's log-likelihoods."""
    tasks: list[dict[str, Any]] = []
    for line in lines(results, base):
        entry = describe(line.ours)
        if line.base is not None:
            entry["base"] = describe(line.base)
            entry["difference"] = describe_difference(line.ours, line.base)
        if line.is_family:
            tasks[-1]["families"].append({"family": line.name, **entry})
            continue
        tasks.append({"task": line.name, **entry, "families": []})
        if samples:
            tasks[-1]["samples"] = [describe_sample(sample) for sample in line.ours.samples]
            if line.base is not None:
                tasks[-1]["base"]["samples"] = [describe_sample(sample) for sample in line.base.samples]
    return tasks


def table(ours: str, results: Sequence[TaskResult], base: Sequence[TaskResult] | None) -> Table:
    """Returns the results as a table for the terminal, 80 columns wide: a task's acc and acc_norm, a family's acc.

    Args:
        ours: what the results are of, as a column's title.
        results: one a task.
        base: the backbone's results on the same questions; None: the column is left out.
    """
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    grid.add_column("task")
    for title in ("n", *(("backbone",) if base else ()), ours, "difference" if base else "95 % interval"):
        grid.add_column(title, justify="right")
    for line in lines(results, base):
        for metric in line.shown:
            grid.add_row(line.title(metric), str(line.ours.n), *_cells(line, metric))
        for metric, value in line.ours.others.items():
            grid.add_row(line.title(metric), str(line.ours.n), *_other_cells(line, metric, value))
    return grid


def comparison(
    names: Sequence[str], results: Sequence[Sequence[TaskResult]], base: Sequence[TaskResult] | None
) -> Table:
    """Returns the results of several runs side by side.

    Args:
        names: of the runs.
        results: of each run, one a task, all on the same questions.
        base: the backbone's results on them; None: the column is left out.
    """
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    grid.add_column("task")
    for title in ("n", *(("backbone",) if base else ()), *names):
        grid.add_column(title, justify="right")
    columns = [list(lines(each, None)) for each in ([base] if base else []) + list(results)]
    for row in zip(*columns, strict=True):
        for metric in row[0].shown:
            cells = [_with_error(describe(line.ours), metric) for line in row]
            grid.add_row(row[0].title(metric), str(row[0].ours.n), *cells)
        for metric in row[0].ours.others:
            cells = [f"{line.ours.others[metric]:.3f}" for line in row]
            grid.add_row(row[0].title(metric), str(row[0].ours.n), *cells)
    return grid


def _other_cells(line: Line, metric: str, value: float) -> list[str]:
    """Returns the values of a metric that has no error: lm-eval works it out of all questions together."""
    return [f"{value:.3f}", ""] if line.base is None else [f"{line.base.others[metric]:.3f}", f"{value:.3f}", ""]


def _cells(line: Line, metric: str) -> list[str]:
    """Returns the values of a line: ours with its interval, or the backbone's, ours and the difference."""
    summary = describe(line.ours)
    value = _with_error(summary, metric)
    if line.base is None:
        low, high = summary[f"{metric}_ci95"]
        return [value, f"[{low:.3f}, {high:.3f}]"]
    difference = describe_difference(line.ours, line.base)
    low, high = difference[f"{metric}_ci95"]
    return [_with_error(describe(line.base), metric), value, f"{difference[metric]:+.3f} [{low:+.3f}, {high:+.3f}]"]


def _with_error(summary: dict[str, Any], metric: str) -> str:
    error = summary[f"{metric}_stderr"]
    return f"{summary[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}")
