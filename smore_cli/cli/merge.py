"""`smore merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["merge_command"]


def merge_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, one of its checkpoints, or an adapter.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The model folder to write; must not exist.")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="KL",
            min=0,
            help="Mean KL in nats above which nothing is kept (exit 3); default: by weight type.",
        ),
    ] = None,
    full_precision: Annotated[
        bool,
        typer.Option("--full-precision", help="Merge a run of 4 or 8 bits into unquantised weights; says the change."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Merge a LoRA adapter into its backbone: an ordinary model folder, reopened and compared before it is kept."""
    from smore_cli.cli.console import out as console
    from smore_cli.merging.merge import merge

    merged = merge(run, out, tolerance=tolerance, full_precision=full_precision)
    if as_json:
        print(json.dumps(merged.document(), indent=1, sort_keys=True))
        return
    apart = merged.difference
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    for line in (
        f"merged      {merged.run} into {merged.linears} linear maps of its backbone",
        f"written     {out} ({size:,.0f} MB, {merged.dtype}), reopened with plain transformers",
        f"difference  largest logit {apart.max_abs_logit:.1e}, mean KL {apart.mean_kl:.1e} nats, "
        f"same first choice {100 * apart.top1_agreement:.2f} %",
        f"            on {apart.tokens:,} tokens of {merged.text}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if merged.precision is not None:
        console.print(merged.precision.line(), markup=False, highlight=False, soft_wrap=True)
