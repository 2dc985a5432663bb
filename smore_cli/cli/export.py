"""`smore export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from smore_cli.cli.merge_options import (
    CalibrationFile,
    CalibrationFormat,
    CalibrationTokens,
    DistillSteps,
    calibration_of,
)

__all__ = ["export_command"]


def export_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, one of its checkpoints, or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="peft: a LoRA; hf: the merged model; hf-code: the routed model with its code; hf-moe: a stock mixture "
            "of experts (MixLoRA); gguf: for llama.cpp.",
        ),
    ],
    rank: Annotated[
        int | None, typer.Option("--rank", metavar="R", min=1, help="peft: rank of the LoRA; default: 16.")
    ] = None,
    type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="gguf: f32, f16, bf16 or q8_0; default: f16.")
    ] = None,
    calibration: CalibrationFile = None,
    format_name: CalibrationFormat = None,
    calibration_tokens: CalibrationTokens = None,
    distill: DistillSteps = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Ask ours and the program it is for the same prompts, before it is kept.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="NATS",
            min=0,
            help="Mean difference of log-probabilities above which nothing is kept (exit 3); default: by format.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Export a run to what another program opens: exactly where the format can, with the loss measured elsewhere."""
    from smore_cli.cli.console import err
    from smore_cli.cli.console import out as console
    from smore_cli.exporting.export import export
    from smore_cli.exporting.formats import Options

    options = Options(
        rank=rank,
        type=type,
        verify=verify,
        calibration=calibration_of(calibration, format_name, calibration_tokens, None, None, distill),
        say=lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    exported = export(run, out, to, options=options, tolerance=tolerance)
    if as_json:
        print(json.dumps(exported.document(), indent=1, sort_keys=True, default=str))
        return
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 1e6
    for line in (
        f"exported    {exported.run} as {exported.written.what}",
        f"written     {out} ({size:,.0f} MB)",
        *(f"verified    {line}" for line in exported.shown),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
