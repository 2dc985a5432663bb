"""One run's routing beside another's on the same rows: an earlier checkpoint's, or that of another run.

total variation = 1/2 sum_e |usage_e - usage'_e|        0: the experts share the work alike; 1: not one in common
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.errors import UsageError
from smore_cli.models.runs import open_run
from smore_cli.routing.collect import collect_routing
from smore_cli.training.checkpoint import step_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from smore_cli.data.batch import Row
    from smore_cli.routing.statistics import RouterStatistics

__all__ = ["Beside", "checkpoints_of", "look_beside", "total_variation"]


@dataclass(frozen=True)
class Beside:
    """Another adapter's routers on the same rows.

    Attributes:
        run: its folder.
        step: of a checkpoint; None: it is another run.
        method: its method.
        routers: what they do.
        variation: total variation from the run that is looked at, by module and level; of routers that both have with
            as many experts.
    """

    run: Path
    step: int | None
    method: str
    routers: list[RouterStatistics]
    variation: dict[tuple[str, int], float]

    @property
    def mean_variation(self) -> float | None:
        """Mean over the routers; None where the two have none in common."""
        return sum(self.variation.values()) / len(self.variation) if self.variation else None

    def document(self) -> dict[str, Any]:
        """Returns everything as JSON values."""
        return {
            "run": str(self.run),
            "step": self.step,
            "method": self.method,
            "mean_total_variation": self.mean_variation,
            "routers": [
                {
                    "module": router.module,
                    "level": router.level,
                    "usage": router.usage,
                    "effective_experts": router.effective_experts,
                    "entropy": router.entropy,
                    "total_variation": self.variation.get((router.module, router.level)),
                }
                for router in self.routers
            ],
        }


def total_variation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns half the sum of the differences of two distributions over the same experts."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) / 2


def checkpoints_of(run: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, the earliest first.

    Raises:
        UsageError: there is none.
    """
    found = sorted((path.parent for path in run.glob("checkpoint-*/complete.json")), key=step_of)
    if not found:
        raise UsageError(f"--drift: {run} has no checkpoint left", "train with train.save_steps, and keep them")
    return found


def look_beside(
    other: Path,
    backbone: str,
    rows: Sequence[Row],
    routers: Sequence[RouterStatistics],
    *,
    device: torch.device,
    batch_size: int,
    step: int | None = None,
    supervised: bool = False,
    on_progress: Callable[[int, int], None],
) -> Beside:
    """Runs the same rows through another adapter on the same backbone.

    Args:
        other: its folder.
        backbone: the name of the backbone of the run that is looked at, whose tokenizer made the rows.
        rows: what is looked at.
        routers: what that run's routers do, those that were chosen.
        device: where the model is loaded.
        batch_size: rows a forward pass.
        step: of a checkpoint.
        supervised: count the tokens that are learned or scored alone.
        on_progress: called with the rows done and their total.

    Raises:
        UsageError: it is on another backbone, or routes nothing.
    """
    opened = open_run(other)
    if opened.model.name_or_path != backbone:
        raise UsageError(f"--compare: {other} is on {opened.model.name_or_path}, not on {backbone}")
    model, tokenizer = opened.load(device)
    found = collect_routing(
        model,
        rows,
        pad_token_id=int(tokenizer.pad_token_id or 0),
        batch_size=batch_size,
        supervised=supervised,
        on_progress=on_progress,
    )
    if not found.routers:
        raise UsageError(f"--compare: {other} is a run of {opened.adapter.method}, which routes nothing")
    mine = {(router.module, router.level): router for router in routers}
    variation = {
        key: total_variation(mine[key].usage, router.usage)
        for router in found.routers
        if (key := (router.module, router.level)) in mine and mine[key].num_experts == router.num_experts
    }
    return Beside(other, step, opened.adapter.method, found.routers, variation)
