"""What a running training shows: a live bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["BarReporter", "LineReporter", "Reporter", "SilentReporter", "is_evaluation", "load_bar", "make_reporter"]

BLOCKS = "▁▂▃▄▅▆▇█"
MOST_BARS = 16
"""Of a level, so that a grid of hundreds of experts does not fill the screen."""


class Reporter(Protocol):
    """Receives what happens in a run."""

    def start(self, total_steps: int, done: int) -> None:
        """The first step is about to run."""

    def step(self, step: int) -> None:
        """A step is done."""

    def metrics(self, values: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def say(self, line: str) -> None:
        """Something the user should know."""

    def stop(self) -> None:
        """No step will follow."""


def make_reporter(*, main: bool = True) -> Reporter:
    """Returns the live bar where stderr is a terminal, else plain lines; silence beside a main process that speaks."""
    if not main:
        return SilentReporter()
    return BarReporter() if sys.stderr.isatty() else LineReporter()


def load_bar(routing: dict[str, dict[str, Any]]) -> str:
    """Draws each tree level's load, root and busiest expert first: `▇▅▃▂ ▆▅▄▃`, where full height is everything.

    Of more than 16 experts the rest is a number: `▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁+584`.
    """
    bars = []
    for level in sorted(routing, key=int, reverse=True):
        load = routing[level]["load"]
        bar = "".join(BLOCKS[min(len(BLOCKS) - 1, int(share * len(BLOCKS)))] for share in load[:MOST_BARS])
        bars.append(bar if len(load) <= MOST_BARS else f"{bar}+{len(load) - MOST_BARS}")
    return " ".join(bars)


def is_evaluation(values: dict[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is one of evaluation and not of training."""
    return "eval_loss" in values or "benchmarks" in values


def describe(values: dict[str, Any]) -> str:
    """Returns a metrics line for people."""
    if is_evaluation(values):
        parts = [f"eval at step {values['step']}"]
        if "eval_loss" in values:
            accuracy = f"  accuracy {values['eval_accuracy']:.3f}" if "eval_accuracy" in values else ""
            parts.append(f"loss {values['eval_loss']:.4f}{accuracy}  ({values['eval_rows']} rows)")
        parts += [
            f"{task} " + ", ".join(f"{metric} {value:.3f}" for metric, value in scores.items())
            for task, scores in values.get("benchmarks", {}).items()
        ]
        return "  ".join(parts)
    parts = [f"loss {values['loss']:.4f}"]
    if values.get("aux_loss"):
        parts.append(f"aux {values['aux_loss']:.3f}")
    parts += [f"lr {values['learning_rate']:.2e}", f"{values['tokens_per_second']:.0f} tok/s"]
    if values.get("routing"):
        parts.append(f"load {load_bar(values['routing'])}")
    return "  ".join(parts)


class LineReporter:
    """One plain line for each metrics line."""

    def __init__(self) -> None:
        self.total = 0

    def start(self, total_steps: int, done: int) -> None:
        """Remembers the length of the run."""
        self.total = total_steps

    def step(self, step: int) -> None:
        """Nothing: a line a step would be noise."""

    def metrics(self, values: dict[str, Any]) -> None:
        """Prints the line."""
        place = "" if is_evaluation(values) else f"step {values['step']}/{self.total}  "
        self.say(place + describe(values))

    def say(self, line: str) -> None:
        """Prints the line."""
        print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing is left open."""


class SilentReporter(LineReporter):
    """Nothing at all."""

    def say(self, line: str) -> None:
        """Keeps it to itself."""


class BarReporter:
    """A bar with the latest numbers and the time left; lines from `say` scroll above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self.task: TaskID | None = None

    def start(self, total_steps: int, done: int) -> None:
        """Opens the bar."""
        self.progress.start()
        self.task = self.progress.add_task("", total=total_steps, completed=done)

    def step(self, step: int) -> None:
        """Moves the bar."""
        if self.task is not None:
            self.progress.update(self.task, completed=step)

    def metrics(self, values: dict[str, Any]) -> None:
        """Shows the numbers behind the bar; evaluations stay on the screen as lines."""
        if is_evaluation(values):
            self.say(describe(values))
        elif self.task is not None:
            self.progress.update(self.task, description=describe(values))

    def say(self, line: str) -> None:
        """Prints the line above the bar."""
        self.progress.console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        """Closes the bar."""
        self.progress.stop()
