"""`smore merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from smore_cli.cli.merge_options import (
    CalibrationFile,
    CalibrationFormat,
    CalibrationTokens,
    DistillSteps,
    benchmark_of,
    calibration_of,
)

__all__ = ["merge_command"]


def merge_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, one of its checkpoints, or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write; must not exist.")],
    method: Annotated[
        Literal["exact", "least-squares", "mean", "uniform"] | None,
        typer.Option("--method", help="Default: exact for what is the same for every token, else least-squares."),
    ] = None,
    calibration: CalibrationFile = None,
    format_name: CalibrationFormat = None,
    calibration_tokens: CalibrationTokens = None,
    ridge: Annotated[
        float | None,
        typer.Option("--ridge", metavar="X", min=0, help="Pull towards the prior, relative to the inputs' square."),
    ] = None,
    prior: Annotated[
        Literal["none", "mean"] | None,
        typer.Option("--prior", help="What inputs that never occur get: nothing (default), or the mean expert."),
    ] = None,
    distill: DistillSteps = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="KL",
            min=0,
            help="Mean KL in nats from the adapter above which nothing is kept (exit 3).",
        ),
    ] = None,
    base_weights: Annotated[
        Literal["trained", "original"],
        typer.Option("--base-weights", help="After 4- or 8-bit training: the dequantised weights, or the original."),
    ] = "trained",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Type of the written weights; default: the run's."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Largest file of weights, as in 2GB.")
    ] = "2GB",
    benchmark: Annotated[
        list[str] | None,
        typer.Option("--benchmark", metavar="NAME", help="Score backbone, adapter and merge on this; may be repeated."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", metavar="DIR", help="Read the benchmark's questions from files here.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N questions of each benchmark.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Merge an adapter into its backbone: an ordinary model folder, reopened and judged before it is kept."""
    from smore_cli.cli.console import err
    from smore_cli.cli.console import out as console

    options = calibration_of(calibration, format_name, calibration_tokens, ridge, prior, distill)
    questions = benchmark_of(benchmark, data_dir, limit)

    from smore_cli.merging.merge import merge

    merged = merge(
        run,
        out,
        method=method,
        calibration=options,
        tolerance=tolerance,
        base_weights=base_weights,
        dtype=dtype,
        shard_size=shard_size,
        benchmark=questions,
        say=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    if as_json:
        print(json.dumps(merged.document(), indent=1, sort_keys=True))
        return
    for line in merged.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
