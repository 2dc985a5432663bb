"""`smore recipe`: look at recipes, check them, start from a ready one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List, show, copy and check recipes.")

_Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)]

_Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value of the recipe; repeatable.")
]


@app.command("list")
def list_recipes() -> None:
    """List the ready recipes: name, method, model and what it is for."""
    from smore_cli.comparing.spec import is_comparison, read_comparison
    from smore_cli.recipe import load_recipe
    from smore_cli.recipe.ready import ready_recipes

    rows = []
    for ready in ready_recipes():
        several = is_comparison(ready.path)
        recipe = read_comparison(ready.path).baseline.recipe if several else load_recipe(ready.path)
        method = "compare" if several else recipe.adapter.method
        rows.append((ready.name, method, recipe.model.name_or_path, ready.summary))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command()
def show(recipe: _Recipe, overrides: _Overrides = None) -> None:
    """Print a recipe with every default spelled out."""
    from smore_cli.recipe import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name that `smore recipe list` shows.", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="A new file, or a folder to put it in.", show_default=False)
    ],
) -> None:
    """Copy a ready recipe, to change it."""
    from smore_cli.errors import UsageError
    from smore_cli.recipe.ready import find_ready_recipe

    ready = find_ready_recipe(name)
    target = destination / ready.path.name if destination.is_dir() else destination
    if target.exists():
        raise UsageError(f"{target} exists already", "name another file; nothing is overwritten")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", "make it first")
    target.write_bytes(ready.path.read_bytes())
    typer.echo(str(target))


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="YAML files.", show_default=False)],
    overrides: _Overrides = None,
) -> None:
    """Check recipes and comparisons; every problem is shown with its line and column."""
    from smore_cli.comparing.spec import is_comparison, read_comparison
    from smore_cli.errors import RecipeError
    from smore_cli.recipe import load_recipe

    problems, hints = [], []
    for path in recipes:
        try:
            read = read_comparison if is_comparison(path) else load_recipe
            read(path, overrides or [])
        except RecipeError as error:
            problems += error.problems
            hints.append(error.hint)
        else:
            typer.echo(f"{path}: ok")
    if problems:
        raise RecipeError(problems, next(filter(None, hints), ""))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from smore_cli.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
