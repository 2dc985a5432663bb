"""`smore train --dry-run`: everything a run does up to its first step, and nothing of it kept."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from smore_cli.training.census import take_census
from smore_cli.training.parallel import ALONE
from smore_cli.training.setup import prepare
from smore_cli.training.step import accumulate_gradients

if TYPE_CHECKING:
    from smore_cli.recipe.schema import Recipe
    from smore_cli.training.parallel import Processes

__all__ = ["dry_run"]


def dry_run(recipe: Recipe, processes: Processes = ALONE) -> list[str]:
    """Loads everything, runs the first step's forward and backward passes, and returns what would be run.

    Raises:
        UsageError: anything that would stop the run before its first step.
        CheckFailed: a gradient does not reach everything that trains.
    """

    def say(line: str) -> None:
        if processes.main:
            print(line, file=sys.stderr)

    setup = prepare(recipe, say, processes)
    census = recipe.train.gradient_census and not setup.sharded
    coverage = processes.on_main(lambda: take_census(setup, say).table()) if census else []
    started = time.perf_counter()
    result = accumulate_gradients(
        setup.model,
        setup.batches.step(0),
        setup.objective,
        device=setup.device,
        backward=setup.backward,
        aux_over_step=recipe.train.aux_statistics == "global_batch",
        processes=processes,
        reduce=not setup.sharded,
    )
    seconds = time.perf_counter() - started
    return [
        *setup.describe(),
        *coverage,
        f"first step: loss {float(result.loss):.4f}, {result.tokens} tokens ({result.counts.tokens} supervised), "
        f"{seconds:.1f} s without warm-up",
        "nothing was written",
    ]
