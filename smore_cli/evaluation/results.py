"""What an evaluation found: one result a task, which holds the answer to every question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smore_cli.evaluation.statistics import mean, paired_difference, standard_error, wilson_interval

__all__ = ["Sample", "TaskResult", "describe", "describe_difference"]

METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Sample:
    """One question and how it was answered.

    Attributes:
        id: the question's id in its file (its number where it has none).
        family: the group it is reported in; None where the task has no groups.
        label: index of the right choice.
        loglikelihoods: summed log-likelihood of each choice, in nats.
        acc: whether the likeliest choice is right.
        acc_norm: whether the choice of the greatest log-likelihood per character is right.
    """

    id: str
    family: str | None
    label: int
    loglikelihoods: list[float]
    acc: bool
    acc_norm: bool


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        task: the task's name.
        samples: every question, in the order of the file; at least one.
    """

    task: str
    samples: list[Sample]

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.samples)

    @property
    def acc(self) -> float:
        """Share of questions whose likeliest choice is right."""
        return mean(self.correct("acc"))

    @property
    def acc_norm(self) -> float:
        """The same with log-likelihoods divided by the choice's length in characters."""
        return mean(self.correct("acc_norm"))

    @property
    def acc_stderr(self) -> float | None:
        """Standard error of `acc`; None for a single question."""
        return standard_error(self.correct("acc"))

    @property
    def acc_norm_stderr(self) -> float | None:
        """Standard error of `acc_norm`; None for a single question."""
        return standard_error(self.correct("acc_norm"))

    def correct(self, metric: str) -> list[bool]:
        """Returns which questions were answered right by `metric`, "acc" or "acc_norm"."""
        return [bool(getattr(sample, metric)) for sample in self.samples]

    def families(self) -> list[TaskResult]:
        """Returns one result a family, in order of appearance; none where the task has no families."""
        names = dict.fromkeys(sample.family for sample in self.samples if sample.family is not None)
        return [TaskResult(name, [s for s in self.samples if s.family == name]) for name in names]


def describe(result: TaskResult) -> dict[str, Any]:
    """Returns n and, for each metric, its value, standard error and 95 % interval, as JSON values."""
    summary: dict[str, Any] = {"n": result.n}
    for metric in METRICS:
        right = result.correct(metric)
        summary[metric] = mean(right)
        summary[f"{metric}_stderr"] = standard_error(right)
        summary[f"{metric}_ci95"] = list(wilson_interval(sum(right), len(right)))
    return summary


def describe_difference(ours: TaskResult, base: TaskResult) -> dict[str, Any]:
    """Returns ours minus base for each metric, with the 95 % interval of the paired difference, as JSON values.

    The samples of both results must be the same questions in the same order.
    """
    summary: dict[str, Any] = {}
    for metric in METRICS:
        difference = paired_difference(ours.correct(metric), base.correct(metric))
        summary[metric] = difference.value
        summary[f"{metric}_ci95"] = [difference.low, difference.high]
    return summary
