"""`smore data`: looking at data as a model will read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def data_commands() -> None:
    """Look at a recipe's data."""


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
) -> None:
    """Show what tokenised data is kept for later runs; SMORE_TOKEN_CACHE names another folder, or 0 for none."""
    from datetime import datetime

    from smore_cli.cli.console import out
    from smore_cli.data.cache import cache_entries, clear_cache, token_cache

    entries = cache_entries()
    for entry in entries:
        names = ", ".join(source.origin for source in entry.report.sources)
        used = datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        rows = f"{entry.report.total.rows:,} rows"
        out.print(f"{entry.bytes / 2**20:8.1f} MiB  {used}  {rows}  {names}", highlight=False, markup=False)
    total = f"{len(entries)} entries, {sum(entry.bytes for entry in entries) / 2**20:.1f} MiB in {token_cache()}"
    if clear:
        clear_cache()
    out.print(f"removed {total}" if clear else total, highlight=False, markup=False, soft_wrap=True)


@app.command()
def show(
    recipe: Annotated[Path, typer.Argument(help="The recipe.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many rows of each source to print.")] = 3,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe.")
    ] = None,
) -> None:
    """Print the first rows of each source as the model reads them, what it learns marked, and the counts.

    What is learned is green on a terminal, and in [[double brackets]] elsewhere.
    """
    from rich.text import Text

    from smore_cli.cli.console import out
    from smore_cli.data.build import build_rows
    from smore_cli.data.preview import preview_row
    from smore_cli.models.load import load_tokenizer
    from smore_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    tokenizer = load_tokenizer(loaded.model)
    colour = out.is_terminal and not out.no_color
    for source in (*loaded.data.train, *loaded.data.eval):
        built = build_rows(loaded.data, tokenizer, [source])
        report = built.report.sources[0]
        for number, row in enumerate(built.rows[:rows], 1):
            out.print(Text(f"-- {report.origin}, {number} of {len(built.rows):,} ({row.length} tokens)", "bold"))
            # Neither wrapped nor interpreted: what is shown is what the model reads, to the character.
            out.print(preview_row(row, tokenizer, colour=colour), soft_wrap=True)
        for line in built.report.lines():
            out.print(Text(line), soft_wrap=True)
