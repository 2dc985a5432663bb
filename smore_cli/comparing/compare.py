"""A comparison from its file to its summary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smore_cli.atomic import write_text, writing
from smore_cli.comparing.page import page
from smore_cli.comparing.report import markdown
from smore_cli.comparing.runs import Planned, plan_runs, run_all
from smore_cli.comparing.sizes import Sized, match_sizes
from smore_cli.comparing.summary import Summary, summarise
from smore_cli.comparing.tuning import choose_rates, plan_trials
from smore_cli.errors import SmoreError, UsageError
from smore_cli.evaluation.benchmarks import read_tasks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from smore_cli.comparing.spec import Comparison

__all__ = ["Layout", "compare", "lay_out", "write"]


@dataclass(frozen=True)
class Layout:
    """A comparison whose sizes are matched.

    Attributes:
        comparison: as it was read.
        sized: the methods, the baseline first.
        trials: runs that choose each method's learning rate.
        out: its folder.
    """

    comparison: Comparison
    sized: list[Sized]
    trials: list[Planned]
    out: Path

    def lines(self) -> list[str]:
        """Returns what would be run."""
        config = self.comparison.config
        width = max(len(one.contender.label) for one in self.sized)
        lines = [f"{'method':{width}}  {'trainable':>12} {'active':>12}  changed to match"]
        for one in self.sized:
            changed = ", ".join(f"{name}: {value}" for name, value in one.changed.items()) or "-"
            lines.append(f"{one.contender.label:{width}}  {one.trainable:12,} {one.active:12,}  {changed}")
        objectives = " and ".join(self.comparison.objectives)
        runs = plan_runs(self.comparison, self.sized, self.out)
        lines.append(f"{len(runs)} runs: {len(self.sized)} methods, {config.seeds} seeds, {objectives}; the backbone")
        if self.trials:
            lines.append(f"before them {len(self.trials)} trials of learning rates, of which the best are gone on with")
        return lines


def lay_out(comparison: Comparison, out: Path) -> Layout:
    """Matches the sizes and plans the runs; nothing is loaded but shapes, nothing written.

    Raises:
        UsageError: sizes cannot be matched, a benchmark is unknown, or there are no held-out rows for the dividend
            or the choice of learning rates.
        DataError: questions or general text are not there.
    """
    from pathlib import Path

    from smore_cli.data.sources import read_source

    config = comparison.config
    for name in config.benchmarks:
        read_tasks(name, None if config.data_dir is None else Path(config.data_dir))
    if config.general_text is not None:
        read_source(config.general_text)
    data = comparison.baseline.recipe.data
    held_out = bool(data.eval or data.eval_fraction)
    if config.dividend_tokens and not held_out:
        raise UsageError(
            "the routing dividend is measured on held-out rows, of which there are none",
            "give data.eval or data.eval_fraction, or compare.dividend_tokens: 0",
        )
    if config.learning_rate_factors and not held_out:
        raise UsageError(
            "learning rates are chosen by the loss on held-out rows, of which there are none",
            "give data.eval or data.eval_fraction, or leave out compare.learning_rate_factors",
        )
    sized = match_sizes(comparison)
    return Layout(comparison, sized, plan_trials(comparison, sized, out), out)


def compare(layout: Layout, *, jobs: int, say: Callable[[str], None]) -> Summary:
    """Does the runs that are not done and returns what all come to.

    Args:
        layout: the comparison.
        jobs: runs at a time.
        say: takes lines of progress.

    Raises:
        SmoreError: a run failed, or two runs of one seed did not see the same rows.
        Interrupted: the same command goes on.
    """
    out = layout.out
    with writing(out):
        run_all(layout.trials, out, jobs, say)
        tuned = choose_rates(layout.trials, _results(layout.trials))
        factors = {key: one.factor for key, one in tuned.items()}
        runs = plan_runs(layout.comparison, layout.sized, out, factors)
        run_all(runs, out, jobs, say)
    results = _results(runs)
    _require_same_rows(runs, results)
    title = ", ".join(layout.comparison.config.benchmarks) or "held-out loss"
    return summarise(title, layout.sized, runs, results, tuned)


def _results(runs: list[Planned]) -> dict[str, dict[str, Any]]:
    return {run.name: found for run in runs if (found := run.result()) is not None}


def _require_same_rows(runs: list[Planned], results: dict[str, dict[str, object]]) -> None:
    """Checks that the runs of one seed and objective were given the same rows; their order follows from the seed."""
    seen: dict[tuple[str, int], tuple[str, object]] = {}
    for run in runs:
        if run.label is None:
            continue
        first, rows = seen.setdefault((run.objective, run.seed), (run.name, results[run.name]["data_hash"]))
        if rows != results[run.name]["data_hash"]:
            raise SmoreError(
                f"{run.name} was trained on other rows than {first}",
                "data changed in between: compare anew, with --out",
            )


def write(summary: Summary, out: Path) -> list[Path]:
    """Writes the summary as results.json, results.md and results.html; returns the files."""
    texts = {
        "results.json": json.dumps(summary.document(), indent=1, sort_keys=True) + "\n",
        "results.md": markdown(summary),
        "results.html": page(summary),
    }
    with writing(out):
        for name, text in texts.items():
            write_text(out / name, text)
    return [out / name for name in texts]
