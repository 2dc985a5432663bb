"""What the runs of a comparison come to: for each method and objective a row of figures beside the baseline's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from smore_cli.comparing.bootstrap import Interval, paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smore_cli.comparing.runs import Planned
    from smore_cli.comparing.sizes import Sized
    from smore_cli.comparing.tuning import Tuned

__all__ = ["Backbone", "Row", "Score", "Summary", "summarise"]

Result = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A method on a task, or on the mean of all.

    Attributes:
        value: the task's first metric, mean over seeds and questions.
        seeds: the same for each seed.
        above: the difference to the baseline; None: it is the baseline.
    """

    value: float
    seeds: list[float]
    above: Interval | None


@dataclass(frozen=True)
class Row:
    """One method, trained with one objective.

    Attributes:
        label: its name in the comparison.
        title: its name in words.
        trainable, active: parameters.
        changed: settings that were changed to match the size.
        scores: by task, and `mean` over all tasks.
        held_out: loss on the held-out rows at the end, mean over seeds; None: there are none.
        curve: (tokens, held-out loss) at each evaluation, mean over seeds.
        tokens_to_baseline: share of the tokens after which the held-out loss was the baseline's final one, mean over
            seeds; None: a seed never came there.
        step_ratio, memory_ratio: to the baseline's run of the same seed, median over seeds; of separate runs.
        perplexity: of general text, mean over seeds; None: not asked for.
        dividend: the routing dividend of seed 0 (`routing.dividend`); None: not asked for.
        learning_rate: the peak of its runs.
        tried: (learning rate, held-out loss) of the trials it was chosen by; None: it diverged.
    """

    label: str
    title: str
    trainable: int
    active: int
    changed: dict[str, Any]
    scores: dict[str, Score]
    held_out: float | None
    curve: list[tuple[float, float]]
    tokens_to_baseline: float | None
    step_ratio: float
    memory_ratio: float
    perplexity: float | None
    dividend: dict[str, Any] | None
    learning_rate: float
    tried: list[tuple[float, float | None]]

    @property
    def at_edge(self) -> bool:
        """Whether its learning rate is the least or the largest of those tried: the best may lie beyond."""
        return bool(self.tried) and self.learning_rate in (self.tried[0][0], self.tried[-1][0])


@dataclass(frozen=True)
class Backbone:
    """The backbone alone: score by task, and perplexity of general text."""

    scores: dict[str, float]
    perplexity: float | None


@dataclass(frozen=True)
class Summary:
    """A whole comparison.

    Attributes:
        title: what was compared on.
        baseline: label of what the others are held against.
        metrics: the metric that is shown, by task.
        questions: how many, by task.
        seeds: runs of each method and objective.
        tokens: that a run went through, mean.
        backbone: without any adapter.
        rows: by objective, the baseline first.
    """

    title: str
    baseline: str
    metrics: dict[str, str]
    questions: dict[str, int]
    seeds: int
    tokens: float
    backbone: Backbone
    rows: dict[str, list[Row]]

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return asdict(self)


def summarise(
    title: str,
    sized: Sequence[Sized],
    runs: Sequence[Planned],
    results: dict[str, Result],
    tuned: Mapping[tuple[str, str], Tuned],
) -> Summary:
    """Returns the summary of a comparison whose runs are all done.

    Args:
        title: what it is called.
        sized: the methods, the baseline first.
        runs: all of them.
        results: what was measured, by run.
        tuned: how learning rates were chosen, by label and objective; may be empty.
    """
    plain = results["backbone"]
    metrics = {task: next(iter(found)) for task, found in plain["tasks"].items()}
    rows: dict[str, list[Row]] = {}
    for objective in dict.fromkeys(run.objective for run in runs if run.label is not None):
        planned = {
            one.contender.label: [
                run for run in runs if run.label == one.contender.label and run.objective == objective
            ]
            for one in sized
        }
        by_label = {label: [results[run.name] for run in some] for label, some in planned.items()}
        against = by_label[sized[0].contender.label]
        for one in sized:
            label = one.contender.label
            tried = tuned[label, objective].tried if (label, objective) in tuned else []
            rate = planned[label][0].learning_rate
            rows.setdefault(objective, []).append(_row(one, by_label[label], against, metrics, rate, tried))
    trained = [results[run.name] for run in runs if run.label is not None]
    return Summary(
        title=title,
        baseline=sized[0].contender.label,
        metrics=metrics,
        questions={task: len(plain["tasks"][task][metric]) for task, metric in metrics.items()},
        seeds=len(against),
        tokens=fmean(result["tokens"] for result in trained),
        backbone=Backbone(_backbone_scores(plain, metrics), plain["perplexity"]),
        rows=rows,
    )


def _backbone_scores(plain: Result, metrics: dict[str, str]) -> dict[str, float]:
    scores = {task: fmean(plain["tasks"][task][metric]) for task, metric in metrics.items()}
    return scores | ({"mean": fmean(scores.values())} if len(scores) > 1 else {})


def _row(
    one: Sized,
    ours: list[Result],
    against: list[Result],
    metrics: dict[str, str],
    learning_rate: float,
    tried: list[tuple[float, float | None]],
) -> Row:
    final = [result["curve"][-1][1] for result in ours if result["curve"]]
    reached = [_tokens_to(result, base) for result, base in zip(ours, against, strict=True)]
    perplexities = [result["perplexity"] for result in ours]
    return Row(
        label=one.contender.label,
        title=one.adapter.title,
        trainable=one.trainable,
        active=one.active,
        changed=one.changed,
        scores=_scores(ours, None if ours is against else against, metrics),
        held_out=fmean(final) if final else None,
        curve=[(fmean(p[0] for p in points), fmean(p[1] for p in points)) for points in _points(ours)],
        tokens_to_baseline=None if None in reached else fmean(share for share in reached if share is not None),
        step_ratio=_ratio(ours, against, "step_seconds"),
        memory_ratio=_ratio(ours, against, "peak_memory_bytes"),
        perplexity=None if None in perplexities else fmean(perplexities),
        dividend=ours[0]["dividend"],
        learning_rate=learning_rate,
        tried=tried,
    )


def _points(results: list[Result]) -> list[tuple[Any, ...]]:
    """Returns the evaluations of all seeds, step by step."""
    return list(zip(*(result["curve"] for result in results), strict=True))


def _scores(ours: list[Result], against: list[Result] | None, metrics: dict[str, str]) -> dict[str, Score]:
    """Returns the score of every task, and of their mean."""
    values = {task: _values(ours, task, metric) for task, metric in metrics.items()}
    differences = (
        None
        if against is None
        else {task: values[task] - _values(against, task, metric) for task, metric in metrics.items()}
    )
    found = {}
    for name in [*values, *(["mean"] if len(values) > 1 else [])]:
        tasks = list(values) if name == "mean" else [name]
        seeds = np.mean([values[task].mean(1) for task in tasks], axis=0)
        above = None if differences is None else paired_bootstrap([differences[task] for task in tasks])
        found[name] = Score(float(seeds.mean()), [float(value) for value in seeds], above)
    return found


def _values(results: list[Result], task: str, metric: str) -> Any:
    """Returns (seeds, questions) float64."""
    return np.array([result["tasks"][task][metric] for result in results], dtype=float)


def _tokens_to(result: Result, base: Result) -> float | None:
    """Returns after what share of the tokens the held-out loss was the baseline's last one."""
    if not result["curve"] or not base["curve"]:
        return None
    wanted = base["curve"][-1][1]
    reached = next((tokens for tokens, loss in result["curve"] if loss <= wanted), None)
    return None if reached is None else float(reached / base["tokens"])


def _ratio(ours: list[Result], against: list[Result], name: str) -> float:
    return float(median(a[name] / b[name] for a, b in zip(ours, against, strict=True)))
