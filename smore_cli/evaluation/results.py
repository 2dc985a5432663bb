"""What an evaluation found: one result a task, which holds the answer to every question."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smore_cli.evaluation.statistics import (
    mean,
    normal_interval,
    paired_difference,
    paired_mean_difference,
    standard_error,
    wilson_interval,
)

__all__ = ["Sample", "TaskResult", "describe", "describe_difference", "describe_sample"]


@dataclass(frozen=True)
class Sample:
    """One question and how it was answered.

    Attributes:
        id: the question's id in its file (its number where it has none).
        family: the group it is reported in; None where the task has no groups.
        label: index of the right choice, or the right answer as text.
        loglikelihoods: summed log-likelihood of each choice, in nats; None where text was generated.
        metrics: the question's value of every metric, right answers as 1: acc (the likeliest choice is right), acc_norm
            (the choice of the greatest log-likelihood per character is), exact_match, ...
        response: what was generated, stop sequence and what follows cut off; None where choices were compared.
    """

    id: str
    family: str | None
    label: int | str | None
    loglikelihoods: list[float] | None
    metrics: dict[str, float]
    response: str | None = None

    @property
    def acc(self) -> bool:
        """Whether the likeliest choice is right."""
        return bool(self.metrics["acc"])

    @property
    def acc_norm(self) -> bool:
        """Whether the choice of the greatest log-likelihood per character is right."""
        return bool(self.metrics["acc_norm"])


@dataclass(frozen=True)
class TaskResult:
    """The result of one task.

    Attributes:
        task: the task's name.
        samples: every question, in the order of the file; at least one.
        others: metrics that are no mean over questions, as lm-eval works them out (f1, perplexity): value by name.
    """

    task: str
    samples: list[Sample]
    others: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.samples)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that are means over the questions; the first one is the task's main one."""
        return list(self.samples[0].metrics)

    @property
    def acc(self) -> float:
        """Share of questions whose likeliest choice is right."""
        return self.value("acc")

    @property
    def acc_norm(self) -> float:
        """The same with log-likelihoods divided by the choice's length in characters."""
        return self.value("acc_norm")

    @property
    def acc_stderr(self) -> float | None:
        """Standard error of `acc`; None for a single question."""
        return standard_error(self.values("acc"))

    @property
    def acc_norm_stderr(self) -> float | None:
        """Standard error of `acc_norm`; None for a single question."""
        return standard_error(self.values("acc_norm"))

    def value(self, metric: str) -> float:
        """Returns the mean of a metric over the questions."""
        return mean(self.values(metric))

    def values(self, metric: str) -> list[float]:
        """Returns a metric's value of every question."""
        return [float(sample.metrics[metric]) for sample in self.samples]

    def correct(self, metric: str) -> list[bool]:
        """Returns which questions were answered right by a metric that is 0 or 1, as acc is."""
        return [bool(value) for value in self.values(metric)]

    def families(self) -> list[TaskResult]:
        """Returns one result a family, in order of appearance; none where the task has no families."""
        names = dict.fromkeys(sample.family for sample in self.samples if sample.family is not None)
        return [TaskResult(name, [s for s in self.samples if s.family == name]) for name in names]


def describe(result: TaskResult) -> dict[str, Any]:
    """Returns n and, for each metric, its value, standard error and 95 % interval, as JSON values."""
    summary: dict[str, Any] = {"n": result.n}
    for metric in result.metrics:
        values = result.values(metric)
        summary[metric] = mean(values)
        summary[f"{metric}_stderr"] = standard_error(values)
        interval = wilson_interval(round(sum(values)), len(values)) if _are_shares(values) else normal_interval(values)
        summary[f"{metric}_ci95"] = list(interval)
    return summary | result.others


def describe_difference(ours: TaskResult, base: TaskResult) -> dict[str, Any]:
    """Returns ours minus base for each metric, with the 95 % interval of the paired difference, as JSON values.

    The samples of both results must be the same questions in the same order.
    """
    summary: dict[str, Any] = {}
    for metric in ours.metrics:
        a, b = ours.values(metric), base.values(metric)
        shares = _are_shares([*a, *b])
        found = (
            paired_difference(ours.correct(metric), base.correct(metric)) if shares else paired_mean_difference(a, b)
        )
        summary[metric] = found.value
        summary[f"{metric}_ci95"] = [found.low, found.high]
    return summary


def describe_sample(sample: Sample) -> dict[str, Any]:
    """Returns a question's result as JSON values: what was right and what came of it."""
    values: dict[str, Any] = {"id": sample.id, "family": sample.family, "label": sample.label}
    if sample.loglikelihoods is not None:
        values["loglikelihoods"] = sample.loglikelihoods
    if sample.response is not None:
        values["response"] = sample.response
    return values | {name: bool(value) if value in (0, 1) else value for name, value in sample.metrics.items()}


def _are_shares(values: list[float]) -> bool:
    """Whether a metric's values are 0 or 1, so that its mean is a share of the questions."""
    return all(value in (0, 1) for value in values)
