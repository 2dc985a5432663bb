"""An evaluation for people and for programs: a table, and a JSON document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smore_cli.evaluation.results import TaskResult, describe, describe_difference, describe_sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["LEGEND", "Line", "document", "lines", "table"]

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
        first, *others = line.ours.metrics
        grid.add_row(f"  {line.name}" if line.is_family else line.name, str(line.ours.n), *_cells(line, first))
        for metric in () if line.is_family else others:
            grid.add_row(f"  {metric}", str(line.ours.n), *_cells(line, metric))
    return grid


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
