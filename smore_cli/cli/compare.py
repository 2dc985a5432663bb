"""`smore compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["compare_command"]


def compare_command(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A recipe with a section `compare`, or a plain one.")],
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            help="Where SPEC is a plain recipe: compare its adapter with these, as in mola,smore,trex.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", metavar="N", min=1, help="Runs of each method; default: 3, or as SPEC says."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of it; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write here; default: the output_dir of SPEC.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", min=1, help="Runs at a time, which share the processor's cores.")
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Match the sizes, print them and the runs, and train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare methods fairly: equal parameters, the same data in the same order, several seeds, intervals."""
    from smore_cli.cli.console import err
    from smore_cli.cli.console import out as console
    from smore_cli.comparing.spec import read_comparison

    overrides = [*(overrides or []), *([] if seeds is None else [f"compare.seeds={seeds}"])]
    names = [name.strip() for name in (methods or "").split(",") if name.strip()]
    comparison = read_comparison(spec, overrides, names)

    from smore_cli.comparing.compare import compare, lay_out, write
    from smore_cli.comparing.report import tables

    def say(line: str) -> None:
        err.print(line, markup=False, highlight=False, soft_wrap=True)

    folder = out or Path(comparison.baseline.recipe.output_dir)
    planned = lay_out(comparison, folder)
    if dry_run:
        for line in planned.lines():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    summary = compare(planned, jobs=jobs, say=say)
    if as_json:
        print(json.dumps(summary.document(), indent=1, sort_keys=True))
    else:
        for table in tables(summary):
            console.print(table)
    for path in write(summary, folder):
        say(f"written to {path}")
