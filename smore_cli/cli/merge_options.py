"""Options that merging and exporting share, from the command line to the objects they stand for."""

from __future__ import annotations

from pathlib import Path  # Typer reads the annotations when the program runs
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from smore_cli.errors import UsageError

if TYPE_CHECKING:
    from smore_cli.merging.calibration import Calibration
    from smore_cli.merging.reference import Benchmark

__all__ = [
    "CalibrationFile",
    "CalibrationFormat",
    "CalibrationTokens",
    "DistillSteps",
    "benchmark_of",
    "calibration_of",
]

CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration", metavar="FILE", help="Fit a routed adapter to this text; default: the run's training mixture."
    ),
]
CalibrationFormat = Annotated[
    str | None, typer.Option("--format", metavar="F", help="How to read --calibration; default: as the run's own data.")
]
CalibrationTokens = Annotated[
    int | None, typer.Option("--calibration-tokens", metavar="N", min=1, help="Tokens to fit to; default 16384.")
]
DistillSteps = Annotated[
    int | None,
    typer.Option(
        "--distill", metavar="STEPS", min=1, help="Then teach the result what the routed model says, so many steps."
    ),
]


def calibration_of(
    path: Path | None,
    format_name: str | None,
    tokens: int | None,
    ridge: float | None,
    prior: Literal["none", "mean"] | None,
    distill: int | None,
) -> Calibration | None:
    """Returns how a routed adapter is fitted; None where nothing was said of it.

    Raises:
        UsageError: a format is given for no file.
    """
    from smore_cli.merging.calibration import Calibration

    if format_name is not None and path is None:
        raise UsageError("--format is about --calibration, which is not given", "name a file with --calibration")
    given: dict[str, Any] = {"path": path, "format": format_name, "tokens": tokens, "ridge": ridge, "prior": prior}
    given["distill"] = distill
    given = {key: value for key, value in given.items() if value is not None}
    return Calibration(**given) if given else None


def benchmark_of(names: list[str] | None, data_dir: Path | None, limit: int | None) -> Benchmark:
    """Returns what to score on.

    Raises:
        UsageError: questions are named for no benchmark, or there is no such benchmark.
        DataError: its questions are not there.
    """
    from smore_cli.evaluation.benchmarks import read_tasks
    from smore_cli.merging.reference import Benchmark

    if not names and (data_dir is not None or limit is not None):
        option = "--data-dir" if data_dir is not None else "--limit"
        raise UsageError(f"{option} is about --benchmark, which is not given", "name one, or leave it out")
    for name in names or ():
        read_tasks(name, data_dir)  # before the model is loaded, so that a mistake shows at once
    return Benchmark(tuple(names or ()), data_dir, limit)
