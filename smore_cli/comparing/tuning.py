"""Each method's own learning rate: tried on the first seed with several, the one with the least held-out loss is kept.

Gates, ranks and starts scale a method's update, so that one rate for all compares step sizes before methods. A trial is
the first seed's run: the one that is kept is not trained again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.comparing.runs import Planned, plan_run
from smore_cli.errors import SmoreError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from smore_cli.comparing.sizes import Sized
    from smore_cli.comparing.spec import Comparison

__all__ = ["Tuned", "choose_rates", "plan_trials"]


@dataclass(frozen=True)
class Tuned:
    """What was tried for one method and objective.

    Attributes:
        factor: what its learning rates are multiplied with from now on.
        tried: (learning rate, held-out loss at the end) of each trial, by rate; None: it diverged.
    """

    factor: float
    tried: list[tuple[float, float | None]]


def plan_trials(comparison: Comparison, sized: Sequence[Sized], out: Path) -> list[Planned]:
    """Returns a run of the first seed for each method, objective and factor; none where no factors are given."""
    return [
        plan_run(comparison, one, objective, 0, out, factor=factor, trial=True)
        for objective in comparison.objectives
        for one in sized
        for factor in comparison.config.learning_rate_factors or []
    ]


def choose_rates(trials: Sequence[Planned], results: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Tuned]:
    """Returns the factor with the least held-out loss, by label and objective.

    Args:
        trials: all of them.
        results: what was measured, by run.

    Raises:
        SmoreError: all trials of a method diverged.
    """
    by_method: dict[tuple[str, str], list[Planned]] = {}
    for trial in trials:
        by_method.setdefault((str(trial.label), trial.objective), []).append(trial)
    return {key: _choose(some, results) for key, some in by_method.items()}


def _choose(trials: Sequence[Planned], results: dict[str, dict[str, Any]]) -> Tuned:
    losses = {trial.factor: _loss(results[trial.name]) for trial in trials}
    finite = {factor: loss for factor, loss in losses.items() if loss is not None}
    if not finite:
        raise SmoreError(
            f"{trials[0].label}, {trials[0].objective}: diverged with every learning rate that was tried",
            "give smaller compare.learning_rate_factors, and another --out",
        )
    tried = sorted((trial.learning_rate, trial.factor) for trial in trials)
    return Tuned(min(finite, key=lambda factor: finite[factor]), [(rate, losses[factor]) for rate, factor in tried])


def _loss(found: dict[str, Any]) -> float | None:
    """Returns the last held-out loss of a trial; None: it is not finite."""
    loss = None if "diverged" in found else float(found["curve"][-1][1])
    return loss if loss is not None and math.isfinite(loss) else None
