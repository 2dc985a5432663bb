"""`smore train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["train_command"]


def train_command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint of the run.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="DIR", help="Go on from this checkpoint of the run.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option("--output-dir", metavar="DIR", help="Write the run here.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load everything, run one forward and backward pass, write nothing.")
    ] = False,
) -> None:
    """Train an adapter as a recipe says."""
    from smore_cli.recipe import load_recipe

    extra = [] if output_dir is None else [f"output_dir={output_dir}"]
    loaded = load_recipe(recipe, [*(overrides or []), *extra])
    from smore_cli.cli.console import out

    if dry_run:
        from smore_cli.training.dry_run import dry_run as check

        for line in check(loaded):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    from smore_cli.training.loop import train

    run = train(loaded, recipe.read_text(), resume=resume, checkpoint=checkpoint)
    result, seconds = run["result"], run["seconds"]
    out.print(f"saved     {loaded.output_dir}", highlight=False, markup=False, soft_wrap=True)
    held_out = f", held-out loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""
    out.print(f"result    training loss {result['loss']:.4f}{held_out}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"time      data {seconds['data']:.1f} s, model {seconds['model']:.1f} s, steps {result['seconds']:.1f} s; "
        f"peak memory {run['peak_memory_bytes']['resident'] / 2**30:.2f} GiB",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
